"""4-bit floats in ggml's blocks: bit for bit what the owner's package makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_gguf as files
import tiny_jobs as jobs
import torch

import quantkit
from quantkit.checks.inspection import inspect
from quantkit.checks.verify import verify
from quantkit.demo.files import demo_path
from quantkit.errors import NumericsError, SchemeError
from quantkit.formats.gguf.container import MODEL_FILE
from quantkit.formats.gguf.file import read_gguf
from quantkit.formats.gguf.floats import FLOAT_TYPES, pack_mxfp4, unpack_floats
from quantkit.formats.open import open_source
from quantkit.formats.registry import make_format
from quantkit.model.decoded import open_decoded
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

pytest.importorskip("gguf", reason="the extra [gguf] writes the files")
import gguf
from formats.gguf.test_export import save_model

pytestmark = pytest.mark.usefixtures("one_thread")


def theirs(label: str, data: torch.Tensor) -> torch.Tensor:
    """The rows as the owner's package decodes them."""
    kind = gguf.GGMLQuantizationType[label]
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), kind).copy())


def test_every_mxfp4_code_under_every_scale_is_what_the_owner_makes_of_it() -> None:
    # 255 rows of 9 blocks (18 groups of 16 codes each side of a byte); scale 255 is NaN for us.
    exponents = torch.arange(255, dtype=torch.uint8)[:, None].expand(255, 9)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (255, 288), generator=generator, dtype=torch.uint8)
    scale = torch.where(exponents == 0, 2.0**-127, torch.exp2(exponents.double() - 127)).float()
    tensor = QuantizedTensor(
        codes=codes,
        scale=PlainScale(tensor=scale),
        zero=None,
        scheme=Scheme.parse("mxfp4a16"),
        dtype=torch.float32,
    )
    data = pack_mxfp4("w", tensor)
    assert data.shape == (255, 9 * 17) and torch.equal(data[:, ::17], exponents)
    expected = tensor.dequantize(torch.float32)
    assert torch.equal(theirs("MXFP4", data), expected)
    back = unpack_floats("w", "MXFP4", data, torch.float32)
    assert torch.equal(back.codes, codes) and torch.equal(back.scale.values(), scale)


def test_blocks_of_the_owner_are_decoded_as_by_it() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(7, 576, generator=generator) * torch.logspace(-3, 1, 7)[:, None]
    kind = gguf.GGMLQuantizationType.MXFP4
    data = torch.from_numpy(gguf.quants.quantize(weight.numpy(), kind))
    found = unpack_floats("w", "MXFP4", data, torch.float32)
    decoded = found.dequantize(torch.float32)
    # A zero of e2m1 has a sign, of the owner's integers none.
    assert torch.equal(decoded, theirs("MXFP4", data))
    assert float((decoded[3:] - weight[3:]).norm() / weight[3:].norm()) < 0.15


def test_every_nvfp4_scale_is_the_owners() -> None:
    scales = torch.arange(127, dtype=torch.uint8).repeat(4)[: 124 * 4].view(124, 4)
    codes = torch.randint(0, 256, (124, 32), generator=torch.Generator().manual_seed(2))
    data = torch.cat([scales, codes.to(torch.uint8)], dim=1)
    found = unpack_floats("w", "NVFP4", data, torch.float32)
    assert torch.equal(found.dequantize(torch.float32), theirs("NVFP4", data))


@pytest.mark.parametrize(("label", "byte"), [("MXFP4", 255), ("NVFP4", 127), ("NVFP4", 255)])
def test_a_scale_that_is_nan_is_refused(label: str, byte: int) -> None:
    data = torch.zeros(1, FLOAT_TYPES[label][2], dtype=torch.uint8)
    data[0, 0] = byte
    with pytest.raises(NumericsError, match="w: there is a scale"):
        unpack_floats("w", label, data, torch.float32)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_model_is_quantized_to_it(method: str, tmp_path: Path) -> None:
    rows = torch.randint(1, 2048, (8, 64), generator=torch.Generator().manual_seed(0)).tolist()
    out = files.quantize(
        demo_path(), tmp_path / "out", "mxfp4a16", method, calibration=rows, samples=8, seq_len=64
    )
    assert files.types(out) == {"MXFP4": 28, "Q8_0": 1, "F32": 9}
    assert read_gguf(out / MODEL_FILE).count("general.file_type") == 38
    assert verify(out, against=demo_path()).ok
    assert {group.scheme for group in inspect(out / MODEL_FILE).groups} == {"MXFP4", "Q8_0", None}
    loaded = quantkit.load(out / MODEL_FILE, dtype=torch.float32)
    dense = quantkit.load(demo_path(), dtype=torch.float32)
    assert (
        0 < jobs.distance(loaded(torch.tensor(rows)).logits, dense(torch.tensor(rows)).logits) < 0.2
    )


def test_experts_lie_together(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "mixtral", intermediate_size=96)
    out = files.quantize(source, tmp_path / "out", "mxfp4a16")
    found = read_gguf(out / MODEL_FILE).tensors["blk.0.ffn_down_exps.weight"]
    assert (found.type, found.shape[0], found.shape[2]) == ("MXFP4", 3, 96)
    assert verify(out, against=source).ok


def test_a_checkpoint_is_exported_as_it_is(tmp_path: Path) -> None:
    quantkit.quantize(
        demo_path(), "rtn", scheme="mxfp4a16", out=tmp_path / "packed", progress=False
    )
    done = files.export_gguf(tmp_path / "packed", tmp_path / "out")
    assert not done.rounded
    ours, packed = (
        open_decoded(open_source(path)) for path in (tmp_path / "out", tmp_path / "packed")
    )
    report = json.loads((tmp_path / "packed/quantkit/report.json").read_text())
    names = [t["name"] for t in report["tensors"] if t["scheme"] == "mxfp4a16"]
    assert len(names) == 28
    for name in names:
        assert torch.equal(ours.read(name), packed.read(name).float()), name


def test_nvfp4_is_read_only() -> None:
    reason = make_format("gguf").supports(Scheme.parse("nvfp4a16"))
    assert reason is not None and "no divisor" in reason
    with pytest.raises(SchemeError, match="no divisor"):
        jobs.make_job(demo_path(), "rtn", "nvfp4a16", format="gguf")
