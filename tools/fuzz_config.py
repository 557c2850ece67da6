"""Hostile configurations, indices, reports, manifests, recipes and command lines: refused or done.

    fuzz_config.py [--count 20000] [--seed 0] [--only NUMBER] [--keep-going]
Every case damages a file of a tiny checkpoint, or a command line, and runs the command in this
process.  It must end with exit code 0, 1 or 2, the latter with one sentence; a traceback, more than
20 seconds of CPU time or more than 1.5 GiB of resident memory is a defect.  A case depends on the
seed and its number only.  tests/cli/test_fuzz_config.py runs some of it.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Nothing here may ask the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import tiny_jobs as jobs
import torch
import yaml
from hostile_values import (
    FIELDS,
    KIND_OF,
    OPTIONS_OF,
    PLACES,
    VALUES_OF,
    damage,
    damaged_json,
    damaged_recipe,
    to_json,
)

from quantkit.cli.app import main as quantkit
from quantkit.methods.recipe import builtin_recipes, load_recipe

# Of CPU time, as others may use the machine too; waiting for a FIFO takes none, so it ends at WAIT.
SECONDS, WAIT = 20.0, 60.0
RESIDENT_BYTES = 3 * 2**29


class Late(BaseException):
    """A case took too long; no handler of errors may catch it."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is run: the command, and the file that was damaged (None: the line alone)."""

    number: int
    kind: str
    line: tuple[str, ...]
    file: Path | None = None


@dataclass(kw_only=True)
class Outcome:
    """How many cases ended with which exit code, the slowest, the highest peak, and the defects."""

    codes: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    peak_bytes: int = 0
    defects: list[str] = field(default_factory=list)


class Stage:
    """A folder with tiny checkpoints, whose files are damaged and mended again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plain = jobs.build("llama", folder / "plain")
        self.models = [self.plain]
        for kind in ("gpt2", "mixtral", "gemma3_text"):
            self.models.append(jobs.build(kind, folder / kind))
        self.sharded = folder / "sharded"
        shutil.copytree(self.plain, self.sharded)
        _split(self.sharded)
        self.finished = folder / "finished"
        jobs.finish(jobs.make_job(self.plain, "rtn"), self.finished)
        self.recipes = [yaml.safe_dump(load_recipe(name).to_dict()) for name in builtin_recipes()]
        _furnish(folder)
        self._kept: dict[Path, bytes] = {}

    def damage(self, path: Path, content: bytes) -> None:
        """Replaces the content of a file until `mend`."""
        self._kept.setdefault(path, path.read_bytes())
        path.write_bytes(content)

    def replace(self, path: Path, make: Callable[[Path], None]) -> None:
        """Puts something else in the place of a file until `mend`."""
        self._kept.setdefault(path, path.read_bytes())
        path.unlink()
        make(path)

    def mend(self) -> None:
        """Makes every file what it was, and removes outputs."""
        for path, content in self._kept.items():
            _remove(path)
            path.write_bytes(content)
        self._kept.clear()
        for path in self.folder.glob("out*"):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _split(folder: Path) -> None:
    """Splits the weights of a checkpoint into two shards with an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _furnish(folder: Path) -> None:
    """What the places of `PLACES` stand for: odd files beside the checkpoints."""
    (folder / "circle").symlink_to("circle")
    (folder / "zeros").symlink_to("/dev/zero")
    (folder / "nowhere").symlink_to("nothing")
    os.mkfifo(folder / "pipe")
    (folder / "note.txt").write_text("all work and no play " * 100)
    (folder / "report.json").write_text("{}")
    with (folder / "big.json").open("wb") as file:
        file.truncate(2**40)
    (folder / "locked").mkdir()


def make_case(stage: Stage, seed: int, number: int) -> Case:
    """Damages the stage for the case and returns what to run on it."""
    rng = random.Random(f"{seed}-{number}")
    kind = rng.choice(
        (
            "config",
            "config",
            "config",
            "index",
            "report",
            "manifest",
            "quantization",
            "recipe",
            "line",
            "line",
            "file",
        )
    )
    out, text = str(stage.folder / "out"), str(stage.plain / "calibration.txt")
    rtn = ("--method", "rtn", "--scheme", "w4a16_g32")
    if kind == "config":
        model = rng.choice(stage.models)
        path = model / "config.json"
        stage.damage(path, damaged_json(path.read_bytes(), rng, FIELDS))
        line = _on_a_model(str(model), rng, rtn)
    elif kind == "index":
        path = stage.sharded / "model.safetensors.index.json"
        stage.damage(path, damaged_json(path.read_bytes(), rng, ("weight_map", "metadata")))
        line = rng.choice([("plan", str(stage.sharded), *rtn), ("inspect", str(stage.sharded))])
    elif kind in ("report", "manifest", "quantization"):
        name = "config.json" if kind == "quantization" else f"quantkit/{kind}.json"
        path = stage.finished / name
        content = json.loads(path.read_bytes())
        if kind == "quantization":
            damage(
                content["quantization_config"], rng, ("quant_method", "format", "ignore", "bits")
            )
            stage.damage(path, to_json(content))
        else:
            stage.damage(
                path,
                damaged_json(
                    path.read_bytes(), rng, ("version", "files", "tensors", "calibration")
                ),
            )
        line = _on_an_output(stage, rng, out)
    elif kind == "recipe":
        path = stage.folder / "recipe.yaml"
        path.write_bytes(damaged_recipe(rng.choice(stage.recipes), rng))
        line = ("plan", str(stage.plain), "--recipe", str(path), "--calib", text)
    elif kind == "file":
        path = rng.choice(
            [
                stage.plain / "config.json",
                stage.plain / "tokenizer.json",
                stage.plain / "tokenizer_config.json",
                stage.finished / "quantkit/report.json",
                stage.finished / "quantkit/manifest.json",
                stage.finished / "config.json",
            ]
        )
        if rng.random() < 0.4:
            stage.replace(path, rng.choice((os.mkfifo, _zeros, _giant, _circle, Path.mkdir)))
        else:
            stage.damage(
                path, damaged_json(path.read_bytes(), rng, ("auto_map", "tokenizer_class"))
            )
        on_output = stage.finished in path.parents
        line = _on_an_output(stage, rng, out) if on_output else _calibrated(stage.plain, rng)
    else:
        path = None
        line = _damaged_line(stage, rng, out)
    return Case(number=number, kind=kind, line=line, file=path)


def _on_a_model(model: str, rng: random.Random, rtn: tuple[str, ...]) -> tuple[str, ...]:
    chosen = rng.random()
    if chosen < 0.7:
        return ("plan", model, *rtn)
    if chosen < 0.9:
        return ("inspect", model)
    return ("generate", model, "--prompt", "all work", "--max-new-tokens", "2")


def _on_an_output(stage: Stage, rng: random.Random, out: str) -> tuple[str, ...]:
    finished = str(stage.finished)
    chosen = rng.random()
    if chosen < 0.5:
        return ("verify", finished)
    if chosen < 0.7:
        return ("inspect", finished)
    if chosen < 0.85:
        return ("verify", finished, "--against", str(stage.plain))
    if chosen < 0.95:
        return ("export", finished, "--format", "gptq_v2", "--out", out, "--allow-rounding")
    return ("generate", finished, "--prompt", "all work", "--max-new-tokens", "2")


def _calibrated(model: Path, rng: random.Random) -> tuple[str, ...]:
    if rng.random() < 0.5:
        return ("inspect", str(model))
    text = str(model / "calibration.txt")
    options = ("--method", "gptq", "--scheme", "w4a16_g32", "--samples", "4", "--seq-len", "16")
    return ("plan", str(model), *options, "--calib", text)


def _damaged_line(stage: Stage, rng: random.Random, out: str) -> tuple[str, ...]:
    """A command with one to three options, or its argument, of a value that nobody expects."""
    command = rng.choice([*OPTIONS_OF, "plan", "plan", "quantize"])
    text = str(stage.plain / "calibration.txt")
    options: dict[str, str] = {}
    if command in ("plan", "quantize"):
        options = {
            "--method": rng.choice(("rtn", "rtn", "gptq")),
            "--scheme": "w4a16_g32",
            "--calib": text,
        }
        options |= {"--samples": "4", "--seq-len": "16"}
    if command == "eval":
        options = {
            "--text": text,
            "--seq-len": "16",
            "--windows": "2",
            "--prompts": "0",
            "--device": "cpu",
        }
    if command == "compare":
        options = {"--methods": "int8", "--calib": text, "--text": text, "--samples": "4"}
        options |= {"--seq-len": "16", "--windows": "2", "--prompts": "0", "--device": "cpu"}
    if command == "bench":
        options = {"--batches": "1", "--prompt-tokens": "4", "--new-tokens": "2", "--repeats": "1"}
    if command == "generate":
        options = {"--prompt": "all", "--max-new-tokens": "2"}
    if command == "export":
        options = {"--format": "gptq_v2"}
    if command in ("quantize", "export", "eval", "compare"):
        options["--out"] = out
    place = (
        stage.finished if command in ("verify", "inspect", "generate", "export") else stage.plain
    )
    arguments = [str(place), str(stage.finished)] if command == "eval" else [str(place)]
    for _ in range(rng.randint(1, 3)):
        able = OPTIONS_OF[command]
        if able and rng.random() < 0.8:
            name = rng.choice(able)
            value = rng.choice(VALUES_OF[KIND_OF[name]])
            if name == "--out" and value in ("", "-", "#", "*"):
                value = "out-x"
            if name == "--max-new-tokens" and value.isdigit() and 10**3 < int(value) < 2**25:
                value = "3"
            options[name] = value
        elif rng.random() < 0.2:
            options[rng.choice(("--nonsense", "--json=x", "-h", "--", "\ud800"))] = "x"
        else:
            arguments[rng.randrange(len(arguments))] = rng.choice(PLACES)
    words = [word for pair in options.items() for word in pair]
    return (command, *arguments, *words) if rng.random() < 0.7 else (command, *words, *arguments)


def _zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _circle(path: Path) -> None:
    path.symlink_to(path.name)


def _giant(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def run_case(case: Case) -> tuple[int, str, float]:
    """The exit code, what was told on stderr, and the seconds of CPU time that it took."""
    out, err = io.StringIO(), io.StringIO()
    began = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _deadline():
        try:
            quantkit(list(case.line))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except Late:
            code = -1
    return code, err.getvalue(), time.process_time() - began


def defect_of(case: Case, code: int, told: str, seconds: float, peak_bytes: int) -> str | None:
    """What is wrong with how a case ended, in a line; None if nothing is."""
    lines = told.strip().splitlines()
    last = lines[-1][:300] if lines else ""
    problem = None
    if code == -1 or seconds > SECONDS:
        problem = f"took {seconds:.1f} s"
    elif peak_bytes > RESIDENT_BYTES:
        problem = f"{peak_bytes / 2**20:.0f} MiB resident"
    elif code not in (0, 1, 2) or "Traceback (most recent call last)" in told:
        problem = f"exit code {code}"
    elif code == 2 and not any(start in told for start in ("quantkit: ", "Usage: ", "Error: ")):
        problem = "exit code 2 without a sentence"
    if problem is None:
        return None
    line = " ".join(map(ascii, case.line))[:400]
    return f"case {case.number}, {case.kind}: {problem}: {line}: {last}"


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise Late

    timers = (
        (signal.SIGALRM, signal.ITIMER_REAL, WAIT),
        (signal.SIGPROF, signal.ITIMER_PROF, SECONDS),
    )
    before = [signal.signal(sign, late) for sign, _, _ in timers]
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (sign, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(sign, handler)


@contextlib.contextmanager
def _surroundings(folder: Path) -> Iterator[None]:
    """The stage as current directory, no logs, one thread, a limit that saves the machine."""
    before = Path.cwd()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    shown = os.environ.get("QUANTKIT_TRACEBACK")
    logging.disable(logging.CRITICAL)
    os.environ["QUANTKIT_TRACEBACK"] = "1"
    os.chdir(folder)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 2 * RESIDENT_BYTES, hard))
        with jobs.one_thread():
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        os.chdir(before)
        logging.disable(logging.NOTSET)
        if shown is None:
            del os.environ["QUANTKIT_TRACEBACK"]
        else:
            os.environ["QUANTKIT_TRACEBACK"] = shown


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    """Highest resident bytes since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no VmHWM")


def fuzz(
    count: int, seed: int, *, first: int = 0, keep_going: bool = False, tell: Any = None
) -> Outcome:
    """Runs cases `first`... of a seed; raises AssertionError at a defect unless `keep_going`."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as text:
        stage = Stage(Path(text))
        with _surroundings(stage.folder):
            for number in range(first, first + count):
                case = make_case(stage, seed, number)
                _reset_peak()
                code, told, seconds = run_case(case)
                peak = _peak_bytes()
                outcome.codes[code] += 1
                outcome.kinds[case.kind] += 1
                outcome.seconds = max(outcome.seconds, seconds)
                outcome.peak_bytes = max(outcome.peak_bytes, peak)
                defect = defect_of(case, code, told, seconds, peak)
                if defect is not None:
                    outcome.defects.append(defect)
                    assert keep_going, f"{defect}\n{told[-3000:]}"
                stage.mend()
                if tell is not None:
                    tell(number, outcome, defect)
                if number % 500 == 499:
                    gc.collect()
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--keep-going", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Code that never returns to the interpreter hears no alarm.
    limit = 5 * WAIT

    def tell(number: int, outcome: Outcome, defect: str | None) -> None:
        faulthandler.dump_traceback_later(limit, exit=True)
        if defect is not None:
            print(defect, flush=True)
        if number % 1000 == 999:
            print(
                f"{number + 1}: {dict(outcome.codes)}, {len(outcome.defects)} defects", flush=True
            )

    first, count = (options.only, 1) if options.only is not None else (options.first, options.count)
    outcome = fuzz(count, options.seed, first=first, keep_going=options.keep_going, tell=tell)
    print(
        f"{count} hostile cases: {outcome.codes[2]} refused, {outcome.codes[0]} done, "
        f"{outcome.codes[1]} found wrong, {len(outcome.defects)} defects; the slowest took "
        f"{outcome.seconds:.1f} s, the highest peak was {outcome.peak_bytes / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    main()
