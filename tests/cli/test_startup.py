"""Commands that need no model, and every error that shows before one is needed, import no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models as tiny
import torch

from quantkit.pipeline.job import prepare
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.session import run

# Runs command lines one after the other; prints each one's exit code and what it had imported.
SCRIPT = """
import contextlib, io, json, sys
from quantkit.cli.app import main

heavy = ("torch", "transformers", "datasets", "onnx")
for line in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main(line)
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, [name for name in heavy if name in sys.modules]]))
"""


def outcomes(lines: list[list[str]]) -> list[tuple[int, list[str]]]:
    """Exit code of each command line, and the heavy packages imported so far."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(lines)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("llama", tmp_path_factory.mktemp("startup") / "m", dtype=torch.bfloat16)


def test_lists_and_help_import_no_torch() -> None:
    lines = [["--help"], ["quantize", "--help"], ["eval", "--help"], ["methods"], ["formats"]]
    assert outcomes(lines) == [(0, [])] * len(lines)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rtn", {"scheme": "w4a16_g32_asym"}),
        ("rtn", {"scheme": "fp8a8_row"}),
        ("rtn", {"scheme": "mxfp4a16"}),
        ("rtn", {"scheme": "w4a16_g32_asym", "format": "gptq"}),
        ("rtn", {"scheme": "w4a16_g32", "format": "awq"}),
        ("nf4", {}),
        ("rtn", {"scheme": "w8a8_row", "format": "bitsandbytes"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_inspect_imports_no_torch(
    method: str, options: dict[str, str], model: Path, tmp_path: Path
) -> None:
    job = prepare(str(model), QuantizeOptions(method, **options))
    run(job, tmp_path / "out", progress=False)
    assert outcomes([["inspect", str(tmp_path / "out")]]) == [(0, [])]


def test_errors_that_need_no_model_import_no_torch(model: Path, tmp_path: Path) -> None:
    nowhere, out = str(tmp_path / "nowhere"), str(tmp_path / "out")
    quantize = ["quantize", str(model), "--out", out]
    lines = [
        [*quantize, "--method", "none"],
        [*quantize, "--scheme", "w9"],
        [*quantize, "--set", "rounding.none=1"],
        [*quantize, "--method", "gptq", "--set", "rounding.damp=much"],
        [*quantize, "--recipe", nowhere],
        [*quantize, "--format", "none"],
        [*quantize, "--max-ram", "6QB"],
        [*quantize, "--max-shard-size", "none"],
        [*quantize, "--device", "tpu"],
        [*quantize, "--seed", "-1"],
        [*quantize, "--samples", "many"],
        ["quantize", nowhere, "--out", out],
        ["plan", nowhere],
        ["inspect", nowhere],
        ["verify", nowhere],
        ["verify", str(model), "--against", nowhere],
        ["generate", nowhere, "--prompt", "a"],
        ["export", nowhere, "--format", "gptq", "--out", out],
        ["export", str(model), "--format", "none", "--out", out],
        ["eval", nowhere, nowhere, "--out", out],
        ["eval", str(model), nowhere, "--out", out],
        ["eval", str(model), str(model), "--out", out, "--fail-if", "speed>1"],
        ["compare", nowhere, "--out", out],
        ["compare", str(model), "--out", out, "--methods", "rtn,none"],
        ["compare", str(model), "--out", out, "--fail-if", "speed>1"],
        ["bench", nowhere],
        ["bench", str(model), "--batches", "many"],
    ]
    for line, outcome in zip(lines, outcomes(lines), strict=True):
        assert outcome == (2, []), line
