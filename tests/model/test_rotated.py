"""Rotated models against the models they were: whole, in transformers' own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_jobs as jobs
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.files import FileSource
from quantkit.errors import CheckpointError, RecipeError
from quantkit.methods.parts import make_part
from quantkit.methods.rotations.hadamard import Hadamard
from quantkit.methods.rules import PartSpec
from quantkit.model.causal import CausalModel
from quantkit.model.fold_vectors import FOLDS_FILE
from quantkit.model.rotations.rotated import (
    ROTATION_FILE,
    Axis,
    Rotated,
    Turn,
    keep_rotation,
    rotated_since,
)
from quantkit.model.rotations.rotating import rotate
from quantkit.model.split_experts import split_experts

pytestmark = pytest.mark.usefixtures("one_thread")

# Biases and a tied head; heads of another size; fused qkv; experts; a hidden size of 9 * 8.
WHOLE: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 72, "num_attention_heads": 2, "num_key_value_heads": 1},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "mixtral": {},
}


def opened(path: Path) -> CausalModel:
    return CausalModel.open(split_experts(FileSource(path)))


def rotated(model: CausalModel, **options: Any) -> Rotated:
    spec = PartSpec.from_value("rotation", {"name": "hadamard", **options})
    part = make_part("rotation", spec.name, dict(spec.options))
    source = rotate(model, part, spec).source
    assert isinstance(source, Rotated)
    return source


def block_logits(model: CausalModel) -> Tensor:
    ids = torch.arange(1, 25)[None]
    hidden, calls = model.calls(ids)
    for index, call in enumerate(calls):
        hidden = model.run(model.load_block(index), hidden, call)
    return model.logits(hidden)


def with_vectors(kind: str, path: Path, **changes: Any) -> Path:
    """A tiny model whose norms and biases are no ones and zeros."""
    model = jobs.build(kind, path, **changes)
    file = model / "model.safetensors"
    source = FileSource(model)
    tensors = {name: source.read(name) for name in source.names()}
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            tensors[name] = torch.rand(tensor.shape, generator=generator) + 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "heads"])
def test_a_rotated_model_computes_the_same(kind: str, stream: bool, tmp_path: Path) -> None:
    model = opened(with_vectors(kind, tmp_path / "model", **WHOLE[kind]))
    source = rotated(model, stream=stream, untie=True)
    expected = block_logits(model)
    found = block_logits(CausalModel.open(source))
    # float32 sums in another order.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    changed = [n for n in source.turns if n in model.source.names()]
    assert not any(torch.equal(source.read(n), model.source.read(n)) for n in changed)


def test_transformers_computes_the_same_from_the_files(tmp_path: Path) -> None:
    path = with_vectors("qwen2", tmp_path / "model")
    source = rotated(opened(path), untie=True)
    save_file(
        {name: source.read(name) for name in source.names()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    (tmp_path / "config.json").write_text(json.dumps(source.config))
    assert source.config["tie_word_embeddings"] is False
    ids = torch.arange(1, 25)[None]
    with torch.no_grad():
        found, expected = (
            AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)(ids).logits
            for where in (tmp_path, path)
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("gemma2", {"untie": True}, "does not follow when model.layers.0 reads a rotated stream"),
        ("olmo2", {}, "what model.layers.0 puts out does not follow"),
        ("cohere2", {"untie": True}, "q_proj.weight does not follow"),
        ("gpt2", {"untie": True}, "several tables write the stream"),
        ("qwen2", {}, "its head is tied to the embedding.*rotation.untie=true"),
        ("gpt_neox", {"stream": False}, "the values of a head do not reach one product"),
        ("falcon", {"stream": False}, "no attention of its blocks hands values over"),
    ],
)
def test_a_model_it_does_not_fold_into_is_refused(
    kind: str, options: dict[str, Any], why: str, tmp_path: Path
) -> None:
    model = opened(jobs.build(kind, tmp_path / "model"))
    with pytest.raises(RecipeError, match=why):
        rotated(model, **options)


def test_a_model_that_was_transformed_before_is_refused(tmp_path: Path) -> None:
    path = jobs.build("llama", tmp_path / "model")
    (path / "quantkit").mkdir()
    save_file({"x:rows": torch.ones(2)}, path / FOLDS_FILE)
    with pytest.raises(RecipeError, match="have been transformed before"):
        rotated(opened(path))


def reference_turn(source: FileSource, name: str, turn: Turn, part: Hadamard) -> Tensor:
    """The whole tensor by matrices of its axes."""
    value = source.read(name).double()
    value = value.t() if turn.flipped else value
    if turn.norm is not None:
        value = value * (source.read(turn.norm).double() + turn.offset)
    if turn.columns is not None:
        value = value @ matrix_of(turn.columns, value.shape[1], part)
    if turn.rows is not None:
        value = matrix_of(turn.rows, value.shape[0], part).t() @ value
    return value.t() if turn.flipped else value


def matrix_of(axis: Axis, length: int, part: Hadamard) -> Tensor:
    block = part(torch.eye(axis.size, dtype=torch.float64), axis.key)
    matrix = torch.eye(length, dtype=torch.float64)
    last = length if axis.last is None else axis.last
    for start in range(axis.first, last, axis.size):
        matrix[start : start + axis.size, start : start + axis.size] = block
    return matrix


TURNS = {
    "columns": Turn(columns=Axis(key="s", size=72), norm="norm", offset=1.0),
    "rows": Turn(rows=Axis(key="s", size=60)),
    "both": Turn(rows=Axis(key="s", size=60), columns=Axis(key="h", size=9)),
    "some rows": Turn(
        rows=Axis(key="h", size=8, first=12, last=44), columns=Axis(key="s", size=72), norm="norm"
    ),
    "flipped": Turn(columns=Axis(key="s", size=60), flipped=True),
    "flipped rows": Turn(rows=Axis(key="s", size=72), flipped=True),
}


@pytest.mark.parametrize("kind", TURNS)
@pytest.mark.parametrize("chunk", [1, 1000, 1 << 20])
def test_a_tensor_is_turned_in_parts_as_by_matrices(
    kind: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.model.rotations.rotated._CHUNK", chunk)
    generator = torch.Generator().manual_seed(2)
    tensors = {
        "w": torch.randn(60, 72, generator=generator),
        "norm": torch.rand(72, generator=generator),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    source, part, turn = FileSource(tmp_path), Hadamard(), TURNS[kind]
    view = Rotated(source, part, PartSpec(name="hadamard", options=()), {"w": turn})
    whole = view.read("w")
    # float64 against float64, each rounded to float32.
    torch.testing.assert_close(
        whole, reference_turn(source, "w", turn, part).float(), rtol=1e-6, atol=1e-6
    )
    for start, stop in ((0, 1), (71, 300), (0, 60 * 72), (4000, 4320)):
        assert torch.equal(view.read_flat("w", start, stop), whole.reshape(-1)[start:stop])


def test_a_record_gives_the_same_tensors_again(tmp_path: Path) -> None:
    model = opened(with_vectors("qwen2", tmp_path / "model"))
    source = rotated(model, untie=True)
    (tmp_path / "out").mkdir()
    keep_rotation(source, tmp_path / "out")
    again = rotated_since(tmp_path / "out", model.source)
    assert again.names() == source.names()
    for name in source.names():
        assert torch.equal(again.read(name), source.read(name)), name


def damaged(data: dict[str, Any], how: str) -> dict[str, Any]:
    name = next(n for n in data["tensors"] if n.endswith("o_proj.weight"))
    if how == "foreign":
        data["rotation"] = {"name": "os:system"}
    elif how == "size":
        data["tensors"][name]["rows"]["size"] = 7
    elif how == "name":
        data["tensors"]["nothing"] = data["tensors"].pop(name)
    elif how == "norm":
        data["tensors"][name]["norm"] = "lm_head.weight"
    else:
        data["tensors"] = [name]
    return data


@pytest.mark.parametrize("how", ["foreign", "size", "name", "norm", "list"])
def test_a_damaged_record_is_named(how: str, tmp_path: Path) -> None:
    model = opened(jobs.build("llama", tmp_path / "model"))
    keep_rotation(rotated(model), tmp_path)
    file = tmp_path / ROTATION_FILE
    file.write_text(json.dumps(damaged(json.loads(file.read_bytes()), how)))
    with pytest.raises(CheckpointError, match="no record of this model's rotation"):
        rotated_since(tmp_path, model.source)
