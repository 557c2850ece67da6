"""Every format by every method on tiny models, to show that a change of the code changed no byte.

    matrix.py record --out DIR [--only GLOB] [--keep]    run it; write DIR/matrix.json
    matrix.py compare A/matrix.json B/matrix.json        what is equal; exit code 1 if not all is

Run `record` in the root of the checkout to look at, with that checkout's interpreter.  Exit codes,
weights, containers, configurations and side files must be equal, and what killed and resumed runs
wrote must equal what runs in peace did.  Reports, cards and manifests are told apart, JSON path by
JSON path; `compare --all` wants them equal too.  Times and versions are left out of them.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import hashlib
import json
import os
import platform
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from matrix_cases import Case, cases, out_of, write_inputs

RESULT = "matrix.json"
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "COLUMNS": "100",
}
_PACKAGES = ("torch", "transformers", "numpy", "safetensors", "gguf", "onnx", "onnxruntime-genai")
# Holds times and peaks only.
_RUN = "quantkit/run.json"
# Told, but not part of what a runtime reads.
_TOLD = ("README.md", "quantkit/*.json", "quantkit/*.md", "quantkit/*.html", "quantkit/*.yaml")
# Of these, what readers depend on after all.
_READ = ("quantkit/names.json",)
_MANIFEST = "quantkit/manifest.json"
_JOURNAL = ".scratch/journal.jsonl"
_PRINTED = "(printed)"
_KILLED = "(journal)"
_VARIES = re.compile(r".* version|versions|python|hardware|(.*_)?seconds|.*peak.*|.*_ram_bytes|run")
_VERSION_ROW = re.compile(
    r"<tr><td>[^<]* version</td>.*?</tr>|<tr><td>(python|hardware)</td>.*?</tr>"
)
_KILL_TRIES = 5
_SHOWN = 3


def main() -> None:
    """Runs `record` or `compare`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record", help="run the matrix with this checkout")
    recorder.add_argument("--out", type=Path, required=True)
    recorder.add_argument("--only", default="*", help="glob of case names")
    recorder.add_argument("--keep", action="store_true", help="leave all outputs in DIR")
    comparer = commands.add_parser("compare", help="two results")
    comparer.add_argument("before", type=Path)
    comparer.add_argument("after", type=Path)
    comparer.add_argument("--all", action="store_true", help="reports and cards must be equal too")
    options = parser.parse_args()
    if options.command == "record":
        sys.exit(record(options.out.resolve(), only=options.only, keep=options.keep))
    before, after = (json.loads(path.read_bytes()) for path in (options.before, options.after))
    sys.exit(compare(before, after, everything=options.all))


def record(out: Path, *, only: str = "*", keep: bool = False) -> int:
    """0 if every case ended, and ended well if killed; writes `out`/matrix.json."""
    root = Path.cwd()
    os.environ.update(_ENVIRONMENT)
    import torch

    import quantkit

    if root not in Path(str(quantkit.__file__)).resolve().parents:
        raise SystemExit(
            f"{quantkit.__file__}: not of this checkout; run the matrix in the root of the "
            "checkout with its own interpreter"
        )
    work = out / "matrix-work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    commit = _git(root, "rev-parse", "HEAD")
    edited = _git(root, "status", "--porcelain")
    os.chdir(work)
    write_inputs(work)
    told: dict[str, Any] = {}
    problems: list[str] = []
    for case in cases():
        if fnmatch.fnmatch(case.name, only):
            began = time.perf_counter()
            told[case.name] = _run(case)
            problems += _problems(case, told)
            seconds = time.perf_counter() - began
            print(f"{seconds:6.1f} s  exit {told[case.name]['exit']}  {case.name}", flush=True)
    result = {
        "commit": commit,
        "edited": edited.splitlines(),
        "only": only,
        "versions": {
            "python": platform.python_version(),
            "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            **{name: _version(name) for name in _PACKAGES},
        },
        "inputs": {
            path.relative_to(work).as_posix(): _sha256(path)
            for part in ("models", "text.txt", "mixed.yaml")
            for path in _files(work / part)
        },
        "problems": problems,
        "cases": told,
    }
    (out / RESULT).write_text(json.dumps(result, indent=1) + "\n")
    if not keep:
        os.chdir(out)
        shutil.rmtree(work)
    times = os.times()
    failed = sum(case["exit"] != 0 for case in told.values())
    print(
        f"{len(told)} cases, {failed} ended with another exit code than 0, "
        f"{times.user + times.system + times.children_user + times.children_system:.0f} s of CPU"
    )
    for problem in problems:
        print(f"problem: {problem}")
    return 1 if problems else 0


def _run(case: Case) -> dict[str, Any]:
    """Exit code, digests and told content of a case; its output stays where it is."""
    out = Path(out_of(case.name))
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.parent / "log"
    journals = [_killed(case.arguments, out, lines) for lines in case.kill_at]
    code = _resumed(case.arguments, log) if case.kill_at else _forked(case.arguments, log)
    printed = log.with_suffix(".out").read_text()
    found: dict[str, Any] = {
        "arguments": case.arguments,
        "exit": code,
        "files": {},
        "told": {"(errors)": _plain(log.with_suffix(".err").read_text())},
    }
    if case.printed:
        found["files"][_PRINTED] = {"sha256": hashlib.sha256(printed.encode()).hexdigest()}
    else:
        found["told"][_PRINTED] = _content(_PRINTED, printed)
    for path in _files(out):
        name = path.relative_to(out).as_posix()
        if name == _RUN:
            continue
        if _is_told(name):
            found["told"][name] = _content(name, path.read_text())
        else:
            found["files"][name] = _digest(path)
    if case.kill_at:
        found["killed"] = [bool(journal) for journal in journals]
        found["told"][_KILLED] = [_content(_KILLED, line) for line in journals[-1]]
        if (file := out / _RUN).is_file():
            found["resumed_steps"] = json.loads(file.read_bytes()).get("steps_before_resume")
    return found


def _problems(case: Case, told: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What is wrong with a case by itself."""
    found = told[case.name]
    if case.package is not None and _version(case.package) is None:
        yield f"{case.name}: needs the package {case.package}"
    elif found["exit"] != 0:
        yield f"{case.name}: exit code {found['exit']}: {_last(found)}"
    if not all(found.get("killed", ())):
        yield f"{case.name}: finished before it could be killed, {_KILL_TRIES} times"
    if found.get("resumed_steps") == 0:
        yield f"{case.name}: began anew instead of being resumed"
    if case.same_as is not None and case.same_as in told:
        for line in _differences(told[case.same_as], found, told_too=True):
            yield f"{case.name}: {line}, unlike {case.same_as}"


def _forked(arguments: Sequence[str], log: Path) -> int:
    """The exit code of `python -m quantkit` in a process that has imported torch already."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            for number, suffix in ((1, ".out"), (2, ".err")):
                os.dup2(os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT), number)
            sys.argv = ["quantkit", *arguments]
            runpy.run_module("quantkit", run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-P", "-m", "quantkit", *arguments]


def _resumed(arguments: Sequence[str], log: Path) -> int:
    with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as errors:
        done = subprocess.run(_command(arguments), stdout=out, stderr=errors, check=False)
    return done.returncode


def _killed(arguments: Sequence[str], out: Path, lines: int) -> list[str]:
    """The first lines of the journal of a process that was killed when it had so many.

    Nothing if it was always too fast.
    """
    for _ in range(_KILL_TRIES):
        process = subprocess.Popen(
            _command(arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and len(_journal(out)) < lines:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        journal = _journal(out)
        if not out.exists() and len(journal) >= lines:
            return journal[:lines]
        shutil.rmtree(out, ignore_errors=True)
    return []


def _journal(out: Path) -> list[str]:
    """The whole lines of an unfinished output's journal; none if there is no such file."""
    try:
        text = (out.with_name(f"{out.name}.partial") / _JOURNAL).read_text()
    except FileNotFoundError:
        return []
    return text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]


def _files(place: Path) -> list[Path]:
    """All files at or below a place, sorted."""
    found = [place] if place.is_file() else place.rglob("*")
    return sorted(path for path in found if path.is_file())


def _is_told(name: str) -> bool:
    return name not in _READ and any(fnmatch.fnmatch(name, glob) for glob in _TOLD)


def _digest(path: Path) -> dict[str, Any]:
    """sha256 of a file; of safetensors also each tensor's, to name those that differ."""
    found: dict[str, Any] = {"sha256": _sha256(path)}
    if path.suffix == ".safetensors":
        data = path.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        found["tensors"] = {
            name: hashlib.sha256(
                repr((entry["dtype"], entry["shape"])).encode()
                + data[
                    8 + length + entry["data_offsets"][0] : 8 + length + entry["data_offsets"][1]
                ]
            ).hexdigest()[:12]
            for name, entry in header.items()
            if name != "__metadata__"
        }
    elif path.name == "config.json":
        found["content"] = json.loads(path.read_bytes())
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content(name: str, text: str) -> Any:
    """What a told file says, without what may differ between two runs: JSON values, or lines."""
    try:
        value = json.loads(text)
    except ValueError:
        return _plain(text)
    if name == _MANIFEST:
        # What is told has an entry of its own here.
        for file in value.get("files", {}):
            if _is_told(file):
                value["files"][file] = "told"
    return _lasting(value)


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(item) for key, item in value.items() if not _VARIES.fullmatch(key)}
    if isinstance(value, list):
        return [_lasting(item) for item in value]
    return value.replace(os.getcwd(), "WORK") if isinstance(value, str) else value


def _plain(text: str) -> list[str]:
    """The lines of a text, without the rows of versions in a report's page."""
    text = _VERSION_ROW.sub("", text.replace(os.getcwd(), "WORK"))
    return text.splitlines()


def _last(found: Mapping[str, Any]) -> str:
    return next(iter(found["told"]["(errors)"][-1:]), "nothing was said")


def compare(before: Mapping[str, Any], after: Mapping[str, Any], *, everything: bool) -> int:
    """Prints what differs between two results; 1 if any of it counts, or with `everything` is."""
    for part in ("versions", "inputs"):
        for path, was, now in _paths(before[part], after[part], part):
            print(f"not the same to start from: {path}: {was} -> {now}")
    globs = (before["only"], after["only"])
    old, new = (
        {
            name: case
            for name, case in result["cases"].items()
            if all(fnmatch.fnmatch(name, glob) for glob in globs)
        }
        for result in (before, after)
    )
    counted, equal, num_files = [], 0, 0
    listed: dict[tuple[str, str], list[str]] = {}
    for name in [*old, *(name for name in new if name not in old)]:
        if name not in old or name not in new:
            counted.append(f"{name}: only in the {'first' if name in old else 'second'} result")
            continue
        lines = list(_differences(old[name], new[name]))
        counted += [f"{name}: {line}" for line in lines]
        equal += not lines
        num_files += len(old[name]["files"])
        if old[name]["exit"] != new[name]["exit"]:
            continue
        for file, path, was, now in _told_apart(old[name]["told"], new[name]["told"]):
            key = (file, re.sub(r"\[\d+\]|(?<=\.)\d+(?=\.)", "*", path))
            listed.setdefault(key, []).append(f"{name}{path and ' at '}{path}: {was} -> {now}")
    print(f"{equal} of {len(old)} cases are equal, with {num_files} files in all")
    for problem in (*before["problems"], *after["problems"]):
        counted.append(f"when it was recorded: {problem}")
    for line in counted:
        print(f"DIFFERENT  {line}")
    if listed:
        print("\nreports, cards and manifests (number of differences, where, the first of them):")
    for (file, path), examples in sorted(listed.items()):
        print(f"{len(examples):6}  {file} {path}\n        {examples[0]}")
    return 1 if counted or (everything and listed) else 0


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], *, told_too: bool = False
) -> Iterator[str]:
    """What differs between two cases of those things that count."""
    if old["exit"] != new["exit"]:
        yield f"exit code {old['exit']} -> {new['exit']} ({_last(old)} -> {_last(new)})"
        return
    was, now = old["files"], new["files"]
    for name in sorted({*was, *now}):
        if name not in was or name not in now:
            yield f"{name}: {'no longer' if name in was else 'newly'} written"
        elif was[name]["sha256"] != now[name]["sha256"]:
            inner = [path for path, _, _ in _paths(was[name], now[name], "") if path != ".sha256"]
            more = f" and {len(inner) - _SHOWN} more" if len(inner) > _SHOWN else ""
            at = f", at {', '.join(inner[:_SHOWN])}{more}" if inner else ""
            yield f"{name}: other bytes{at}"
    if told_too:
        for file, path, first, second in _told_apart(old["told"], new["told"]):
            if not file.startswith("("):
                yield f"{file} {path}: {first} -> {second}"


def _told_apart(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> Iterator[tuple[str, str, str, str]]:
    """(file, JSON path, before, after) of what differs in reports, cards and manifests."""
    for file in sorted({*old, *new}):
        if file not in old or file not in new:
            yield file, "", *(("there", "absent") if file in old else ("absent", "there"))
        elif file.endswith((".md", ".html", ".yaml")):
            lines = difflib.unified_diff(old[file], new[file], n=0, lineterm="")
            for line in list(lines)[2:]:
                if not line.startswith("@@"):
                    was, now = (line[1:], "") if line.startswith("-") else ("", line[1:])
                    yield (
                        file,
                        "",
                        was.strip()[:100] or "(no line)",
                        now.strip()[:100] or "(no line)",
                    )
        else:
            for path, first, second in _paths(old[file], new[file], ""):
                yield file, path, first, second


def _paths(old: Any, new: Any, path: str) -> Iterator[tuple[str, str, str]]:
    """(JSON path, before, after) of every difference between two JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            missing = [] if key in old and key in new else [key]
            if missing:
                yield f"{path}.{key}", _short(old, key), _short(new, key)
            else:
                yield from _paths(old[key], new[key], f"{path}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (first, second) in enumerate(zip(old, new, strict=True)):
            yield from _paths(first, second, f"{path}[{index}]")
    elif old != new:
        yield path, json.dumps(old)[:100], json.dumps(new)[:100]


def _short(value: Mapping[str, Any], key: str) -> str:
    return json.dumps(value[key])[:100] if key in value else "absent"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
