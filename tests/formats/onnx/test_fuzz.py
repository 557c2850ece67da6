"""Damaged ONNX models are refused with a reason or read whole; bombs before they are parsed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

onnx = pytest.importorskip("onnx", reason="the extra quantkit[onnx] is not installed")
TOOL = Path(__file__).parent.parent.parent.parent / "tools" / "fuzz_onnx.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_onnx", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_2000_damaged_models_are_refused_or_read_whole(tool: ModuleType) -> None:
    outcome = tool.fuzz(2000, seed=1)
    assert outcome.refused + outcome.read == 2000
    # Some damage is harmless, such as another name of an output; most is not.
    assert 1000 < outcome.refused < 1950


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def nested(depth: int) -> bytes:
    """A graph in an attribute of a node of a graph in an attribute..."""
    content = b""
    for _ in range(depth):
        content = field(1, field(5, field(6, content)))
    return field(7, content)


BOMBS = {
    "nodes": (field(7, field(1, b"") * 20_000_000), "GraphProto at .*more than 200000 fields"),
    "inputs": (field(7, field(1, field(1, b"") * 10_000_000)), "more than 200000 fields"),
    "numbers": (field(7, field(5, field(7, b"\x01" * 30_000_000))), "packed bytes"),
    "depth": (nested(100_000), "nested deeper than 32"),
    "length": (b"\x3a" + varint(2**60), "1152921504606846976 bytes, 0 are there"),
    "endless": (b"\x3a" + b"\xff" * 100, "a number without an end"),
}


def test_small_files_that_would_fill_the_memory_are_refused_at_once(tmp_path: Path) -> None:
    for name, (content, _) in BOMBS.items():
        (tmp_path / f"{name}.onnx").write_bytes(content)
    code = (
        "import resource, sys, time; from pathlib import Path\n"
        "import onnx, torch\n"
        "from quantkit.errors import CheckpointError\n"
        "from quantkit.formats.onnx.file import OnnxFile\n"
        "status = Path('/proc/self/status')\n"
        "def peak(): return int(status.read_text().split('VmHWM:')[1].split()[0]) // 1024\n"
        "for name in sys.argv[2:]:\n"
        "    before, began = peak(), time.process_time()\n"
        "    try: OnnxFile(Path(sys.argv[1], name + '.onnx'))\n"
        "    except CheckpointError as error: print(error, end='')\n"
        "    print('|', peak() - before, time.process_time() - began)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *BOMBS],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.strip().splitlines()
    for line, (_, message) in zip(lines, BOMBS.values(), strict=True):
        told, _, numbers = line.partition("|")
        assert re.search(message, told), told
        megabytes, seconds = map(float, numbers.split())
        assert megabytes < 200 and seconds < 1, line
