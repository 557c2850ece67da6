"""Text from a checkpoint on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig

from quantkit.checkpoint import FileSource
from quantkit.loading import load
from quantkit.tokenizer import load_tokenizer


def generate_text(
    path: Path,
    prompt: str,
    max_new_tokens: int,
    *,
    backend: str = "auto",
    fuse: bool = False,
    device: str = "auto",
    compiled: bool = False,
) -> str:
    """The prompt and its greedy continuation; `device` "auto" is a GPU if torch sees one.

    `compiled` as in `decoding_options`.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(path, backend=backend, fuse=fuse, device=device)
    tokenizer = load_tokenizer(FileSource(path))
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.no_grad():
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **decoding_options(compiled=compiled),
        )
    text: str = tokenizer.decode(ids[0], skip_special_tokens=True)
    return text


def decoding_options(*, compiled: bool) -> dict[str, Any]:
    """What transformers' `generate` takes for a cache of fixed size and a compiled step.

    The first token then waits for the compiler, seconds to minutes; every other one comes sooner.
    """
    if not compiled:
        return {}
    config = CompileConfig(mode="default")
    # transformers compiles on GPUs only, unless it is told so.
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}
