"""What a model gives a text: the next token, a vector, or (a pair of texts) a score."""

from __future__ import annotations

from typing import Literal

from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedModel

from quantkit.checkpoint.sidefiles import MODULES
from quantkit.checkpoint.source import Source
from quantkit.model import skeleton, stacks
from quantkit.model.decoded import open_decoded
from quantkit_eval.errors import EvaluationError

Kind = Literal["tokens", "vectors", "scores"]
# Of a classifier of pairs the score is its one label, or how much likelier the second of two is.
_LABELS = (1, 2)


def kind_of(source: Source, *, trust_remote_code: bool = False) -> Kind:
    """What a checkpoint is for; reads no weights.

    A model without a head gives vectors, as does one with sentence-transformers' modules beside it,
    whatever its class; a sequence classifier gives scores.  Raises EvaluationError for one of more
    than two labels, ModelError for a model that cannot be built.
    """
    view = open_decoded(source, trust_remote_code=trust_remote_code)
    model = skeleton.build(view, trust_remote_code=trust_remote_code, dtype=None)
    if _classifies(model):
        labels = model.config.num_labels
        if labels not in _LABELS:
            raise EvaluationError(
                f"{type(model).__name__} tells {labels} labels apart; models of one or two, which "
                "rank texts, can be measured"
            )
        return "scores"
    return (
        "vectors" if stacks.head_of(model) is None or MODULES in source.side_files() else "tokens"
    )


def is_causal(model: PreTrainedModel) -> bool:
    """Whether tokens see those before them only, as far as its class tells."""
    config = model.config.get_text_config()
    found = getattr(config, "is_causal", None)
    if getattr(config, "use_bidirectional_attention", False) or found is False:
        return False
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def _classifies(model: PreTrainedModel) -> bool:
    kind = type(model.config)
    if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return False
    return type(model) is MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[kind]
