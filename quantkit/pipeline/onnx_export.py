"""A quantized checkpoint as an ONNX model with a cache: the same codes, scales and zeros.

    packed road   checkpoint -> gptq or awq -> model builder -> MatMulNBits
    float road    checkpoint -> float32 -> model builder -> MatMul -> MatMulNBits, MatMulInteger

Either way the finished graph is read back and compared with the checkpoint bit for bit.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from quantkit.checkpoint.disk import disk_errors, write_file
from quantkit.checkpoint.door import RECORD_BYTES, given_path, read_plain
from quantkit.checkpoint.manifest import RUN
from quantkit.checkpoint.output import OutputDirectory, OutputState, refuse_unfinished
from quantkit.checkpoint.record import EXPORT_OF, REPORT, read_report
from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.shards import ShardWriter, plan_shards
from quantkit.checkpoint.sidefiles import copy_side_files
from quantkit.checkpoint.source import Source
from quantkit.checkpoint.version import __version__
from quantkit.checks.verify import refuse_unsound
from quantkit.errors import FormatError, OutputError
from quantkit.formats.onnx.builder import build_graph, require_builder
from quantkit.formats.onnx.check import Checked, check_graph
from quantkit.formats.onnx.file import DATA, MODEL, OnnxFile
from quantkit.formats.onnx.format import READERS, Onnx
from quantkit.formats.onnx.names import NAMES, Names, QuantizedPlace, find_kept
from quantkit.formats.onnx.rewrite import rewrite
from quantkit.formats.onnx.rows import RowIndex
from quantkit.formats.onnx.triton import model_config
from quantkit.formats.open import open_source
from quantkit.formats.registry import make_format
from quantkit.model.decoded import Unpacked
from quantkit.model.fold_vectors import copy_folds
from quantkit.model.rotations.rotated import keep_rotation
from quantkit.numbers.tensor import PlainScale
from quantkit.pipeline.export import Exported, export

DETAILS = "quantkit/onnx.json"
# What of a report stays true of the graph made of the checkpoint.
_TOLD = ("method", "scheme", "calibration")
# What is shown of a run that had the graph for its aim.
_PAGES = (RUN, "quantkit/report.md", "quantkit/report.html", "quantkit/recipe.yaml", "README.md")
# The builder's own setting for CPUs: activations in int8 by block.  1 is float32.
ACCURACY_LEVELS = (1, 4)

_TRITON_VERSION = "1"
_SHARD_BYTES = 2_000_000_000
# The names that the builder's readers of quantized checkpoints know.
_KNOWN = re.compile(
    r"model\.layers\.\d+\.(self_attn\.(q|k|v|o|qkv)_proj|mlp\.(gate|up|down|gate_up)_proj)\.weight"
)
_PACKED_GROUPS = (16, 32, 64, 128, 256)
# Where nothing may be quantized on the way: the head and the table of embeddings.
_UNTOUCHED = "/lm_head/MatMul,/model/embed_tokens/Gather"

logger = logging.getLogger(__name__)


def export_onnx(
    path: str | Path,
    out: str | Path,
    *,
    accuracy_level: int = 4,
    triton: bool = False,
    trust_remote_code: bool = False,
    progress: bool = True,
    job: Mapping[str, str] | None = None,
    fresh: bool = False,
) -> Exported:
    """Writes the checkpoint at `path` to `out` as an ONNX model for ONNX Runtime on a CPU.

    `accuracy_level` 4 computes weight-only products with int8 blocks of activations, 1 in float32.
    `triton`: `out` becomes a model of a Triton Inference Server repository.  `job`: the fingerprint
    of the run that made the checkpoint for this graph alone, instead of the checkpoint's; its pages
    travel along.  Raises FormatError if the operators cannot hold a weight exactly, or if the model
    builder does not know the model.
    """
    if accuracy_level not in ACCURACY_LEVELS:
        raise FormatError(f"accuracy level {accuracy_level}: 1 (float32) and 4 (int8) are allowed")
    path = given_path(path)
    refuse_unfinished(path)
    source = open_source(path)
    view = Unpacked.open(source, trust_remote_code=trust_remote_code)
    _check_held(view)
    versions = require_builder()
    fingerprint = graph_fingerprint(
        {EXPORT_OF: source.fingerprint()} if job is None else job,
        accuracy_level=accuracy_level,
        triton=triton,
        trust_remote_code=trust_remote_code,
    )
    with OutputDirectory(out) as output:
        written = fresh or output.state is not OutputState.COMPLETE
        if written:
            output.begin(fingerprint, fresh=fresh)
            work = _Work(
                path=path,
                view=view,
                scratch=output.scratch,
                accuracy_level=accuracy_level,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
            built, details, checked = work.build()
            target = output.partial / _TRITON_VERSION if triton else output.partial
            graph = {file.name for file in built.iterdir()}
            _place(built, target)
            copy_side_files(view, target, spare=graph)
            write_file(_made(output.partial / DETAILS), _json({**details, "versions": versions}))
            names = _names(view, OnnxFile(target), checked)
            write_file(output.partial / NAMES, names.to_json())
            _copy_provenance(source, output.partial, fingerprint, whole=job is not None)
            if job is not None:
                _copy_pages(path, output.partial)
            if triton:
                config = model_config(target, name=output.out.name)
                write_file(output.partial / "config.pbtxt", config.encode())
            output.finish(refuse_unsound)
        else:
            output.check_complete(fingerprint)
        model = output.out / _TRITON_VERSION if triton else output.out
        return Exported(
            out=output.out,
            format="onnx",
            num_bytes=sum((model / name).stat().st_size for name in (MODEL, DATA)),
            weights=len(view.stored),
            rounded=(),
            readers=READERS,
            notes=(),
            left=view.left_files(),
            written=written,
        )


def graph_fingerprint(
    made_of: Mapping[str, str],
    *,
    accuracy_level: int = 4,
    triton: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, str]:
    """Everything that a graph's bytes depend on; `made_of` tells the weights."""
    return {
        **made_of,
        "format": "onnx",
        "accuracy level": str(accuracy_level),
        "triton": str(triton),
        "trust_remote_code": str(trust_remote_code),
        "quantkit version": __version__,
        **{f"{package} version": found for package, found in require_builder().items()},
    }


@dataclass(frozen=True, kw_only=True)
class _Work:
    """One export under way; `scratch` is a directory that is removed afterwards."""

    path: Path
    view: Unpacked
    scratch: Path
    accuracy_level: int
    trust_remote_code: bool
    progress: bool

    def build(self) -> tuple[Path, dict[str, object], Checked]:
        """A directory with the checked graph and its files, how it was made, what is where."""
        index = self._index()
        packed, reason = _packed_format(self.view)
        if packed is not None:
            built = self._from_packed(packed)
            checked = check_graph(built, index, self.view.tensor)
            if checked.difference is None:
                return built, {"road": packed, "quantized nodes": checked.nodes}, checked
            reason = f"the builder changed {checked.difference}"
            logger.warning("onnx: not through %s: %s", packed, reason)
        built = self._from_float(index)
        checked = check_graph(built, index, self.view.tensor)
        if checked.difference is not None:
            raise FormatError(f"format onnx: the graph differs: {checked.difference}")
        details = {"road": "float32", "because": reason, "quantized nodes": checked.nodes}
        return built, details, checked

    def _index(self) -> RowIndex:
        index = RowIndex()
        shown = None if self.progress else True
        for name in tqdm(self.view.stored, desc="check", unit="weight", disable=shown):
            index.add(name, self.view.tensor(name).dequantize(torch.float32))
        return index

    def _from_packed(self, packed: str) -> Path:
        """The graph that the builder makes of a gptq or awq checkpoint."""
        checkpoint, built = self._empty("packed"), self._empty("built")
        checkpoint.rmdir()
        export(
            self.path,
            checkpoint,
            format_name=packed,
            allow_unreadable=True,
            trust_remote_code=self.trust_remote_code,
            progress=self.progress,
        )
        bits = next(iter(self.view.stored.values())).scheme.bits
        options = {
            "accuracy_level": str(self.accuracy_level),
            "nodes_to_exclude": _UNTOUCHED,
        }
        self._run(checkpoint, built, f"int{bits}", options)
        shutil.rmtree(checkpoint)
        return built

    def _from_float(self, index: RowIndex) -> Path:
        """The graph of the decoded weights, with quantized operators put into it."""
        dense, built, out = (self._empty(name) for name in ("dense", "float", "graph"))
        _write_decoded(self.view, dense)
        # Fused projections must share a scheme.
        schemes = {weight.scheme for weight in self.view.stored.values()}
        fuse = len(schemes) == 1 and not _kept_in_blocks(self.view)
        self._run(dense, built, "fp32", {"fuse_qkv": str(fuse).lower()})
        shutil.rmtree(dense)
        with disk_errors(out):
            rewrite(built, out, index, self.view.tensor, accuracy_level=self.accuracy_level)
            for file in built.iterdir():
                if file.is_file() and file.name not in (MODEL, DATA):
                    shutil.move(file, out / file.name)
        shutil.rmtree(built)
        return out

    def _run(self, checkpoint: Path, built: Path, precision: str, options: dict[str, str]) -> None:
        build_graph(
            checkpoint,
            built,
            precision=precision,
            options=options,
            trust_remote_code=self.trust_remote_code,
        )

    def _empty(self, name: str) -> Path:
        folder = self.scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        return _made(folder / "file").parent


def _check_held(view: Unpacked) -> None:
    """FormatError naming the first weight that no operator holds exactly."""
    if not view.stored:
        raise FormatError("no weight of the checkpoint is quantized; there is nothing to export")
    for name, weight in view.stored.items():
        if (reason := Onnx().supports(weight.scheme)) is not None:
            raise FormatError(f"{name}: onnx cannot hold {weight.scheme.name}: {reason}")
        if weight.permuted:
            raise FormatError(
                f"{name}: its columns are permuted (activation order), which onnx does not hold; "
                "formats that can: gptq, gptq_v2"
            )


def _packed_format(view: Unpacked) -> tuple[str | None, str]:
    """The format from which the builder makes the graph itself, or None and the reason."""
    schemes = {weight.scheme for weight in view.stored.values()}
    scheme = next(iter(schemes))
    if len(schemes) > 1:
        return None, "weights of several schemes"
    if scheme.activation_bits == 8 or scheme.bits not in (4, 8):
        return None, f"the builder reads no checkpoints of {scheme.name}"
    if scheme.group_size not in _PACKED_GROUPS or (scheme.bits == 8 and not scheme.symmetric):
        return None, f"the builder reads no checkpoints of {scheme.name}"
    unknown = next((name for name in view.stored if not _KNOWN.fullmatch(name)), None)
    if unknown is not None:
        return None, f"the builder does not know {unknown} as quantized"
    if (kept := _kept_in_blocks(view)) is not None:
        return None, f"{kept} is kept"
    name = "gptq" if scheme.symmetric else "awq"
    fmt = make_format(name)
    for weight in view.stored:
        _, told = fmt.represent(view.tensor(weight))
        if told is not None:
            return None, f"{weight}: {told} for {name}"
    return name, ""


def _kept_in_blocks(view: Unpacked) -> str | None:
    """A matrix inside the blocks that is not quantized, None if there is none."""
    for name in view.names():
        inside = re.search(r"\.\d+\.", name) is not None
        if inside and name not in view.stored and len(view.info(name).shape) == 2:
            return name
    return None


def _write_decoded(view: Unpacked, folder: Path) -> None:
    """Writes the checkpoint with its quantized weights decoded, everything in float32."""
    infos = []
    for name in view.names():
        info = view.info(name)
        dtype = torch.float32 if info.dtype.is_floating_point else info.dtype
        infos.append(TensorInfo(name=name, dtype=dtype, shape=info.shape))
    config = {key: value for key, value in view.config.items() if key != "torch_dtype"}
    if isinstance(text := config.get("text_config"), dict):
        config["text_config"] = {k: v for k, v in text.items() if k not in ("dtype", "torch_dtype")}
    write_file(folder / "config.json", _json({**config, "dtype": "float32"}))
    copy_side_files(view, folder)
    with ShardWriter(folder, plan_shards(infos, _SHARD_BYTES)) as writer:
        for info in infos:
            if info.name not in view.stored:
                writer.put(info.name, view.read(info.name).to(info.dtype))
                continue
            value = view.tensor(info.name).dequantize(torch.float32)
            writer.put(info.name, value.t() if info.name in view.transposed else value)
        writer.close()


def _names(view: Unpacked, file: OnnxFile, checked: Checked) -> Names:
    """Which numbers of the finished graph are which tensor of the checkpoint."""
    quantized = {}
    for name, weight in view.stored.items():
        scale = view.tensor(name).scale
        assert isinstance(scale, PlainScale)
        quantized[name] = QuantizedPlace(
            scheme=weight.scheme,
            shape=weight.shape,
            dtype=weight.dtype,
            scale_dtype=scale.tensor.dtype,
            parts=checked.parts[name],
        )
    others = [name for name in view.names() if name not in view.stored]
    kept = find_kept(file, view, others)
    lost = tuple(name for name in others if name not in kept)
    return Names(config=view.config, quantized=quantized, kept=kept, lost=lost)


def _place(built: Path, target: Path) -> None:
    """Moves the graph and the files around it to where they belong."""
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: in the way")
    with disk_errors(target):
        target.mkdir(exist_ok=True)
        for file in sorted(built.iterdir()):
            if file.is_dir():
                continue
            file.replace(target / file.name)


def _made(path: Path) -> Path:
    """The path, its parent directory created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _json(data: object) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _copy_pages(checkpoint: Path, partial: Path) -> None:
    """What a run told of itself, beside the graph."""
    for name in _PAGES:
        data = read_plain(checkpoint / name, largest=RECORD_BYTES)
        with disk_errors(partial / name):
            write_file(_made(partial / name), data)


def _copy_provenance(
    source: Source, partial: Path, fingerprint: Mapping[str, str], *, whole: bool
) -> None:
    """Writes how the checkpoint was made, and what transforms did, beside the graph made of it.

    Nothing where no report of quantkit's tells it.
    """
    copy_folds(source.home, partial)
    keep_rotation(source, partial)
    report = {} if source.home is None else read_report(source.home)
    made = report.get("fingerprint")
    if not isinstance(made, dict) or any(key not in report for key in _TOLD):
        return
    # The names and sizes of its tensors are not those of the graph's.
    keys = set(report) - {"tensors"} if whole else {*_TOLD, "recipe"}
    told = {key: value for key, value in report.items() if key in keys}
    told["fingerprint"] = {**made, **fingerprint}
    text = json.dumps(told, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    path = partial / REPORT
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        write_file(path, text.encode())
