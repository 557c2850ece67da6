"""One model type through quantkit: built tiny, saved, quantized twice, loaded, compared.

The verdict of a type is a Finding, whose stages tell how far it came.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shutil
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

import quantkit
from quantkit.checkpoint.files import FileSource
from quantkit.errors import QuantkitError
from quantkit.formats.format import expert_name
from quantkit.methods.recipe import load_recipe
from quantkit.model.decoded import Unpacked
from quantkit.model.trace import UNREACHED
from quantkit.pipeline.job import prepare
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.plan import Plan
from quantkit.pipeline.session import run
from tools.sweep.shrink import FIRST_SPECIAL, MAX_PARAMETERS, tiny_config

Kind = Literal["causal", "image", "encoder", "embedding", "reranker"]
Status = Literal["works", "refused", "wrong", "crashed", "not runnable"]

# Data-free and calibrated, each under its default scheme.
METHODS = ("rtn", "best")
_TOKENS, _ROWS = 24, 2
# What `expert_name` gives.
_EXPERT = re.compile(r"(.+?)\.(\d+)(?:\.(\w+))?\.weight")
# Relative to the largest logit.  Seen: below 2e-6; a weight in the wrong place gives 1e-2 and more.
_EQUAL = 1e-4
_MAPPINGS: dict[Kind, tuple[str, str]] = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "image": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText"),
    "encoder": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
    "embedding": ("MODEL_MAPPING_NAMES", "AutoModel"),
    "reranker": (
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "AutoModelForSequenceClassification",
    ),
}
# Of models without a head: every encoder that has one elsewhere, and what embedding models and
# rerankers are built on besides.
_DECODERS = frozenset(
    {"gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "qwen3_moe"}
)
_RANKERS = _DECODERS | {
    "albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "eurobert", "gte",
    "jina_embeddings_v3", "modernbert", "mpnet", "nomic_bert", "roberta", "xlm-roberta",
    "xlm-roberta-xl",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """One method on one type.

    quantized    share of the weights in blocks, by count of parameters, that is quantized
    error        largest difference of loaded logits to those of the decoded weights, relative to
                 the largest logit; None if it did not come so far
    message      the refusal, or the last line of a traceback and where it was raised
    readers      runtime -> None if the plan says that it reads the file, else why not
    """

    method: str
    status: Status
    message: str = ""
    quantized: float | None = None
    error: float | None = None
    readers: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of one type; `message` is transformers' own error if it is not runnable."""

    kind: Kind
    model_type: str
    status: Status
    message: str = ""
    parameters: int = 0
    runs: tuple[Run, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


def types(kind: Kind) -> list[str]:
    """The model types of a mapping of transformers that the kind is about, sorted."""
    found = set(getattr(modeling_auto, _MAPPINGS[kind][0]))
    if kind == "embedding":
        found &= {*getattr(modeling_auto, _MAPPINGS["encoder"][0]), *_DECODERS}
    if kind == "reranker":
        found &= _RANKERS
    return sorted(found)


@torch.no_grad()
def examine(kind: Kind, model_type: str, work: Path) -> Finding:
    """The finding for one type; `work` is a scratch directory that is emptied."""
    transformers.logging.set_verbosity_error()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    model_dir = work / "model"
    ids = torch.randint(3, FIRST_SPECIAL, (_ROWS, _TOKENS), generator=_seed(1))
    try:
        parameters = _build(kind, model_type, model_dir, ids)
    # Whatever transformers' own classes raise is the finding.
    except Exception as error:
        return Finding(
            kind=kind, model_type=model_type, status="not runnable", message=_last(error)
        )
    runs = tuple(_run(kind, method, model_dir, work / method, ids) for method in METHODS)
    shutil.rmtree(work)
    worst = max((run.status for run in runs), key=_ORDER.index)
    return Finding(kind=kind, model_type=model_type, status=worst, parameters=parameters, runs=runs)


_ORDER: tuple[Status, ...] = ("not runnable", "works", "refused", "crashed", "wrong")


def _seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def _build(kind: Kind, model_type: str, directory: Path, ids: Tensor) -> int:
    """Writes a tiny random model that transformers reloads to equal logits; its parameters."""
    auto = getattr(transformers, _MAPPINGS[kind][1])
    config = tiny_config(model_type)
    if kind == "reranker":
        # Classifiers on decoders read the last token that is none.
        config.get_text_config().pad_token_id = 0
    with torch.device("meta"):
        count = sum(p.numel() for p in auto.from_config(config, dtype=torch.float32).parameters())
    if count > MAX_PARAMETERS:
        raise RuntimeError(f"the tiny configuration has {count} parameters: a rule is missing")
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32).eval()
    _randomize_(model)
    wanted = _logits(model, ids)
    if not bool(wanted.isfinite().all()):
        raise RuntimeError("its logits are not finite with random weights")
    model.save_pretrained(directory)
    reloaded, told = auto.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    if told["missing_keys"] or told["mismatched_keys"]:
        missing = sorted({*told["missing_keys"], *map(str, told["mismatched_keys"])})
        raise RuntimeError(f"what it saves it does not load: {', '.join(missing[:3])}")
    if _distance(_logits(reloaded.eval(), ids), wanted) > _EQUAL:
        raise RuntimeError("saved and loaded again it has other logits")
    return count


def _randomize_(model: nn.Module) -> None:
    """Weights of unit gain, and norms and biases that are not all alike."""
    generator = _seed(0)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise * max(parameter.shape[-1], 16) ** -0.5)
        else:
            parameter.add_(noise * 0.1)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    inputs: dict[str, Any] = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    found = model(**inputs, use_cache=False) if _takes_cache(model) else model(**inputs)
    return (found.logits if hasattr(found, "logits") else found.last_hidden_state).float()


def _takes_cache(model: nn.Module) -> bool:
    return "use_cache" in inspect.signature(model.forward).parameters


def _distance(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def _run(kind: Kind, method: str, model_dir: Path, work: Path, ids: Tensor) -> Run:
    """One method: quantized, loaded by quantkit, compared with the decoded weights."""
    out = work / "out"
    told: dict[str, Any] = {}
    stage = "quantize"
    try:
        recipe = load_recipe(method, samples=8, seq_len=32)
        tokens = torch.randint(3, FIRST_SPECIAL, (8, 32), generator=_seed(2))
        request = QuantizeOptions(
            recipe=recipe, calibration=tokens, device="cpu", allow_unreadable=True
        )
        job = prepare(str(model_dir), request)
        told = _told(job.plan)
        run(job, out, progress=False)
        stage = "load"
        loaded = quantkit.load(out, dtype=torch.float32, backend="reference")
        stage = "run"
        found = _logits(loaded, ids)
        stage = "save"
        _check_saved(loaded, out, work / "saved")
        del loaded
        stage = "decode"
        wanted = _decoded_logits(kind, model_dir, out, work / "decoded", ids)
    except QuantkitError as error:
        # A checkpoint that was written must load: refusing it there is a fault.
        status: Status = "refused" if stage == "quantize" else "wrong"
        return Run(method=method, status=status, message=f"{stage}: {error}", **told)
    except Exception as error:
        if os.environ.get("SWEEP_TRACEBACK"):
            traceback.print_exc()
        return Run(method=method, status="crashed", message=f"{stage}: {_last(error)}", **told)
    error = _distance(found, wanted)
    right = error <= _EQUAL
    enough = told["quantized"] >= 0.8
    message = ""
    if not right:
        message = "loaded logits differ from those of the decoded weights"
    elif not enough:
        message = f"only {told['quantized']:.0%} of the weights in blocks are quantized"
    verdict: Status = "works" if right and enough else "wrong" if not right else "refused"
    return Run(method=method, status=verdict, message=message, error=error, **told)


def _check_saved(loaded: nn.Module, out: Path, directory: Path) -> None:
    """AssertionError unless what the loaded model saves are the tensors that it came from."""
    loaded.save_pretrained(directory)
    first, again = FileSource(out), FileSource(directory)
    for name in first.names():
        old, new = first.read(name), again.read(name)
        assert old.shape == new.shape and torch.equal(old, new.to(old.dtype)), name


def _told(plan: Plan) -> dict[str, Any]:
    """Readers, and the quantized share of what is a matrix or more in blocks and takes part."""
    total = quantized = 0
    for fate in plan.fates:
        aside = fate.reason in (UNREACHED, "embedding", "output head")
        if fate.block is not None and len(fate.shape) >= 2 and not aside:
            size = torch.Size(fate.shape).numel()
            total += size
            quantized += size if fate.fate == "quantized" else 0
    return {"quantized": quantized / max(total, 1), "readers": dict(plan.readers)}


def _decoded_logits(kind: Kind, model_dir: Path, out: Path, directory: Path, ids: Tensor) -> Tensor:
    """Logits of the decoded weights, which transformers loads as it loaded the original.

    Experts that quantkit took out of a tensor for all are put back into it.
    """
    auto = getattr(transformers, _MAPPINGS[kind][1])
    view, source = Unpacked.open(FileSource(out)), FileSource(model_dir)
    found = set(view.names())
    tensors = {}
    for name in sorted(found):
        match = _EXPERT.fullmatch(name)
        fused = None if match is None else f"{match[1]}.{match[3] or 'weight'}"
        if fused is None or name in source.names() or expert_name(fused, 0) not in found:
            tensors[name] = view.read(name).contiguous()
        elif match is not None and match[2] == "0":
            count = sum(expert_name(fused, e) in found for e in range(len(found)))
            whole = torch.stack([view.read(expert_name(fused, e)) for e in range(count)])
            turned = fused in source.names() and source.info(fused).shape != whole.shape
            tensors[fused] = (whole.transpose(1, 2) if turned else whole).contiguous()
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(view.config))
    model, told = auto.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"], told["missing_keys"]
    return _logits(model.eval(), ids)


def _last(error: BaseException) -> str:
    """An exception in a line: type, text, and the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    ours = [f for f in frames if "/quantkit/" in f.filename]
    if ours and ours[-1] is not frames[-1]:
        place += f" from {Path(ours[-1].filename).name}:{ours[-1].lineno}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"
