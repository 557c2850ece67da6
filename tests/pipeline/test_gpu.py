"""Whole runs on a GPU that is none (see fake_gpu): what two devices would break, and what it costs.

The numbers are the CPU's but for the order of sums, so results can be compared.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_jobs as jobs
import torch
from fake_gpu import OnGpu, fake_gpu
from safetensors.torch import load_file

from quantkit.calibration import hidden, stream
from quantkit.calibration.hidden import HiddenStore
from quantkit.calibration.stream import CalibrationStream
from quantkit.errors import NumericsError
from quantkit.formats.bitpack import pack_nibbles, pack_rows
from quantkit.methods.stats import Needs, Stats, add_product_
from quantkit.model.causal import CausalModel

pytestmark = pytest.mark.usefixtures("one_thread")

# (model, method, scheme)
RUNS: list[tuple[str, str, str | None]] = [
    ("llama", "gptq", "w4a16_g32"),
    ("llama", "best", "w3a16_g32_asym"),
    ("llama", "gptq_nf4", None),
    ("llama", "rtn", "nvfp4a16"),
    ("llama", "gptq", "mxfp4a16"),
    ("llama", "fp8", None),
    ("qwen3", "awq", "w4a16_g32_asym"),
    ("gpt2", "smoothquant", None),
    ("mixtral", "gptq", "w4a16_g32"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    built = {kind: jobs.build(kind, folder / kind) for kind in {run[0] for run in RUNS}}
    return {**built, "deep": jobs.build("llama", folder / "deep", num_hidden_layers=5)}


def weights(out: Path) -> list[dict[str, Any]]:
    """What the report says of each weight."""
    found: list[dict[str, Any]] = json.loads((out / "quantkit" / "report.json").read_text())[
        "weights"
    ]
    return found


def alike(cpu: list[dict[str, Any]], gpu: list[dict[str, Any]]) -> None:
    """Errors up to what codes change that the last bit of a sum tips, and those after them."""
    for one, other in zip(cpu, gpu, strict=True):
        assert (one["name"], one["degraded"]) == (other["name"], other["degraded"])
        assert other["error"] == pytest.approx(one["error"], rel=0.25)
    whole, found = (sum(one["error"] for one in side) for side in (cpu, gpu))
    assert found == pytest.approx(whole, rel=0.05)


@pytest.mark.parametrize(("kind", "method", "scheme"), RUNS)
def test_a_gpu_gives_what_a_cpu_gives(
    kind: str,
    method: str,
    scheme: str | None,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The GPU that is none has no gradients.
    overrides = ("refine=null", "heal=null") if method == "best" else ()
    jobs.finish(jobs.make_job(models[kind], method, scheme, overrides=overrides), tmp_path / "cpu")
    with fake_gpu(monkeypatch):
        job = jobs.make_job(models[kind], method, scheme, overrides=overrides, device="cuda")
        jobs.finish(job, tmp_path / "gpu")
    alike(weights(tmp_path / "cpu"), weights(tmp_path / "gpu"))


def test_the_output_head_is_quantized_on_a_gpu_too(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"head": "w8a16_row", "allow_unreadable": True}
    jobs.finish(jobs.make_job(models["llama"], "gptq", **options), tmp_path / "cpu")
    with fake_gpu(monkeypatch):
        job = jobs.make_job(models["llama"], "gptq", device="cuda", **options)
        jobs.finish(job, tmp_path / "gpu")
    assert weights(tmp_path / "gpu")[-1]["name"] == "lm_head.weight"
    alike(weights(tmp_path / "cpu"), weights(tmp_path / "gpu"))


def test_scales_of_the_cache_are_calibrated_on_a_gpu_too(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = jobs.load_recipe("rtn", scheme="w8a16_row", samples=8, seq_len=32, kv="fp8_head")
    jobs.finish(jobs.make_job(models["llama"], recipe=recipe), tmp_path / "cpu")
    with fake_gpu(monkeypatch):
        job = jobs.make_job(models["llama"], recipe=recipe, device="cuda")
        jobs.finish(job, tmp_path / "gpu")
    here, there = (load_file(tmp_path / side / "model.safetensors") for side in ("cpu", "gpu"))
    scales = [name for name in here if name.endswith(("k_scale", "v_scale"))]
    assert len(scales) == 4
    assert all(torch.allclose(here[name], there[name], rtol=2**-7) for name in scales)


def test_methods_are_compared_and_budgets_kept_on_a_gpu(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["llama"]
    text = model / "calibration.txt"
    asked = ("--device", "cuda", "--calib", text, "--samples", "4", "--seq-len", "16")
    compared = ("--methods", "rtn,awq", "--text", text, "--out", tmp_path / "compared")
    compared += ("--windows", "2", "--prompts", "0")
    with fake_gpu(monkeypatch):
        assert jobs.command("compare", model, *asked, *compared) == 0
        # The GPU that is none has no gradients.
        plain = ("--set", "refine=null", "--set", "heal=null")
        budget = ("--bits", "4.6", *plain, "--out", tmp_path / "mixed")
        assert jobs.command("quantize", model, *asked, *budget) == 0
    assert len({weight["scheme"] for weight in weights(tmp_path / "mixed")}) > 1


def test_what_learns_mixes_no_devices(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the gradients themselves, for which there are zeros: nothing is gained."""

    def zeros(_: Any, inputs: list[torch.Tensor] | torch.Tensor, *__: Any, **___: Any) -> Any:
        wanted = [inputs] if isinstance(inputs, torch.Tensor) else inputs
        return [torch.zeros_like(each.detach()) for each in wanted]

    learning = ("refine.iterations=4", "heal.iterations=4")
    options: dict[str, Any] = {"overrides": learning, "allow_unreadable": True}
    monkeypatch.setattr(torch, "enable_grad", torch.no_grad)
    monkeypatch.setattr(torch.autograd, "grad", zeros)
    with fake_gpu(monkeypatch):
        job = jobs.make_job(models["llama"], "best", "w3a16_g32_asym", device="cuda", **options)
        jobs.finish(job, tmp_path / "gpu")
    report = json.loads((tmp_path / "gpu" / "quantkit" / "report.json").read_text())
    assert list(report["refined"]) == ["block 0", "block 1", "heal"]
    assert all(step["after"] == step["before"] > 0 for step in report["refined"].values())


def test_a_gpu_of_little_memory_reads_statistics_back_from_disk(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.make_job(models["llama"], "gptq", "w4a16_g32")
    jobs.finish(job, tmp_path / "cpu")
    with fake_gpu(monkeypatch):
        few = jobs.make_job(models["llama"], "gptq", "w4a16_g32", device="cuda")
        least = few.prediction.smallest - few.prediction.base
        few = dataclasses.replace(few, max_vram=least)
        budget = few.prediction.gram_budget(None, least)
        assert budget is not None and budget < few.prediction.grams
        jobs.finish(few, tmp_path / "gpu")
    alike(weights(tmp_path / "cpu"), weights(tmp_path / "gpu"))


def test_gram_matrices_of_16_bits_are_the_same_over_the_borders_of_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    columns = 2 * 1920 + 7
    x = torch.randn(64, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    with fake_gpu(monkeypatch):
        stats = Stats.empty(columns, Needs(gram=-1), device="cuda")
        for part in x.split(24):
            stats.update_(part.to("cuda"), name="x")
        stats.finish_()
    assert isinstance(stats.gram, OnGpu)
    assert torch.allclose(stats.gram.inner, x.float().T @ x.float(), rtol=1e-5, atol=1e-4)


def test_a_float32_factor_keeps_16_bits_beside_one_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(50, 9, generator=draw).bfloat16(), torch.randn(50, 2000, generator=draw)
    exact = x.double().T @ y.double()
    with fake_gpu(monkeypatch):
        found = torch.zeros(9, 2000, device="cuda")
        add_product_(found, x.to("cuda"), y.to("cuda"))
    assert isinstance(found, OnGpu)
    assert float((found.inner.double() - exact).norm() / exact.norm()) < 2**-16


def test_values_that_come_to_the_host_are_few(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each makes the host wait for the GPU: some for every weight, none for every channel."""
    with fake_gpu(monkeypatch) as visits:
        job = jobs.make_job(models["llama"], "gptq", "w4a16_g32", device="cuda")
        visits.clear()
        jobs.finish(job, tmp_path / "out")
    count = len(weights(tmp_path / "out"))
    busy = {line: seen for line, seen in visits.items() if seen > 8 * count}
    # The loop over channels stands for a kernel.
    assert not {line for line in busy if "columns.py" not in line}, busy


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_packed_on_a_gpu_to_the_same_words(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (37, 101), generator=draw, dtype=torch.uint8)
    with fake_gpu(monkeypatch) as visits:
        there = pack_rows(codes.to("cuda"), bits)
        nibbles = pack_nibbles(codes[:, :100].to("cuda")) if bits == 4 else None
        assert there.is_cuda and not visits
        assert torch.equal(there.cpu(), pack_rows(codes, bits))
        if nibbles is not None:
            assert torch.equal(nibbles.cpu(), pack_nibbles(codes[:, :100]))


def test_hidden_states_that_stay_on_the_gpu_are_those_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(2))
    with fake_gpu(monkeypatch):
        found = {}
        for kept_on in (None, "cuda"):
            with HiddenStore(tmp_path, (4, 3, 5), torch.bfloat16, kept_on=kept_on) as store:
                assert store.keeps == (kept_on is not None)
                for start in (0, 2):
                    store.write(7, start, written[start : start + 2].to("cuda"))
                first = store.read(7, 2, 4, "cuda")
                first.add_(1)
                found[kept_on] = store.read(7, 2, 4, "cuda").cpu()
                # Another generation leaves this one whole, until one of its parity comes.
                store.write(8, 2, first)
                assert torch.equal(store.read(7, 2, 4, "cuda").cpu(), found[kept_on])
                store.sync(7)
                assert store.has_file_for(8) and not store.has_file_for(9)
                store.write(9, 2, first)
            with HiddenStore(tmp_path, (4, 3, 5), torch.bfloat16) as store:
                assert torch.equal(store.read(7, 0, 2), written[:2].bfloat16())
    assert torch.equal(found[None], found["cuda"])
    assert torch.equal(found[None], written[2:].bfloat16())


@pytest.mark.parametrize("method", ["gptq", pytest.param("best", marks=pytest.mark.long)])
@pytest.mark.parametrize(("times", "kills"), [(0, (0, 1, 3)), (float("inf"), (2,))])
def test_a_run_goes_on_from_the_hidden_states_that_were_saved(
    method: str,
    times: float,
    kills: tuple[int, ...],
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kill at a block, with every generation saved that there is a file for, or the first."""
    with fake_gpu(monkeypatch):
        whole = jobs.make_job(models["deep"], method, "w4a16_g32", device="cuda")
        jobs.finish(whole, tmp_path / "whole")
        monkeypatch.setattr(stream, "TIMES_SAVING", times)
        for kill in kills:
            out = tmp_path / f"killed-{kill}"
            with monkeypatch.context() as patch:
                patch.setattr(CalibrationStream, "forward", dying(kill))
                with pytest.raises(KeyboardInterrupt):
                    jobs.finish(whole, out)
            again = jobs.finish(whole, out)
            assert jobs.hashes(again.out) == jobs.hashes(tmp_path / "whole")
            before = json.loads((out / "quantkit" / "run.json").read_text())["steps_before_resume"]
            # outside and embed, and the blocks before the one that it died in.
            assert before == (2 if times else 2 + kill)


def dying(kill: int) -> Callable[..., None]:
    """A forward that ends the process once it has written what the block hands on."""
    plain = CalibrationStream.forward

    def forward(self: CalibrationStream, index: int, *rest: Any, **options: Any) -> None:
        plain(self, index, *rest, **options)
        if index == kill:
            raise KeyboardInterrupt

    return forward


def test_the_next_block_is_read_while_one_is_at_work(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = []
    plain = CausalModel.fill_block_

    def fill(self: CausalModel, block: torch.nn.Module, index: int, device: torch.device) -> None:
        readers.append((index, threading.current_thread().name.split("_")[0]))
        if index == 3:
            raise NumericsError("block 3 cannot be read")
        plain(self, block, index, device)

    with fake_gpu(monkeypatch):
        job = jobs.make_job(models["deep"], "gptq", "w4a16_g32", device="cuda")
        monkeypatch.setattr(CausalModel, "fill_block_", fill)
        with pytest.raises(NumericsError, match="block 3"):
            jobs.finish(job, tmp_path / "out")
    assert readers == [(index, "next-block") for index in range(4)]


def test_what_is_still_being_written_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers that never sync, as those of budgets, get the new bytes."""
    plain = hidden.write_from

    def slow(*parts: Any) -> None:
        time.sleep(0.3)
        plain(*parts)

    monkeypatch.setattr(hidden, "write_from", slow)
    old, new = torch.zeros(2, 3, 5), torch.ones(2, 3, 5)
    with HiddenStore(tmp_path, (2, 3, 5), torch.float32) as store:
        store.write(0, 0, old)
        store.write(2, 0, new)
        assert torch.equal(store.read(2, 0, 2), new)


def test_tensors_of_two_devices_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in itself: it refuses what CUDA refuses, and lets through what CUDA does."""
    with fake_gpu(monkeypatch) as visits:
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert there.device == torch.device("cuda", 0) and there.is_cuda
        for mixed in (
            lambda: here + there,
            lambda: here[there.long()],
            lambda: there.scatter_(0, torch.zeros(3, dtype=torch.int64), there),
            lambda: there.numpy(),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                mixed()
        assert (there * torch.tensor(2.0)).cpu().tolist() == [2, 2, 2]
        assert there[torch.tensor([0, 1])].shape == (2,)
        visits.clear()
        assert float(there.sum()) == 3 and sum(visits.values()) == 1


def test_the_benchmark_times_what_it_quantizes(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            *(sys.executable, str(root / "eval" / "bench" / "gpu.py"), "--self-test"),
            *("--only", "speed", "--methods", "rtn", "--json", str(tmp_path / "gpu.json")),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["method"] for row in report["speed"]] == ["rtn"]
    for row in report["speed"]:
        assert row["whole"] and row["blocks"] == 2
        assert 0 < sum(row["phases"].values()) < row["seconds"]
