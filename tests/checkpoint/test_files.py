"""Reading checkpoints: damage is refused with a sentence, everything else comes out exactly."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.checkpoint.dtypes import LABELS, dtype_of
from quantkit.checkpoint.files import FileSource, refuse_quantized
from quantkit.errors import CheckpointError
from quantkit.formats.open import open_source

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(37, 8, generator=generator).to(torch.bfloat16),
        "layer.weight": torch.randn(5, 3, 7, generator=generator),
        "norm.weight": torch.randn(8, generator=generator).half(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
    }


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A checkpoint in one file."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint in two shards with an index."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    names = sorted(tensors())
    parts = {SHARDS[0]: names[:2], SHARDS[1]: names[2:]}
    for file, part in parts.items():
        save_file({name: tensors()[name] for name in part}, tmp_path / file)
    edit_index(tmp_path, {name: file for file, part in parts.items() for name in part})
    return tmp_path


def edit_index(path: Path, weight_map: dict[str, object]) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def weight_map(path: Path) -> dict[str, object]:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    found: dict[str, object] = index["weight_map"]
    return found


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_tensors_are_read_as_the_safetensors_library_reads_them(
    layout: str, request: pytest.FixtureRequest
) -> None:
    source = open_source(request.getfixturevalue(layout))
    assert source.names() == tuple(sorted(tensors()))
    for name, expected in tensors().items():
        assert source.info(name).shape == tuple(expected.shape)
        assert source.info(name).nbytes == expected.nbytes
        found = source.read(name)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_rows_ranges_and_gathers_are_parts_of_the_tensor(single: Path) -> None:
    source = FileSource(single)
    embed, layer = tensors()["embed.weight"], tensors()["layer.weight"]
    assert torch.equal(source.read_rows("embed.weight", 4, 9), embed[4:9])
    assert torch.equal(source.read_rows("layer.weight", 4, 5), layer[4:5])
    assert source.read_rows("embed.weight", 3, 3).shape == (0, 8)
    assert torch.equal(source.read_flat("layer.weight", 10, 31), layer.flatten()[10:31])
    for rows in ([3, 4, 5, 0, 36, 3], [0, 1, 2], [7, 6], [], [5, 5]):
        index = torch.tensor(rows, dtype=torch.int64)
        assert torch.equal(source.gather("embed.weight", index), embed[index])
    with pytest.raises(IndexError, match="rows"):
        source.gather("embed.weight", torch.tensor([37]))
    with pytest.raises(IndexError, match=r"rows 30\.\.38 of 37"):
        source.read_rows("embed.weight", 30, 38)
    with pytest.raises(CheckpointError, match="no tensor nope"):
        source.read("nope")


def test_every_dtype_survives(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    payload = torch.arange(48, dtype=torch.uint8) % 2
    content = {name: payload.view(dtype_of(name)).clone() for name in LABELS}
    save_file(content, tmp_path / "model.safetensors")
    source = FileSource(tmp_path)
    for name in LABELS:
        dtype = dtype_of(name)
        assert source.info(name).dtype == dtype
        assert torch.equal(source.read(name).view(torch.uint8), payload)


def truncate(path: Path) -> None:
    os.truncate(path / SHARDS[1], (path / SHARDS[1]).stat().st_size - 1)


def truncate_header(path: Path) -> None:
    os.truncate(path / SHARDS[1], 20)


def append(path: Path) -> None:
    with (path / SHARDS[1]).open("ab") as file:
        file.write(b"x")


def remove_shard(path: Path) -> None:
    (path / SHARDS[1]).unlink()


def lfs_shard(path: Path) -> None:
    (path / SHARDS[1]).write_bytes(LFS)


def lfs_config(path: Path) -> None:
    (path / "config.json").write_bytes(LFS)


def remove_config(path: Path) -> None:
    (path / "config.json").unlink()


def adapter(path: Path) -> None:
    (path / "config.json").rename(path / "adapter_config.json")


def bad_config(path: Path) -> None:
    (path / "config.json").write_text("{")


def list_config(path: Path) -> None:
    (path / "config.json").write_text("[1]")


def huge_header(path: Path) -> None:
    (path / SHARDS[1]).write_bytes((200_000_000).to_bytes(8, "little") + b"{}")


def duplicate(path: Path) -> None:
    (path / SHARDS[1]).write_bytes((path / SHARDS[0]).read_bytes())


def index_names_absent_tensor(path: Path) -> None:
    edit_index(path, weight_map(path) | {"ghost": SHARDS[0]})


def remove_index(path: Path) -> None:
    (path / "model.safetensors.index.json").unlink()


def empty_index(path: Path) -> None:
    edit_index(path, {})


def only_pickles(path: Path) -> None:
    for file in path.glob("*.safetensors*"):
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def no_weights(path: Path) -> None:
    for file in path.glob("*.safetensors*"):
        file.unlink()


def link_outside(path: Path) -> None:
    outside = path.parent / "outside.safetensors"
    (path / SHARDS[1]).rename(outside)
    (path / SHARDS[1]).symlink_to(outside)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated data": (truncate, r"00002-of-00002.safetensors: the file is truncated.*asks for"),
    "truncated header": (truncate_header, "truncated .* too short for its header"),
    "appended": (append, "damaged: it holds"),
    "missing shard": (remove_shard, "00002-of-00002.safetensors: the file is missing"),
    "LFS shard": (lfs_shard, "Git-LFS pointer.*git lfs pull"),
    "LFS config": (lfs_config, "config.json: this is a Git-LFS pointer"),
    "no config": (remove_config, "no model: there is no config.json"),
    "adapter": (adapter, "PEFT adapter"),
    "config no JSON": (bad_config, "config.json: this is no valid JSON"),
    "config no object": (list_config, "config.json: no JSON object"),
    "huge header": (huge_header, "damaged: its header claims 200000000"),
    "duplicate": (duplicate, "the tensor is in model-00001-of-00002.safetensors too"),
    "ghost": (index_names_absent_tensor, "ghost: the index says"),
    "no index": (remove_index, "index.json is missing"),
    "empty index": (empty_index, "no weight_map"),
    "pickle": (only_pickles, "pickle files .pytorch_model.bin.*save_pretrained"),
    "no weights": (no_weights, "there are no weights"),
    "link outside": (link_outside, "leads out of the model's directory"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_with_a_sentence(kind: str, sharded: Path) -> None:
    damage, message = DAMAGE[kind]
    FileSource(sharded)
    damage(sharded)
    with pytest.raises(CheckpointError, match=message):
        FileSource(sharded)


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "a/../../outside.safetensors",
        "..\\outside.safetensors",
        "C:\\outside.safetensors",
        "nul\0.safetensors",
        "lone\ud800.safetensors",
        "./model.safetensors",
        "pytorch_model.bin",
        f"{'x' * 5000}.safetensors",
        "",
        3,
        None,
    ],
    ids=lambda file: ascii(file)[:30],
)
def test_index_that_escapes_the_directory_is_refused(file: object, sharded: Path) -> None:
    save_file({"x": torch.zeros(1)}, sharded.parent / "outside.safetensors")
    edit_index(sharded, weight_map(sharded) | {"x": file})
    with pytest.raises(
        CheckpointError,
        match=r"index.json: (x: the shard .* is not allowed|weight_map.x: .* no valid text)",
    ):
        FileSource(sharded)


def test_links_into_the_hub_cache_are_followed(single: Path) -> None:
    repo = single / "cache" / "models--a--b"
    snapshot = repo / "snapshots" / "0123abcd"
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (single / file).rename(repo / "blobs" / f"blob-{file}")
        (snapshot / file).symlink_to(f"../../blobs/blob-{file}")
    assert FileSource(snapshot).names() == tuple(sorted(tensors()))


def test_quantized_models_are_readable_but_refused_as_input(single: Path) -> None:
    refuse_quantized(FileSource(single))
    for config in (
        {"quantization_config": {"quant_method": "gptq"}},
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
    ):
        (single / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"already quantized .*method gptq"):
            refuse_quantized(FileSource(single))
    (single / "config.json").write_text("{}")
    save_file({"a.qweight": torch.zeros(2, dtype=torch.int32)}, single / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.qweight: the model is already quantized"):
        refuse_quantized(FileSource(single))


@pytest.mark.parametrize("name", ["no such/model name", "/no/such", "./a/b", "../a", ""])
def test_what_cannot_be_a_model_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"no such directory|no model"):
        open_source(name)


def test_a_file_is_refused(single: Path) -> None:
    with pytest.raises(CheckpointError, match="this is a file"):
        open_source(single / "model.safetensors")


def test_side_files_are_all_but_weights_and_the_card(single: Path) -> None:
    wanted = ("generation_config.json", "tokenizer.json", "LICENSE", "modeling_x.py", "notes.txt")
    for name in (*wanted, "README.md", "training_args.bin"):
        (single / name).write_text(name)
    source = FileSource(single)
    assert source.side_files() == {name: single / name for name in sorted(wanted)}
    assert sorted(source.left_files()) == ["README.md", "training_args.bin"]
    (single / "tokenizer.json").write_bytes(LFS)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: this is a Git-LFS pointer"):
        FileSource(single).side_files()
