"""How fast a checkpoint runs here and what memory it takes: warmed up, medians with quartiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit.checkpoint.memory import format_size, peak_rss
from quantkit.checkpoint.output import refuse_unfinished
from quantkit.formats.open import open_source
from quantkit.inference.load import load
from quantkit.inference.room import check_continues, check_room
from quantkit.model.towers.loaded import without_placeholders
from quantkit_eval.errors import EvaluationError
from quantkit_eval.machine import machine_facts, version_facts
from quantkit_eval.records import Fact
from quantkit_eval.report.tables import markdown
from quantkit_eval.subjects import weight_paths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEMA = "quantkit.speed/2"
_MOST_SEQUENCES, _MOST_REPEATS = 4096, 1000


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The median of the repeats, and the quartiles around it, in seconds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class BatchSpeed:
    """One batch size: seconds to the first token, seconds for each further one, tokens/s in all.

    cache_bytes            of the keys and values of prompt and answer, measured
    cache_bytes_formula    2 · layers · key-value heads · head size · tokens · bytes of a number
    """

    batch: int
    first_token: Spread
    next_token: Spread
    tokens_per_second: float
    cache_bytes: int
    cache_bytes_formula: int


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Everything that was measured.

    peak_bytes   of the device's memory on a GPU, else of this process, loading included
    """

    schema: str
    name: str
    dtype: str
    device: str
    backend: str
    weights_on_disk: int
    load_seconds: float
    peak_bytes: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    batches: tuple[BatchSpeed, ...]
    machine: tuple[Fact, ...]
    versions: tuple[Fact, ...]

    def text(self) -> str:
        """For people."""
        header = ["batch", "first token", "next token", "tokens/s", "KV cache", "by formula"]
        rows = [
            [
                str(b.batch),
                _milliseconds(b.first_token),
                _milliseconds(b.next_token),
                f"{b.tokens_per_second:.1f}",
                format_size(b.cache_bytes),
                format_size(b.cache_bytes_formula),
            ]
            for b in self.batches
        ]
        return "\n".join(
            [
                markdown(header, rows),
                "",
                f"{self.name}: {self.prompt_tokens} tokens in, {self.new_tokens} out, in "
                f"{self.dtype} on {self.device}, backend {self.backend}; medians of "
                f"{self.repeats} with quartiles",
                f"weights on disk {format_size(self.weights_on_disk)}, loaded in "
                f"{self.load_seconds:.1f} s, peak memory {format_size(self.peak_bytes)}",
            ]
        )


def measure_speed(
    path: Path,
    *,
    batches: Sequence[int],
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    device: str,
    backend: str = "auto",
    trust_remote_code: bool = False,
) -> Speed:
    """Greedy decoding of random prompts, timed step by step after one warm-up.

    Raises EvaluationError for sizes that are none, ModelError for a context that the model cannot
    hold, and for one that continues no text.
    """
    refuse_unfinished(path)
    if not batches or min(batches) < 1 or max(batches) > _MOST_SEQUENCES:
        raise EvaluationError(
            f"--batches {str(list(batches))[:60]}: give sizes from 1 to {_MOST_SEQUENCES}"
        )
    if not 1 <= repeats <= _MOST_REPEATS:
        raise EvaluationError(f"--repeats {str(repeats)[:30]}: from 1 to {_MOST_REPEATS}")
    began = time.perf_counter()
    model = load(path, device=device, backend=backend, trust_remote_code=trust_remote_code)
    load_seconds = time.perf_counter() - began
    check_continues(model)
    check_room(model, prompt_tokens, new_tokens, "give a smaller --prompt-tokens or --new-tokens")
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    found = tuple(
        _measure_batch(model, batch, prompt_tokens, new_tokens, repeats) for batch in batches
    )
    on_gpu = device.startswith("cuda")
    return Speed(
        schema=SCHEMA,
        name=path.resolve().name,
        dtype=str(model.dtype).removeprefix("torch."),
        device=device,
        backend=backend,
        weights_on_disk=sum(file.stat().st_size for file in weight_paths(open_source(path))),
        load_seconds=load_seconds,
        peak_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else peak_rss(),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        batches=found,
        machine=machine_facts(device),
        versions=version_facts(),
    )


def cache_formula(config: Any, tokens: int, itemsize: int) -> int:
    """Bytes of one sequence's keys and values if every layer keeps all tokens."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * config.num_hidden_layers * kv_heads * head_dim * tokens * itemsize)


def _measure_batch(
    model: PreTrainedModel, batch: int, prompt_tokens: int, new_tokens: int, repeats: int
) -> BatchSpeed:
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (batch, prompt_tokens), generator=generator)
    ids = without_placeholders(ids, model.config)
    first: list[float] = []
    following: list[float] = []
    cache_bytes = 0
    for repeat in range(repeats + 1):
        start, steps, cache_bytes = _decode(model, ids.to(model.device), new_tokens)
        if repeat > 0:
            first.append(start)
            following += steps
    tokens = batch * (prompt_tokens + new_tokens - 1)
    following_spread = _spread(following)
    return BatchSpeed(
        batch=batch,
        first_token=_spread(first),
        next_token=following_spread,
        tokens_per_second=batch / following_spread.median,
        cache_bytes=cache_bytes,
        cache_bytes_formula=cache_formula(config, tokens, model.dtype.itemsize),
    )


def _decode(
    model: PreTrainedModel, ids: torch.Tensor, new_tokens: int
) -> tuple[float, list[float], int]:
    """Seconds of the first token, of every other one, and bytes of the cache in the end."""
    with torch.inference_mode():
        seconds, out = timed(model, lambda: model(input_ids=ids, use_cache=True))
        steps = []
        for _ in range(new_tokens - 1):
            token = out.logits[:, -1:].argmax(-1)
            past = out.past_key_values

            def step(token: torch.Tensor = token, past: Any = past) -> Any:
                return model(input_ids=token, past_key_values=past, use_cache=True)

            taken, out = timed(model, step)
            steps.append(taken)
    layers = out.past_key_values.layers
    held = [t for layer in layers for t in (layer.keys, layer.values) if t is not None]
    return seconds, steps, sum(tensor.numel() * tensor.element_size() for tensor in held)


def timed(model: PreTrainedModel, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that the work took on the model's device, and what it returned."""
    gpu = model.device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(model.device)
    began = time.perf_counter()
    result = work()
    if gpu:
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - began, result


def _spread(seconds: Sequence[float]) -> Spread:
    if len(seconds) < 2:
        return Spread(median=seconds[0], low=seconds[0], high=seconds[0])
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Spread(median=middle, low=low, high=high)


def _milliseconds(spread: Spread) -> str:
    return f"{1e3 * spread.median:.1f} ms [{1e3 * spread.low:.1f}, {1e3 * spread.high:.1f}]"
