"""What a block's outputs lack, and its slopes, beside plain hooks-free differences."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
import tiny_jobs as jobs
import torch

from quantkit.calibration.block_loss import BlockLoss
from quantkit.calibration.stream import CalibrationStream

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "phi3"])
def test_slopes_are_those_of_differences(kind: str, tmp_path: Path) -> None:
    """Along a random direction in each weight; fused ones, experts' and transposed ones too."""
    job = jobs.make_job(
        jobs.build(kind, tmp_path / "model"), "gptq", "w3a16_g32", allow_unreadable=True
    )
    assert job.calibration is not None
    draw = torch.Generator().manual_seed(0)
    with contextlib.ExitStack() as stack, torch.no_grad():
        stream = CalibrationStream(
            job.model,
            job.calibration,
            device="cpu",
            scratch=tmp_path / "scratch",
            gram_budget=None,
            stack=stack,
        )
        stream.embed()
        block = job.model.load_block(0)
        stream.forward(0, block, None, write=True)
        refs = [ref for _, group in job.plan.input_groups(0) for ref in group]
        weights = [job.model.weight(block, ref).float().clone() for ref in refs]
        for number, weight in enumerate(weights):
            weights[number] = weight + 0.1 * weight.std() * torch.randn(
                weight.shape, generator=draw
            )
        outputs = BlockLoss(stream, 0, block, refs, stream.hidden)
        outputs.put_([job.model.weight(job.model.load_block(0), ref) for ref in refs])
        # Hidden states of these models are float32: what was stored is what comes.
        assert outputs.losses([0])[0] == pytest.approx(0, abs=1e-10)
        outputs.put_(weights)
        loss, slopes = outputs.slopes(0)
        assert loss == pytest.approx(outputs.losses([0])[0], rel=1e-6) and loss > 0
        assert not any(p.requires_grad for p in block.parameters())
        for number, (weight, slope) in enumerate(zip(weights, slopes, strict=True)):
            assert slope.shape == weight.shape and slope.dtype == torch.float32
            if kind == "mixtral" and refs[number].role != "expert":
                # Tokens jump to other experts, of which a slope knows nothing.
                continue
            step = slope / slope.norm().clamp(min=1e-20) * 0.002 * weight.norm()
            sides = []
            for sign in (1, -1):
                outputs.put_([w + sign * step if k == number else w for k, w in enumerate(weights)])
                sides.append(outputs.losses([0])[0])
            outputs.put_(weights)
            expected = (sides[0] - sides[1]) / 2
            # Losses are float32 sums, and the third order of the step shows.
            assert float((slope * step).sum()) == pytest.approx(expected, rel=0.01, abs=1e-6)


def test_padding_does_not_count(tmp_path: Path) -> None:
    model = jobs.build("llama", tmp_path / "model")
    job = jobs.make_job(model, "gptq", "w3a16_g32", allow_unreadable=True)
    assert job.calibration is not None
    mask = torch.ones_like(job.calibration.ids)
    mask[:, 20:] = 0

    padded = dataclasses.replace(job.calibration, mask=mask)
    with contextlib.ExitStack() as stack, torch.no_grad():
        stream = CalibrationStream(
            job.model, padded, device="cpu", scratch=tmp_path / "s", gram_budget=None, stack=stack
        )
        stream.embed()
        block = job.model.load_block(0)
        stream.forward(0, block, None, write=True)
        refs = [ref for _, group in job.plan.input_groups(0) for ref in group]
        outputs = BlockLoss(stream, 0, block, refs, stream.hidden)
        for parameter in block.parameters():
            parameter.mul_(0.9)
        before = outputs.losses([0])[0]
        wanted = stream.hidden.read(1, 0, len(mask))
        wanted[:, 20:] += 100
        stream.hidden.write(1, 0, wanted)
        assert outputs.losses([0])[0] == before
