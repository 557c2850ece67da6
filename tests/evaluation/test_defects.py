"""Planted damage: evaluation flags it and names the weight, and flags nothing else."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_eval
import tiny_jobs as jobs
import torch
from quantkit_eval.command import run_evaluation
from quantkit_eval.evaluation import evaluate
from quantkit_eval.records import Candidate
from quantkit_eval.setting import EvaluationRequest
from safetensors.torch import load_file, save_file

from quantkit.errors import CheckpointError
from quantkit.methods.recipe import load_recipe
from quantkit.model.fold_vectors import FOLDS_FILE
from quantkit.pipeline.job import prepare
from quantkit.pipeline.options import QuantizeOptions

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_eval.loud("mixtral", tmp_path_factory.mktemp("mixtral"))
    tiny_eval.write_heldout(path)
    return path


@pytest.fixture(scope="module")
def finished(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # gptq_v2 stores int32 words [I/8, O] and float16 scales [G, O]: easy to reach into.
    out = tmp_path_factory.mktemp("finished") / "out"
    job = jobs.make_job(mixtral, "gptq", "w4a16_g32", format="gptq_v2", allow_unreadable=True)
    return jobs.finish(job, out).out


def measured(model: Path, out: Path, folder: Path) -> Candidate:
    request = EvaluationRequest(
        model=str(model),
        quantized=(str(out),),
        text=str(model / "heldout.txt"),
        seq_len=48,
        prompts=0,
        noise_floor=False,
        limits=("defects>0",),
    )
    (candidate,) = evaluate(request, folder, progress=False).candidates
    return candidate


def scales_up(state: State) -> str:
    name = "model.layers.1.self_attn.o_proj"
    state[f"{name}.scales"] *= 1.05
    return name


def expert_zeroed(state: State) -> str:
    name = next(k for k in state if "experts.2." in k and k.endswith("w1.scales"))
    name = name.removesuffix(".scales")
    # Codes equal to the zero point: every weight is zero.
    state[f"{name}.qweight"][:] = 0x08080808 + 0x80808080 - 2**32
    return name


def rows_swapped(state: State) -> str:
    name = "model.layers.0.self_attn.q_proj"
    for part in ("qweight", "scales"):
        tensor = state[f"{name}.{part}"]
        tensor[:, [3, 17]] = tensor[:, [17, 3]]
    return name


def columns_swapped(state: State) -> str:
    name = "model.layers.0.self_attn.v_proj"
    words = state[f"{name}.qweight"][2]
    # The first and second nibble are the input channels 16 and 17, of one group.
    low, high = words & 0xF, (words >> 4) & 0xF
    words[:] = (words & ~0xFF) | (low << 4) | high
    return name


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (scales_up, "its output is 1.0"),
        (expert_zeroed, "all its values are zero"),
        (rows_swapped, "output channel 3 has nothing in common"),
        (columns_swapped, "input channel 16 has nothing in common"),
    ],
    ids=["scales times 1.05", "expert zeroed", "swapped outputs", "swapped inputs"],
)
def test_planted_defect_is_flagged_where_it_is(
    mixtral: Path, finished: Path, tmp_path: Path, plant: Callable[[State], str], told: str
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(finished, damaged)
    state = load_file(damaged / "model.safetensors")
    name = plant(state)
    save_file(state, damaged / "model.safetensors", {"format": "pt"})
    candidate = measured(mixtral, damaged, tmp_path / "scratch")
    assert [weight.name for weight in candidate.defects] == [f"{name}.weight"]
    defect = candidate.defects[0].defect
    assert defect is not None and told in defect
    assert candidate.outcome == "drop"


@pytest.mark.parametrize(
    ("method", "scheme"),
    [("rtn", "w2a16_g32"), ("gptq", "w2a16_g32"), ("awq", "w3a16_g32_asym"), ("nf4", "nf4_b64")],
)
def test_coarse_quantization_is_no_defect(
    mixtral: Path, tmp_path: Path, method: str, scheme: str
) -> None:
    job = jobs.make_job(mixtral, method, scheme, allow_unreadable=True)
    out = jobs.finish(job, tmp_path / "out").out
    candidate = measured(mixtral, out, tmp_path / "scratch")
    assert [weight.defect for weight in candidate.defects] == []
    assert candidate.weights and candidate.outcome == "within"


def test_a_model_that_is_no_use_any_more_is_measured(mixtral: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(mixtral, tmp_path / "broken"))
    state = load_file(broken / "model.safetensors")
    # The token that follows becomes less likely than any float can say.
    state["lm_head.weight"] *= 1e5
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    request = EvaluationRequest(
        model=str(mixtral),
        quantized=(str(broken),),
        text=str(mixtral / "heldout.txt"),
        seq_len=48,
        prompts=0,
        noise_floor=False,
    )
    evaluated = run_evaluation(request, tmp_path / "report", progress=False)
    (candidate,) = evaluated.report.candidates
    assert candidate.divergence.perplexity_ratio == math.inf
    assert candidate.outcome == "drop"
    assert "∞" in evaluated.text()
    # Neither JSON knows a number for that.
    for content in (
        json.dumps(evaluated.summary(), allow_nan=False),
        (tmp_path / "report" / "report.json").read_text(),
    ):
        assert "Infinity" not in content and "NaN" not in content


def test_folds_of_all_runs_are_divided_out(tmp_path: Path) -> None:
    """A weight that was quantized twice still has the folds of the first time."""
    model = tiny_eval.loud("llama", tmp_path / "model")
    tiny_eval.write_heldout(model)
    first = tiny_eval.quantized(model, tmp_path / "first", "awq", "w8a16_g32")
    recipe = load_recipe("rtn", scheme="w8a16_g32")
    job = prepare(str(first), QuantizeOptions(recipe=recipe, requantize=True))
    second = jobs.finish(job, tmp_path / "second").out
    request = EvaluationRequest(
        model=str(model),
        quantized=(str(second),),
        text=str(model / "heldout.txt"),
        seq_len=48,
        prompts=0,
        noise_floor=False,
        any_base=True,
    )
    (candidate,) = evaluate(request, tmp_path / "work", progress=False).candidates
    assert candidate.defects == ()
    assert max(weight.error for weight in candidate.weights) < 1e-3


def test_damaged_folds_are_named(tmp_path: Path) -> None:
    model = tiny_eval.loud("llama", tmp_path / "model")
    tiny_eval.write_heldout(model)
    out = tiny_eval.quantized(model, tmp_path / "out", "awq", "w4a16_g32")
    (out / FOLDS_FILE).write_bytes(b"\x08\0\0\0\0\0\0\0{damaged")
    with pytest.raises(CheckpointError, match=r"folds\.safetensors: the file is damaged"):
        measured(model, out, tmp_path / "work")
