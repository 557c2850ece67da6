"""Text from a checkpoint on disk."""

from __future__ import annotations

from pathlib import Path

import torch

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
) -> str:
    """The prompt and its greedy continuation; `device` "auto" is a GPU if torch sees one."""
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
        )
    text: str = tokenizer.decode(ids[0], skip_special_tokens=True)
    return text
