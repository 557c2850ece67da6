"""The shard writer: the safetensors library reads what it wrote, and nothing is left unwritten."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import quantkit.checkpoint.shards
from quantkit.checkpoint.dtypes import LABELS, dtype_of
from quantkit.checkpoint.files import FileSource
from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.shards import ShardWriter, plan_shards
from quantkit.errors import FormatError, OutputError, ResumeError

INFOS = [
    TensorInfo(name="codes", dtype=torch.uint8, shape=(5, 3)),
    TensorInfo(name="scale", dtype=torch.bfloat16, shape=(5, 1)),
    TensorInfo(name="norm", dtype=torch.float32, shape=(7,)),
]


def content(info: TensorInfo) -> torch.Tensor:
    """Bytes 0 and 1 that follow from the name, valid in every dtype."""
    generator = torch.Generator().manual_seed(sum(info.name.encode()))
    payload = torch.randint(0, 2, (info.nbytes,), dtype=torch.uint8, generator=generator)
    return payload.view(info.dtype).reshape(info.shape)


def random_infos(generator: random.Random) -> list[TensorInfo]:
    infos = []
    for number in range(generator.randint(1, 12)):
        shape = tuple(generator.randint(0, 6) for _ in range(generator.randint(0, 3)))
        dtype = generator.choice([dtype_of(name) for name, (_, size) in LABELS.items() if size < 8])
        infos.append(TensorInfo(name=f"t{number}.é", dtype=dtype, shape=shape))
    return infos


@pytest.mark.parametrize("seed", range(25))
def test_random_layouts_are_read_back_by_the_library_and_by_us(seed: int, tmp_path: Path) -> None:
    generator = random.Random(seed)
    infos = random_infos(generator)
    layout = plan_shards(infos, generator.choice([1, 20, 100, 10**6]))
    with ShardWriter(tmp_path, layout) as writer:
        for info in generator.sample(infos, len(infos)):
            writer.put(info.name, content(info))
        writer.close()
    assert sum((tmp_path / s.file).stat().st_size for s in layout.shards) == layout.num_bytes
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (len(layout.shards) > 1)
    for shard in layout.shards:
        with safe_open(tmp_path / shard.file, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            for tensor in shard.tensors:
                found, expected = file.get_tensor(tensor.info.name), content(tensor.info)
                assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
                assert tensor.offset % tensor.info.dtype.itemsize == 0
                assert found.reshape(-1).view(torch.uint8).tolist() == (
                    expected.reshape(-1).view(torch.uint8).tolist()
                )
    (tmp_path / "config.json").write_text("{}")
    source = FileSource(tmp_path)
    assert set(source.names()) == {info.name for info in infos}
    for info in infos:
        assert source.info(info.name) == info


def test_shards_are_filled_in_order_up_to_the_limit(tmp_path: Path) -> None:
    infos = [TensorInfo(name=f"t{n}", dtype=torch.uint8, shape=(n,)) for n in (4, 6, 25, 3, 7)]
    layout = plan_shards(infos, 10)
    names = [[tensor.info.name for tensor in shard.tensors] for shard in layout.shards]
    assert names == [["t4", "t6"], ["t25"], ["t3", "t7"]]
    assert layout.shards[2].file == "model-00003-of-00003.safetensors"
    index = json.loads(layout.index() or b"")
    assert index["metadata"] == {"total_size": 45}
    assert index["weight_map"]["t25"] == "model-00002-of-00003.safetensors"
    assert plan_shards(infos, 45).shards[0].file == "model.safetensors"
    assert plan_shards(infos, 45).index() is None
    assert layout.index_file == "model.safetensors.index.json"
    assert plan_shards(infos, 10, stem="folds").index_file == "folds.safetensors.index.json"


def test_impossible_layouts_are_refused() -> None:
    with pytest.raises(FormatError, match="codes: the tensor is planned twice"):
        plan_shards([*INFOS, INFOS[0]], 100)
    with pytest.raises(FormatError, match="q: safetensors cannot hold"):
        plan_shards([TensorInfo(name="q", dtype=torch.qint8, shape=(1,))], 100)
    with pytest.raises(OutputError, match="at least 1 byte"):
        plan_shards(INFOS, 0)


def test_what_is_not_as_planned_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, plan_shards(INFOS, 10**6)) as writer:
        writer.put("codes", content(INFOS[0]))
        with pytest.raises(FormatError, match=r"scale: planned as torch\.bfloat16 \[5, 1\]"):
            writer.put("scale", torch.zeros(5, 1))
        with pytest.raises(FormatError, match=r"but written as torch\.bfloat16 \[5\]"):
            writer.put("scale", torch.zeros(5, dtype=torch.bfloat16))
        with pytest.raises(FormatError, match="other: no such tensor is planned"):
            writer.put("other", torch.zeros(5))
        with pytest.raises(FormatError, match="codes: the tensor is written twice"):
            writer.put("codes", content(INFOS[0]))
        assert writer.missing() == ("norm", "scale")
        with pytest.raises(FormatError, match="2 planned tensors were never written, norm, scale"):
            writer.close()


def test_noncontiguous_tensors_are_written_right(tmp_path: Path) -> None:
    info = TensorInfo(name="w", dtype=torch.float32, shape=(4, 6))
    with ShardWriter(tmp_path, plan_shards([info], 10**6)) as writer:
        writer.put("w", content(info).T.contiguous().T)
        assert torch.equal(writer.read("w"), content(info))


def test_interrupted_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    layout = plan_shards(INFOS, 20)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for directory in (whole, resumed):
        directory.mkdir()
    with ShardWriter(whole, layout) as writer:
        for info in INFOS:
            writer.put(info.name, content(info))
        writer.close()
    with ShardWriter(resumed, layout) as writer:
        writer.put("codes", content(INFOS[0]))
        writer.sync()
        writer.put("scale", torch.zeros(5, 1, dtype=torch.bfloat16))
    with ShardWriter(resumed, layout, committed=["codes"]) as writer:
        assert writer.missing() == ("norm", "scale")
        assert torch.equal(writer.read("codes"), content(INFOS[0]))
        with pytest.raises(FormatError, match="scale: the tensor has not been written"):
            writer.read("scale")
        for info in INFOS[1:]:
            writer.put(info.name, content(info))
        writer.close()
    files = sorted(path.name for path in whole.iterdir())
    assert files == sorted(path.name for path in resumed.iterdir())
    for file in files:
        assert (whole / file).read_bytes() == (resumed / file).read_bytes()


@pytest.mark.parametrize("damage", ["gone", "shorter", "header"])
def test_lost_committed_tensors_are_noticed(damage: str, tmp_path: Path) -> None:
    layout = plan_shards(INFOS, 10**6)
    with ShardWriter(tmp_path, layout) as writer:
        writer.put("codes", content(INFOS[0]))
    path = tmp_path / "model.safetensors"
    if damage == "gone":
        path.unlink()
    elif damage == "shorter":
        os.truncate(path, layout.num_bytes - 1)
    else:
        path.write_bytes(bytes(layout.num_bytes))
    with pytest.raises(ResumeError, match=r"codes is gone or changed .*--fresh"):
        ShardWriter(tmp_path, layout, committed=["codes"])
    with pytest.raises(ResumeError, match="ghost was written by the earlier run"):
        ShardWriter(tmp_path, layout, committed=["ghost"])


def test_copy_goes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantkit.checkpoint.shards, "PIECE_BYTES", 10)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    with ShardWriter(source, plan_shards(INFOS, 10**6)) as writer:
        for info in INFOS:
            writer.put(info.name, content(info))
        writer.close()
    renamed = TensorInfo(name="renamed", dtype=torch.uint8, shape=(5, 3))
    with ShardWriter(tmp_path, plan_shards([*INFOS, renamed], 10**6)) as writer:
        for info in INFOS:
            writer.copy(info.name, FileSource(source))
        writer.copy("renamed", FileSource(source), "codes")
        writer.close()
    (tmp_path / "config.json").write_text("{}")
    copied = FileSource(tmp_path)
    for info in INFOS:
        assert torch.equal(copied.read(info.name), content(info))
    assert torch.equal(copied.read("renamed"), content(INFOS[0]))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_full_disk_is_an_error_that_says_how_to_go_on(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    layout = plan_shards(INFOS, 10**6)
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match=rf"disk full: .* {layout.num_bytes}; .* resume"):
        ShardWriter(tmp_path, layout)
    monkeypatch.undo()
    with ShardWriter(tmp_path, layout) as writer:
        monkeypatch.setattr(os, call, full)
        if call == "pwrite":
            with pytest.raises(OutputError, match="disk full"):
                writer.put("codes", content(INFOS[0]))
            assert "codes" in writer.missing()


def test_a_file_system_without_reservation_still_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    layout = plan_shards(INFOS, 10**6)
    with ShardWriter(tmp_path, layout):
        assert (tmp_path / "model.safetensors").stat().st_size == layout.num_bytes
