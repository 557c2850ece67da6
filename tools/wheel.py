"""Builds the wheel, and beside what every install has puts compiled objects for x86 on Linux.

    python -m tools.wheel --out dist

`pip install .` makes the wheel of pure Python; its CPU backend `cpu-int8` is compiled on first use.
This one brings the same source compiled for each level of quantkit_kernels/cpu/objects.py, so that
machines without a compiler have it too.  It is tagged by the versions of glibc and libstdc++ that
the objects ask for, and contains no part of torch: what they need of it is its C interface.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from quantkit_kernels.cpu import native, objects

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path(native.__file__).with_name("int8_dot.cpp")
INSIDE = "quantkit_kernels/cpu/built"
# glibc of the manylinux policies (PEP 600), and the newest libstdc++ symbols each has.
POLICIES = (
    ((2, 28), (3, 4, 24)), ((2, 31), (3, 4, 28)), ((2, 34), (3, 4, 29)),
    ((2, 35), (3, 4, 30)), ((2, 39), (3, 4, 33)),
)  # fmt: skip
# All that the objects may take from elsewhere: the rest has versions.
C_INTERFACE = re.compile(r"aoti_torch_\w+|torch_\w+|_ITM_\w+|__gmon_start__")
EPOCH = (1980, 1, 1, 0, 0, 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the wheel")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        plain = pure_wheel(Path(folder))
        built = build_objects(Path(folder) / "built")
        print(with_objects(plain, built, out))


def pure_wheel(folder: Path) -> Path:
    """The wheel of pure Python, built in a copy of the sources: nothing stale gets into it."""
    project = folder / "project"
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("quantkit", "kernels", "eval", "recipes"):
        shutil.copytree(ROOT / name, project / name, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project / name)
    # setuptools alone, without isolation: no network.
    code = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=project, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode or "would be ignored" in done.stderr:
        sys.exit(done.stderr)
    (found,) = folder.glob("*.whl")
    return found


def build_objects(folder: Path) -> dict[str, Path]:
    """An object of SOURCE for every level, by its name."""
    folder.mkdir()
    compiler = native._compiler()
    if isinstance(compiler, str):
        sys.exit(f"no C++ compiler: {compiler}")
    major, minor = objects.FIRST_TORCH
    built = {}
    for name, level in objects.LEVELS.items():
        built[name] = folder / f"{SOURCE.stem}-{name}.so"
        flags = (
            *level.flags, f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000ULL",
            "-fvisibility=hidden", "-s", f"-ffile-prefix-map={SOURCE.parent}/=",
            f"-ffile-prefix-map={Path(torch.__file__).parent}/include/=",
        )  # fmt: skip
        if reason := native.compile_library(SOURCE, built[name], compiler, flags):
            sys.exit(reason)
        if foreign := [one for one in imported(built[name]) if not C_INTERFACE.fullmatch(one)]:
            sys.exit(f"{built[name].name} takes {foreign} from torch, not from its C interface")
    return built


def imported(library: Path, versioned: bool = False) -> list[str]:
    """Names that a library takes from others without a version, or the versions of the rest."""
    done = subprocess.run(
        ["readelf", "--dyn-syms", "--wide", str(library)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line.split() for line in done.stdout.splitlines()]
    names = [words[7] for words in lines if len(words) > 7 and words[6] == "UND"]
    if versioned:
        return sorted({name.partition("@")[2] for name in names if "@" in name})
    return [name for name in names if "@" not in name]


def platform_of(libraries: list[Path]) -> str:
    """The tag of the oldest Linux that has all versions which the libraries ask for."""
    needed: dict[str, tuple[int, ...]] = {"GLIBC": (2, 28), "GLIBCXX": (3, 4)}
    for library in libraries:
        for version in imported(library, versioned=True):
            kind, _, numbers = version.partition("_")
            found = tuple(int(part) for part in numbers.split("."))
            needed[kind] = max(needed.get(kind, found), found)
    for glibc, glibcxx in POLICIES:
        if needed["GLIBC"] <= glibc and needed["GLIBCXX"] <= glibcxx:
            return f"manylinux_{glibc[0]}_{glibc[1]}_x86_64"
    sys.exit(f"the compiler is newer than every manylinux policy: {needed}")


def with_objects(plain: Path, built: dict[str, Path], out: Path) -> Path:
    """The wheel with the objects in it, tagged for where they run, in the folder `out`."""
    platform = platform_of(list(built.values()))
    target = out / plain.name.replace("-any.whl", f"-{platform}.whl")
    added = {f"{INSIDE}/{path.name}": path.read_bytes() for path in built.values()}
    added[f"{INSIDE}/{SOURCE.stem}.json"] = objects.manifest(SOURCE, built).encode()
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(target, "w") as wheel:
        record = next(name for name in source.namelist() if name.endswith(".dist-info/RECORD"))
        files = {name: source.read(name) for name in source.namelist() if name != record}
        tags = record.replace("RECORD", "WHEEL")
        files[tags] = (
            files[tags]
            .replace(b"Tag: py3-none-any", f"Tag: py3-none-{platform}".encode())
            .replace(b"Root-Is-Purelib: true", b"Root-Is-Purelib: false")
        )
        lines = []
        for name, data in [*files.items(), *added.items()]:
            _write(wheel, name, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={digest},{len(data)}\n")
        _write(wheel, record, "".join([*lines, f"{record},,\n"]).encode())
    return target


def _write(wheel: zipfile.ZipFile, name: str, data: bytes) -> None:
    # One time for all: the same sources and compiler make the same wheel.
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    wheel.writestr(entry, data)


if __name__ == "__main__":
    main()
