"""How models go on from the same beginnings, greedily."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit_eval.figures.live import on_device_of
from quantkit_eval.setting import EvaluationRequest, Setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROMPT_TOKENS, _NEW_TOKENS = 32, 40


def draw_prompts(request: EvaluationRequest, setting: Setting) -> list[Mapping[str, Tensor]]:
    """Model inputs of the beginnings of evenly spaced windows, or of conversations' first turns."""
    rows = setting.sequences
    count = min(request.prompts, len(rows))
    places = [k * len(rows) // count for k in range(count)]
    if setting.talks is not None:
        return [setting.talks.prompt(place) for place in places]
    lengths = [min(_PROMPT_TOKENS, len(rows[place].ids) // 2) for place in places]
    return [
        {"input_ids": torch.tensor([rows[place].ids[:length]])}
        for place, length in zip(places, lengths, strict=True)
    ]


def continue_prompts(
    model: PreTrainedModel, prompts: Sequence[Mapping[str, Tensor]], tokenizer: Any
) -> list[str]:
    """What the model makes of each prompt, the prompt left out."""
    found = []
    for prompt in prompts:
        inputs = on_device_of(model, prompt)
        with torch.inference_mode():
            out = model.generate(
                **inputs,
                attention_mask=torch.ones_like(inputs["input_ids"]),
                max_new_tokens=_NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            )
        length = inputs["input_ids"].shape[1]
        found.append(tokenizer.decode(out[0, length:], skip_special_tokens=True))
    return found
