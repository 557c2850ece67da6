"""Whether a model can continue a text, and one so long."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from quantkit.errors import ModelError


def check_continues(model: PreTrainedModel) -> None:
    """Nothing if the model writes tokens after others; ModelError for an encoder."""
    if not model.can_generate():
        raise ModelError(
            f"{type(model).__name__}: this model reads texts and continues none; give a causal "
            "language model"
        )


def check_room(model: PreTrainedModel, prompt_tokens: int, new_tokens: int, advice: str) -> None:
    """ModelError, which ends in `advice`, if the model has not so many positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and prompt_tokens + new_tokens > positions:
        raise ModelError(
            f"{prompt_tokens} + {new_tokens} tokens do not fit the model's {positions} positions; "
            f"{advice}"
        )


def check_known(model: PreTrainedModel, ids: Tensor) -> None:
    """ModelError if the table of embeddings has no row for a token of int64 `ids`."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = int(ids.max())
    if largest >= rows:
        raise ModelError(
            f"the tokenizer gives token {largest}, and the model has {rows} embeddings: it is "
            "another model's tokenizer; put the right files beside config.json"
        )
