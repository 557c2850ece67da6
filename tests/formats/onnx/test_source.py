"""ONNX models read back: as checkpoints where the names are known, as graphs where they are not."""

# ruff: noqa: E402 (the skip comes before what needs the package)

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_jobs as jobs
import torch

onnx = pytest.importorskip("onnx", reason="the extra quantkit[onnx] is not installed")

from formats.onnx.test_export import Builder
from formats.onnx.test_nbits import SCHEMES, sample
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import quantkit
from quantkit.checkpoint.dtypes import label_of
from quantkit.checkpoint.manifest import write_manifest
from quantkit.checks.inspection import inspect
from quantkit.checks.verify import verify
from quantkit.errors import CheckpointError
from quantkit.formats.onnx.file import OnnxFile
from quantkit.formats.onnx.matrices import matrices, tensor_of
from quantkit.formats.onnx.names import NAMES
from quantkit.formats.onnx.nbits import blocks_of, pack, unpack
from quantkit.formats.onnx.source import OnnxSource
from quantkit.formats.open import open_source
from quantkit.formats.registry import format_of
from quantkit.model.decoded import Unpacked
from quantkit.pipeline import onnx_export
from quantkit.pipeline.export import export
from quantkit.pipeline.onnx_export import export_onnx

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {"sym": "w4a16_g32", "asym": "w4a16_g32_asym", "int8": "w8a8_row", "w3": "w3a16_row"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.build("llama", tmp_path_factory.mktemp("llama"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def pairs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Scheme -> a checkpoint and what is exported of it; a stand-in builds the graphs."""
    root = tmp_path_factory.mktemp("pairs")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "build_graph", Builder())
        patch.setattr(onnx_export, "require_builder", lambda: {"onnx": "1"})
        for kind, scheme in KINDS.items():
            source = jobs.finish(jobs.make_job(model, "rtn", scheme), root / kind).out
            found[kind] = source, export_onnx(source, root / f"{kind}-onnx", progress=False).out
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_gives_back_every_number_of_the_checkpoint(
    pairs: dict[str, tuple[Path, Path]], kind: str
) -> None:
    source, graph = (Unpacked.open(open_source(path)) for path in pairs[kind])
    assert source.names() == graph.names()
    assert set(source.stored) == set(graph.stored)
    for name, weight in source.stored.items():
        theirs, ours = source.tensor(name), graph.tensor(name)
        assert graph.stored[name].scheme == weight.scheme
        assert torch.equal(ours.codes, theirs.codes) and ours.dtype == theirs.dtype
        assert (ours.zero is None) == (theirs.zero is None)
        assert ours.zero is None or theirs.zero is None or torch.equal(ours.zero, theirs.zero)
        assert torch.equal(ours.scale.values(), theirs.scale.values())
    for name in set(source.names()) - set(source.stored):
        assert torch.equal(source.read(name), graph.read(name))


def test_load_computes_what_the_checkpoint_computes(pairs: dict[str, tuple[Path, Path]]) -> None:
    ids = torch.arange(12)[None]
    for source, graph in pairs.values():
        expected, found = (
            quantkit.load(path, dtype=torch.float32)(ids) for path in (source, graph)
        )
        assert torch.equal(expected.logits, found.logits)


def test_a_graph_can_be_exported_to_another_format(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    source, graph = pairs["sym"]
    done = export(graph, tmp_path / "gptq", format_name="gptq", progress=False)
    back, own = (Unpacked.open(open_source(path)) for path in (done.out, source))
    assert format_of(open_source(done.out)).name == "gptq"
    for name in own.stored:
        assert torch.equal(back.tensor(name).codes, own.tensor(name).codes)


@pytest.mark.parametrize("kind", ["asym", "int8"])
def test_verify_compares_with_the_checkpoint_and_with_the_model(
    pairs: dict[str, tuple[Path, Path]], model: Path, kind: str
) -> None:
    source, graph = pairs[kind]
    for against in (None, source, model):
        result = verify(graph, against=against)
        assert result.ok, result.text()
    assert [check.name for check in result.checks] == [
        "files",
        "headers",
        "coverage",
        "numbers",
        "source",
    ]
    assert verify(graph / "model.onnx").ok


def test_verify_finds_a_changed_code_and_a_scale_that_is_no_number(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    source, graph = pairs["asym"]
    out = tmp_path / "out"
    shutil.copytree(graph, out)
    stored = OnnxFile(out).stored
    codes = next(entry for name, entry in stored.items() if name.endswith("qweight"))
    data = bytearray((out / "model.onnx.data").read_bytes())
    data[codes.offset] ^= 1
    (out / "model.onnx.data").write_bytes(data)
    (files, *_) = verify(out).checks
    assert not files.ok and "model.onnx.data" in files.problems[0]
    write_manifest(out)
    assert verify(out).ok
    changed = verify(out, against=source)
    assert [check.name for check in changed.checks if not check.ok] == ["source"]
    assert "not the numbers of the source" in changed.checks[-1].problems[0]
    scales = next(entry for name, entry in stored.items() if name.endswith("scales"))
    data[scales.offset : scales.offset + 4] = b"\x00\x00\x80\x7f"
    (out / "model.onnx.data").write_bytes(data)
    write_manifest(out)
    assert "a scale is NaN or infinite" in verify(out).text()


def test_inspect_shows_the_checkpoints_names_schemes_and_method(
    pairs: dict[str, tuple[Path, Path]],
) -> None:
    found = inspect(pairs["w3"][1])
    assert found.model_type == "llama" and found.format.startswith("onnx (ir ")
    schemes = {group.pattern: group.scheme for group in found.groups}
    assert schemes["model.layers.*.self_attn.q_proj.weight"] == "w3a16_row"
    assert schemes["model.norm.weight"] is None
    assert found.provenance is not None and found.provenance.method == "rtn"
    source = inspect(pairs["w3"][0])
    assert found.parameters == source.parameters
    # 3 bits are held in 4, and a row's scale is repeated.
    assert found.bits_per_quantized_weight is not None
    assert found.bits_per_quantized_weight > 4


def test_a_graph_without_names_is_inspected_and_not_loaded(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    out = tmp_path / "foreign"
    shutil.copytree(pairs["asym"][1], out, ignore=shutil.ignore_patterns("quantkit"))
    (out / "genai_config.json").write_text('{"model": {"type": "phi3"}}')
    found = inspect(out)
    assert found.model_type == "phi3"
    assert "w4a16_g32_asym" in {group.scheme for group in found.groups}
    assert any("nothing tells the checkpoint's names" in note for note in found.notes)
    with pytest.raises(CheckpointError, match=r"there is no quantkit/names.json"):
        quantkit.load(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2; 1 is read"),
        ({"config": []}, "config is no object"),
        ({"quantized": {"x": {}}}, "cannot be read"),
        ({"kept": {"x": {"initializer": "nowhere"}}}, "cannot be read"),
        ({"lost": 3}, "cannot be read"),
    ],
)
def test_damaged_names_are_refused(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(pairs["sym"][1], out)
    data = json.loads((out / NAMES).read_bytes())
    (out / NAMES).write_text(json.dumps({**data, **change}))
    with pytest.raises(CheckpointError, match=message):
        OnnxSource(out / "model.onnx")


def test_names_that_point_outside_a_matrix_are_refused(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(pairs["sym"][1], out)
    data = json.loads((out / NAMES).read_bytes())
    place = next(iter(data["quantized"].values()))
    for field, value, message in (("row", 1, "is not in"), ("node", "x", "there is no node")):
        kept = place["parts"][0][field]
        place["parts"][0][field] = value
        (out / NAMES).write_text(json.dumps(data))
        with pytest.raises(CheckpointError, match=message):
            OnnxSource(out / "model.onnx")
        place["parts"][0][field] = kept


def test_a_vector_that_is_to_be_transposed_is_refused(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(pairs["sym"][1], out)
    data = json.loads((out / NAMES).read_bytes())
    data["kept"]["model.norm.weight"]["transposed"] = True
    (out / NAMES).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"'model.norm.weight': \[\d+\] cannot be transposed"):
        OnnxSource(out / "model.onnx")


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_packed_is_unpacked_to_the_same_tensor(name: str) -> None:
    for seed, rows, groups in ((0, 1, 1), (1, 7, 3), (2, 5, 8)):
        tensor = sample(name, rows=rows, groups=groups, seed=seed)
        blocks = blocks_of(tensor)
        packed = pack(blocks)
        again = unpack("node", packed, bits=blocks.bits, size=blocks.size, shape=tensor.shape)
        found = tensor_of(
            "node", again, tensor.scheme, label=label_of(tensor.dtype), scale_label="BF16"
        )
        assert torch.equal(found.codes, tensor.codes) and found.scheme == tensor.scheme
        assert torch.equal(found.scale.values(), tensor.scale.values())
        assert found.zero is None or torch.equal(found.zero, tensor.zero)  # type: ignore[arg-type]


def graph_of(folder: Path, nodes: list[Any], tensors: list[Any]) -> Path:
    """A graph whose weights are in it, as small ones of other tools are."""
    folder.mkdir(exist_ok=True)
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None])
    out = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [given], [out], tensors)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def array(name: str, values: torch.Tensor, kind: int | None = None) -> Any:
    if kind is not None:
        return helper.make_tensor(name, kind, values.shape, values.flatten().tolist())
    return numpy_helper.from_array(values.numpy(), name)


LINEAR = {
    # name: (codes' dtype, shape stored, scales, attributes, has zeros, ONNX type, consumer)
    "rows": (torch.int8, (12, 5), (5,), {"axis": 1}, False, None, "MatMul"),
    "rows-zeros": (torch.uint8, (12, 5), (5,), {"axis": 1}, True, None, "MatMul"),
    "one": (torch.int8, (12, 5), (), {}, False, None, "MatMul"),
    "gemm": (torch.int8, (5, 12), (5,), {"axis": 0}, False, None, "Gemm"),
    "blocks": (torch.uint8, (32, 6), (2, 6), {"axis": 0, "block_size": 16}, True, 21, "MatMul"),
    "signed": (torch.int8, (32, 6), (2, 6), {"axis": 0, "block_size": 16}, False, 22, "MatMul"),
    "turned": (torch.uint8, (6, 32), (6, 2), {"axis": 1, "block_size": 16}, True, 21, "Transpose"),
}


@pytest.mark.parametrize("case", LINEAR)
def test_qdq_weights_are_read_with_the_values_that_onnx_gives_them(
    tmp_path: Path, case: str
) -> None:
    dtype, shape, scales, attributes, zeros, kind, user = LINEAR[case]
    generator = torch.Generator().manual_seed(0)
    low, high = (-8, 8) if kind == 22 else (0, 16) if kind == 21 else (-128, 128)
    low, high = (0, 256) if dtype == torch.uint8 and kind is None else (low, high)
    codes = torch.randint(low, high, shape, generator=generator).to(dtype)
    scale = torch.rand(scales, generator=generator) + 0.1
    tensors = [array("codes", codes, kind), array("scale", scale)]
    inputs = ["codes", "scale"]
    if zeros:
        zero = torch.randint(low, high, scales, generator=generator).to(dtype)
        tensors.append(array("zero", zero, kind))
        inputs.append("zero")
    nodes = [helper.make_node("DequantizeLinear", inputs, ["w"], name="dq", **attributes)]
    if user == "Transpose":
        nodes.append(helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]))
    if user == "Gemm":
        nodes.append(helper.make_node("Gemm", ["x", "w"], ["y"], name="/up/Gemm", transB=1))
    else:
        last = "t" if user == "Transpose" else "w"
        nodes.append(helper.make_node("MatMul", ["x", last], ["y"], name="/up/MatMul"))
    path = graph_of(tmp_path / "g", nodes, tensors)
    file = OnnxFile(path)
    (matrix,) = matrices(file)
    tensor = matrix.read(file)
    columns = matrix.shape[1]
    (expected,) = ReferenceEvaluator(onnx.load(path)).run(None, {"x": torch.eye(columns).numpy()})
    assert torch.allclose(tensor.dequantize(torch.float32).T, torch.from_numpy(expected))
    assert matrix.scheme.symmetric == (dtype == torch.int8)
    assert matrix.scheme.bits == (8 if kind is None else 4)
    assert inspect(path).bits_per_quantized_weight is not None


def test_dynamically_quantized_graphs_of_onnxruntime_are_read(tmp_path: Path) -> None:
    codes = torch.randint(-127, 128, (12, 5), generator=torch.Generator().manual_seed(0))
    tensors = [
        array("up.weight_quantized", codes.to(torch.int8)),
        array("up.weight_scale", torch.tensor(0.5)),
        array("up.weight_zero_point", torch.tensor(0, dtype=torch.int8)),
        array("x_q", torch.zeros(1, 12, dtype=torch.uint8)),
        array("x_z", torch.tensor(0, dtype=torch.uint8)),
    ]
    inputs = ["x_q", "up.weight_quantized", "x_z", "up.weight_zero_point"]
    nodes = [helper.make_node("MatMulInteger", inputs, ["y"], name="/up/MatMul_quant")]
    file = OnnxFile(graph_of(tmp_path / "g", nodes, tensors))
    (matrix,) = matrices(file)
    assert matrix.name == "up.MatMul_quant" and matrix.scheme.name == "w8a8_row"
    assert torch.equal(matrix.read(file).dequantize(torch.float32), codes.T * 0.5)
