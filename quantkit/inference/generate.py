"""Text from a checkpoint on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig

from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.errors import ModelError
from quantkit.formats.open import open_source
from quantkit.inference.device import choose_device
from quantkit.inference.load import load
from quantkit.inference.packed_cache import check_packed, packed_cache

_MOST_TOKENS = 2**24
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def generate_text(
    path: Path,
    prompt: str,
    max_new_tokens: int,
    *,
    backend: str = "auto",
    fuse: bool = False,
    device: str = "auto",
    dtype: str | None = None,
    compiled: bool = False,
    kv: str | None = None,
) -> str:
    """The prompt and its greedy continuation; `device` "auto" is a GPU if torch sees one.

    `dtype` names what the model computes in, None is the config's; `compiled` as in
    `decoding_options`; `kv` packs keys and values, see `packed_cache`.  Raises ModelError for
    another dtype than float32, bfloat16 and float16, and for what cannot be packed.
    """
    if kv is not None:
        check_packed(kv)
        if compiled:
            raise ModelError("--compile wants a cache of fixed size, --kv one that grows; give one")
    if dtype not in (None, *_DTYPES):
        raise ModelError(f"dtype {dtype!r} is unknown; allowed: {', '.join(_DTYPES)}")
    if not 1 <= max_new_tokens <= _MOST_TOKENS:
        raise ModelError(f"{str(max_new_tokens)[:30]} new tokens: ask for 1 to {_MOST_TOKENS}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ModelError(f"the prompt {ascii(prompt)[:60]} is no valid text: {error}") from error
    device = choose_device(device)
    wanted = None if dtype is None else _DTYPES[dtype]
    model = load(path, dtype=wanted, backend=backend, fuse=fuse, device=device)
    tokenizer = load_tokenizer(open_source(path))
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not inputs["input_ids"].numel():
        raise ModelError("the prompt holds no tokens; write what the model shall continue")
    cache = {} if kv is None else {"past_key_values": packed_cache(model.config, kv)}
    with torch.no_grad():
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **decoding_options(compiled=compiled),
            **cache,
        )
    text: str = tokenizer.decode(ids[0], skip_special_tokens=True)
    return text


def decoding_options(*, compiled: bool) -> dict[str, Any]:
    """What transformers' `generate` takes for a cache of fixed size and a compiled step.

    The first token then waits for the compiler, seconds to minutes; every other one comes sooner.
    The model's modules must stay as they are from then on.
    """
    if not compiled:
        return {}
    options = {
        # As the mode "reduce-overhead", with which options cannot be given.
        "triton.cudagraphs": True,
        # Checking that no module has changed took a sixth of a token's time.
        "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
    }
    config = CompileConfig(mode=None, options=options)
    # transformers compiles on GPUs only, unless it is told so.
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}
