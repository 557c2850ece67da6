"""Weights that transformers computes from other tensors, under the names of the parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_jobs as jobs
import torch

from quantkit.checkpoint.files import FileSource
from quantkit.errors import QuantkitError
from quantkit.model import skeleton
from quantkit.model.names import map_names
from quantkit.model.views import Converted, converted
from tools.sweep.one import Kind, _build


def opened(kind: Kind, model_type: str, directory: Path) -> FileSource:
    directory.mkdir(exist_ok=True)
    with torch.no_grad():
        _build(kind, model_type, directory, torch.arange(3, 51).view(2, 24))
    return FileSource(directory)


def test_a_tensor_cut_in_three_is_read_as_three_weights(tmp_path: Path) -> None:
    source = opened("encoder", "gte", tmp_path)
    model = skeleton.build(source, trust_remote_code=False, dtype=None)
    view = converted(source, model)
    assert isinstance(view, Converted)
    fused = "gte.encoder.layer.2.attention.qkv_proj"
    assert f"{fused}.weight" in source.names()
    assert not any(name.startswith(fused) for name in view.names())
    for leaf in ("weight", "bias"):
        paths = [f"gte.layers.2.self_attn.{part}_proj.{leaf}" for part in "qkv"]
        whole = torch.cat([view.read(path) for path in paths])
        assert torch.equal(whole, source.read(f"{fused}.{leaf}"))
        assert [view.info(path).shape for path in paths] == [view.read(p).shape for p in paths]
    assert torch.equal(
        view.read_rows("gte.layers.2.self_attn.k_proj.weight", 5, 9),
        source.read_rows(f"{fused}.weight", 64 + 5, 64 + 9),
    )
    assert view.fingerprint() == source.fingerprint()
    names = map_names(model, view)
    assert not names.conversions and not names.unmapped
    assert all(names.pieces[path][0].split for path in paths)
    assert not names.pieces["gte.layers.2.mlp.down_proj.weight"][0].split
    assert converted(view, model) is view


def test_towers_and_plain_models_stay_as_they_are(tmp_path: Path) -> None:
    for kind, model_type in (("image", "kimi_k25"), ("causal", "qwen3")):
        source = opened(kind, model_type, tmp_path / model_type)  # type: ignore[arg-type]
        model = skeleton.build(source, trust_remote_code=False, dtype=None)
        assert converted(source, model) is source
        pieces = map_names(model, source).pieces
        assert not any(piece.split for found in pieces.values() for piece in found)


def test_the_plan_says_who_reads_it(tmp_path: Path) -> None:
    opened("encoder", "gte", tmp_path)
    plan = jobs.make_job(tmp_path, "rtn", None).plan
    assert plan.readers["transformers"] is None
    assert "the tensors that transformers makes these weights of gte of" in str(
        plan.readers["vllm"]
    )


def test_a_damaged_fused_tensor_is_named(tmp_path: Path) -> None:
    source = opened("encoder", "gte", tmp_path)
    model = skeleton.build(source, trust_remote_code=False, dtype=None)
    name = "gte.encoder.layer.0.mlp.up_gate_proj.weight"
    broken = source.read(name)
    broken[3, 4] = torch.nan
    view = converted(source, model)
    view.source.read = lambda asked: broken if asked == name else source.read(asked)  # type: ignore[attr-defined,method-assign]
    with pytest.raises(QuantkitError, match=r"up_gate_proj\.weight: the weight holds NaN"):
        view.read("gte.layers.0.mlp.up_proj.weight")
