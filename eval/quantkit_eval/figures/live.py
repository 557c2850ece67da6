"""Live Hugging Face models measured on the same windows: both in memory, logits of one batch.

For a model that a program has at hand, and for what runs through kernels instead of decoded
weights.  Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit_eval.errors import EvaluationError
from quantkit_eval.figures.divergence import Divergence, divergence_of
from quantkit_eval.figures.perplexity import Perplexity, perplexity_of, window_sequences
from quantkit_eval.figures.scoring import Block, PairScores, Scores, accumulate, places
from quantkit_eval.sequences import Workload, make_workload
from quantkit_eval.tasks.accuracy import (
    Example,
    Item,
    TaskComparison,
    answers,
    compare_answers,
    example_items,
)
from quantkit_eval.windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Float32 logits are softmaxed this many elements at a time.
_CHUNK_ELEMENTS = 1 << 24


def measure_divergence(
    original: PreTrainedModel, quantized: PreTrainedModel, windows: Windows
) -> Divergence:
    """Divergence over all scored tokens of the windows; softmaxes are float32.

    Raises EvaluationError for models with other vocabularies, or logits that are not finite.
    """
    workload = make_workload(window_sequences(windows))
    base, (pair,) = score_live([original, quantized], workload, ["original", "quantized"])
    return divergence_of(base, pair, workload, range(len(workload.sequences)))


def measure_perplexity(model: PreTrainedModel, windows: Windows) -> Perplexity:
    """A causal model's perplexity by the windows' protocol."""
    workload = make_workload(window_sequences(windows))
    base, _ = score_live([model], workload, ["the model"])
    return perplexity_of(base, workload, range(len(workload.sequences)))


def score_live(
    models: Sequence[PreTrainedModel],
    workload: Workload,
    names: Sequence[str],
    *,
    done: Callable[[], object] = lambda: None,
) -> tuple[Scores, list[PairScores]]:
    """Scores of the first model and of every other one, which all stay in eval mode meanwhile."""
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(_evaluating(model))
        return accumulate(names, workload, _blocks(models, workload, names, done))


def _blocks(
    models: Sequence[PreTrainedModel],
    workload: Workload,
    names: Sequence[str],
    done: Callable[[], object],
) -> Iterator[Block]:
    for number, batch in enumerate(workload.batches):
        logits = [batch_logits(model, batch.ids, workload.inputs(batch)) for model in models]
        for name, other in zip(names[1:], logits[1:], strict=True):
            if other.shape != logits[0].shape:
                raise EvaluationError(
                    f"{names[0]} has {logits[0].shape[-1]} logits per token and {name} "
                    f"{other.shape[-1]}; they do not belong together"
                )
        device = logits[0].device
        for place in places(workload, number, max(1, _CHUNK_ELEMENTS // logits[0].shape[-1])):
            yield (
                0,
                place,
                [found.flatten(0, 1)[place.states].to(device).float() for found in logits],
            )
        done()


def batch_logits(
    model: PreTrainedModel, ids_BT: Tensor, inputs: Mapping[str, Tensor] | None = None
) -> Tensor:
    """A model's logits [B, T, V] in its own dtype, on its own device, without gradients.

    inputs: what comes with the ids, such as pixels.
    """
    more = on_device_of(model, inputs or {})
    with torch.inference_mode():
        ids = ids_BT.to(next(model.parameters()).device)
        logits: Tensor = model(input_ids=ids, use_cache=False, **more).logits
    return logits


def on_device_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs on the model's device, floating ones in its dtype."""
    device = next(model.parameters()).device
    return {
        name: value.to(device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def measure_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> float:
    """The share of examples that greedy decoding answers exactly, in 0..1."""
    items, workload = _questions(tokenizer, examples)
    base, _ = score_live([model], workload, ["the model"])
    return sum(answers(items, base, workload, 0)) / len(items)


def compare_tasks(
    original: PreTrainedModel,
    quantized: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
) -> tuple[TaskComparison, ...]:
    """One comparison per task, in order of appearance, and "all" if there are several."""
    items, workload = _questions(tokenizer, examples)
    base, (pair,) = score_live([original, quantized], workload, ["original", "quantized"])
    before, after = (answers(items, found, workload, 0) for found in (base, pair.scores))
    return compare_answers([item.task for item in items], before, after)


def _questions(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> tuple[tuple[Item, ...], Workload]:
    items = example_items(tokenizer, examples)
    if not items:
        raise EvaluationError("no task questions; give at least one")
    return items, make_workload([sequence for item in items for sequence in item.sequences])
