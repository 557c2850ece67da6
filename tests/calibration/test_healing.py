"""Slopes of scales through a whole model, block by block, and those of one plain backward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_jobs as jobs
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit.calibration import healing
from quantkit.calibration.healing import Healing
from quantkit.methods.descent import LearnedScales

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEME = "w3a16_g32_asym"


@pytest.mark.parametrize("logits", [healing.LOGITS, 997], ids=["at once", "in pieces"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_slopes_are_those_of_one_backward_pass(
    kind: str, logits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = jobs.build(kind, tmp_path / "model")
    plain: dict[str, Any] = {"allow_unreadable": True}
    job = jobs.make_job(model, "best", SCHEME, overrides=("refine=null", "heal=null"), **plain)
    jobs.finish(job, tmp_path / "plain")
    told: dict[int, Tensor] = {}
    names: dict[int, str] = {}
    run = Healing.run

    def keep(self: LearnedScales, slope_OG: Tensor, number: int, rate: float) -> None:
        told[id(self)] = slope_OG

    def named(self: Healing) -> tuple[float, float]:
        loss = run(self)
        names.update({id(scales): name for name, scales in self._scales.items()})
        return loss

    monkeypatch.setattr(LearnedScales, "step_", keep)
    monkeypatch.setattr(Healing, "run", named)
    monkeypatch.setattr(healing, "LOGITS", logits)
    once = ("refine=null", "heal.iterations=1")
    healed = jobs.make_job(model, "best", SCHEME, overrides=once, **plain)
    jobs.finish(healed, tmp_path / "healed")

    assert job.calibration is not None
    ids = job.calibration.ids
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    written = jobs.dequantized(model, tmp_path / "plain").requires_grad_(True)
    with torch.no_grad():
        p = original(ids).logits.log_softmax(-1)
    q = written(ids).logits.log_softmax(-1)
    (p.exp() * (p - q)).sum().backward()
    state = dict(written.named_parameters())
    assert len(names) == len(told) == 14
    for key, name in names.items():
        weight = state[name]
        assert weight.grad is not None
        expected = (weight.grad * weight).detach().view(*told[key].shape, -1).sum(-1)
        # Float32 sums in another order, of terms that cancel.
        torch.testing.assert_close(
            told[key], expected, rtol=1e-3, atol=1e-3 * float(expected.std())
        )
