"""What every benchmark records and how it runs commands: evidence is JSON in eval/results.

A result holds the command, the commit, versions and hardware beside its figures.  Paths outside
the repository are recorded by their last part only.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "eval" / "results"
_PACKAGES = (
    "quantkit",
    "torch",
    "transformers",
    "datasets",
    "safetensors",
    "numpy",
    "triton",
    "compressed-tensors",
    "llmcompressor",
    "nvidia-modelopt",
    "auto-round",
    "bitsandbytes",
)
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
_PROBE = (
    "import importlib.metadata as m, json, platform, sys\n"
    "found = {'python': platform.python_version()}\n"
    "for name in sys.argv[1:]:\n"
    "    try: found[name] = m.version(name)\n"
    "    except m.PackageNotFoundError: pass\n"
    "print(json.dumps(found))"
)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A command that has ended.

    cpu_seconds: of the processor, user's and system's, of all threads.
    peak_bytes: the operating system's peak RSS of the process, never below this one's own peak,
    because the kernel counts the moment before exec.
    """

    returncode: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    stdout: str
    stderr: str

    def check(self, command: Sequence[str]) -> Finished:
        """Itself; exits with the command's last lines if it failed."""
        if self.returncode != 0:
            tail = "\n".join((self.stdout + self.stderr).strip().splitlines()[-15:])
            raise SystemExit(f"{shown(command)} exited with {self.returncode}:\n{tail}")
        return self


def run(
    command: Sequence[str],
    *,
    threads: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Finished:
    """Runs a command to its end, start-up included in the time.  Output goes through files."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        process = subprocess.Popen(
            list(command), stdout=out, stderr=err, env=child_environment(threads, environment)
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        # The process is reaped; without this, Popen would wait for it again.
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        return Finished(
            returncode=process.returncode,
            seconds=seconds,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak_bytes=usage.ru_maxrss * 1024,
            stdout=out.read().decode(errors="replace"),
            stderr=err.read().decode(errors="replace"),
        )


def child_environment(threads: int | None, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for a child: this checkout importable, and so many threads."""
    environment = dict(os.environ)
    paths = [str(ROOT), str(ROOT / "eval"), str(ROOT / "kernels")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    environment["HF_HUB_OFFLINE"] = "1"
    if threads is not None:
        environment.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    return environment | dict(more or {})


def quantkit_command(model: Path | str, out: Path | str, *options: str) -> list[str]:
    """`quantkit quantize MODEL --out OUT ...` with this Python."""
    return [
        sys.executable,
        "-m",
        "quantkit",
        "quantize",
        str(model),
        "--out",
        str(out),
        *options,
        "--json",
    ]


def last_json(text: str) -> Any:
    """The JSON value that a command's output ends with."""
    lines = text.strip().splitlines()
    for start in range(len(lines) - 1, -1, -1):
        if lines[start].lstrip().startswith(("{", "[")):
            try:
                return json.loads("\n".join(lines[start:]))
            except json.JSONDecodeError:
                continue
    raise SystemExit(f"no JSON at the end of: {text[-500:]}")


def write_result(name: str, figures: Any, *, pythons: Mapping[str, str] | None = None) -> Path:
    """Prints a result and writes it to eval/results/NAME.json.

    pythons: interpreters of peers by name, whose package versions are recorded too.
    """
    result = {
        "benchmark": name,
        "command": shown(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "versions": {
            "quantkit": versions(sys.executable),
            **{peer: versions(python) for peer, python in (pythons or {}).items()},
        },
        "hardware": hardware(),
        "figures": to_json(figures),
    }
    text = json.dumps(result, indent=2) + "\n"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(text, encoding="utf-8")
    print(text, end="")
    print(f"written to {path.relative_to(ROOT)}", file=sys.stderr)
    return path


def with_earlier(
    name: str, setting: Mapping[str, Any], rows: str, label: str, new: Mapping[str, Any]
) -> dict[str, Any]:
    """New rows by label, in place of an earlier result's where those have the same label.

    The list is under the key `rows`; "earlier" says which rows are another run's, and what made
    them.  Raises SystemExit if that was measured in another setting.
    """
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    figures = result.pop("figures")
    for key, value in setting.items():
        if figures[key] != value:
            raise SystemExit(f"--update: {name}.json was measured with {key} {figures[key]}")
    old = {row[label]: row for row in figures[rows]}
    earlier = list(figures.get("earlier", ()))
    older = {name for run in earlier for name in run["rows"]}
    earlier.append({**result, "rows": [name for name in old if name not in older]})
    for run in earlier:
        run["rows"] = [name for name in run["rows"] if name not in new]
    return {
        rows: list({**old, **new}.values()),
        "earlier": [run for run in earlier if run["rows"]],
    }


def to_json(value: Any) -> Any:
    """Dataclasses as dicts, recursively; numbers to six significant digits."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_json(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def shown(command: Sequence[str]) -> str:
    """A command as recorded: absolute paths by their place in the repository or their last part."""
    return shlex.join(_shown_part(part) for part in command)


def _shown_part(part: str) -> str:
    option, mark, value = part.partition("=")
    if mark and value.startswith("/"):
        return f"{option}={_shown_part(value)}"
    if not part.startswith("/"):
        return part
    path = Path(part)
    if path.is_relative_to(ROOT):
        return str(path.relative_to(ROOT))
    return "python" if path.name.startswith("python") else path.name


def versions(python: str) -> dict[str, str]:
    """Python's and the relevant packages' versions in an interpreter."""
    if python == sys.executable:
        found = {"python": platform.python_version()}
        for name in _PACKAGES:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found
    output = subprocess.run(
        [python, "-c", _PROBE, *_PACKAGES], check=True, capture_output=True, text=True
    )
    answer: dict[str, str] = json.loads(output.stdout)
    return answer


def commit() -> str:
    """The checkout's commit, marked if tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    # Results themselves are files of the repository.
    changed = git("status", "--porcelain", "-uno", "--", ".", ":!eval/results")
    return git("rev-parse", "HEAD") + (" with changes" if changed else "")


def hardware() -> dict[str, Any]:
    """Processor, relevant instruction sets, cores, memory and GPU."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    pairs = [line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line]
    fields = {name.strip(): value.strip() for name, value in pairs}
    flags = set(fields.get("flags", "").split())
    found = {
        "cpu": fields.get("model name", platform.processor()),
        "instructions": [flag for flag in _CPU_FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg()[0],
    }
    import torch

    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def arguments(doc: str | None, *, name: str, threads: int = 2) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes: threads, scratch space, the result's name."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--scratch", help="directory for outputs (default: the system's)")
    parser.add_argument("--name", default=name, help="of the result in eval/results")
    return parser


def calibration_arguments(
    parser: argparse.ArgumentParser, *, samples: int, seq_len: int, default: str | None = None
) -> None:
    """Adds --calib (required unless it has a default), --samples and --seq-len."""
    parser.add_argument(
        "--calib", "--calib-text", default=default, required=default is None, help="text file"
    )
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--seq-len", type=int, default=seq_len)


def calibrated(options: argparse.Namespace) -> tuple[str, ...]:
    """What `calibration_arguments` were given, as options of `quantkit quantize`."""
    sizes = ("--samples", str(options.samples), "--seq-len", str(options.seq_len))
    return ("--calib", options.calib, *sizes)


def evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --eval-text, --eval-tokens and --eval-seq-len."""
    parser.add_argument("--eval-text", default="demo", help="other text, or demo")
    parser.add_argument("--eval-tokens", type=int, default=40_960)
    parser.add_argument("--eval-seq-len", type=int, default=256)


def setting(options: argparse.Namespace) -> dict[str, Any]:
    """The model and the texts that both kinds of arguments name, for a result."""
    return {
        "model": Path(options.model).name,
        "calibration": {"samples": options.samples, "seq_len": options.seq_len},
        "evaluation": {
            "text": Path(options.eval_text).name,
            "tokens": options.eval_tokens,
            "seq_len": options.eval_seq_len,
        },
    }


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def named_paths(pairs: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` options as a mapping."""
    split = [pair.partition("=") for pair in pairs]
    if not all(name and mark and value for name, mark, value in split):
        raise SystemExit(f"{' '.join(pairs)}: write NAME=VALUE")
    return {name: value for name, _, value in split}
