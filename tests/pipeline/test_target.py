"""Hidden states of the original and of the quantized model side by side, and runs on them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from pathlib import Path

import pytest
import tiny_jobs as jobs
import torch
from torch import Tensor, nn

from quantkit.calibration.staged import stages_of
from quantkit.calibration.stream import CalibrationStream
from quantkit.methods.recipe import load_recipe
from quantkit.methods.stats import Stats
from quantkit.pipeline.duration import Speeds, duration
from quantkit.pipeline.session import Job
from quantkit.pipeline.work.needs import block_needs

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEME = "w3a16_g32_asym"


@pytest.fixture(scope="module")
def job(llama: Path) -> Job:
    return jobs.make_job(llama, "best", SCHEME)


def both_gathered(job: Job, block: nn.Module, folder: Path, budget: int | None) -> dict[str, Stats]:
    """Statistics of block 0 as `block` beside the original's, on the embedded text."""
    assert job.calibration is not None
    wanted = block_needs(job.plan, 0, transforms=False)
    with contextlib.ExitStack() as stack, torch.no_grad():
        stream = CalibrationStream(
            job.model,
            job.calibration,
            device="cpu",
            scratch=folder,
            gram_budget=budget,
            stack=stack,
            original=True,
        )
        stream.embed()
        book = stream.gather_paired(
            0,
            job.model.load_block(0),
            block,
            wanted.needs,
            wanted.features,
            rounded={},
            write=True,
        )
        return {key: book.get(key) for key in wanted.needs}


def changed(block: nn.Module) -> nn.Module:
    """The block with every matrix off by a tenth."""
    other = copy.deepcopy(block)
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        if parameter.ndim == 2:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.1 * parameter.data.std() * noise
    return other


def inputs_of_linears(job: Job, block: nn.Module) -> dict[str, Tensor]:
    """Path of a linear layer -> its inputs [T, I] on the calibration text, by plain hooks."""
    assert job.calibration is not None
    found: dict[str, Tensor] = {}
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda _, args, __, path=path: found.update({path: args[0].flatten(0, 1)})
            )
    with torch.no_grad():
        hidden, calls = job.model.calls(job.calibration.ids)
        job.model.run(block, hidden, calls[0])
    return found


def test_streams_of_the_same_weights_do_not_drift(job: Job, tmp_path: Path) -> None:
    for stats in both_gathered(job, job.model.load_block(0), tmp_path, None).values():
        assert stats.drift is not None and not bool(stats.drift.any())
        assert stats.gram is not None and bool(stats.gram.any())


@pytest.mark.parametrize("budget", [None, 1], ids=["one pass", "a pass for each input"])
def test_drift_is_that_of_plain_hooks(job: Job, budget: int | None, tmp_path: Path) -> None:
    original = job.model.load_block(0)
    block = changed(original)
    found = both_gathered(job, block, tmp_path, budget)
    first, second = inputs_of_linears(job, original), inputs_of_linears(job, block)
    for key, refs in job.plan.input_groups(0):
        path = refs[0].parameter.removesuffix(".weight")
        x, y = first[path].double(), second[path].double()
        stats = found[key]
        assert stats.drift is not None and stats.gram is not None
        # Float32 sums over 256 tokens.
        torch.testing.assert_close(stats.gram, (y.T @ y).float(), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(stats.drift, (y.T @ (x - y)).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "adds"), [("llama", True), ("gpt2", True), ("gemma3_text", False)]
)
def test_the_last_matrix_of_a_block_makes_up_for_its_output(
    kind: str, adds: bool, tmp_path: Path
) -> None:
    """gemma3 normalizes what it adds."""
    job = jobs.make_job(jobs.build(kind, tmp_path / "model"), "best", "w4a16_g32")
    assert job.calibration is not None
    original = job.model.load_block(0)
    block = changed(original)
    wanted = block_needs(job.plan, 0, transforms=False)
    *_, (key, refs) = job.plan.input_groups(0)
    with contextlib.ExitStack() as stack, torch.no_grad():
        stream = CalibrationStream(
            job.model,
            job.calibration,
            device="cpu",
            scratch=tmp_path / "scratch",
            gram_budget=None,
            stack=stack,
            original=True,
        )
        stream.embed()
        before = {name: value.clone() for name, value in block.state_dict().items()}
        assert stream.adds_up(0, block, refs[0]) == adds
        assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
        book = stream.gather_paired(
            0,
            original,
            block,
            {key: wanted.needs[key]},
            wanted.features,
            rounded={},
            write=False,
            summand=key,
        )
        hidden, calls = job.model.calls(job.calibration.ids)
        outs = [job.model.run(each, hidden, calls[0]).flatten(0, 1) for each in (original, block)]
        inputs: list[Tensor] = []
        with job.model.tap(0, block, None, lambda k, x: inputs.append(x) if k == key else None):
            job.model.run(block, hidden, calls[0])
    stats = book.get(key)
    assert stats.lack is not None and stats.drift is None
    expected = inputs[0].double().T @ (outs[0] - outs[1]).double()
    # Float32 sums over 256 tokens.
    torch.testing.assert_close(stats.lack, expected.float(), rtol=1e-3, atol=1e-3)


def test_stages_follow_the_order_of_use() -> None:
    assert stages_of([("qkv", False), ("o", False), ("up", False)]) == [["qkv"], ["o"], ["up"]]
    experts = [("router", False), ("up 0", True), ("up 1", True), ("down", False)]
    assert stages_of(experts) == [["router"], ["up 0", "up 1"], ["down"]]
    many = stages_of([(str(number), False) for number in range(30)])
    assert len(many) == 10
    assert [key for stage in many for key in stage] == [str(number) for number in range(30)]


@pytest.mark.parametrize(
    ("kind", "method", "scheme", "overrides"),
    [
        ("llama", "best", SCHEME, ()),
        ("mixtral", "best", SCHEME, ()),
        ("gpt2", "gptq", "w4a16_g32", ("target=qronos",)),
        ("llama", "gptq_nf4", "nf4_b64", ("target=qronos",)),
        ("llama", "rtn", "w8a8_row", ("target=qronos",)),
    ],
    ids=["llama", "experts", "conv1d", "nf4", "8-bit activations"],
)
def test_the_smallest_budget_changes_no_byte(
    kind: str, method: str, scheme: str, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    model = jobs.build(kind, tmp_path / "model")
    whole = jobs.make_job(
        model, method, scheme, overrides=overrides, head=scheme, allow_unreadable=True
    )
    least = jobs.make_job(
        model,
        method,
        scheme,
        overrides=overrides,
        head=scheme,
        allow_unreadable=True,
        max_ram=whole.prediction.smallest + 2**26,
    )
    outs = [
        jobs.hashes(jobs.finish(job, tmp_path / name).out)
        for job, name in ((whole, "whole"), (least, "least"))
    ]
    assert outs[0] == outs[1]


def test_what_a_run_needs_grows_by_the_second_stream(llama: Path) -> None:
    recipe = load_recipe("best", scheme=SCHEME, samples=8, seq_len=32)
    recipe = dataclasses.replace(recipe, refine=None, heal=None)
    job = jobs.make_job(llama, recipe=recipe)
    plain = jobs.make_job(llama, recipe=dataclasses.replace(recipe, target=None))
    without = plain.prediction
    assert job.prediction.block > without.block
    assert job.prediction.gram == 2 * without.gram
    assert job.prediction.disk > without.disk
    # At the same speeds: those that are measured differ from one moment to the next.
    speeds = Speeds(own=1e9, wide=1e9, passes=1e9, share=1.0)
    taken, less = (duration(j.model, j.plan, j.calibration, speeds) for j in (job, plain))
    assert taken > less
