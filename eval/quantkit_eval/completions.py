"""What both models write when they go on from the same beginnings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.budget import current_rss, format_size, release_free_memory
from quantkit.loading import load
from quantkit_eval.records import Completion
from quantkit_eval.setting import EvaluationRequest, Setting

_PROMPT_TOKENS, _NEW_TOKENS = 32, 40
# Copies of the weights in bytes that loading one model takes at its peak, and room to run it.
_LOAD_FACTOR, _RUN_BYTES = 1.3, 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Continued:
    """One model's completions beside the original's, or a note that says why there are none."""

    completions: tuple[Completion, ...]
    note: str | None


def complete(request: EvaluationRequest, setting: Setting) -> list[Continued]:
    """Greedy completions of every quantized model; one model is in memory at a time."""
    nothing = Continued(completions=(), note=None)
    if request.prompts == 0:
        return [nothing] * len(setting.quantized)
    original_bytes = sum(
        setting.original.source.info(name).numel * _dtype(request).itemsize
        for name in setting.original.source.names()
    )
    if request.max_ram is not None:
        needed = current_rss() + int(_LOAD_FACTOR * original_bytes) + _RUN_BYTES
        if needed > request.max_ram:
            note = (
                f"Writing text needs a whole model in memory, about {format_size(needed)}; "
                f"--max-ram is {format_size(request.max_ram)}."
            )
            return [Continued(completions=(), note=note)] * len(setting.quantized)
    prompts = _prompts(request, setting)
    before = _continue(request.model, prompts, request, setting.tokenizer)
    found = []
    for path in request.quantized:
        after = _continue(path, prompts, request, setting.tokenizer)
        completions = tuple(
            Completion(prompt=setting.tokenizer.decode(ids), original=one, quantized=other)
            for ids, one, other in zip(prompts, before, after, strict=True)
        )
        found.append(Continued(completions=completions, note=None))
    return found


def _dtype(request: EvaluationRequest) -> torch.dtype:
    # The dtype of all other numbers; on a CPU bfloat16 may be slow besides.
    return torch.float32


def _prompts(request: EvaluationRequest, setting: Setting) -> list[list[int]]:
    """The beginnings of evenly spaced windows."""
    rows = setting.windows.ids
    count = min(request.prompts, len(rows))
    length = min(_PROMPT_TOKENS, rows.shape[1] // 2)
    places = [k * len(rows) // count for k in range(count)]
    return [rows[place, :length].tolist() for place in places]


def _continue(
    path: str, prompts: list[list[int]], request: EvaluationRequest, tokenizer: Any
) -> list[str]:
    model = load(
        Path(path) if Path(path).is_dir() else path,
        dtype=_dtype(request),
        device=request.device,
        trust_remote_code=request.trust_remote_code,
    )
    found = []
    for ids in prompts:
        inputs = torch.tensor([ids], device=model.device)
        with torch.inference_mode():
            out = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=_NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            )
        found.append(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
    del model
    release_free_memory()
    return found
