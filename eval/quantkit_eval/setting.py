"""What an evaluation is asked for, and everything that is decided and checked before models run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.calibration.data.tokens import check_seed
from quantkit.checkpoint.source import Source
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.formats.open import open_source
from quantkit.inference.backend import check_backend
from quantkit.model.skeleton import is_encoder
from quantkit_eval.errors import EvaluationError
from quantkit_eval.figures.perplexity import window_sequences
from quantkit_eval.gate import DEFAULT_LIMITS, DEFAULT_TASK_LIMIT
from quantkit_eval.limits import Limit, parse_limit
from quantkit_eval.records import Fact, TextUsed
from quantkit_eval.sequences import Scored, Workload, make_workload
from quantkit_eval.subjects import Subject, check_source, open_original, open_subject
from quantkit_eval.talks import Talks, read_talks
from quantkit_eval.tasks.accuracy import ALL, Item
from quantkit_eval.tasks.harness_tasks import HarnessTask
from quantkit_eval.tasks.tasklist import TaskList, parse_tasks
from quantkit_eval.texts import read_text
from quantkit_eval.windows import ProtocolKind, text_windows

# Of a text that is longer, the beginning is used; the protocol says so.
MAX_TOKENS = 524_288
_CACHES = ("stored", "none", "fp8", "int8", "int4")


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What the command line asks for; paths are directories or Hub names, sizes in bytes.

    tasks            lists with commas between the names: see `tasklist`
    task_questions   of each task: of the demo's (None: 200) and of lm-eval's (None: all)
    backend          what multiplies where whole models run: completions, lm-eval's tasks
    sensitivity      also measure what each block costs when it alone is quantized
    prompts          how many beginnings of the text both models continue; 0 for none
    original_name    what to call the original (default: its directory's name)
    any_base         accept a quantized model that was made from another original
    kv               the cache of quantized models: `stored`, `none`, `fp8`, `int8` or `int4`
    """

    model: str
    quantized: tuple[str, ...]
    text: str = "demo"
    tasks: tuple[str, ...] = ()
    task_questions: int | None = None
    seq_len: int = 2048
    windows: int | None = None
    protocol: ProtocolKind = "standard"
    stride: int | None = None
    sensitivity: bool = False
    limits: tuple[str, ...] = ()
    max_ram: int | None = None
    device: str = "cpu"
    backend: str = "auto"
    seed: int = 0
    prompts: int = 3
    noise_floor: bool = True
    any_base: bool = False
    trust_remote_code: bool = False
    title: str | None = None
    original_name: str | None = None
    kv: str = "stored"

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.kv not in _CACHES:
            raise EvaluationError(f"--kv {self.kv!r}: choose {', '.join(_CACHES)}")
        for option, value, smallest, largest in (
            ("--seq-len", self.seq_len, 2, 2**24),
            ("--windows", self.windows, 1, 2**24),
            ("--stride", self.stride, 1, 2**24),
            ("--questions", self.task_questions, 1, 10**5),
            ("--prompts", self.prompts, 0, 1000),
        ):
            if value is not None and not smallest <= value <= largest:
                raise EvaluationError(
                    f"{option} {str(value)[:30]}: write a number from {smallest} to {largest}"
                )


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The models, the text in sequences, the questions, and all of them as one workload.

    The workload's first sequences are the text's, the rest are those of `items`, in order.  `talks`
    are conversations with images that the text is, None for text alone.  `harness` are lm-eval's
    tasks, which whole models answer; `task_sources` says where the questions of `items` come from.
    """

    original: Subject
    quantized: tuple[Subject, ...]
    tokenizer: Any
    text: TextUsed
    sequences: tuple[Scored, ...]
    talks: Talks | None
    items: tuple[Item, ...]
    task_sources: tuple[Fact, ...]
    harness: tuple[HarnessTask, ...]
    workload: Workload
    positions: int | None
    limits: tuple[Limit, ...]


def prepare(request: EvaluationRequest, names: Sequence[str] | None = None) -> Setting:
    """The setting of a request; reads text, headers and hashes, no weights.

    Raises the QuantkitError of whatever does not work out.
    """
    if not request.quantized:
        raise EvaluationError("give at least one quantized model beside the original")
    trust = request.trust_remote_code
    original = open_original(request.model, name=request.original_name, trust_remote_code=trust)
    tokenizer = load_tokenizer(original.source, trust_remote_code=trust)
    quantized = tuple(
        open_subject(path, original, name=name, trust_remote_code=trust)
        for path, name in zip(request.quantized, _names(request, names), strict=True)
    )
    for subject in quantized:
        check_source(original, subject, tokenizer, any_base=request.any_base)
    wishes = _wishes(request, original.source, tokenizer)
    listed = wishes.tasks
    return Setting(
        original=original,
        quantized=quantized,
        tokenizer=tokenizer,
        text=wishes.text,
        sequences=wishes.sequences,
        talks=wishes.talks,
        items=listed.items,
        task_sources=tuple(Fact(name=name, value=value) for name, value in listed.sources.items()),
        harness=listed.harness,
        workload=wishes.workload,
        positions=wishes.positions,
        limits=wishes.limits or _default_limits(listed.names),
    )


def check_token_wishes(request: EvaluationRequest) -> None:
    """Nothing if text, tasks and limits fit an original that predicts tokens."""
    trust = request.trust_remote_code
    source = open_source(request.model)
    _wishes(request, source, load_tokenizer(source, trust_remote_code=trust))


@dataclass(frozen=True, kw_only=True)
class _Wishes:
    sequences: tuple[Scored, ...]
    talks: Talks | None
    text: TextUsed
    tasks: TaskList
    workload: Workload
    positions: int | None
    limits: tuple[Limit, ...]


def _wishes(request: EvaluationRequest, source: Source, tokenizer: Any) -> _Wishes:
    limits = tuple(parse_limit(text) for text in request.limits)
    if is_encoder(source, trust_remote_code=request.trust_remote_code):
        raise EvaluationError(
            f"{request.model}: a masked language model sees the tokens that it would have to "
            "predict; evaluation is of models that continue a text"
        )
    check_backend(request.backend, request.device)
    positions = _positions(source)
    seq_len = request.seq_len if positions is None else min(request.seq_len, positions)
    talks = read_talks(
        request.text,
        source,
        tokenizer,
        most=request.windows or max(1, MAX_TOKENS // seq_len),
        seq_len=seq_len,
        trust_remote_code=request.trust_remote_code,
    )
    if talks is None:
        text_sequences, text = _windows(request, tokenizer, seq_len)
    else:
        text_sequences, text = talks.sequences, talks.text
        if request.protocol != "standard" or request.stride is not None:
            raise EvaluationError(
                "--protocol and --stride cut text into windows, and conversations with images are "
                "never cut; leave them out"
            )
    listed = parse_tasks(request.tasks, tokenizer, limit=request.task_questions, seed=request.seed)
    known = [*listed.names, *([ALL] if listed.names else [])]
    for limit in limits:
        if limit.metric == "task" and limit.task not in known:
            raise EvaluationError(
                f"--fail-if {limit.text!r}: there is no task {limit.task!r}; asked for with "
                f"--tasks: {', '.join(listed.names) or 'none'}"
            )
    sequences = [*text_sequences, *(s for item in listed.items for s in item.sequences)]
    return _Wishes(
        sequences=text_sequences,
        talks=talks,
        text=text,
        tasks=listed,
        workload=make_workload(
            sequences,
            max_length=positions,
            pictured=None if talks is None else talks.pictured,
        ),
        positions=positions,
        limits=limits,
    )


def _default_limits(tasks: Sequence[str]) -> tuple[Limit, ...]:
    found = [parse_limit(text) for text in DEFAULT_LIMITS]
    if tasks:
        asked = ALL if len(tasks) > 1 else tasks[0]
        found.append(parse_limit(DEFAULT_TASK_LIMIT.format(asked)))
    return tuple(found)


def _names(request: EvaluationRequest, names: Sequence[str] | None) -> Sequence[str | None]:
    if names is not None:
        return names
    return [None] * len(request.quantized)


def _positions(source: Source) -> int | None:
    config = source.config
    text_config = config.get("text_config", config)
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(found := text_config.get(key), int):
            return found
    return None


def _windows(
    request: EvaluationRequest, tokenizer: Any, seq_len: int
) -> tuple[tuple[Scored, ...], TextUsed]:
    text = read_text(request.text)
    windows = text_windows(
        text.content,
        tokenizer,
        seq_len=seq_len,
        max_windows=request.windows,
        max_tokens=None if request.windows is not None else MAX_TOKENS,
        source=text.source,
        kind=request.protocol,
        stride=request.stride,
    )
    facts = tuple(Fact(name=name, value=value) for name, value in text.details.items())
    used = TextUsed(source=text.source, sha256=text.sha256, facts=facts, protocol=windows.protocol)
    return tuple(window_sequences(windows)), used
