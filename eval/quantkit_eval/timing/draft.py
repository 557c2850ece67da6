"""Whether a draft model pays: how many of its tokens the model takes, and what that saves.

The draft proposes some tokens, one pass of the model checks them all and keeps those that it would
have chosen itself, and one more (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192; here
greedy, by transformers' assisted generation).  The text is the model's own either way.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from quantkit.checkpoint.output import refuse_unfinished
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.formats.open import open_source
from quantkit.inference.load import load
from quantkit_eval.errors import EvaluationError
from quantkit_eval.figures.statistics import clustered_mean
from quantkit_eval.machine import machine_facts, version_facts
from quantkit_eval.records import Fact
from quantkit_eval.texts import read_text
from quantkit_eval.timing.speed import timed
from quantkit_eval.windows import text_windows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SCHEMA = "quantkit.draft/1"
_MOST_TOKENS, _MOST_PROMPTS = 64, 4096
Verdict = Literal["pays", "does not pay", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Drafted:
    """What a draft does for a model, one prompt at a time.

    proposed, accepted   tokens of the draft, and those of them that the model kept
    acceptance           accepted / proposed
    tokens_per_pass      tokens that one pass of the model yields; 1 without a draft
    plain, drafted       seconds for a token, medians over prompts
    speed_up             plain / drafted: the geometric mean over prompts, with its 95 % interval
    same_text            prompts whose text is the same with the draft; others differ by a tie
    """

    schema: str
    model: str
    draft: str
    dtype: str
    device: str
    backend: str
    text: str
    prompts: int
    prompt_tokens: int
    new_tokens: int
    draft_tokens: int
    proposed: int
    accepted: int
    acceptance: float
    tokens_per_pass: float
    plain: float
    drafted: float
    speed_up: float
    speed_up_low: float
    speed_up_high: float
    verdict: Verdict
    same_text: int
    machine: tuple[Fact, ...]
    versions: tuple[Fact, ...]

    def said(self) -> str:
        """A few lines."""
        return "\n".join(
            [
                f"{self.draft} drafts {self.draft_tokens} tokens at a time for {self.model}, in "
                f"{self.dtype} on {self.device}, backend {self.backend}",
                f"acceptance  {100 * self.acceptance:.1f} % of {self.proposed} tokens; "
                f"{self.tokens_per_pass:.2f} tokens for a pass of the model",
                f"a token     {1e3 * self.plain:.1f} ms alone, {1e3 * self.drafted:.1f} ms drafted",
                f"speed-up    {self.speed_up:.2f} [{self.speed_up_low:.2f}, "
                f"{self.speed_up_high:.2f}]: it {_SAID[self.verdict]}",
                f"text        the same for {self.same_text} of {self.prompts} prompts of "
                f"{self.prompt_tokens} tokens, {self.new_tokens} out ({self.text})",
            ]
        )


_SAID: dict[Verdict, str] = {
    "pays": "pays",
    "does not pay": "does not pay",
    "undecided": "is undecided; give more --prompts",
}


def measure_draft(
    path: Path,
    draft: Path,
    *,
    text: str,
    prompts: int,
    prompt_tokens: int,
    new_tokens: int,
    draft_tokens: int,
    device: str,
    backend: str = "auto",
    trust_remote_code: bool = False,
) -> Drafted:
    """Greedy decoding of prompts from a text, with and without the draft, taking turns.

    Raises EvaluationError for a draft of another vocabulary, a context that one of the two cannot
    hold, and models that transformers cannot draft for.
    """
    for name, value, most in (("--draft-tokens", draft_tokens, _MOST_TOKENS),
                              ("--prompts", prompts, _MOST_PROMPTS)):  # fmt: skip
        if not 1 <= value <= most:
            raise EvaluationError(f"{name} {str(value)[:30]}: from 1 to {most}")
    if prompts < 2:
        raise EvaluationError("--prompts 1: two at least show how much prompts differ")
    refuse_unfinished(path)
    refuse_unfinished(draft)
    tokenizer = load_tokenizer(open_source(path))
    if load_tokenizer(open_source(draft)).get_vocab() != tokenizer.get_vocab():
        raise EvaluationError(
            f"--draft {draft.name}: its tokenizer is not that of {path.name}; a draft proposes "
            "tokens by their numbers, so it must be a model of the same family"
        )

    def opened(which: Path) -> PreTrainedModel:
        return load(which, device=device, backend=backend, trust_remote_code=trust_remote_code)

    model, small = opened(path), opened(draft)
    for one in (model, small):
        _check_room(one, prompt_tokens + new_tokens + draft_tokens)
    settings = small.generation_config
    # A fixed number, so that what is counted belongs to it.
    settings.num_assistant_tokens = draft_tokens
    settings.num_assistant_tokens_schedule = "constant"
    settings.assistant_confidence_threshold = 0.0
    used = read_text(text)
    windows = text_windows(
        used.content, tokenizer, seq_len=prompt_tokens, max_windows=prompts, source=used.source
    )
    rows = windows.ids.to(model.device)
    if len(rows) < prompts:
        raise EvaluationError(
            f"--text {text}: it has {len(rows)} prompts of {prompt_tokens} tokens, {prompts} are "
            "asked for; give a longer text or a smaller --prompts"
        )
    runs = _run(model, small, rows, new_tokens)
    speed_up, low, high = _ratio([(run.plain, run.drafted) for run in runs])
    proposed, accepted = (
        sum(getattr(run, key) for run in runs) for key in ("proposed", "accepted")
    )
    return Drafted(
        schema=SCHEMA,
        model=path.resolve().name,
        draft=draft.resolve().name,
        dtype=str(model.dtype).removeprefix("torch."),
        device=device,
        backend=backend,
        text=used.source,
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        draft_tokens=draft_tokens,
        proposed=proposed,
        accepted=accepted,
        acceptance=accepted / proposed,
        tokens_per_pass=sum(run.tokens for run in runs) / sum(run.passes for run in runs),
        plain=statistics.median([run.plain for run in runs]),
        drafted=statistics.median([run.drafted for run in runs]),
        speed_up=speed_up,
        speed_up_low=low,
        speed_up_high=high,
        verdict="pays" if low > 1 else "does not pay" if high <= 1 else "undecided",
        same_text=sum(run.same for run in runs),
        machine=machine_facts(device),
        versions=version_facts(),
    )


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One prompt: seconds for a token, and what was counted with the draft."""

    plain: float
    drafted: float
    tokens: int
    passes: int
    proposed: int
    accepted: int
    same: bool


def _run(model: PreTrainedModel, small: PreTrainedModel, rows: Tensor, new: int) -> list[_Run]:
    """All prompts; the first is run once before it counts."""
    found = []
    for row in (rows[0], *rows):
        alone, plain = _generated(model, row[None], new, None)
        with _counted(model) as passes, _counted(small) as proposals:
            drafted, seconds = _generated(model, row[None], new, small)
        tokens = drafted.shape[1] - len(row)
        # Each pass yields one token of the model's own beside what it keeps of the draft's; the
        # last may be cut where the answer ends.
        kept = min(max(tokens - passes[0], 0), proposals[0])
        found.append(
            _Run(
                plain=plain / (alone.shape[1] - len(row)),
                drafted=seconds / tokens,
                tokens=tokens,
                passes=passes[0],
                proposed=proposals[0],
                accepted=kept,
                same=torch.equal(alone, drafted),
            )
        )
    return found[1:]


def _generated(
    model: PreTrainedModel, ids: Tensor, new: int, draft: PreTrainedModel | None
) -> tuple[Tensor, float]:
    """Token ids [1, T] of prompt and answer (shorter if it ends), and the seconds that took."""
    more: dict[str, Any] = {} if draft is None else {"assistant_model": draft}

    def work() -> Tensor:
        try:
            found: Tensor = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                **more,
            )
        except ValueError as error:
            raise EvaluationError(
                f"transformers cannot draft for {model.config.model_type}: {error}"
            ) from error
        return found

    with torch.no_grad():
        seconds, found = timed(model, work)
    return found, seconds


@contextmanager
def _counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """Calls of the model while active, in a list of one."""
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    handle = model.register_forward_pre_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


def _check_room(model: PreTrainedModel, tokens: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise EvaluationError(
            f"{tokens} tokens (prompt, answer and draft) do not fit the {positions} positions of a "
            f"{model.config.model_type}; give a smaller --prompt-tokens or --new-tokens"
        )


def _ratio(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Geometric mean of plain / drafted over prompts, and its 95 % interval."""
    logs = torch.tensor([math.log(plain / drafted) for plain, drafted in pairs])
    mean, interval = clustered_mean(logs, torch.ones(len(pairs)))
    return math.exp(mean), math.exp(interval.low), math.exp(interval.high)
