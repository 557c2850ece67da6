"""verify passes what the pipeline writes and names what is wrong with anything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.manifest import write_manifest
from quantkit.checks.verify import VerifyResult, verify
from quantkit.errors import CheckpointError
from quantkit.methods.recipe import load_recipe
from quantkit.pipeline.job import prepare
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.session import run

pytestmark = pytest.mark.usefixtures("one_thread")

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"
HEAD = "lm_head.weight"
WEIGHTS = "model.safetensors"
REPORT = "quantkit/report.json"


def quantize(source: Path, out: Path, method: str, scheme: str, *, head: str | None = None) -> Path:
    text = source / "calibration.txt"
    text.write_text("All work and no play makes a dull text to calibrate on. " * 40)
    recipe = load_recipe(method, scheme=scheme, samples=2, seq_len=32, head=head)
    request = QuantizeOptions(recipe=recipe, calibration=str(text), allow_unreadable=True)
    run(prepare(str(source), request), out, progress=False)
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("llama", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(source, tmp_path_factory.mktemp("awq") / "out", "awq", "w4a16_g32_asym")


def names_of_failed(result: VerifyResult) -> list[str]:
    return [check.name for check in result.checks if not check.ok]


def test_a_finished_output_passes_every_check(finished: Path, source: Path) -> None:
    result = verify(finished, against=source)
    assert result.ok, result.text()
    assert [check.name for check in result.checks] == [
        "files",
        "headers",
        "coverage",
        "numbers",
        "source",
    ]
    assert json.loads(json.dumps(result.to_dict()))["ok"] is True
    assert "all checks passed" in result.text()


def test_without_a_source_weights_are_not_compared(finished: Path) -> None:
    result = verify(finished)
    assert result.ok
    assert "source" not in [check.name for check in result.checks]


@pytest.mark.parametrize(
    ("kind", "method", "scheme", "head"),
    [
        ("gpt2", "awq", "w4a16_g32_asym", None),
        ("gemma3_text", "awq", "w4a16_g32", None),
        ("qwen2", "rtn", "w4a16_g32", "w8a16_row"),
        ("mixtral", "rtn", "w4a16_g32", None),
        ("llama", "gptq", "w2a16_g32", None),
        ("opt", "nf4", "nf4_b64_dq", None),
    ],
    ids=lambda value: str(value),
)
def test_every_layout_passes(
    kind: str, method: str, scheme: str, head: str | None, tmp_path: Path
) -> None:
    model = tiny.build(kind, tmp_path / "model", dtype=torch.bfloat16)
    out = quantize(model, tmp_path / "out", method, scheme, head=head)
    result = verify(out, against=model)
    assert result.ok, result.text()


Tensors = dict[str, torch.Tensor]


def edit(finished: Path, out: Path, change: Callable[[Tensors], None]) -> Path:
    """A copy with changed tensors and a manifest that fits them."""
    shutil.copytree(finished, out)
    tensors = load_file(out / WEIGHTS)
    change(tensors)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    write_manifest(out)
    return out


def edit_report(finished: Path, out: Path, change: Callable[[Any], None]) -> Path:
    """A copy with a changed report and a manifest that fits it."""
    shutil.copytree(finished, out)
    report = json.loads((out / REPORT).read_text())
    change(report)
    (out / REPORT).write_text(json.dumps(report))
    write_manifest(out)
    return out


def assert_only_fails(result: VerifyResult, check: str, *words: str) -> None:
    assert names_of_failed(result) == [check], result.text()
    problems = "\n".join(p for c in result.checks for p in c.problems)
    for word in words:
        assert word in problems
    assert "FAILED" in result.text()


def test_a_flipped_bit_fails_the_manifest(finished: Path, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    content = bytearray((out / "tokenizer.json").read_bytes())
    content[10] ^= 1
    (out / "tokenizer.json").write_bytes(content)
    assert_only_fails(verify(out, against=source), "files", "tokenizer.json")


def test_a_missing_manifest_fails(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "quantkit" / "manifest.json").unlink()
    assert_only_fails(verify(out), "files", "unfinished")


def test_a_missing_shard_is_reported_not_raised(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / WEIGHTS).unlink()
    assert names_of_failed(verify(out)) == ["files", "headers"]


def test_no_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        verify(tmp_path / "nothing")


def test_a_nan_scale_is_named(finished: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{UP}_scale"][3, 0] = float("nan")

    assert_only_fails(verify(edit(finished, tmp_path / "out", change)), "numbers", UP)


def test_a_nan_in_an_unquantized_tensor_is_named(finished: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[HEAD][3, 0] = float("nan")

    assert_only_fails(verify(edit(finished, tmp_path / "out", change)), "numbers", HEAD)


def test_a_code_outside_the_scheme_is_named(tmp_path: Path) -> None:
    model = tiny.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    finished = quantize(model, tmp_path / "int8", "rtn", "w8a8_row")

    def change(tensors: Tensors) -> None:
        tensors[UP][0, 0] = -128

    result = verify(edit(finished, tmp_path / "out", change))
    assert_only_fails(result, "numbers", UP, "code")


@pytest.mark.parametrize(
    "method, scheme, part, number",
    [
        ("fp8", "fp8a8_row", "", 0x7F),
        ("rtn", "mxfp4a16", "_scale", 255),
        ("rtn", "nvfp4a16", "_global_scale", 0),
    ],
    ids=["fp8", "mxfp4", "nvfp4"],
)
def test_numbers_that_no_value_belongs_to_are_a_finding(
    method: str, scheme: str, part: str, number: int, tmp_path: Path
) -> None:
    model = tiny.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    finished = quantize(model, tmp_path / "finished", method, scheme)

    def change(tensors: Tensors) -> None:
        stored = tensors[UP + part].view(torch.uint8)
        stored.view(-1)[:4] = number

    assert_only_fails(verify(edit(finished, tmp_path / "out", change)), "numbers", UP)


def test_zeros_in_the_middle_are_no_other_scheme(tmp_path: Path) -> None:
    """awq does not say what is symmetric; a weight may happen to have such zeros only."""
    model = tiny.build("llama", tmp_path / "model")
    state = load_file(model / WEIGHTS)
    # Groups from -8 to 7 steps: their zero is 8.
    state[UP] = torch.arange(-8, 8).repeat(state[UP].numel() // 16).view(state[UP].shape) / 64
    save_file(state, model / WEIGHTS, metadata={"format": "pt"})
    recipe = load_recipe("rtn", scheme="w4a16_g32_asym")
    job = prepare(str(model), QuantizeOptions(recipe=recipe, format="awq"))
    run(job, tmp_path / "out", progress=False)
    result = verify(tmp_path / "out", against=model)
    assert result.ok, result.text()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_weights_of_any_size_are_compared(size: float, tmp_path: Path) -> None:
    model = tiny.build("llama", tmp_path / "model")
    state = load_file(model / WEIGHTS)
    state[UP] *= size
    save_file(state, model / WEIGHTS, metadata={"format": "pt"})
    recipe = load_recipe("rtn", scheme="w8a16_g32")
    run(prepare(str(model), QuantizeOptions(recipe=recipe)), tmp_path / "out", progress=False)
    result = verify(tmp_path / "out", against=model)
    assert result.ok, result.text()

    def turned(tensors: Tensors) -> None:
        tensors[UP + "_scale"].neg_()

    changed = verify(edit(tmp_path / "out", tmp_path / "changed", turned), against=model)
    problems = [problem for check in changed.checks for problem in check.problems]
    assert any(problem.startswith(f"{UP}: relative error 2.0") for problem in problems), problems


def swap_layers(tensors: Tensors) -> None:
    other = UP.replace("layers.1", "layers.2")
    for suffix in ("_packed", "_scale", "_zero_point"):
        mine = tensors[UP + suffix].clone()
        tensors[UP + suffix] = tensors[other + suffix].clone()
        tensors[other + suffix] = mine


def roll_one_row(tensors: Tensors) -> None:
    tensors[f"{UP}_packed"][5] = tensors[f"{UP}_packed"][5].roll(1)


def grow_scales(tensors: Tensors) -> None:
    tensors[f"{UP}_scale"] *= 2


@pytest.mark.parametrize("change", [swap_layers, roll_one_row, grow_scales])
def test_weights_that_are_not_the_sources_fail(
    change: Callable[[Tensors], None], finished: Path, source: Path, tmp_path: Path
) -> None:
    out = edit(finished, tmp_path / "out", change)
    assert verify(out).ok
    assert_only_fails(verify(out, against=source), "source", UP)


def change_kept(tensors: Tensors) -> None:
    tensors[HEAD].view(torch.int16)[0, 0] ^= 1


def change_rescaled(tensors: Tensors) -> None:
    tensors[NORM][7] *= 1.05


@pytest.mark.parametrize(
    ("change", "name"), [(change_kept, HEAD), (change_rescaled, NORM)], ids=["kept", "rescaled"]
)
def test_changed_unquantized_tensors_fail(
    change: Callable[[Tensors], None], name: str, finished: Path, source: Path, tmp_path: Path
) -> None:
    out = edit(finished, tmp_path / "out", change)
    assert_only_fails(verify(out, against=source), "source", name)


def test_another_source_fails(finished: Path, tmp_path: Path) -> None:
    other = tiny.build("llama", tmp_path / "other", seed=1, dtype=torch.bfloat16)
    assert_only_fails(verify(finished, against=other), "source", UP, NORM, HEAD)


def test_lost_folds_show_in_the_rescaled_tensors(
    finished: Path, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "quantkit" / "folds.safetensors").unlink()
    write_manifest(out)
    assert_only_fails(verify(out, against=source), "source", NORM)


def test_a_tensor_the_report_does_not_know_fails(finished: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["stray"] = torch.zeros(2)

    assert_only_fails(verify(edit(finished, tmp_path / "out", change)), "coverage", "stray")


def drop_entry(report: Any) -> None:
    report["tensors"] = [t for t in report["tensors"] if t["name"] != UP]


def claim_kept(report: Any) -> None:
    for tensor in report["tensors"]:
        if tensor["name"] == UP:
            tensor["fate"] = "kept"


def claim_scheme(report: Any) -> None:
    for tensor in report["tensors"]:
        if tensor["name"] == UP:
            tensor["scheme"] = "w8a16_row"


@pytest.mark.parametrize("change", [drop_entry, claim_kept, claim_scheme])
def test_a_report_that_contradicts_the_files_fails(
    change: Callable[[Any], None], finished: Path, tmp_path: Path
) -> None:
    assert_only_fails(verify(edit_report(finished, tmp_path / "out", change)), "coverage", UP)


def test_a_damaged_report_is_reported_not_raised(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / REPORT).write_text('{"tensors": [{"name": 1}]}')
    write_manifest(out)
    assert_only_fails(verify(out), "headers", "report.json")


def foreign(finished: Path, out: Path) -> Path:
    """The checkpoint as another tool would leave it, with neither manifest nor report."""
    shutil.copytree(finished, out)
    shutil.rmtree(out / "quantkit")
    return out


def test_a_directory_of_another_tool_is_held_against_its_model(
    source: Path, tmp_path: Path
) -> None:
    out = foreign(quantize(source, tmp_path / "rtn", "rtn", "w4a16_g32"), tmp_path / "theirs")
    result = verify(out, against=source)
    assert result.ok, result.text()
    assert result.checks[0].detail == "no manifest: not an output of quantkit"
    tensors = load_file(out / WEIGHTS)
    del tensors[NORM]
    roll_one_row(tensors)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    result = verify(out, against=source)
    assert names_of_failed(result) == ["coverage", "source"], result.text()
    assert NORM in result.checks[2].problems[0] and UP in result.checks[-1].problems[0]


def test_a_plain_model_is_not_called_a_good_checkpoint(source: Path) -> None:
    assert_only_fails(verify(source), "headers", "not quantized")
