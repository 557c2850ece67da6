"""Text from a checkpoint on disk."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig

from quantkit.checkpoint.processor import Talk, load_processor, open_image, processed
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.errors import ModelError
from quantkit.formats.open import open_source
from quantkit.inference.device import choose_device
from quantkit.inference.load import load
from quantkit.inference.packed_cache import check_packed, packed_cache
from quantkit.inference.room import check_continues, check_known, check_room

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
    images: Sequence[Path] = (),
    trust_remote_code: bool = False,
) -> str:
    """The prompt and its greedy continuation; `device` "auto" is a GPU if torch sees one.

    With `images` the prompt is what a user says about them, through the model's own processor and
    chat template, and the answer comes alone.  `dtype` names what the model computes in, None is
    the config's; `compiled` as in `decoding_options`; `kv` packs keys and values, see
    `packed_cache`.  Raises ModelError for another dtype than float32, bfloat16 and float16, for
    what cannot be packed, for images that the model does not read, for a model that continues no
    text, and for more tokens than it has positions.
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
    talk = _talk(images, prompt) if images else None
    device = choose_device(device)
    wanted = None if dtype is None else _DTYPES[dtype]
    model = load(
        path,
        dtype=wanted,
        backend=backend,
        fuse=fuse,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    check_continues(model)
    tokenizer = load_tokenizer(open_source(path), trust_remote_code=trust_remote_code)
    if talk is None:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        # Some tokenizers give no mask; a single text is seen whole.
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        inputs = _pictured(model, load_processor(open_source(path)), talk)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    length = inputs["input_ids"].shape[-1]
    if not length:
        raise ModelError("the prompt holds no tokens; write what the model shall continue")
    check_known(model, inputs["input_ids"])
    check_room(
        model, length, max_new_tokens, "give a shorter --prompt or a smaller --max-new-tokens"
    )
    cache = {} if kv is None else {"past_key_values": packed_cache(model.config, kv)}
    with torch.no_grad():
        ids = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **decoding_options(compiled=compiled),
            **cache,
        )
    told = ids[0] if talk is None else ids[0][length:]
    text: str = tokenizer.decode(told, skip_special_tokens=True)
    return text


def _talk(images: Sequence[Path], prompt: str) -> Talk:
    """What a user says about images.  Raises CalibrationError for one that cannot be read."""
    parts = [{"type": "image", "image": open_image(Path(image), "--image")} for image in images]
    return Talk(messages=[{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}])


def _pictured(model: Any, processor: Any, talk: Talk) -> dict[str, torch.Tensor]:
    """The model's inputs for a conversation with images.

    Raises ModelError for a class that reads none.
    """
    takes = inspect.signature(model.forward).parameters
    if "pixel_values" not in takes:
        raise ModelError(f"--image: {type(model).__name__} reads no images; leave it out")
    found = processed(processor, talk, tuple(takes), "--image", reply=True)
    found = {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in found.items()
    }
    return {**found, "attention_mask": torch.ones_like(found["input_ids"])}


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
