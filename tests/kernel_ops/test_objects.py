"""The wheel with compiled objects: it runs where there is no compiler, and takes no other file."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from quantkit_kernels.cpu import native, objects

ROOT = Path(__file__).parent.parent.parent
SOURCE = Path(native.__file__).with_name("int8_dot.cpp")
SCRIPT = """
import json, logging, sys
from pathlib import Path
import torch
from quantkit_kernels.cpu import native, objects
from quantkit_kernels.ops import int8_dot
logging.basicConfig(format="%(message)s")
reason = int8_dot.unavailable()
used = [str(Path(path)) for path in torch.ops.loaded_libraries]
errors = []
if reason is None:
    torch.manual_seed(0)
    for bits, group in ((4, 32), (8, 64), (4, 0)):
        columns = 333 if not group else 576
        codes = torch.randint(0, 2**bits, (37, columns), dtype=torch.uint8)
        scale = torch.rand(37, -(-columns // group) if group else 1) + 0.1
        weight = int8_dot.pack(codes, scale, None, group or None, bits)
        parts = (weight.packed, weight.scale, weight.zero, weight.table, None)
        numbers = (weight.bits, weight.floats, weight.group_size, 37)
        x = torch.randn(5, columns)
        found = torch.ops.quantkit.int8_dot(x, *parts, *numbers)
        wanted = int8_dot.reference(x, *parts, *numbers)
        errors.append(float((found - wanted).norm() / wanted.norm()))
print(json.dumps({"reason": reason, "used": used, "errors": errors, "file": native.__file__}))
"""


# A wheel is compiled for every level.
@pytest.fixture(scope="module", params=[pytest.param("built", marks=pytest.mark.long)])
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux" or isinstance(native._compiler(), str):
        pytest.skip("objects are built on Linux, with a compiler")
    if objects.best_level(native._processor_flags()) is None:
        pytest.skip("this processor has none of the levels")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "tools.wheel", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment: the wheel, and the torch of this one."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth is searched last, and its own .pth files, such as ours, are not read.
    (site / "torch.pth").write_text(str(Path(torch.__file__).parent.parent) + "\n")
    return python


def run(python: Path, tmp_path: Path) -> tuple[dict[str, list[object]], str]:
    empty = tmp_path / "empty"
    empty.mkdir(exist_ok=True)
    place = {"PATH": str(empty), "HOME": str(tmp_path), "QUANTKIT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [str(python), "-P", "-c", SCRIPT],
        cwd=tmp_path, env={**place, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def built_in(python: Path) -> Path:
    (folder,) = python.parent.parent.glob("lib/python*/site-packages/quantkit_kernels/cpu/built")
    return folder


def test_a_fresh_environment_without_a_compiler_multiplies(installed: Path, tmp_path: Path) -> None:
    found, _ = run(installed, tmp_path)
    level = objects.best_level(native._processor_flags())
    assert found["reason"] is None
    assert found["used"] == [str(built_in(installed) / f"int8_dot-{level}.so")]
    # The reference adds in another order, in float32.
    assert len(found["errors"]) == 3 and all(float(str(e)) < 2**-20 for e in found["errors"])
    assert not (tmp_path / "cache").exists()


def test_an_object_that_was_cut_short_is_refused_in_one_line(
    installed: Path, tmp_path: Path
) -> None:
    level = objects.best_level(native._processor_flags())
    path = built_in(installed) / f"int8_dot-{level}.so"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    try:
        found, said = run(installed, tmp_path)
    finally:
        path.write_bytes(whole)
    told = f"int8_dot-{level}.so is not the file that int8_dot.json tells of"
    assert said.splitlines() == [f"{told}; building int8_dot.cpp instead"]
    reason = str(found["reason"])
    assert reason.startswith("no C++ compiler") and reason.endswith(f"({told})")


def test_the_wheel_is_tagged_whole_and_without_paths_of_this_machine(wheel: Path) -> None:
    assert wheel.name.endswith("_x86_64.whl") and "-none-manylinux_2_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        names = set(archive.namelist())
        record = next(name for name in names if name.endswith("RECORD"))
        listed = [line.split(",")[0] for line in archive.read(record).decode().splitlines()]
        assert sorted(listed) == sorted(names)
        files = {name: archive.read(name) for name in names if "/built/" in name}
    assert len(files) == len(objects.LEVELS) + 1
    for data in files.values():
        assert str(ROOT).encode() not in data and b"site-packages" not in data


@pytest.fixture
def folder(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The objects unpacked, and taken for those of the package."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if "/built/" in name:
                (tmp_path / Path(name).name).write_bytes(archive.read(name))
    monkeypatch.setattr(objects, "FOLDER", tmp_path)
    monkeypatch.setattr(native, "_build_and_load", lambda source: "not built")
    return tmp_path


def reason_of(caplog: pytest.LogCaptureFixture) -> str:
    native.load.cache_clear()
    with caplog.at_level(logging.WARNING):
        reason = native.load("int8_dot")
    native.load.cache_clear()
    assert len(caplog.records) == 1 and "building int8_dot.cpp instead" in caplog.text
    return str(reason)


def test_a_foreign_object_that_the_manifest_tells_of_falls_back(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    levels = {level: folder / f"int8_dot-{level}.so" for level in objects.LEVELS}
    for path in levels.values():
        data = bytearray(path.read_bytes())
        data[18:20] = (183).to_bytes(2, "little")  # e_machine: AArch64
        path.write_bytes(data)
    (folder / "int8_dot.json").write_text(objects.manifest(SOURCE, levels))
    assert "does not load" in reason_of(caplog)


def test_objects_of_another_source_are_not_run(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listed = folder / "int8_dot.json"
    listed.write_text(json.dumps({**json.loads(listed.read_text()), "source": "0" * 64}))
    assert "was made from another int8_dot.cpp" in reason_of(caplog)


@pytest.mark.parametrize("text", ["", "[]", '{"source": 1}'], ids=["empty", "list", "short"])
def test_a_damaged_manifest_falls_back(
    text: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "int8_dot.json").write_text(text)
    assert "not built (int8_dot-" in reason_of(caplog)


def test_a_processor_without_avx2_gets_none(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_processor_flags", lambda: "flags : fpu sse2 avx")
    assert "none of the objects" in reason_of(caplog)


def test_the_level_is_the_best_that_the_processor_has_whole() -> None:
    v3 = objects.LEVELS["avx2"].features
    assert objects.best_level(v3) == "avx2"
    assert objects.best_level(f"{v3} avx512f avx512_vnni") == "avx2"
    assert objects.best_level(f"{v3} avx_vnni") == "avx_vnni"
    assert objects.best_level(f"avx_vnni {objects.LEVELS['avx512_vnni'].features}") == "avx512_vnni"
    assert objects.best_level("sse2") is None and objects.best_level("") is None


def test_a_checkout_has_no_objects_and_says_nothing() -> None:
    assert objects.find(SOURCE, native._processor_flags()) == (None, None)
    assert not os.path.exists(objects.FOLDER)
