"""What every source promises: a fingerprint of the content, and memory bounded by what is asked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import quantkit.checkpoint.source
from quantkit.checkpoint.files import FileSource
from quantkit.checkpoint.safetensors import TensorInfo, build_header

Tensors = dict[str, torch.Tensor]


def write(path: Path, tensors: Tensors, config: str = "{}") -> FileSource:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(config)
    save_file(tensors, path / "model.safetensors")
    return FileSource(path)


def weights() -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(96, 64, generator=generator) for name in ("a", "b", "c")}


def last_element_changed() -> Tensors:
    changed = weights()
    changed["c"][-1, -1] += 1
    return changed


CHANGES: dict[str, Callable[[Path], FileSource]] = {
    "weights": lambda path: write(path, {name: 1.01 * w for name, w in weights().items()}),
    "last element": lambda path: write(path, last_element_changed()),
    "config": lambda path: write(path, weights(), config='{"a": 1}'),
    "one more": lambda path: write(path, {"d": torch.zeros(1), **weights()}),
    "name": lambda path: write(path, {f"{name}x": w for name, w in weights().items()}),
    "shape": lambda path: write(path, {name: w.reshape(64, 96) for name, w in weights().items()}),
    "dtype": lambda path: write(path, {n: w.view(torch.int32) for n, w in weights().items()}),
}


@pytest.mark.parametrize("whole_bytes", [2**28, 0], ids=["whole", "sampled"])
def test_fingerprint_follows_the_content(
    whole_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantkit.checkpoint.source, "_WHOLE_BYTES", whole_bytes)
    original = write(tmp_path / "original", weights()).fingerprint()
    assert write(tmp_path / "elsewhere", weights()).fingerprint() == original
    for kind, change in CHANGES.items():
        assert change(tmp_path / kind).fingerprint() != original, kind
    source = write(tmp_path / "original", weights())
    (source.path / "tokenizer.json").write_text("{}")
    assert source.fingerprint() != original


MEASURE = """
import sys
import torch
from pathlib import Path
from quantkit.checkpoint.files import FileSource
from quantkit.checkpoint.shards import ShardWriter, plan_shards
from quantkit.checkpoint.safetensors import TensorInfo

def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))

source = FileSource(sys.argv[1])
total = source.read_rows("big", 0, 1).sum()
before = peak()
for start in range(0, 50_000, 1000):
    total += source.read_rows("big", start, start + 1000).sum()
source.gather("big", torch.arange(0, 50_000, 1000))
source.fingerprint()
with ShardWriter(Path(sys.argv[2]), plan_shards([source.info("big")], 2**40)) as writer:
    writer.copy("big", source)
    writer.close()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_reading_and_copying_a_large_tensor_takes_little_memory(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    big = TensorInfo(name="big", dtype=torch.bfloat16, shape=(50_000, 2000))
    assert big.nbytes == 200_000_000
    header = build_header([big])
    (source / "config.json").write_text("{}")
    (source / "model.safetensors").write_bytes(header)
    # The tensor is a hole in the file: zeros that take no room on the disk.
    os.truncate(source / "model.safetensors", len(header) + big.nbytes)
    command = [sys.executable, "-c", MEASURE, str(source), str(target)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    # Pieces of 8 MiB plus what the allocator keeps and the code that is loaded on first use.
    assert int(run.stdout) < 40
    assert (target / "model.safetensors").stat().st_size == len(header) + big.nbytes
