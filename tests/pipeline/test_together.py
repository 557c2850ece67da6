"""Several methods from one calibration pass: the very bytes of separate runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_eval
import tiny_jobs as jobs
from many import run_ranks

from quantkit.calibration.processes.ranks import ALONE, World
from quantkit.calibration.stream import CalibrationStream
from quantkit.errors import RecipeError
from quantkit.methods.recipe import load_recipe
from quantkit.pipeline.job import prepare_all
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.session import Session
from quantkit.pipeline.together import Candidate, candidates, run_spread, run_together

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = ["rtn", "awq", "gptq", "best", "smoothquant"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_eval.loud("llama", tmp_path_factory.mktemp("model"))


def chosen(methods: list[str]) -> list[Candidate]:
    found = []
    for candidate in candidates(methods, [], samples=jobs.SAMPLES, seq_len=jobs.SEQ_LEN):
        # The models' 96 columns fit no group of 128.
        scheme = candidate.recipe.scheme.name.replace("g128", "g32")
        recipe = load_recipe(
            candidate.recipe.method, scheme=scheme, samples=jobs.SAMPLES, seq_len=jobs.SEQ_LEN
        )
        data = {**recipe.to_dict(), "propagate": False, "target": None}
        found.append(
            Candidate(
                name=candidate.name,
                label=candidate.label,
                recipe=type(recipe).from_dict(data, "test"),
            )
        )
    return found


def requests(model: Path, found: list[Candidate]) -> list[QuantizeOptions]:
    text = str(model / "calibration.txt")
    return [QuantizeOptions(recipe=c.recipe, calibration=text, device="cpu") for c in found]


def test_every_method_gets_the_bytes_of_its_own_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = chosen(METHODS)
    embedded: list[object] = []
    embed = CalibrationStream.embed
    monkeypatch.setattr(
        CalibrationStream, "embed", lambda self: (embedded.append(self), embed(self))
    )
    outs = [tmp_path / candidate.name for candidate in found]
    outcomes = run_together(
        prepare_all(str(model), requests(model, found)), outs, tmp_path / "s", progress=False
    )
    assert all(outcome.written for outcome in outcomes)
    assert len(embedded) == 1, "one pass over the calibration text serves all methods"
    assert not (tmp_path / "s").exists()
    for candidate, out in zip(found, outs, strict=True):
        recipe = load_recipe(path=out / "quantkit" / "recipe.yaml")
        assert recipe.propagate is False
        job = jobs.make_job(model, recipe=recipe)
        again = jobs.finish(job, tmp_path / f"{candidate.name}-again").out
        assert jobs.hashes(again) == jobs.hashes(out)


def test_same_command_goes_on_where_it_was_killed(model: Path, tmp_path: Path) -> None:
    found = chosen(["awq", "gptq"])
    outs = [tmp_path / candidate.name for candidate in found]
    jobs_ = prepare_all(str(model), requests(model, found))
    run_together(jobs_, outs, tmp_path / "s", progress=False)
    expected = [jobs.hashes(out) for out in outs]
    broken = [tmp_path / f"{out.name}-broken" for out in outs]
    script = (
        "import os, signal, sys; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path; from pipeline import test_together as t\n"
        "from quantkit.pipeline import session as pipeline; run = pipeline.Session.run; done = []\n"
        "def counted(self, step):\n"
        "    run(self, step); done.append(step)\n"
        "    if len(done) == 6: os.kill(os.getpid(), signal.SIGKILL)\n"
        "pipeline.Session.run = counted\n"
        "model, folder = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "found = t.chosen(['awq', 'gptq'])\n"
        "outs = [folder / f'{c.name}-broken' for c in found]\n"
        "jobs = t.prepare_all(str(model), t.requests(model, found))\n"
        "import torch; torch.set_num_threads(1)\n"
        "t.run_together(jobs, outs, folder / 'scratch', progress=False)\n"
    )
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'eval'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(model), str(tmp_path)],
        cwd=root, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not any(out.exists() for out in broken)
    run_together(jobs_, broken, tmp_path / "scratch", progress=False)
    assert [jobs.hashes(out) for out in broken] == expected


def test_ranks_share_outputs_out_and_any_number_goes_on(model: Path, tmp_path: Path) -> None:
    """Two ranks, killed in the second block, then one process without their hidden states."""
    found = chosen(["awq", "gptq", "rtn"])
    prepared = prepare_all(str(model), requests(model, found))
    names = [candidate.name for candidate in found]
    alone = [tmp_path / f"{name}-alone" for name in names]
    run_together(prepared, alone, tmp_path / "s", progress=False)
    outs = [tmp_path / name for name in names]
    ran = tmp_path / "ran"

    def spread(world: World) -> None:
        run_spread(world, prepared, outs, tmp_path / "spread.partial", progress=False)

    def dying(world: World) -> None:
        patch, run = pytest.MonkeyPatch(), Session.run

        def die(self: Session, step: str) -> None:
            if step == "block 1" and self._job.calibration is not None:
                os.kill(os.getpid(), signal.SIGKILL)
            run(self, step)
            with ran.open("a") as file:
                file.write(f"{world.rank} {self._job.plan.recipe.method}\n")

        patch.setattr(Session, "run", die)
        spread(world)

    codes = [code for code, _ in run_ranks(2, dying, tmp_path / "told")]
    assert -signal.SIGKILL in codes and set(codes) <= {3, -signal.SIGKILL}
    who = {tuple(line.split()) for line in ran.read_text().splitlines()}
    assert {rank for rank, _ in who} == {"0", "1"} and len(who) == len({name for _, name in who})
    for scratch in tmp_path.glob("spread-*.partial"):
        shutil.rmtree(scratch)
    spread(ALONE)
    assert [jobs.hashes(out) for out in outs] == [jobs.hashes(out) for out in alone]


def test_two_ranks_write_every_output(model: Path, tmp_path: Path) -> None:
    found = chosen(["awq", "gptq", "rtn"])
    prepared = prepare_all(str(model), requests(model, found))
    outs = [tmp_path / candidate.name for candidate in found]

    def spread(world: World) -> None:
        run_spread(world, prepared, outs, tmp_path / "spread.partial", progress=False)
        # Rank 0 evaluates what others wrote.
        assert all((out / "quantkit/manifest.json").exists() for out in outs)

    assert run_ranks(2, spread, tmp_path / "told") == [(0, ""), (0, "")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*(out.name for out in outs), "told"]
    )


def test_bits_make_candidates_of_methods_that_have_them() -> None:
    found = candidates(["rtn", "nf4", "int8", "awq"], [3, 4])
    assert [c.name for c in found] == [
        *("rtn-w3a16_g128", "rtn-w4a16_g128", "nf4-nf4_b64_dq", "int8-w8a16_row"),
        *("awq-w3a16_g128_asym", "awq-w4a16_g128_asym"),
    ]
    assert [c.label for c in found][:3] == ["rtn 3 bit", "rtn 4 bit", "nf4"]
    assert all(not c.recipe.propagate for c in found)
    with pytest.raises(RecipeError, match="give numbers from 2 to 8"):
        candidates(["rtn"], [9])
    with pytest.raises(RecipeError, match="method 'nothing' is unknown"):
        candidates(["nothing"], [])


def compare(model: Path, out: Path, *more: Any) -> int:
    # Group sizes of the built-in recipes need wider models: rows and flat blocks fit any.
    line = ["compare", model, "--methods", "int8,nf4", "--text", model / "heldout.txt"]
    line += ["--calib", model / "calibration.txt", "--samples", 8, "--seq-len", 32]
    return jobs.command(*line, "--prompts", 0, "--out", out, *more)


def test_command_rates_all_candidates_in_one_report(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_eval.write_heldout(model)
    out = tmp_path / "out"
    assert compare(model, out, "--fail-if", "kl>9") == 0
    assert "int8" in capsys.readouterr().out
    names = sorted(path.name for path in out.iterdir())
    assert names == [
        "int8-w8a16_row",
        "nf4-nf4_b64_dq",
        *(f"report.{e}" for e in ("html", "json", "md")),
    ]
    report = json.loads((out / "report.json").read_text())
    assert [c["identity"]["name"] for c in report["candidates"]] == ["int8", "nf4"]
    assert (
        report["candidates"][0]["divergence"]["mean"]
        < report["candidates"][1]["divergence"]["mean"]
    )
    # The same command again finds its checkpoints and rates them anew.
    assert compare(model, out, "--fail-if", "kl>1e-9") == 1
    assert compare(model, tmp_path / "other", "--fail-if", "nothing>1") == 2
    assert compare(model, tmp_path / "other", "--bits", "four") == 2
    assert not (tmp_path / "other").exists()
