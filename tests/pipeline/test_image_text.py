"""What config.json of a quantized image-text model says of the layers that were not quantized."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_jobs as jobs
import tiny_models as tiny
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from quantkit.errors import FormatError
from quantkit.model import skeleton

SKIPPED = {"compressed-tensors": "ignore", "bitsandbytes": "llm_int8_skip_modules"}


def linears(model: Path) -> set[str]:
    """Paths of all linear layers of the model as transformers builds it."""
    with torch.device("meta"):
        built = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(model))
    return {path for path, module in built.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("kind", tiny.IMAGES)
@pytest.mark.parametrize("format_name", SKIPPED)
def test_every_linear_layer_that_stays_is_named_as_readers_look_it_up(
    kind: str, format_name: str, tmp_path: Path
) -> None:
    model = tiny.build_multimodal(tmp_path / "model", kind)
    job = jobs.make_job(model, "int8", "w8a8_row", format=format_name)
    skipped = set(job.plan.quantization_config[SKIPPED[format_name]])
    quantized = {weight.module for weight in job.plan.weights if weight.scheme is not None}
    kept = linears(model) - quantized
    # torch's own attention, under the name that transformers gives the tower.
    assert "model.vision_tower.head.attention.out_proj" in kept
    assert kept <= skipped and not quantized & skipped
    # The names of the checkpoint, which vLLM maps itself.
    assert "vision_tower.head.attention.out_proj" in skipped
    out = jobs.finish(job, tmp_path / "out").out
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config == json.loads(json.dumps(dict(job.plan.quantization_config)))


def test_names_that_would_skip_a_quantized_layer_are_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build_multimodal(tmp_path / "model")
    # transformers takes names to be skipped as endings too.
    monkeypatch.setattr(skeleton, "linears", lambda model: {"mlp.up_proj": (2, 2)})
    with pytest.raises(FormatError, match="readers would not take it for quantized"):
        jobs.make_job(model, "int8", "w8a8_row", format="bitsandbytes")
