"""The smallest checkpoint that keeps a limit: who is tried, dropped, and found after a kill."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import quantkit_eval.evaluation
import tiny_eval as eval_tiny
import tiny_jobs as jobs
from quantkit_eval.tournament import Entrant, Rated, Table, play

from quantkit.cli import auto
from quantkit.pipeline import session

pytestmark = pytest.mark.usefixtures("one_thread")


def rated(kl: float, spread: float = 0.0, outcome: Any = None) -> Rated:
    return Rated(kl=kl, low=kl - spread, high=kl + spread, outcome=outcome)


def table(sizes: dict[str, int], screened: dict[str, Rated], share: float = 0.5) -> Table:
    entrants = tuple(Entrant(name=name, num_bytes=size) for name, size in sizes.items())
    return Table(entrants=entrants, share=share, screened=screened, full={})


def test_who_is_no_smaller_and_surely_worse_is_dropped() -> None:
    sizes = {"a": 10, "b": 10, "c": 12, "d": 8}
    found = table(
        sizes, {"a": rated(0.2, 0.05), "b": rated(0.3, 0.04), "c": rated(0.28, 0.04),
                "d": rated(0.9, 0.1)},
    )  # fmt: skip
    # The intervals of a and c overlap; d is smaller than all that are better.
    assert [e.name for e in found.ordered] == ["d", "a", "c"]
    assert found.beaten_by(found.entrants[1]) == "a"
    assert "dropped: a is no larger and better" in found.text()


@pytest.mark.parametrize("seed", range(30))
def test_the_answer_is_the_smallest_that_keeps_the_limit(seed: int) -> None:
    """Whatever the estimate says, as long as larger ones are no worse."""
    draw = random.Random(seed)
    true = sorted((draw.random() for _ in range(7)), reverse=True)
    sizes = {f"c{k}": 10 * k + 10 for k in range(7)}
    screened = {f"c{k}": rated(kl * draw.uniform(0.2, 2), 5.0) for k, kl in enumerate(true)}
    limit = draw.random()
    tried: list[str] = []

    def try_whole(entrant: Entrant) -> Rated:
        tried.append(entrant.name)
        kl = true[int(entrant.name[1:])]
        return rated(kl, 0.01, "within" if kl + 0.01 <= limit else "unsure")

    found = play(table(sizes, screened), max_kl=limit if seed % 2 else None, try_whole=try_whole)
    keeping = [f"c{k}" for k, kl in enumerate(true) if kl + 0.01 <= limit]
    assert (found.winner.name if found.winner else None) == (keeping[0] if keeping else None)
    assert len(tried) == len(set(tried)) <= 7
    verdicts = {row["name"]: row["verdict"] for row in found.rows()}
    assert list(verdicts.values()).count("taken") == bool(keeping)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("loud")
    model = eval_tiny.loud("llama", folder / "model", num_hidden_layers=4)
    text = eval_tiny.write_heldout(folder)
    return {"model": model, "text": text}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_ROUNDS", (("rtn",), ("gptq",)))
    monkeypatch.setattr(auto, "_BITS", (3, 5, 8))


def command(setting: dict[str, Any], out: Path, *more: Any) -> int:
    calib = setting["model"] / "calibration.txt"
    return jobs.command(
        "quantize", setting["model"], "--out", out, "--method", "auto", "--calib", calib,
        "--samples", 8, "--seq-len", 32, "--text", setting["text"], *more,
    )  # fmt: skip


def lasting(out: Path) -> dict[str, str]:
    """Hashes of all files but the evaluation's report, which says how long it took."""
    found = jobs.hashes(out)
    return {name: of for name, of in found.items() if not name.startswith("quantkit/evaluation/")}


def test_a_kill_goes_on_and_ends_with_the_same_bytes(
    setting: dict[str, Any],
    few: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert command(setting, tmp_path / "whole", "--max-kl", 0.01, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    taken = [row for row in told["tried"] if row["verdict"] == "taken"]
    assert len(taken) == 1 and taken[0]["full"]["high"] <= 0.01
    smaller = [row for row in told["tried"] if row["bytes"] < taken[0]["bytes"]]
    assert smaller, "three bits of a loud model break the limit"
    report = json.loads((tmp_path / "whole/quantkit/evaluation/report.json").read_text())
    assert report["candidates"][0]["divergence"]["mean"] == taken[0]["full"]["kl"]
    assert not (tmp_path / "whole.auto").exists()
    assert jobs.command("verify", tmp_path / "whole") == 0
    capsys.readouterr()

    again = tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr(session, "run", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert command(setting, again, "--max-kl", 0.01) == 130
        assert "goes on there" in capsys.readouterr().err
    assert not again.exists()
    with monkeypatch.context() as patch:
        patch.setattr(auto, "_screened", lambda *_, **__: pytest.fail("rated again"))
        assert command(setting, again, "--max-kl", 0.01, "--json") == 0
        assert json.loads(capsys.readouterr().out)["tried"] == told["tried"]
    assert lasting(again) == lasting(tmp_path / "whole")
    assert "| rtn-w3a16_" in (again / "quantkit/evaluation/report.md").read_text()
    page = (again / "quantkit/evaluation/report.html").read_text()
    assert page.count("What was tried") == 1 and page.rstrip().endswith("</html>")
    # Complete: nothing is measured again.
    with monkeypatch.context() as patch:
        patch.setattr(quantkit_eval.evaluation, "evaluate", lambda *_, **__: pytest.fail("again"))
        assert command(setting, again, "--max-kl", 0.01) == 0
    assert command(setting, again, "--max-kl", 0.02) == 2
    assert "is not of this command" in capsys.readouterr().err


def test_a_limit_that_nobody_keeps_is_told_with_the_table(
    setting: dict[str, Any], few: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(setting, tmp_path / "out", "--fail-if", "kl>1e-9") == 2
    told = capsys.readouterr().err
    assert "no candidate keeps kl>1e-9" in told and "breaks the limit" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((), "needs a limit to keep"),
        (("--max-kl", 0), "above 0"),
        (("--max-kl", 0.1, "--scheme", "w4a16_g32"), "--scheme: --method auto tries"),
        (("--max-kl", 0.1, "--bits", 4), "leave it out"),
        (("--fail-if", "kl<1"), "for this metric write"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_a_sentence(
    given: tuple[Any, ...],
    told: str,
    setting: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(setting, tmp_path / "out", *given) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_limits_are_for_auto_and_text_is_held_out(
    setting: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = setting["model"], setting["model"] / "calibration.txt"
    asked = ["quantize", model, "--out", tmp_path / "out", "--max-kl", 0.1]
    assert jobs.command(*asked, "--method", "rtn") == 2
    assert '--fail-if "kl>0.1"' in capsys.readouterr().err
    assert jobs.command(*asked, "--method", "auto", "--text", text, "--calib", text) == 2
    assert "that calibration has not seen" in capsys.readouterr().err
