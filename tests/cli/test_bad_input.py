"""What a user can get wrong: exit code 2, one sentence that names it, and no output left."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_jobs as jobs
import torch
from safetensors.torch import load_file, save_file

import quantkit.checkpoint.disk
from quantkit.checks.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.build("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def arguments(
    model: object, out: Path, *more: object, scheme: str | None = "w4a16_g32"
) -> list[Any]:
    """A `quantize` command line with the tiny model's calibration text."""
    text = Path(str(model)) / "calibration.txt"
    found: list[Any] = ["quantize", model, "--out", out, "--samples", "8", "--seq-len", "32"]
    found += ["--calib", text] if text.exists() else []
    found += ["--scheme", scheme] if scheme else []
    return [*found, *more]


class Refusal(NamedTuple):
    """Runs a command that must be refused and returns its sentence."""

    capsys: pytest.CaptureFixture[str]
    out: Path

    def __call__(self, line: Sequence[object], *, kept: bool = False) -> str:
        code = jobs.command(*line)
        captured = self.capsys.readouterr()
        assert code == 2, captured
        assert captured.out == ""
        message = captured.err.strip().splitlines()[-1]
        assert message.startswith("quantkit: ") and "Traceback" not in captured.err
        assert not self.out.exists()
        if not kept:
            assert not self.out.with_name("out.partial").exists()
        assert not self.out.with_name("out.partial.lock").exists()
        return message


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refusal:
    return Refusal(capsys, tmp_path / "out")


def no_model(model: Path) -> None:
    (model / "config.json").unlink()


def pickled(model: Path) -> None:
    (model / WEIGHTS).unlink()
    torch.save({}, model / "pytorch_model.bin")


def truncated(model: Path) -> None:
    os.truncate(model / WEIGHTS, (model / WEIGHTS).stat().st_size - 100)


def corrupted(model: Path) -> None:
    with (model / WEIGHTS).open("r+b") as file:
        file.seek(9)
        file.write(b"}}}}")


def lfs_pointer(model: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
    (model / WEIGHTS).write_text(text)


def missing_shard(model: Path) -> None:
    (model / WEIGHTS).unlink()
    weight_map = {NORM: "model-00001-of-00001.safetensors"}
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def escaping(model: Path) -> None:
    (model / WEIGHTS).unlink()
    (model / INDEX).write_text(json.dumps({"weight_map": {NORM: "../../secret.safetensors"}}))


def without_tensor(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    del tensors[UP]
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})


def misshapen(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors[UP] = tensors[UP][:-1].contiguous()
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})


def quantized_already(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))


def remote_code(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["model_type"] = "homemade"
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_homemade.Homemade"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "modeling_homemade.py").write_text("raise SystemExit('it ran')\n")


def unknown_type(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["model_type"] = "homemade"
    (model / "config.json").write_text(json.dumps(config))


DAMAGED: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no model": (no_model, ("no config.json",)),
    "pickle": (pickled, ("pytorch_model.bin", "safetensors")),
    "truncated": (truncated, (WEIGHTS, "bytes")),
    "corrupted": (corrupted, (WEIGHTS,)),
    "git-lfs": (lfs_pointer, (WEIGHTS, "LFS")),
    "missing shard": (missing_shard, ("model-00001-of-00001.safetensors", "missing")),
    "escaping index": (escaping, ("../../secret.safetensors", "inside")),
    "missing tensor": (without_tensor, (UP,)),
    "misshapen tensor": (misshapen, (UP, "95")),
    "already quantized": (quantized_already, ("already quantized", "gptq")),
    "remote code": (remote_code, ("--trust-remote-code",)),
    "unknown type": (unknown_type, ("homemade",)),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_model_is_named(kind: str, copy: Path, refused: Refusal) -> None:
    damage, named = DAMAGED[kind]
    damage(copy)
    message = refused(arguments(copy, refused.out, "--method", "rtn"))
    for word in named:
        assert word in message


def test_a_path_that_is_nothing_is_named(refused: Refusal, tmp_path: Path) -> None:
    message = refused(arguments(tmp_path / "no-such", refused.out, "--method", "rtn"))
    assert "no-such" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "infinite"])
def test_a_weight_that_is_not_finite_is_named(value: float, copy: Path, refused: Refusal) -> None:
    tensors = load_file(copy / WEIGHTS)
    tensors[UP][3, 5] = value
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    message = refused(arguments(copy, refused.out, "--method", "rtn"), kept=True)
    assert UP in message


def test_an_activation_that_overflows_names_its_layer(copy: Path, refused: Refusal) -> None:
    tensors = load_file(copy / WEIGHTS)
    tensors["model.layers.0.mlp.down_proj.weight"].fill_(1e38)
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(1e38)
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    message = refused(arguments(copy, refused.out, "--method", "gptq"), kept=True)
    assert "layers.0" in message and "activation" in message


# Options that cannot work, and the words that say why and what would.
OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "group does not divide": (
        ("--method", "rtn", "--scheme", "w4a16_g64"),
        ("down_proj", "96", "64", "32", "row"),
    ),
    "format cannot hold": (
        ("--method", "gptq", "--scheme", "w5a16_g32", "--format", "gptq_v2"),
        ("gptq_v2", "w5a16_g32", "compressed-tensors"),
    ),
    "no format holds": (("--method", "nf4", "--scheme", "nf4_b96"), ("nf4_b96", "no format")),
    "unknown format": (
        ("--method", "rtn", "--format", "gguf9"),
        ("gguf9", "compressed-tensors", "bitsandbytes", "gptq_v2"),
    ),
    "unknown scheme": (("--method", "rtn", "--scheme", "w4g128"), ("w4g128", "w{2-8}a{16|8}")),
    "fp8 in groups": (
        ("--method", "rtn", "--scheme", "fp8a8_g32"),
        ("fp8", "per row", "fp8a8_row"),
    ),
    "unknown method": (("--method", "magic"), ("magic", "awq", "gptq", "nf4")),
    "unknown option of a part": (
        ("--method", "gptq", "--set", "rounding.dampening=1"),
        ("dampening", "damp", "act_order"),
    ),
    "unknown part": (
        ("--method", "gptq", "--set", "rounding.name=magic"),
        ("magic", "gptq", "nearest"),
    ),
    "unknown key": (("--method", "gptq", "--set", "speed=9"), ("speed", "range", "rounding")),
    "wrong value": (("--method", "gptq", "--set", "rounding.damp=7"), ("damp", "7", "0..1")),
    "value of the wrong type": (
        ("--method", "gptq", "--set", "rounding.damp=much"),
        ("damp", "much"),
    ),
    "text for an integer": (("--method", "awq", "--set", "transforms.awq.grid=many"), ("grid",)),
    "no assignment": (("--method", "gptq", "--set", "rounding.damp"), ("part.field=value",)),
    "no such transform": (
        ("--method", "awq", "--set", "transforms.smoothquant.alphas=[1]"),
        ("smoothquant", "awq"),
    ),
    "samples by --set": (
        ("--method", "gptq", "--set", "calibration.samples=few"),
        ("samples", "few"),
    ),
    "size": (("--method", "rtn", "--max-ram", "lots"), ("lots", "6GiB")),
    "too little memory": (("--method", "rtn", "--max-ram", "1MiB"), ("1.00 MiB", "smallest")),
    "shard size": (("--method", "rtn", "--max-shard-size", "big"), ("big", "5GB")),
    "device": (("--method", "rtn", "--device", "tpu"), ("tpu", "auto, cpu or cuda")),
    "shared input": (
        ("--method", "rtn", "--skip", "*q_proj*"),
        ("q_proj", "k_proj", "same input", "kept"),
    ),
    "skip of nothing": (("--method", "rtn", "--skip", "*nothing*"), ("*nothing*", "matches no")),
    "skip of everything": (("--method", "rtn", "--skip", "*"), ("no weight is quantized",)),
    "head scheme": (("--method", "rtn", "--lm-head", "w9a16"), ("w9a16",)),
    "no calibration file": (("--method", "gptq", "--calib", "/no/such.txt"), ("/no/such.txt",)),
    "no samples": (("--method", "gptq", "--samples", "0"), ("--samples",)),
    "too little text": (("--method", "gptq", "--samples", "9999"), ("9999",)),
    "unreadable recipe": (("--recipe", "/no/such.yaml"), ("/no/such.yaml",)),
    "unreadable result": (
        ("--method", "rtn", "--scheme", "w4a16_g8", "--format", "gptq_v2"),
        ("no runtime reads", "--allow-unreadable"),
    ),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_an_option_that_cannot_work_is_explained(kind: str, llama: Path, refused: Refusal) -> None:
    options, named = OPTIONS[kind]
    message = refused(arguments(llama, refused.out, *options))
    for word in named:
        assert word in message


def test_an_unknown_option_is_a_usage_error(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert jobs.command(*arguments(llama, tmp_path / "out", "--methd", "rtn")) == 2
    assert "--methd" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown key": ("speed: fast", ("speed", "rounding")),
    "unknown rule key": ("rules: [{match: 'x', bits: 4}]", ("bits", "scheme")),
    "rule without a verdict": ("rules: [{match: 'x'}]", ("'x'", "keep")),
    "rules that are no list": ("rules: 3", ("rules", "list")),
    "calibration key": ("calibration: {rows: 3}", ("samples", "seq_len")),
    "calibration value": ("calibration: {samples: many}", ("samples", "many")),
    "no transform list": ("transforms: awq", ("transforms", "list")),
    "not YAML": ("a: [", ("YAML",)),
    "a part without a name": ("range: {steps: 3}", ("range", "name")),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_a_recipe_that_cannot_be_followed_is_explained(
    kind: str, llama: Path, tmp_path: Path, refused: Refusal
) -> None:
    text, named = RECIPES[kind]
    parts = {"method": "mine", "scheme": "w4a16_g32", "range": "minmax", "rounding": "nearest"}
    lines = [f"{key}: {value}" for key, value in parts.items() if not text.startswith(key)]
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("\n".join([*lines, text]) + "\n")
    message = refused(arguments(llama, refused.out, "--recipe", recipe, scheme=None))
    for word in named:
        assert word in message


def test_experts_of_one_layer_share_a_scheme(mixtral: Path, refused: Refusal) -> None:
    message = refused(arguments(mixtral, refused.out, "--method", "rtn", "--skip", "*experts.1*"))
    assert "experts.1" in message and "experts of one layer" in message


def test_an_output_that_holds_something_else_stays_as_it_is(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for extra in ((), ("--fresh",)):
        assert jobs.command(*arguments(llama, out, "--method", "rtn", *extra)) == 2
        assert f"{out}: exists and holds something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "thesis.txt").read_text() == "years of work"


def test_a_full_disk_leaves_what_was_written_resumable(
    llama: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line = arguments(llama, refused.out, "--method", "gptq")
    writes = 0
    write = os.pwrite

    def full(descriptor: int, data: Any, position: int) -> int:
        nonlocal writes
        writes += 1
        if writes > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", full)
    message = refused(line, kept=True)
    assert "disk full" in message and "run the same command again" in message
    monkeypatch.undo()
    journal = refused.out.with_name("out.partial") / ".scratch/journal.jsonl"
    assert len(journal.read_text().splitlines()) > 2
    assert jobs.command(*line) == 0
    run = json.loads((refused.out / "quantkit/run.json").read_bytes())
    assert run["steps_before_resume"] >= 2
    whole = jobs.finish(jobs.make_job(llama, "gptq", "w4a16_g32"), tmp_path / "whole").out
    assert jobs.hashes(whole) == jobs.hashes(refused.out)
    assert verify(refused.out, against=llama).ok


def test_a_disk_without_room_for_the_result_is_refused_before_the_work(
    llama: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(quantkit.checkpoint.disk.os, "posix_fallocate", full, raising=False)
    message = refused(arguments(llama, refused.out, "--method", "rtn"), kept=True)
    assert "disk full" in message


def test_the_smallest_memory_named_is_enough(llama: Path, refused: Refusal) -> None:
    line = arguments(llama, refused.out, "--method", "gptq", "--max-ram")
    message = refused([*line, "2MiB"])
    named = message.split("--max-ram ")[-1].split()[0]
    # The base is this process, whose size moves a little between two runs.
    enough = f"{int(named.removesuffix('MiB')) + 32}MiB"
    assert jobs.command(*line, enough) == 0
