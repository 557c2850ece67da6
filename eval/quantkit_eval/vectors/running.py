"""Texts through one whole model: vectors, or scores of pairs.

Texts of one length run together, so nothing is padded and no vector depends on what ran beside it
but for rounding.  N texts, T tokens, H hidden size, E size of a vector, C candidates.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantkit.model import skeleton
from quantkit_eval.errors import EvaluationError
from quantkit_eval.vectors.pooling import Pooling
from quantkit_eval.vectors.texts import Query

_BATCH_TOKENS = 4096
Encoded = Mapping[str, list[int]]


def longest(model: PreTrainedModel, tokenizer: Any, told: int | None = None) -> int:
    """Tokens that are read of a text: the least of what model, tokenizer and settings say."""
    limits = (skeleton.positions(model), tokenizer.model_max_length, told)
    return min(int(limit) for limit in limits if limit is not None)


def vectors(
    model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], pooling: Pooling
) -> Tensor:
    """Vectors [N, E] of length 1, float32, on the CPU."""
    most = longest(model, tokenizer, pooling.max_tokens)
    encoded = []
    for text in texts:
        whole = f"{pooling.prompt}{text}"
        whole = whole.lower() if pooling.lower else whole
        encoded.append(_ids(tokenizer(whole, truncation=True, max_length=most)))
    body = model.base_model
    rows: dict[int, Tensor] = {}
    for members, given in _batches(body, encoded):
        hidden = body(**given).last_hidden_state
        rows |= dict(zip(members, pooling(hidden.float().cpu()), strict=True))
    return _finite(torch.stack([rows[number] for number in range(len(texts))]), model)


def scores(model: PreTrainedModel, tokenizer: Any, queries: Sequence[Query]) -> Tensor:
    """Scores [N, C], float32, on the CPU: the logit, of two labels how much the second has more."""
    most = longest(model, tokenizer)
    pairs = [(query.text, other) for query in queries for other in query.candidates]
    encoded = [
        _ids(tokenizer(text, other, truncation=True, max_length=most)) for text, other in pairs
    ]
    rows: dict[int, Tensor] = {}
    # Classifiers on decoders look for the last token that is no padding.
    one = getattr(model.config.get_text_config(), "pad_token_id", None) is None
    for members, given in _batches(model, encoded, one=one):
        logits = model(**given).logits.float().cpu()
        found = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
        rows |= dict(zip(members, found, strict=True))
    flat = torch.stack([rows[number] for number in range(len(pairs))])
    return _finite(flat.reshape(len(queries), -1), model)


def _ids(encoding: Mapping[str, Any]) -> Encoded:
    return {name: list(value) for name, value in encoding.items() if name != "attention_mask"}


def _batches(
    model: PreTrainedModel, encoded: Sequence[Encoded], *, one: bool = False
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Numbers of texts of one length, and what the model takes of them; `one` by one if need be."""
    takes = inspect.signature(model.forward).parameters
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(encoded):
        by_length[len(row["input_ids"])].append(number)
    for length, numbers in sorted(by_length.items()):
        if not length:
            raise EvaluationError("the tokenizer makes no token of a text; give other text")
        step = 1 if one else max(1, _BATCH_TOKENS // length)
        for start in range(0, len(numbers), step):
            members = numbers[start : start + step]
            given = {
                name: torch.tensor([encoded[m][name] for m in members], device=model.device)
                for name in encoded[members[0]]
                if name in takes
            }
            mask = torch.ones_like(given["input_ids"])
            yield members, {**given, "attention_mask": mask}


def _finite(found: Tensor, model: PreTrainedModel) -> Tensor:
    if not bool(found.isfinite().all()):
        raise EvaluationError(
            f"{model.name_or_path}: a text gets a vector or score that is NaN or infinite"
        )
    return found
