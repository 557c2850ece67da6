"""The options of `quantize`, each in one place: the command line, the Python function, the plan and
the table in docs/cli.md (`python -m tools.options`) come from here.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.memory import parse_size
from quantkit.errors import RecipeError
from quantkit.numbers.scheme import Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quantkit.calibration.data.tokens import CalibrationSource
    from quantkit.methods.recipe import Recipe

DEFAULT_METHOD = "awq"
BUDGET_METHOD = "best"
# What a runtime reads that reads no safetensors.
_FORMAT_OF = {"llama.cpp": "gguf", "ollama": "gguf", "onnxruntime": "onnx"}
_NUMBER = r"(\d+(?:\.\d+)?)"
_DURATION = re.compile(rf"(?:{_NUMBER}h)?\s*(?:{_NUMBER}m)?\s*(?:{_NUMBER}s)?")


def _told(
    flag: str | None, says: str, *, shown: str = "", type: Any = str | None
) -> Mapping[str, Any]:
    """What the command line and the documentation make of a field.

    flag    None: it is for Python alone
    says    what it does, in Markdown
    shown   the default as the documentation has it
    type    what the command line takes
    """
    return {"flag": flag, "says": says, "shown": shown, "type": type}


@dataclass(frozen=True)
class QuantizeOptions:
    """What a run is asked for; nothing is looked up or read before it is needed.

    Sizes are bytes or texts such as "6GiB".  `recipe` is a file, or a recipe already loaded.
    """

    method: str | None = field(
        default=None,
        metadata=_told(
            "--method",
            "a built-in method, see `quantkit methods`, or `auto`, see "
            "[limits](budget.md#a-limit-instead-of-a-budget); without it and `--recipe` `awq`, for "
            "gguf `gptq`, with a budget `best`",
        ),
    )
    out: str | os.PathLike[str] | None = field(
        default=None,
        metadata=_told(
            "--out",
            "directory to write; built as `OUT.partial` and renamed when complete",
            shown="required",
            type=Path,
        ),
    )
    scheme: str | None = field(
        default=None,
        metadata=_told(
            "--scheme",
            (
                r"`w{2-8}a{16\|8}_{g<size>\|row}[_asym]`, `w4afp8_g128`, `nf4_b64[_dq]`, "
                "`fp4_b64[_dq]`, `fp8a8_row` and other floats, for gguf `q4_k_m`...; see "
                "[recipes](recipes.md#schemes). What you name is taken as it is; the recipe's own "
                "is fitted to the shapes"
            ),
            shown="the recipe's",
        ),
    )
    bits: float | None = field(
        default=None,
        metadata=_told(
            "--bits",
            (
                "a mean of bits per weight instead of a scheme: the mix of schemes with the least "
                "loss that takes no more; see [budgets](budget.md)"
            ),
            type=float | None,
        ),
    )
    bits_of: str = field(
        default="linears",
        metadata=_told(
            "--bits-of",
            (
                "what `--bits` counts: the quantized `linears` with scales and zeros, or all of "
                "the `model`"
            ),
            shown="`linears`",
            type=str,
        ),
    )
    size: int | str | None = field(
        default=None,
        metadata=_told(
            "--size",
            "a budget as the size of the weight files, as in `3GiB`; see [budgets](budget.md)",
        ),
    )
    fit_vram: int | str | None = field(
        default=None,
        metadata=_told(
            "--fit-vram",
            (
                "a budget as the memory that a server may use, as in `24GiB`: weights, a cache of "
                "`--context` tokens (in 8 bits with `--kv`) and activations"
            ),
        ),
    )
    context: int | str | None = field(
        default=None,
        metadata=_told(
            "--context",
            "tokens that the cache of `--fit-vram` holds, of all sequences together, as in `32k`",
        ),
    )
    reader: str | None = field(
        default=None,
        metadata=_told(
            "--for",
            (
                "the runtime that has to read the mix of a budget: `transformers` or `vllm`, for "
                "gguf `llama.cpp`, for onnx `onnxruntime`"
            ),
            shown="the one with the least loss",
        ),
    )
    format: str | None = field(
        default=None,
        metadata=_told(
            "--format",
            (
                "`bitsandbytes` for nf4 and fp4, `gguf` for its own schemes, `compressed-tensors` "
                "for all else; see [formats](formats.md)"
            ),
            shown="by scheme",
        ),
    )
    calibration: CalibrationSource = field(
        default="demo",
        metadata=_told(
            "--calib",
            (
                "calibration text, or conversations with images for models that read these: "
                "`demo`, a Hub dataset, a file or a saved dataset; see "
                "[calibration](calibration.md)"
            ),
            shown="`demo`",
            type=str,
        ),
    )
    samples: int | None = field(
        default=None,
        metadata=_told("--samples", "sequences", shown="the recipe's, 128", type=int | None),
    )
    seq_len: int | None = field(
        default=None,
        metadata=_told(
            "--seq-len",
            "tokens in each; longer than the model's positions is cut to them, with a note",
            shown="the recipe's, 2048",
            type=int | None,
        ),
    )
    seed: int = field(
        default=0, metadata=_told("--seed", "order of calibration documents", shown="`0`", type=int)
    )
    recipe: str | os.PathLike[str] | Recipe | None = field(
        default=None,
        metadata=_told(
            "--recipe", "a recipe file of your own; see [recipes](recipes.md)", type=Path | None
        ),
    )
    overrides: Sequence[str] = field(
        default=(), metadata=_told("--set", "`part.field=value`, repeatable", type=list[str] | None)
    )
    skip: Sequence[str] = field(
        default=(),
        metadata=_told(
            "--skip", "glob of weight names to keep as they are, repeatable", type=list[str] | None
        ),
    )
    rules: Sequence[str] = field(
        default=(),
        metadata=_told(
            "--rule",
            "`WHAT=SCHEME` or `WHAT=keep`, repeatable: WHAT is a role ([experts, "
            "attention...](recipes.md#rules)) or a glob of weight names",
            type=list[str] | None,
        ),
    )
    lm_head: str | None = field(
        default=None,
        metadata=_told("--lm-head", "scheme for the output head, which otherwise stays as it is"),
    )
    mtp: str | None = field(
        default=None,
        metadata=_told(
            "--mtp",
            (
                "scheme for layers that predict further tokens (multi-token prediction), which "
                "transformers' classes do not have; they are rounded without data, and otherwise "
                "stay as they are"
            ),
        ),
    )
    recurrent: str | None = field(
        default=None,
        metadata=_told(
            "--recurrent",
            (
                "scheme for weights that feed a state carried along the sequence, as in Mamba and "
                "gated delta layers of hybrids, or `keep`; see "
                "[recurrences](recipes.md#recurrences)"
            ),
            shown="as all others",
        ),
    )
    experts: str | None = field(
        default=None,
        metadata=_told(
            "--experts",
            (
                "tokens that statistics of experts are of: those `routed` to them, or `all`, where "
                "one that the router does not send counts for less; see "
                "[calibration](calibration.md#experts)"
            ),
            shown="`routed`",
        ),
    )
    towers: str | None = field(
        default=None,
        metadata=_told(
            "--towers",
            (
                "scheme for linear layers of towers and projectors that turn images or sound into "
                "embeddings, as in `w8a16_row`; they are rounded without data; `keep` leaves them "
                "as they are"
            ),
            shown="`keep`",
        ),
    )
    imatrix: str | os.PathLike[str] | None = field(
        default=None,
        metadata=_told(
            "--imatrix",
            "an importance matrix of llama.cpp (GGUF or .dat) in the place of calibration text, "
            "for gguf; see [imatrix](formats/gguf.md#importance-matrices)",
            type=Path | None,
        ),
    )
    kv: str | None = field(
        default=None,
        metadata=_told(
            "--kv",
            (
                "calibrate scales for a cache of keys and values in 8 bits: `fp8` for each layer, "
                "`fp8_head` for each of its heads; a server that reads them then holds such a "
                "cache"
            ),
            shown="none",
        ),
    )
    max_ram: int | str | None = field(
        default=None,
        metadata=_told(
            "--max-ram",
            "most resident memory of the process: `6GiB`, `800MB`, `1234567`",
            shown="no limit",
        ),
    )
    max_vram: int | str | None = field(
        default=None, metadata=_told("--max-vram", "the same for the GPU", shown="no limit")
    )
    device: str = field(
        default="auto",
        metadata=_told(
            "--device",
            "`auto` takes a GPU if torch sees one; `cpu`, `cuda`, `cuda:1`",
            shown="`auto`",
            type=str,
        ),
    )
    max_shard_size: int | str = field(
        default="5GB",
        metadata=_told(
            "--max-shard-size",
            "largest weight file; a larger tensor gets a file of its own",
            shown="`5GB`",
            type=str,
        ),
    )
    revision: str | None = field(
        default=None,
        metadata=_told("--revision", "commit, branch or tag of a Hub model", shown="`main`"),
    )
    trust_remote_code: bool = field(
        default=False,
        metadata=_told(
            "--trust-remote-code",
            "run Python code that comes with the model; recorded in the report",
            shown="off",
            type=bool,
        ),
    )
    allow_unreadable: bool = field(
        default=False,
        metadata=_told(
            "--allow-unreadable",
            "write a combination that no known runtime reads",
            shown="off",
            type=bool,
        ),
    )
    requantize: bool = field(
        default=False,
        metadata=_told(
            "--requantize",
            (
                "take a model that is quantized already, in any format quantkit reads: its weights "
                "are decoded first, and its loss stays"
            ),
            shown="off",
            type=bool,
        ),
    )
    fresh: bool = field(
        default=False,
        metadata=_told(
            "--fresh",
            "start over instead of resuming; replaces a complete OUT once the new one is complete",
            shown="off",
            type=bool,
        ),
    )
    until: str | None = field(
        default=None,
        metadata=_told(
            "--until",
            (
                "end in time, as in `3h50m` from the start: no step is begun that would end later "
                "if it took as long as the longest so far, and training of scales stops between "
                "two of its steps; exit code 3, and the same command goes on"
            ),
            shown="no limit",
        ),
    )
    profile: str | os.PathLike[str] | None = field(
        default=None,
        metadata=_told(
            "--profile",
            (
                "write what the time went to into this file, a trace for "
                "[Perfetto](https://ui.perfetto.dev)"
            ),
            type=Path | None,
        ),
    )
    tokenizer: PreTrainedTokenizerBase | None = field(
        default=None, metadata=_told(None, "replaces the one that comes with a path")
    )
    progress: bool = field(default=True, metadata=_told(None, "a progress bar, on terminals only"))

    def __post_init__(self) -> None:
        if self.format is None and self.reader in _FORMAT_OF:
            object.__setattr__(self, "format", _FORMAT_OF[self.reader])

    @cached_property
    def loaded(self) -> Recipe:
        """The recipe with all of this applied.  Raises RecipeError or SchemeError."""
        from quantkit.formats.format import WholeFormat
        from quantkit.formats.registry import asked_format, default_scheme
        from quantkit.methods.recipe import Recipe, load_recipe

        if isinstance(self.recipe, Recipe):
            return self.recipe
        method, overrides = self.method, tuple(self.overrides)
        if self.imatrix is not None and self.recipe is None and method in (None, "rtn"):
            # What `rtn` makes of mean squares.
            method = "rtn"
            overrides = ("range.name=weighted_mse", "range.metric=diagonal", *overrides)
        if method is None and self.recipe is None:
            scheme = None if self.scheme is None else Scheme.parse(self.scheme)
            fmt = asked_format(self.format, scheme)
            method = fmt.default_method if isinstance(fmt, WholeFormat) else DEFAULT_METHOD
            if self.has_budget and not isinstance(fmt, WholeFormat):
                method = BUDGET_METHOD
        return load_recipe(
            method,
            path=None if self.recipe is None else Path(self.recipe),
            overrides=overrides,
            scheme=self.scheme,
            skip=self.skip,
            rules=self.rules,
            head=self.lm_head,
            mtp=self.mtp,
            recurrent=self.recurrent,
            experts=self.experts,
            towers=self.towers,
            kv=self.kv,
            samples=self.samples,
            seq_len=self.seq_len,
            default_scheme=default_scheme(self.format),
        )

    @property
    def has_budget(self) -> bool:
        """Whether schemes are chosen within a budget, in whatever words it is given."""
        return any(given is not None for given in (self.bits, self.size, self.fit_vram))

    @property
    def max_ram_bytes(self) -> int | None:
        """The limit in bytes; None for none."""
        return _bytes(self.max_ram)

    @property
    def max_vram_bytes(self) -> int | None:
        """The GPU's limit in bytes; None for none."""
        return _bytes(self.max_vram)

    @property
    def until_seconds(self) -> float | None:
        """The limit in seconds; None for none."""
        return None if self.until is None else parse_duration(self.until)

    @property
    def max_shard_bytes(self) -> int:
        """The size of the largest weight file in bytes."""
        size = _bytes(self.max_shard_size)
        assert size is not None
        return size


def option_rows() -> list[tuple[str, str, str]]:
    """(flag, default, what it does) of each option of the command line, as documented."""
    return [
        (f"`{told['flag']}`", told["shown"], told["says"])
        for told in options_told().values()
        if told["flag"] is not None
    ]


def options_told() -> Mapping[str, Mapping[str, Any]]:
    """Field name -> its flag, what it says, the default shown, the type at the command line."""
    return {each.name: each.metadata for each in dataclasses.fields(QuantizeOptions)}


def parse_duration(text: str) -> float:
    """Seconds of "3h50m", "90m", "1.5h" or "45s".  Raises RecipeError showing how to write them."""
    found = _DURATION.fullmatch(text.strip())
    if found is None or not any(found.groups()):
        raise RecipeError(
            f"--until {text[:40]!r}: write hours and minutes, as in 3h50m, 90m or 45s"
        )
    hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return 3600 * hours + 60 * minutes + seconds


def format_duration(seconds: float) -> str:
    """Seconds for people: "3 h 50 min", "12 min", "45 s"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _bytes(size: int | str | None) -> int | None:
    return parse_size(size) if isinstance(size, str) else size
