"""How models go on from the same beginnings, greedily."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from quantkit_eval.setting import EvaluationRequest, Setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROMPT_TOKENS, _NEW_TOKENS = 32, 40


def draw_prompts(request: EvaluationRequest, setting: Setting) -> list[list[int]]:
    """Token ids of the beginnings of evenly spaced windows."""
    rows = setting.windows.ids
    count = min(request.prompts, len(rows))
    length = min(_PROMPT_TOKENS, rows.shape[1] // 2)
    places = [k * len(rows) // count for k in range(count)]
    return [rows[place, :length].tolist() for place in places]


def continue_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], tokenizer: Any
) -> list[str]:
    """What the model makes of each prompt, the prompt left out."""
    found = []
    for ids in prompts:
        inputs = torch.tensor([list(ids)], device=model.device)
        with torch.inference_mode():
            out = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=_NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            )
        found.append(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
    return found
