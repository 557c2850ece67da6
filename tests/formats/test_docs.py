"""The format of docs/adding-a-format.md: it keeps the contract, and checkpoints in it are used."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import tiny_jobs as jobs
import torch
from format_samples import MemorySource
from safetensors.torch import load_file
from test_docs import DOCS, ROOT, fences

import quantkit
from quantkit.checks.inspection import inspect as inspect_checkpoint
from quantkit.checks.verify import verify
from quantkit.errors import CheckpointError, FormatError
from quantkit.formats.open import open_source
from quantkit.formats.registry import code_of, format_of, installed_formats, make_format
from quantkit.numbers.scheme import Scheme
from quantkit.pipeline.export import export

PAGE = DOCS / "adding-a-format.md"
GIVEN = "bitplanes:Bitplanes"


def suite() -> ModuleType:
    """The contract every built-in format keeps."""
    path = ROOT / "tests" / "contract" / "test_formats_contract.py"
    spec = importlib.util.spec_from_file_location("docs_formats_contract", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONTRACT = suite()
QUESTIONS = {
    name: function
    for name, function in vars(CONTRACT).items()
    if name.startswith("test_")
    and {"chosen", "format_name"} & {*inspect.signature(function).parameters}
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with the page's module, importable but not installed."""
    made = tmp_path_factory.mktemp("package")
    for language in ("python", "toml"):
        for title, body in fences(PAGE, language):
            assert title is not None
            (made / title).write_text(body)
    sys.path.insert(0, str(made))
    with jobs.one_thread():
        yield made
    sys.path.remove(str(made))
    sys.modules.pop("bitplanes", None)


@pytest.fixture
def installed(folder: Path) -> Iterator[Path]:
    """The same with the metadata that installing the page's package writes."""
    metadata = folder / "metadata"
    if not metadata.exists():
        metadata.mkdir()
        build = "prepare_metadata_for_build_wheel(sys.argv[1])"
        code = f"import setuptools.build_meta, sys; setuptools.build_meta.{build}"
        subprocess.run(
            [sys.executable, "-c", code, str(metadata)], cwd=folder, capture_output=True, check=True
        )
    sys.path.insert(0, str(metadata))
    importlib.invalidate_caches()
    yield folder
    sys.path.remove(str(metadata))
    importlib.invalidate_caches()


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS.keys())
def test_example_keeps_the_contract(question: Callable[..., None], installed: Path) -> None:
    if "format_name" in inspect.signature(question).parameters:
        question(format_name="bitplanes")
        return
    cases = CONTRACT.holdable("bitplanes")
    assert len(cases) > 60
    for case in cases:
        question(*case.values)


def test_example_holds_what_no_built_in_format_does(folder: Path) -> None:
    chosen = make_format(GIVEN)
    for bits in range(2, 9):
        assert chosen.supports(Scheme.parse(f"w{bits}a16_g32_asym")) is None
    assert chosen.supports(Scheme.parse("w8a8_row")) is not None
    assert len(code_of(chosen)) == 64 and code_of(make_format("awq")) == ""


def test_a_model_is_quantized_exported_and_read_in_it(installed: Path, tmp_path: Path) -> None:
    model = jobs.build("llama", tmp_path / "model")
    job = jobs.make_job(model, "rtn", "w6a16_g32", format=GIVEN, allow_unreadable=True)
    out = jobs.finish(job, tmp_path / "out").out
    assert verify(out, against=model).ok
    assert inspect_checkpoint(out).format == "bitplanes"
    loaded = quantkit.load(out)
    expected = jobs.logits(jobs.dequantized(model, out))
    # The same numbers, multiplied by another op.
    torch.testing.assert_close(jobs.logits(loaded), expected, rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "saved")
    assert same_tensors(out, tmp_path / "saved")

    four = jobs.make_job(model, "rtn", "w4a16_g32_asym", allow_unreadable=True)
    plain = jobs.finish(four, tmp_path / "four").out
    options = {"allow_unreadable": True, "progress": False}
    there = export(plain, tmp_path / "there", format_name=GIVEN, **options).out
    back = export(there, tmp_path / "back", format_name="compressed-tensors", **options).out
    assert same_tensors(plain, back)


def same_tensors(first: Path, second: Path) -> bool:
    ours, theirs = (load_file(path / "model.safetensors") for path in (first, second))
    return set(ours) == set(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_what_is_not_installed_is_not_run_for_a_checkpoint_that_names_it(folder: Path) -> None:
    sys.modules.pop("bitplanes", None)
    for method in ("bitplanes", GIVEN):
        source = MemorySource(config={"quantization_config": {"quant_method": method}}, tensors={})
        with pytest.raises(FormatError, match="is not read; known: awq"):
            format_of(source)
    assert "bitplanes" not in sys.modules


def test_an_installed_format_is_found_by_name(
    installed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert installed_formats() == ["bitplanes"]
    assert type(make_format("bitplanes")).__module__ == "bitplanes"
    assert jobs.command("formats") == 0
    assert "bitplanes " in capfd.readouterr().out


@pytest.mark.parametrize("line", ["bitplanes = bitplanes:Gone", "bitplanes = bitplanes:Scheme"])
def test_an_entry_point_that_is_no_format_is_refused(
    line: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[quantkit.formats]\n{line}\n")
    monkeypatch.syspath_prepend(os.fspath(tmp_path))
    with pytest.raises(FormatError, match="of an installed package"):
        make_format("bitplanes")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, "needs `weights`"),
        ([1], "needs `weights`"),
        ({"a.weight": {"shape": [8, 32]}}, "a.weight: KeyError"),
        ({"a.weight": {"scheme": "w4a16_g32", "shape": [8]}}, "a.weight: ValueError"),
        ({"a.weight": {"scheme": "w4a16_g32", "shape": [8, 33]}}, "a.weight"),
        ({"a.weight": {"scheme": "w4a16_g32", "shape": [-8, 32]}}, "a.weight"),
        ({"a.weight": {"scheme": "nf4_b64", "shape": [8, 64]}}, "a.weight: it holds"),
        ({"a.weight": {"scheme": "w4a16_g32", "shape": [8, 32]}}, "a.weight_scale"),
    ],
    ids=str,
)
def test_damaged_configurations_are_refused_by_name(
    weights: object, message: str, folder: Path
) -> None:
    config = {"quant_method": "bitplanes", "weights": weights}
    source = MemorySource(config={"quantization_config": config}, tensors={})
    with pytest.raises(CheckpointError, match=message):
        make_format(GIVEN).weights(source)


class ReadOnly:
    """A format that only reads."""

    name = "read-only"

    def weights(self, source: object) -> dict[str, object]:
        return {}

    def unpack(self, weight: object, source: object) -> object:
        return None


def test_what_is_no_format_is_refused_as_one() -> None:
    with pytest.raises(FormatError, match="it is no Format"):
        make_format("collections:OrderedDict")
    with pytest.raises(FormatError, match="read, not written"):
        make_format(f"{__name__}:ReadOnly")
    with pytest.raises(FormatError, match="quant_method"):
        format_of(MemorySource(config={"quantization_config": {"quant_method": [1]}}, tensors={}))


def test_a_saved_checkpoint_is_opened_from_disk(installed: Path, tmp_path: Path) -> None:
    model = jobs.build("llama", tmp_path / "model")
    job = jobs.make_job(model, "rtn", "w5a16_row", format="bitplanes", allow_unreadable=True)
    out = jobs.finish(job, tmp_path / "out").out
    source = open_source(out)
    assert all(w.scheme.bits == 5 for w in format_of(source).weights(source).values())
    again = jobs.make_job(out, "nf4", "nf4_b64", text=model / "calibration.txt", requantize=True)
    assert verify(jobs.finish(again, tmp_path / "again").out).ok
