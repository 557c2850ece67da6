"""Checkpoints exported to ONNX: the roads, refusals, and outputs that are whole or not there.

A stand-in takes the model builder's place, which the interop suite runs itself.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import tiny_jobs as jobs
import torch
from many import run_ranks

import quantkit
from quantkit.calibration.processes.ranks import World
from quantkit.cli.app import main
from quantkit.errors import FormatError, ResumeError
from quantkit.formats.onnx.builder import build_graph, require_builder
from quantkit.formats.registry import format_of
from quantkit.pipeline import onnx_export
from quantkit.pipeline.onnx_export import export_onnx

pytestmark = pytest.mark.usefixtures("one_thread")

needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("onnx") is None,
    reason="the extra quantkit[onnx] is not installed",
)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantized")
    model = jobs.build("llama", root / "model")
    schemes = {"sym": "w4a16_g32", "asym": "w4a16_g32_asym", "int8": "w8a8_row", "w3": "w3a16_row"}
    return {
        name: jobs.finish(jobs.make_job(model, "rtn", scheme), root / name).out
        for name, scheme in schemes.items()
    }


class Builder:
    """Writes the graphs that the model builder would; `flip` changes a code of packed weights."""

    def __init__(self, flip: bool = False) -> None:
        self.flip = flip
        self.precisions: list[str] = []

    def __call__(self, checkpoint: Path, out: Path, *, precision: str, **options: object) -> None:
        from onnx_graphs import float_graph, nbits_graph

        from quantkit.formats.onnx.file import DATA, OnnxFile
        from quantkit.formats.open import open_source

        self.precisions.append(precision)
        source = open_source(checkpoint)
        if "quantization_config" in source.config:
            assert format_of(source).name in ("gptq", "awq")
            nbits_graph(out, checkpoint)
            if self.flip:
                place = next(iter(OnnxFile(out).stored.values())).offset
                data = bytearray((out / DATA).read_bytes())
                data[place] ^= 1
                (out / DATA).write_bytes(data)
        else:
            assert source.config["dtype"] == "float32"
            names = [n for n in source.names() if len(source.info(n).shape) == 2]
            others = {n: source.read(n) for n in source.names() if n not in names}
            float_graph(out, {name: source.read(name) for name in names}, others)
        (out / "genai_config.json").write_text("{}")


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    made = Builder()
    monkeypatch.setattr(onnx_export, "build_graph", made)
    monkeypatch.setattr(onnx_export, "require_builder", lambda: {"onnx": "1"})
    return made


def details(out: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((out / "quantkit/onnx.json").read_bytes())
    return found


@needs_onnx
@pytest.mark.parametrize(
    ("kind", "road", "precision"),
    [
        ("sym", "gptq", "int4"),
        ("asym", "awq", "int4"),
        ("int8", "float32", "fp32"),
        ("w3", "float32", "fp32"),
    ],
)
def test_every_scheme_takes_its_road_and_is_checked(
    quantized: dict[str, Path],
    builder: Builder,
    tmp_path: Path,
    kind: str,
    road: str,
    precision: str,
) -> None:
    done = export_onnx(quantized[kind], tmp_path / "out", progress=False)
    assert done.written and done.weights == 14 and not done.rounded
    assert builder.precisions == [precision]
    assert details(done.out)["road"] == road and details(done.out)["quantized nodes"] == 14
    files = {path.name for path in done.out.iterdir()}
    beside = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    graph = {"model.onnx", "model.onnx.data", "genai_config.json", "quantkit"}
    assert files == graph | beside | {"calibration.txt"}
    assert not export_onnx(quantized[kind], tmp_path / "out", progress=False).written
    with pytest.raises(ResumeError, match="accuracy level"):
        export_onnx(quantized[kind], tmp_path / "out", accuracy_level=1, progress=False)


@needs_onnx
def test_a_builder_that_changes_a_code_is_found_out_and_gone_round(
    quantized: dict[str, Path], builder: Builder, tmp_path: Path
) -> None:
    builder.flip = True
    out = export_onnx(quantized["asym"], tmp_path / "out", progress=False).out
    assert builder.precisions == ["int4", "fp32"]
    assert details(out)["road"] == "float32"
    assert "MatMulNBits: its values are in no weight" in str(details(out)["because"])


@needs_onnx
def test_a_killed_export_leaves_nothing_that_looks_finished(
    quantized: dict[str, Path],
    builder: Builder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(onnx_export, "_place", dies)
        with pytest.raises(KeyboardInterrupt):
            export_onnx(quantized["sym"], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial" / "model.onnx").exists()
    again = export_onnx(quantized["sym"], tmp_path / "out", progress=False)
    whole = export_onnx(quantized["sym"], tmp_path / "whole", progress=False)
    assert jobs.hashes(again.out) == jobs.hashes(whole.out)
    assert not list(tmp_path.glob("*.partial*"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.build("llama", tmp_path_factory.mktemp("plain"))


@needs_onnx
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_any_method_quantizes_to_onnx_in_one_command(
    plain: Path, builder: Builder, tmp_path: Path, method: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The same words again, and other words after them.\n" * 500)
    line = ("quantize", plain, "--method", method, "--scheme", "w4a16_g32", "--calib", text)
    sizes = ("--samples", "4", "--seq-len", "32")
    out = tmp_path / "out"
    assert jobs.command(*line, *sizes, "--format", "onnx", "--out", out) == 0
    assert jobs.command("verify", out, "--against", plain) == 0
    # The numbers are those of a checkpoint that is exported.
    assert jobs.command(*line, *sizes, "--out", tmp_path / "q") == 0
    assert jobs.command("verify", out, "--against", tmp_path / "q") == 0
    assert not (tmp_path / "out.checkpoint").exists()
    pages = ("report.html", "report.md", "run.json", "recipe.yaml")
    assert all((out / "quantkit" / name).is_file() for name in pages)
    # The same command again finds it done, another one does not; what is not its own stays.
    before = jobs.hashes(out)
    (tmp_path / "out.checkpoint").mkdir()
    (tmp_path / "out.checkpoint" / "mine.txt").write_text("mine")
    assert jobs.command(*line, *sizes, "--format", "onnx", "--out", out) == 0
    assert jobs.hashes(out) == before and builder.precisions == ["int4"]
    assert jobs.command(*line, "--samples", "3", "--format", "onnx", "--out", out) == 2
    assert (tmp_path / "out.checkpoint" / "mine.txt").read_text() == "mine"


@needs_onnx
def test_quantizing_to_onnx_goes_on_wherever_it_was_killed(
    plain: Path, builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    job = jobs.make_job(plain, "rtn", "w4a16_g32", format="onnx")
    whole = jobs.finish(job, tmp_path / "whole").out
    out = tmp_path / "out"
    for place in (
        "quantkit.pipeline.session.Session.finish",
        "quantkit.pipeline.onnx_export._place",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, dies)
            with pytest.raises(KeyboardInterrupt):
                jobs.finish(job, out)
        assert not out.exists()
    assert jobs.hashes(jobs.finish(job, out).out) == jobs.hashes(whole)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


@needs_onnx
def test_processes_share_the_checkpoint_and_one_builds(
    plain: Path, builder: Builder, tmp_path: Path
) -> None:
    job = jobs.make_job(plain, "gptq", "w4a16_g32", format="onnx")
    whole = jobs.finish(job, tmp_path / "whole").out
    out, built = tmp_path / "out", tmp_path / "built"

    def work(world: World) -> None:
        jobs.finish(dataclasses.replace(job, world=world), out)
        with built.open("a") as file:
            file.write(f"{world.rank} {len(builder.precisions)}\n")

    assert run_ranks(2, work, tmp_path / "told") == [(0, ""), (0, "")]
    assert jobs.hashes(out) == jobs.hashes(whole) and not (tmp_path / "out.checkpoint").exists()
    # The graph of `whole` was built before.
    assert sorted(built.read_text().splitlines()) == ["0 2", "1 1"]


@needs_onnx
def test_a_checkpoint_that_cannot_be_built_of_is_kept(
    plain: Path, builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise FormatError("format onnx: this type of model is not supported")

    monkeypatch.setattr(onnx_export, "build_graph", refuses)
    job = jobs.make_job(plain, "rtn", "w4a16_g32", format="onnx")
    with pytest.raises(FormatError, match=r"kept in .*out\.checkpoint"):
        jobs.finish(job, tmp_path / "out")
    assert jobs.command("verify", tmp_path / "out.checkpoint", "--against", plain) == 0


@needs_onnx
def test_models_in_memory_are_refused(plain: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(plain)
    with pytest.raises(FormatError, match="is a file for other programs"):
        quantkit.quantize(model, "rtn", scheme="w4a16_g32", format="onnx")


@needs_onnx
def test_graphs_of_several_methods_are_compared(
    plain: Path, builder: Builder, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text("A short text of a few words that the model has read before.\n" * 200)
    line = ["compare", plain, "--methods", "rtn,gptq", "--format", "onnx", "--out", out]
    line += ["--samples", "4", "--seq-len", "64", "--windows", "2", "--prompts", "0"]
    line += ["--calib", text, "--text", text]
    assert jobs.command(*line) == 0
    graphs = {path.parent.name: path for path in out.glob("*/model.onnx")}
    assert {name.partition("-")[0] for name in graphs} == {"rtn", "gptq"}
    assert not list(out.glob("*.checkpoint"))
    data = {name: jobs.hashes(path.parent)["model.onnx.data"] for name, path in graphs.items()}
    single = jobs.finish(jobs.make_job(plain, "rtn", None, format="onnx"), tmp_path / "alone").out
    alone = jobs.hashes(single)["model.onnx.data"]
    assert [name.startswith("rtn") for name in data] == [found == alone for found in data.values()]
    # The same command again finds everything done.
    before = {name: path.stat().st_mtime_ns for name, path in graphs.items()}
    assert jobs.command(*line) == 0
    assert {name: path.stat().st_mtime_ns for name, path in graphs.items()} == before


@needs_onnx
def test_the_command_writes_a_model_into_a_triton_repository(
    quantized: dict[str, Path], builder: Builder, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    line = ("export", quantized["sym"], "--format", "onnx", "--triton-repository", repository)
    assert jobs.command(*line) == 0
    assert [path.name for path in repository.iterdir()] == ["sym"]
    model = repository / "sym"
    assert {path.name for path in model.iterdir()} == {"1", "config.pbtxt", "quantkit"}
    assert (model / "1/model.onnx").is_file() and (model / "1/model.onnx.data").is_file()
    assert 'name: "sym"' in (model / "config.pbtxt").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "onnx"), "give either --out or"),
        (("--format", "onnx", "--out", "a", "--triton-repository", "b"), "give either --out or"),
        (("--format", "gptq", "--triton-repository", "b"), "goes with --format onnx"),
        (("--format", "onnx", "--out", "a", "--accuracy-level", "3"), "accuracy level 3"),
        (("--format", "onnx", "--out", "a", "--allow-rounding"), "--allow-rounding goes with"),
        (("--format", "onnx", "--out", "a", "--max-shard-size", "5GB"), "--max-shard-size goes"),
        (("--format", "gguf", "--out", "a", "--allow-unreadable"), "a format of safetensors, not"),
        (("--format", "gptq", "--out", "a", "--accuracy-level", "4"), "goes with --format onnx"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    quantized: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", str(quantized["sym"]), *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [("nf4_b64", "holds integers, not nf4"), ("w4a16_g8", "groups divisible by 16")],
)
def test_schemes_without_an_operator_are_refused_by_name(
    tmp_path: Path, scheme: str, reason: str
) -> None:
    model = jobs.build("llama", tmp_path / "model")
    job = jobs.make_job(model, "rtn", scheme, allow_unreadable=True)
    source = jobs.finish(job, tmp_path / "q").out
    with pytest.raises(FormatError, match=rf"proj.weight: onnx cannot hold {scheme}: .*{reason}"):
        export_onnx(source, tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("out*"))


def test_a_missing_package_is_named_with_the_extra(
    quantized: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(FormatError, match=r"pip install 'quantkit\[onnx\]'"):
        export_onnx(quantized["sym"], tmp_path / "out", progress=False)
    with pytest.raises(FormatError, match=r"pip install 'quantkit\[onnx\]'"):
        require_builder()
    assert not list(tmp_path.glob("out*"))


def test_what_the_builder_says_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.formats.onnx.builder.version", lambda _: "0")
    # Without the package the interpreter itself says so, and there is no graph.
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(FormatError, match="cannot build this model: exit code 1"):
        build_graph(tmp_path, tmp_path / "out", precision="fp32", options={})


def test_dtype_of_every_tensor_for_the_builder_is_float32(
    quantized: dict[str, Path], tmp_path: Path
) -> None:
    from quantkit.formats.open import open_source
    from quantkit.model.decoded import Unpacked

    view = Unpacked.open(open_source(quantized["asym"]))
    onnx_export._write_decoded(view, tmp_path)
    dense = open_source(tmp_path)
    assert {dense.info(name).dtype for name in dense.names()} == {torch.float32}
    for name in view.stored:
        assert torch.equal(dense.read(name), view.tensor(name).dequantize(torch.float32))
