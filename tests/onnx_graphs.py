"""Small graphs as the model builder lays them out, for machines that do not have it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import TensorProto, helper
from torch import Tensor

from quantkit.formats.onnx.file import DOMAIN, DataWriter
from quantkit.formats.onnx.nbits import blocks_of, pack
from quantkit.formats.open import open_source
from quantkit.model.decoded import Unpacked


def float_graph(
    folder: Path, matrices: Mapping[str, Tensor], others: Mapping[str, Tensor] | None = None
) -> None:
    """Writes a graph with one product x_NAME [batch, I] by each matrix [O, I]; float32.

    `others` are tensors that it only hands through.
    """
    folder.mkdir(parents=True, exist_ok=True)
    inputs, outputs, nodes, entries = [], [], [], []
    with DataWriter(folder) as writer:
        for name, matrix in matrices.items():
            rows, columns = matrix.shape
            inputs.append(_value(f"x_{columns}", columns))
            outputs.append(_value(f"y_{name}", rows))
            entries.append(writer.put(f"{name}.MatMul.weight", matrix.float().T.contiguous()))
            nodes.append(
                helper.make_node(
                    "MatMul",
                    [f"x_{columns}", f"{name}.MatMul.weight"],
                    [f"y_{name}"],
                    name=f"/{name}/MatMul",
                )
            )
        _keep(others or {}, writer, nodes, entries, outputs)
        inputs = list({value.name: value for value in inputs}.values())
        graph = helper.make_graph(nodes, "main_graph", inputs, outputs, entries)
        writer.finish(_model(graph))


def nbits_graph(folder: Path, checkpoint: Path) -> None:
    """Writes a graph of MatMulNBits for every quantized weight of a checkpoint."""
    view = Unpacked.open(open_source(checkpoint))
    inputs, outputs, nodes, entries = [], [], [], []
    with DataWriter(folder) as writer:
        for name, weight in view.stored.items():
            blocks = blocks_of(view.tensor(name))
            packed = pack(blocks)
            rows, columns = weight.shape
            parts = {"qweight": packed.codes, "scales": packed.scales, "qzeros": packed.zeros}
            found = [
                writer.put(f"{name}.{part}", tensor)
                for part, tensor in parts.items()
                if tensor is not None
            ]
            entries += found
            inputs.append(_value(f"x_{columns}", columns))
            outputs.append(_value(f"y_{name}", rows))
            nodes.append(
                helper.make_node(
                    "MatMulNBits",
                    [f"x_{columns}", *(entry.name for entry in found)],
                    [f"y_{name}"],
                    name=f"/{name}/MatMulNBits",
                    domain=DOMAIN,
                    K=columns,
                    N=rows,
                    bits=blocks.bits,
                    block_size=blocks.size,
                )
            )
        others = {name: view.read(name) for name in view.names() if name not in view.stored}
        _keep(others, writer, nodes, entries, outputs)
        inputs = list({value.name: value for value in inputs}.values())
        writer.finish(_model(helper.make_graph(nodes, "main_graph", inputs, outputs, entries)))


def _keep(
    tensors: Mapping[str, Tensor],
    writer: DataWriter,
    nodes: list[onnx.NodeProto],
    entries: list[TensorProto],
    outputs: list[onnx.ValueInfoProto],
) -> None:
    """Adds tensors as initializers, matrices [I, O] as the builder has them."""
    for name, tensor in tensors.items():
        value = tensor.float()
        entries.append(
            writer.put(f"{name}.kept", value.T.contiguous() if value.ndim == 2 else value)
        )
        nodes.append(helper.make_node("Identity", [f"{name}.kept"], [f"{name}.out"]))
        outputs.append(helper.make_tensor_value_info(f"{name}.out", TensorProto.FLOAT, None))


def _value(name: str, columns: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch_size", columns])


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    domains = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10)
