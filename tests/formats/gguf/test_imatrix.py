"""llama.cpp's importance matrices are written from text and read in the place of it."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_jobs as jobs
import torch
from transformers import AutoModelForCausalLM

from quantkit.checks.verify import verify
from quantkit.demo.files import demo_path
from quantkit.errors import QuantkitError, ResumeError
from quantkit.formats.gguf.imatrix import read_imatrix, write_imatrix
from quantkit.formats.open import open_source
from quantkit.model.decoded import open_decoded
from quantkit.pipeline.job import prepare
from quantkit.pipeline.options import QuantizeOptions

gguf = pytest.importorskip("gguf", reason="the extra [gguf] writes the files")
pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"hidden_size": 64, "intermediate_size": 96}
UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


def built(kind: str, folder: Path) -> Path:
    """A tiny model with a tokenizer that llama.cpp has."""
    jobs.build(kind, folder, vocab_size=2048, **SIZES)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_path() / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("mixtral", tmp_path_factory.mktemp("mixtral") / "model")


def made(model: Path) -> Path:
    """The model's imatrix from its calibration text, by the command line."""
    out = model.parent / "imatrix.gguf"
    if not out.exists():
        text = ("--calib", model / "calibration.txt", "--samples", 8, "--seq-len", 32)
        assert jobs.command("imatrix", model, "--out", out, *text) == 0
    return out


def quantized(model: Path, out: Path, **options: Any) -> Path:
    asked = QuantizeOptions(**{"format": "gguf", "scheme": "q4_0", **options})
    return jobs.finish(prepare(str(model), asked), out).out


def test_it_holds_the_squares_of_what_each_weight_reads(model: Path) -> None:
    reader = gguf.GGUFReader(made(model))
    assert bytes(reader.fields["general.type"].parts[-1]) == b"imatrix"
    assert "general.architecture" not in reader.fields
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sums = {UP: torch.zeros(64), DOWN: torch.zeros(96)}

    def adding(name: str) -> Any:
        def add(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            sums[name] += args[0].square().sum((0, 1))

        return add

    for name in sums:
        dense.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(adding(name))
    options = QuantizeOptions(
        method="gptq", calibration=str(model / "calibration.txt"), samples=8, seq_len=32
    )
    calibration = prepare(str(model), options).calibration
    assert calibration is not None
    with torch.no_grad():
        dense(input_ids=calibration.ids)
    for name, place in ((UP, "blk.1.ffn_up.weight"), (DOWN, "blk.1.ffn_down.weight")):
        squares = torch.from_numpy(found[f"{place}.in_sum2"].copy())
        # float32 sums of 256 tokens in another order.
        torch.testing.assert_close(squares[0], sums[name], rtol=1e-4, atol=1e-6)
        assert found[f"{place}.counts"].tolist() == [[8 * 32]]
    assert len(found) == 2 * 2 * 7


def old_file(entries: dict[str, np.ndarray[Any, Any]], calls: int) -> bytes:
    """A .dat, byte by byte."""
    data = struct.pack("<i", len(entries))
    for name, means in entries.items():
        values = (means * calls).astype("<f4").tobytes()
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, means.size)
        data += values
    return data + struct.pack("<i", calls) + struct.pack("<i", 4) + b"text"


def test_both_files_say_the_same(model: Path, tmp_path: Path) -> None:
    new = read_imatrix(made(model))
    path = tmp_path / "old.dat"
    path.write_bytes(old_file({name: entry.mean_sq for name, entry in new.items()}, calls=8))
    old = read_imatrix(path)
    assert set(old) == set(new)
    for name, entry in new.items():
        assert np.array_equal(old[name].mean_sq, entry.mean_sq), name
    first = quantized(model, tmp_path / "first", imatrix=made(model))
    second = quantized(model, tmp_path / "second", imatrix=path)
    assert (first / "model.gguf").read_bytes() == (second / "model.gguf").read_bytes()


def weighed_errors(model: Path, out: Path, imatrix: Path) -> dict[str, float]:
    """Squared errors of each weight of a block, weighed by what reads it."""
    entries = read_imatrix(imatrix)
    source, found = open_decoded(open_source(model)), open_decoded(open_source(out))
    errors = {}
    for name, place in ((UP, "blk.1.ffn_up.weight"), (DOWN, "blk.1.ffn_down.weight")):
        lost = (found.read(name).float() - source.read(name).float()).square()
        errors[name] = float((lost * torch.from_numpy(entries[place].mean_sq)).sum())
    return errors


def test_errors_are_weighed_by_it(model: Path, tmp_path: Path) -> None:
    # One channel that matters more than all others, which plain rounding does not know.
    entries = read_imatrix(made(model))
    steep = tmp_path / "steep.gguf"
    sums = {
        name: (np.where(np.arange(e.mean_sq.size) % 32 == 5, 100, 0.01)[None], np.ones((1, 1)))
        for name, e in entries.items()
    }
    write_imatrix(steep, sums, dataset="made up", chunks=1, chunk_size=32)
    plain = quantized(model, tmp_path / "plain", method="rtn")
    weighed = quantized(model, tmp_path / "weighed", imatrix=steep)
    assert verify(weighed, against=model).ok
    report = json.loads((weighed / "quantkit/report.json").read_text())
    assert (report["method"], report["calibration"]) == ("rtn", None)
    assert any("14 of 14 weights" in note for note in report["notes"])
    before, after = (weighed_errors(model, out, steep) for out in (plain, weighed))
    # Seen: 0.14 and 0.06 of it.
    assert all(after[name] < 0.3 * before[name] for name in before), (before, after)


def test_experts_are_told_apart(mixture: Path, tmp_path: Path) -> None:
    entries = read_imatrix(made(mixture))
    entry = entries["blk.0.ffn_down_exps.weight"]
    experts = len(entry.counts)
    assert experts == 4 and entry.mean_sq.size == 4 * 96 and entry.counts.sum() == 2 * 8 * 32
    assert len(entries["blk.0.ffn_gate_inp.weight"].counts) == 1
    # An expert without tokens is rounded without, and that is told.
    squares, counts = entry.mean_sq.reshape(4, -1).copy(), np.array([[1.0], [0.0], [1.0], [1.0]])
    short = tmp_path / "short.gguf"
    write_imatrix(
        short,
        {"blk.0.ffn_down_exps.weight": (squares, counts)},
        dataset="made up", chunks=1, chunk_size=32,
    )  # fmt: skip
    out = quantized(mixture, tmp_path / "out", imatrix=short)
    degraded = json.loads((out / "quantkit/report.json").read_text())["degraded"]
    assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in degraded
    assert "model.layers.0.block_sparse_moe.experts.0.w2.weight" not in degraded


def test_another_imatrix_is_another_run(model: Path, tmp_path: Path) -> None:
    quantized(model, tmp_path / "out", imatrix=made(model))
    other = tmp_path / "other.dat"
    other.write_bytes(old_file({"blk.0.ffn_up.weight": np.ones(64)}, calls=1))
    with pytest.raises(ResumeError, match="imatrix"):
        quantized(model, tmp_path / "out", imatrix=other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gptq"}, "gptq reads more: use --method rtn"),
        ({"method": "awq"}, "awq reads more"),
        ({"format": "compressed-tensors", "scheme": "w4a16_g32"}, "--imatrix is for --format gguf"),
        ({"overrides": ("range=minmax",)}, "nothing of rtn reads it"),
    ],
    ids=["gptq", "awq", "format", "range"],
)
def test_what_does_not_go_with_it_is_refused(
    options: dict[str, Any], message: str, model: Path
) -> None:
    asked = {"format": "gguf", "scheme": "q4_0", "imatrix": made(model), **options}
    with pytest.raises(QuantkitError, match=re.escape(message)):
        prepare(str(model), QuantizeOptions(**asked))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut short"),
        (b"GGUF" + b"\0" * 40, ""),
        (struct.pack("<i", 0), "claims 0 entries"),
        (old_file({"blk.0.ffn_up.weight": np.ones(64)}, 1)[:60], "cut short"),
        (old_file({"blk.0.ffn_up.weight": np.full(64, np.nan)}, 1), "negative, NaN or infinite"),
        (old_file({"blk.0.ffn_up.weight": -np.ones(64)}, 1), "negative, NaN or infinite"),
        (
            old_file({"blk.0.ffn_up.weight": np.ones(48)}, 1),
            "has 64 columns; it was made",
        ),
        (
            old_file({"blk.0.ffn_up.weight": np.ones(128)}, 1),
            "has 64 columns; it was made",
        ),
        (old_file({"blk.7.ffn_up.weight": np.ones(64)}, 1), "it has none of this model's weights"),
    ],
    ids=["empty", "gguf", "no entries", "short", "NaN", "negative", "narrow", "wide", "other"],
)
def test_damaged_files_are_refused_by_name(
    data: bytes, message: str, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "given.dat"
    path.write_bytes(data)
    with pytest.raises(QuantkitError, match=f"given.dat.*{message}|{message}"):
        prepare(str(model), QuantizeOptions(format="gguf", scheme="q4_0", imatrix=path))


def test_a_file_that_is_there_stays(model: Path) -> None:
    before = made(model).read_bytes()
    assert jobs.command("imatrix", model, "--out", made(model)) == 2
    assert jobs.command("imatrix", model, "--out", model / "nowhere/imatrix.gguf") == 2
    assert made(model).read_bytes() == before
