"""ONNX Runtime and onnxruntime-genai compute with the numbers that quantkit wrote.

The export runs here too, as the model builder lives in this environment.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxruntime_genai
import pytest
import torch
from cases import MAX_NEW_TOKENS, PROMPTS
from dense import dense_model, int8_tokens
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel
from tritonclient.grpc import model_config_pb2

from quantkit.checks.inspection import inspect
from quantkit.checks.verify import verify
from quantkit.demo import demo_path
from quantkit.demo.corpus import heldout_text
from quantkit.formats.onnx.builder import build_graph
from quantkit.formats.onnx.file import OnnxFile
from quantkit.formats.onnx.matrices import matrices
from quantkit.formats.onnx.triton import model_config
from quantkit.formats.open import open_source
from quantkit.pipeline.api import quantize
from quantkit.pipeline.onnx_export import export_onnx

# Checkpoint -> how the builder was given it.
ROADS = {"rtn": "gptq", "awq": "awq", "w8a16": "float32", "w8a8": "float32"}
WEIGHT_ONLY = ["rtn", "awq", "w8a16"]
# Float32 sums in another order differ by less; one wrong code or scale differs by far more.
TOLERANCE = 1e-3
# Accuracy level 4 rounds each activation to int8 by block, some tenths of a percent of the norm.
INT8_TOLERANCE = 0.02
# Where one token's int8 code lies on a tie, float32 sums in another order choose the other one.
TIED_CODES_TOLERANCE = 0.1
# One row or many, with a cache or without: kernels sum in another order before they round to int8.
CACHE_TOLERANCE = 0.1
# A choice between two tokens closer than this may fall either way after such rounding.
TIE = 0.15
WINDOWS, WINDOW = 8, 256


@pytest.fixture(scope="session")
def exported(root: Path) -> dict[str, Path]:
    """Exported models by checkpoint, as users make them."""
    found = {}
    for name in ROADS:
        out = root / f"{name}-onnx"
        shutil.rmtree(out, ignore_errors=True)
        found[name] = export_onnx(root / name, out, progress=False).out
    return found


@pytest.fixture(scope="session")
def references(root: Path) -> dict[str, PreTrainedModel]:
    """quantkit's dequantized weights in float32, with int8 tokens where the scheme has them."""
    rule = int8_tokens(levels=127, lowest=-127)
    return {
        name: dense_model(root, name, activation=rule if name == "w8a8" else None) for name in ROADS
    }


@dataclass(frozen=True, kw_only=True)
class Step:
    """Logits [batch, T, V] and the cache after one run."""

    logits: np.ndarray
    cache: dict[str, np.ndarray]


class Runner:
    """A graph in ONNX Runtime on one thread."""

    def __init__(self, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        self.head_size = config["model"]["decoder"]["head_size"]
        inputs = self.session.get_inputs()
        self.past = [value for value in inputs if value.name.startswith("past_key_values.")]

    def run(self, ids: np.ndarray, cache: dict[str, np.ndarray] | None = None) -> Step:
        """Logits of tokens ids int64 [batch, T] after those in the cache."""
        if cache is None:
            shape = (len(ids), self.past[0].shape[1], 0, self.head_size)
            cache = {value.name: np.zeros(shape, np.float32) for value in self.past}
        length = next(iter(cache.values())).shape[2] + ids.shape[1]
        mask = np.ones((len(ids), length), np.int64)
        names = [value.name for value in self.session.get_outputs()]
        values = self.session.run(names, {"input_ids": ids, "attention_mask": mask, **cache})
        found = dict(zip(names, values, strict=True))
        logits = found.pop("logits")
        present = {key.replace("present.", "past_key_values."): v for key, v in found.items()}
        return Step(logits=logits, cache=present)

    def greedy(self, prompt: list[int]) -> list[int]:
        """MAX_NEW_TOKENS tokens, one at a time through the cache."""
        step = self.run(np.array([prompt]))
        tokens = [int(step.logits[0, -1].argmax())]
        while len(tokens) < MAX_NEW_TOKENS:
            step = self.run(np.array([tokens[-1:]]), step.cache)
            tokens.append(int(step.logits[0, -1].argmax()))
        return tokens


def in_float32(folder: Path, target: Path) -> Path:
    """A copy that computes weight-only products in float32: accuracy level 1."""
    target.mkdir()
    shutil.copy(folder / "model.onnx.data", target)
    shutil.copy(folder / "genai_config.json", target)
    model = onnx.load_model(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    (target / "model.onnx").write_bytes(model.SerializeToString())
    return target


def given(root: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and the logits that `quantkit.load` gives for them."""
    found = load_file(root / f"{name}-logits.safetensors")
    return found["input_ids"].numpy(), found["logits"].numpy()


@pytest.mark.parametrize("name", ROADS)
def test_the_checkpoint_took_its_road(exported: dict[str, Path], name: str) -> None:
    details = json.loads((exported[name] / "quantkit/onnx.json").read_text(encoding="utf-8"))
    assert details["road"] == ROADS[name]
    operators = {node.op_type for node in onnx.load(exported[name] / "model.onnx").graph.node}
    quantized = "MatMulInteger" if name == "w8a8" else "MatMulNBits"
    assert {quantized, "GroupQueryAttention"} <= operators


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_in_float32_the_logits_are_quantkits(
    root: Path, exported: dict[str, Path], tmp_path: Path, name: str
) -> None:
    ids, expected = given(root, name)
    found = Runner(in_float32(exported[name], tmp_path / name)).run(ids).logits
    difference = np.abs(found - expected).max()
    print(f"{name}: largest difference of a logit in float32 {difference:.2e}")
    assert difference < TOLERANCE


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_with_int8_activations_the_logits_are_near(
    root: Path, exported: dict[str, Path], name: str
) -> None:
    ids, expected = given(root, name)
    found = Runner(exported[name]).run(ids).logits
    distance = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    print(f"{name}: relative distance of the logits at accuracy level 4 {distance:.4f}")
    assert distance < INT8_TOLERANCE


def test_int8_tokens_give_the_logits_of_quantkits_int8_layers(
    root: Path, exported: dict[str, Path]
) -> None:
    ids, expected = given(root, "w8a8")
    difference = np.abs(Runner(exported["w8a8"]).run(ids).logits - expected).max()
    print(f"w8a8: largest difference of a logit {difference:.4f}")
    assert difference < TIED_CODES_TOLERANCE


@pytest.mark.parametrize("name", ["rtn", "w8a8"])
def test_batch_and_sequence_are_free_and_the_cache_goes_on(
    exported: dict[str, Path], root: Path, name: str
) -> None:
    runner = Runner(exported[name])
    ids, _ = given(root, name)
    rows = np.concatenate([ids[:, :12], ids[:, 12:24], ids[:, 3:15]])
    whole = runner.run(rows)
    for row, logits in zip(rows, whole.logits, strict=True):
        assert np.abs(runner.run(row[None]).logits[0] - logits).max() < CACHE_TOLERANCE
    # GroupQueryAttention goes on by one token for a batch, by several for one sequence.
    for batch, sizes in ((rows, [7, 1, 1, 1, 1, 1]), (rows[:1], [7, 5])):
        step, parts, start = None, [], 0
        for size in sizes:
            ids = batch[:, start : start + size]
            step = runner.run(ids, None if step is None else step.cache)
            parts.append(step.logits)
            start += size
        joined = np.concatenate(parts, axis=1)
        assert np.abs(joined - whole.logits[: len(batch)]).max() < CACHE_TOLERANCE


def assert_agrees(
    reference: PreTrainedModel, prompt: list[int], tokens: list[int], label: str
) -> None:
    """Free running to the first difference, a tie of the reference; then teacher-forced."""
    start = torch.tensor([prompt])
    expected = reference.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=MAX_NEW_TOKENS,
        min_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
    )[0, len(prompt) :].tolist()
    with torch.no_grad():
        logits = reference(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0]
    logits = logits[len(prompt) - 1 : -1]
    assert len(tokens) == MAX_NEW_TOKENS
    pairs = enumerate(zip(tokens, expected, strict=True))
    first = next((step for step, (ours, theirs) in pairs if ours != theirs), None)
    print(f"{label}: first difference at token {first}")
    if first is not None:
        best, second = logits[first].topk(2).values.tolist()
        assert best - second < TIE
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert float((logits.max(-1).values - chosen).max()) < 2 * TIE


@pytest.mark.parametrize("name", ROADS)
def test_greedy_tokens_are_those_of_quantkits_weights(
    root: Path, exported: dict[str, Path], references: dict[str, PreTrainedModel], name: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(root / name)
    runner = Runner(exported[name])
    for text in PROMPTS:
        prompt = tokenizer(text).input_ids
        assert_agrees(references[name], prompt, runner.greedy(prompt), name)


@pytest.mark.parametrize("name", ROADS)
def test_onnxruntime_genai_generates_the_same(
    root: Path, exported: dict[str, Path], references: dict[str, PreTrainedModel], name: str
) -> None:
    model = onnxruntime_genai.Model(str(exported[name]))
    tokenizer = onnxruntime_genai.Tokenizer(model)
    expected = AutoTokenizer.from_pretrained(root / name)
    for text in PROMPTS:
        prompt = expected(text).input_ids
        encoded = [int(token) for token in tokenizer.encode(text)]
        # It leaves out what tokenizer.json's post-processor puts before the text.
        assert encoded in (prompt, prompt[1:])
        length = len(prompt) + MAX_NEW_TOKENS
        options = onnxruntime_genai.GeneratorParams(model)
        options.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = onnxruntime_genai.Generator(model, options)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        tokens = [int(token) for token in generator.get_sequence(0)][len(prompt) :]
        assert_agrees(references[name], prompt, tokens, f"{name} (onnxruntime-genai)")


@pytest.mark.parametrize("name", ROADS)
def test_perplexity_is_within_half_a_percent(
    root: Path, exported: dict[str, Path], references: dict[str, PreTrainedModel], name: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(root / name)
    # Some tokens per document are enough: the text is short pieces of many.
    text = "\n".join(part[:600] for part in heldout_text()[:40])
    ids = torch.tensor(tokenizer(text).input_ids[: WINDOWS * WINDOW]).view(WINDOWS, WINDOW)
    runner = Runner(exported[name])
    losses: dict[str, list[float]] = {"ours": [], "theirs": []}
    for window in ids:
        with torch.no_grad():
            ours = references[name](input_ids=window[None], use_cache=False).logits
        theirs = torch.from_numpy(runner.run(window[None].numpy()).logits)
        for key, logits in (("ours", ours), ("theirs", theirs)):
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], window[1:])
            losses[key].append(float(loss))
    ours, theirs = (math.exp(sum(values) / WINDOWS) for values in losses.values())
    print(f"{name}: perplexity {theirs:.4f}, quantkit {ours:.4f}, ratio {theirs / ours:.5f}")
    assert abs(theirs / ours - 1) < 0.005


@pytest.mark.parametrize("name", ROADS)
def test_verify_lets_onnxruntime_run_what_was_exported(
    root: Path, exported: dict[str, Path], name: str
) -> None:
    result = verify(exported[name], against=root / name, runtime="onnxruntime")
    print(result.checks[-1].detail)
    assert result.ok, result.text()


def test_what_the_builder_quantizes_itself_is_read(root: Path, tmp_path: Path) -> None:
    build_graph(root / "source/demo", tmp_path, precision="int4", options={})
    assert inspect(tmp_path).bits_per_quantized_weight == pytest.approx(5, abs=0.5)
    file, source = OnnxFile(tmp_path), open_source(root / "source/demo")
    (matrix,) = [m for m in matrices(file) if "layers.0.mlp.up_proj" in m.name]
    weight = source.read("model.layers.0.mlp.up_proj.weight").float()
    error = (matrix.read(file).dequantize(torch.float32) - weight).norm() / weight.norm()
    # Nearest 4-bit codes in groups of 32 lose 0.09; any other order of codes 1 and more.
    assert error < 0.2


@pytest.mark.parametrize("kind", ["DequantizeLinear", "MatMulNBits", "MatMulInteger"])
def test_what_onnxruntimes_own_quantizers_write_is_read(tmp_path: Path, kind: str) -> None:
    """QDQ in blocks of 4 bits, the operator, and dynamic quantization to int8."""
    weight = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 24])
    node = helper.make_node("MatMul", ["x", "up.weight"], ["y"], name="/up/MatMul")
    values = [numpy_helper.from_array(weight.numpy(), "up.weight")]
    graph = helper.make_graph([node], "g", [x], [y], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    plain, path = tmp_path / "plain.onnx", tmp_path / "quantized.onnx"
    onnx.save_model(model, plain)
    if kind == "MatMulInteger":
        quantize_dynamic(plain, path, per_channel=True, weight_type=QuantType.QInt8)
    else:
        form = QuantFormat.QDQ if kind == "DequantizeLinear" else QuantFormat.QOperator
        quantizer = MatMulNBitsQuantizer(
            model, bits=4, block_size=32, is_symmetric=False, quant_format=form
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(path))
    file = OnnxFile(path)
    (matrix,) = matrices(file)
    assert matrix.operator == kind
    assert matrix.scheme.group_size == (None if kind == "MatMulInteger" else 32)
    found = matrix.read(file).dequantize(torch.float32)
    assert float((found - weight.T).norm() / weight.norm()) < 0.15


GATHERED = {
    # name: (ONNX type of the data, bits, gather axis, has zeros, scales, columns, block)
    "uint8-2": (TensorProto.UINT8, 2, 0, True, np.float32, 64, 16),
    "uint8-4": (TensorProto.UINT8, 4, 0, True, np.float32, 96, 32),
    "uint8-4-centered": (TensorProto.UINT8, 4, 0, False, np.float16, 96, 16),
    "uint8-8": (TensorProto.UINT8, 8, 0, True, np.float16, 64, 32),
    "uint8-8-row": (TensorProto.UINT8, 8, 0, False, np.float32, 50, 64),
    "int4": (TensorProto.INT4, 4, 0, False, np.float32, 48, 16),
    "int4-zeros": (TensorProto.INT4, 4, -2, True, np.float16, 48, 16),
    "uint4": (TensorProto.UINT4, 4, 0, True, np.float32, 48, 16),
    "uint4-from-zero": (TensorProto.UINT4, 4, 0, False, np.float32, 48, 16),
    "uint4-columns": (TensorProto.UINT4, 4, 1, True, np.float32, 48, 16),
}


@pytest.mark.parametrize("case", GATHERED)
def test_tables_of_embeddings_decode_to_onnxruntimes_values(tmp_path: Path, case: str) -> None:
    kind, bits, axis, zeros, dtype, columns, block = GATHERED[case]
    rows, count, turned = 7, -(-columns // block), axis == 1
    random = np.random.default_rng(0)

    def packed(name: str, width: int) -> onnx.TensorProto:
        shape = [width, rows] if turned else [rows, width]
        if kind == TensorProto.UINT8:
            shape[1] = -(-width * bits // 8)
        high = 256 if kind == TensorProto.UINT8 else 16
        low = -8 if kind == TensorProto.INT4 else 0
        values = random.integers(low, low + high, shape)
        return helper.make_tensor(name, kind, shape, values.flatten().tolist())

    scales = random.uniform(0.1, 1, (count, rows) if turned else (rows, count)).astype(dtype)
    tensors = [packed("data", columns), numpy_helper.from_array(scales, "scales")]
    tensors += [packed("zeros", count)] if zeros else []
    node = helper.make_node(
        "GatherBlockQuantized",
        ["data", "ids", "scales", *(["zeros"] if zeros else [])],
        ["y"],
        name="/embed/Gather",
        domain="com.microsoft",
        bits=bits,
        block_size=block,
        gather_axis=axis,
        quantize_axis=0 if turned else 1,
    )
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [None])
    y = helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(scales.dtype), None)
    graph = helper.make_graph([node], "g", [ids], [y], tensors)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    path = tmp_path / "model.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=domains, ir_version=10), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"ids": np.arange(rows)})
    (matrix,) = matrices(OnnxFile(path))
    assert matrix.shape == (rows, columns) and matrix.scheme.bits == bits
    tensor = matrix.read(OnnxFile(path))
    found = tensor.dequantize(torch.from_numpy(scales[:1]).dtype).numpy()
    assert np.array_equal(found, expected.T if turned else expected)


def test_a_quantized_table_of_onnxruntimes_quantizer_is_read(tmp_path: Path) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [None])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 64])
    node = helper.make_node("Gather", ["embed.weight", "ids"], ["y"], name="/embed/Gather")
    values = [numpy_helper.from_array(weight.numpy(), "embed.weight")]
    graph = helper.make_graph([node], "g", [ids], [y], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    for symmetric in (True, False):
        quantizer = MatMulNBitsQuantizer(
            model,
            bits=4,
            block_size=32,
            is_symmetric=symmetric,
            op_types_to_quantize=("MatMul", "Gather"),
        )
        quantizer.process()
        path = tmp_path / f"{symmetric}.onnx"
        quantizer.model.save_model_to_file(str(path))
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (expected,) = session.run(None, {"ids": np.arange(24)})
        (matrix,) = matrices(OnnxFile(path))
        assert matrix.operator == "GatherBlockQuantized"
        found = matrix.read(OnnxFile(path)).dequantize(torch.float32)
        assert np.array_equal(found.numpy(), expected)
        assert float((found - weight).norm() / weight.norm()) < 0.15


def test_a_tied_quantized_head_of_the_model_builder_is_read_as_the_table_too(
    tmp_path: Path,
) -> None:
    # Whatever model the others are of: this one ties its head.
    build_graph(
        demo_path(),
        tmp_path,
        precision="int4",
        options={"shared_embeddings": "true", "int4_op_types_to_quantize": "MatMul/Gather"},
    )
    file = OnnxFile(tmp_path)
    found = {matrix.operator: matrix for matrix in matrices(file) if "layers" not in matrix.name}
    table, head = found["GatherBlockQuantized"], found["MatMulNBits"]
    # One weight in the file: it is shown once.
    assert table.tensors == head.tensors
    names = [group.pattern for group in inspect(tmp_path).groups]
    assert len([name for name in names if name in (table.name, head.name)]) == 1
    values = table.read(file).dequantize(torch.float32)
    assert torch.equal(values, head.read(file).dequantize(torch.float32))


def test_the_triton_configuration_parses_with_the_servers_schema(
    exported: dict[str, Path],
) -> None:
    text = model_config(exported["rtn"], name="demo")
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert config.name == "demo" and config.backend == "onnxruntime"
    session = Runner(exported["rtn"]).session
    assert [value.name for value in config.input] == [v.name for v in session.get_inputs()]
    assert [value.name for value in config.output] == [v.name for v in session.get_outputs()]
    ids, logits = config.input[0], config.output[0]
    assert ids.data_type == model_config_pb2.TYPE_INT64 and list(ids.dims) == [-1, -1]
    assert logits.data_type == model_config_pb2.TYPE_FP32
    assert list(logits.dims)[:2] == [-1, -1] and logits.dims[2] > 0


def test_one_command_quantizes_and_builds_what_the_runtime_agrees_with(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = {"samples": 8, "seq_len": 128, "progress": False}
    quantize(demo_path(), "gptq", scheme="w4a16_g32", format="onnx", out=out, **sizes)
    result = verify(out, against=demo_path(), runtime="onnxruntime")
    assert result.ok, result.text()
    assert not (tmp_path / "out.checkpoint").exists()
