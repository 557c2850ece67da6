"""Every recipe and scheme from a checkpoint to a checkpoint, its numbers checked when read back."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_jobs as jobs
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.calibration import stream as calibrated
from quantkit.calibration.data.tokens import Calibration
from quantkit.calibration.gather import split_passes
from quantkit.calibration.hidden import HiddenStore
from quantkit.checks.verify import verify
from quantkit.methods.recipe import builtin_recipes
from quantkit.pipeline.session import Job

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.build("qwen2", tmp_path_factory.mktemp("qwen2"))


def report_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "quantkit/report.json").read_bytes())
    return found


def check_finished(model: Path, out: Path, *, most: float) -> dict[str, Any]:
    """The report, after checking files, numbers and logits; `most` bounds the logits' change."""
    result = verify(out, against=model)
    assert result.ok, result.text()
    dense = jobs.logits(jobs.dequantized(model, out))
    report = report_of(out)
    # Weight-only: the same dense products in float32, up to their order of summation.  Dense layers
    # do not round activations, which moves these logits by some 1.5 % at 8 bits and 20 % at 4.
    near = NEAR.get(report["scheme"], 1e-4)
    assert jobs.distance(jobs.logits(quantkit.load(out)), dense) < near
    original = jobs.logits(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    assert 0 < jobs.distance(dense, original) < most
    return report


# Scheme, and half as much again as the logits of this random model were seen to move.
RECIPES = {
    "awq": ("w4a16_g32_asym", 0.25),
    "best": ("w4a16_g32_asym", 0.15),
    "fp8": ("fp8a8_row", 0.1),
    "gptq": ("w4a16_g32", 0.15),
    "gptq_nf4": ("nf4_b64_dq", 0.2),
    "int8": ("w8a16_row", 0.03),
    "nf4": ("nf4_b64_dq", 0.4),
    "rtn": ("w4a16_g32", 0.35),
    "smoothquant": ("w8a8_row", 0.03),
}


def test_every_shipped_recipe_is_covered() -> None:
    assert set(builtin_recipes()) == set(RECIPES)


@pytest.mark.parametrize("method", sorted(RECIPES))
def test_a_recipe_ends_in_a_checkpoint_that_holds_its_numbers(
    method: str, llama: Path, tmp_path: Path
) -> None:
    scheme, most = RECIPES[method]
    out = jobs.finish(jobs.make_job(llama, method, scheme), tmp_path / "out").out
    report = check_finished(llama, out, most=most)
    assert report["method"] == method
    assert {weight["scheme"] for weight in report["weights"]} == {scheme}
    assert len(report["weights"]) == 14
    # NF4's flat blocks of 64 straddle the 96 columns of down_proj, where GPTQ has no order.
    straddling = "down_proj" if method == "gptq_nf4" else "nothing"
    assert all(straddling in name for name in report["degraded"])


NEAR = {
    "w8a8_row": 0.03,
    "w4a8_g32": 0.03,
    "w4afp8_g32": 0.06,
    "fp8a8_row": 0.06,
    "fp8a8_tensor": 0.1,
    "mxfp8a8": 0.1,
    "mxfp4a4": 0.45,
    "nvfp4a4": 0.4,
}
SCHEMES = [
    ("gptq", "w2a16_g32", "compressed-tensors", 0.6),
    ("gptq", "w3a16_g32_asym", "compressed-tensors", 0.25),
    ("gptq", "w4a16_row", "compressed-tensors", 0.15),
    ("gptq", "w8a16_g32_asym", "compressed-tensors", 0.01),
    ("awq", "w4a16_g32", "compressed-tensors", 0.3),
    ("nf4", "nf4_b64", "bitsandbytes", 0.45),
    ("int8", "w8a8_row", "compressed-tensors", 0.03),
    ("gptq", "w4a8_g32", "compressed-tensors", 0.15),
    ("awq", "w4afp8_g32", "compressed-tensors", 0.3),
    ("rtn", "nvfp4a4", "compressed-tensors", 0.5),
    ("best", "nvfp4a16", "compressed-tensors", 0.3),
    ("gptq", "mxfp4a4", "compressed-tensors", 0.5),
    ("awq", "mxfp4a16", "compressed-tensors", 0.4),
    ("fp8", "mxfp8a8", "compressed-tensors", 0.1),
    ("fp8", "fp8a8_tensor", "compressed-tensors", 0.1),
    ("fp8", "fp8a16_row", "compressed-tensors", 0.1),
    ("gptq", "fp8a16_row", "compressed-tensors", 0.03),
    ("best", "fp8a16_row", "compressed-tensors", 0.03),
    ("rtn", "w4a16_g16_asym", "compressed-tensors", 0.35),
]


@pytest.mark.parametrize(
    ("method", "scheme", "format_name", "most"), SCHEMES, ids=lambda value: str(value)
)
def test_a_scheme_is_written_in_the_format_that_holds_it(
    method: str, scheme: str, format_name: str, most: float, llama: Path, tmp_path: Path
) -> None:
    job = jobs.make_job(llama, method, scheme, allow_unreadable=True)
    assert job.plan.format.name == format_name
    out = jobs.finish(job, tmp_path / "out").out
    report = check_finished(llama, out, most=most)
    assert report["scheme"] == scheme and report["format"] == format_name


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_a_quantized_head_is_stored_apart(
    kind: str, llama: Path, tied: Path, tmp_path: Path
) -> None:
    model = llama if kind == "untied" else tied
    job = jobs.make_job(model, "gptq", "w4a16_g32", head="w8a16_row")
    out = jobs.finish(job, tmp_path / "out").out
    report = check_finished(model, out, most=0.2)
    assert report["unties_head"] == (kind == "tied")
    by_name = {weight["name"]: weight["scheme"] for weight in report["weights"]}
    assert by_name["lm_head.weight"] == "w8a16_row"
    config = json.loads((out / "config.json").read_bytes())
    assert config["tie_word_embeddings"] is False
    fates = {tensor["name"]: tensor["fate"] for tensor in report["tensors"]}
    assert fates["model.embed_tokens.weight"] == "kept"


def spied(monkeypatch: pytest.MonkeyPatch) -> dict[int, torch.Tensor]:
    """Generation -> hidden states, filled while a job runs."""
    seen: dict[int, list[torch.Tensor]] = {}
    found: dict[int, torch.Tensor] = {}
    write = HiddenStore.write

    def spy(self: HiddenStore, generation: int, start: int, hidden: torch.Tensor) -> None:
        seen.setdefault(generation, []).append(hidden.clone())
        found[generation] = torch.cat(seen[generation])
        write(self, generation, start, hidden)

    monkeypatch.setattr(HiddenStore, "write", spy)
    return found


def states_of(model: Any, ids: torch.Tensor) -> Any:
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("propagate", [True, False], ids=["propagate", "original"])
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_the_stream_carries_exactly_what_was_stored(
    method: str, propagate: bool, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = spied(monkeypatch)
    job = jobs.make_job(
        llama, method, "w4a16_g32", overrides=(f"propagate={str(propagate).lower()}",)
    )
    assert job.plan.recipe.propagate is propagate
    out = jobs.finish(job, tmp_path / "out").out
    assert job.calibration is not None
    if propagate:
        dense = jobs.dequantized(llama, out)
    else:
        dense = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    states = states_of(dense, job.calibration.ids)
    torch.testing.assert_close(seen[0], states[0], rtol=0, atol=0)
    # The same products on the same batch; the order of summation may differ between builds.
    torch.testing.assert_close(seen[1], states[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_the_stream_carries_the_rounding_of_activations(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = spied(monkeypatch)
    model = jobs.build(kind, tmp_path / "model")
    job = jobs.make_job(model, "smoothquant", "w8a8_row", allow_unreadable=True)
    out = jobs.finish(job, tmp_path / "out").out
    assert job.calibration is not None
    rounded = states_of(quantkit.load(out), job.calibration.ids)[1]
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    original = states_of(dense, job.calibration.ids)[1]
    # An activation a hair from a rounding boundary may fall on the other side of it.
    assert jobs.distance(seen[1], rounded) < 0.1 * jobs.distance(seen[1], original)


@pytest.mark.parametrize(("kind", "method"), [("gpt2", "best"), ("qwen2", "gptq")])
def test_a_bfloat16_model_is_computed_and_stored(kind: str, method: str, tmp_path: Path) -> None:
    model = jobs.build(kind, tmp_path / "model", dtype=torch.bfloat16)
    job = jobs.make_job(model, method, "w4a16_g32", allow_unreadable=True)
    out = jobs.finish(job, tmp_path / "out").out
    assert verify(out, against=model).ok
    original = jobs.logits(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    assert jobs.distance(jobs.logits(quantkit.load(out)), original) < 0.3


def test_rules_give_weights_their_schemes(llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(
        "method: mixed\nscheme: w4a16_g32\nrange: minmax\nrounding: nearest\nrules:\n"
        "- {match: '*layers.0.*down_proj', scheme: w8a16_row}\n"
        "- {match: '*down_proj*', keep: true}\n"
        "- {match: '*down_proj*', scheme: w8a16_g32}\n"
    )
    job = jobs.make_job(llama, recipe=quantkit.methods.recipe.load_recipe(path=recipe))
    out = jobs.finish(job, tmp_path / "out").out
    report = check_finished(llama, out, most=0.35)
    tensors = {tensor["name"]: tensor for tensor in report["tensors"]}
    down = [tensors[f"model.layers.{index}.mlp.down_proj.weight"] for index in (0, 1)]
    assert [tensor["scheme"] for tensor in down] == ["w8a16_row", None]
    assert down[1]["fate"] == "kept" and down[1]["reason"] == "rule '*down_proj*'"


def test_skipped_weights_stay_bit_for_bit(llama: Path, tmp_path: Path) -> None:
    skip = ("*.1.self_attn.[qkv]_proj", "*down_proj*")
    out = jobs.finish(jobs.make_job(llama, "gptq", "w4a16_g32", skip=skip), tmp_path / "out").out
    before, after = load_file(llama / "model.safetensors"), load_file(out / "model.safetensors")
    kept = [name for name in before if name in after]
    assert len([name for name in kept if "proj" in name]) == 3 + 2
    for name in kept:
        assert torch.equal(before[name], after[name])
    check_finished(llama, out, most=0.15)


def test_a_budget_and_the_number_of_passes_change_no_bit(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.make_job(llama, "best", "w4a16_g32_asym", overrides=("target=null",))
    seen: list[int] = []
    gather = calibrated.gather

    def spy(needs: Any, features: Any, *rest: Any, **options: Any) -> Any:
        sizes = {key: 4 * features[key] ** 2 for key in needs}
        seen.append(len(split_passes(sizes, options["budget"])))
        return gather(needs, features, *rest, **options)

    monkeypatch.setattr(calibrated, "gather", spy)
    found = []
    for budget in (None, 10**12, job.prediction.smallest, job.prediction.smallest + 30_000):
        limited = dataclasses.replace(job, max_ram=budget)
        found.append(jobs.hashes(jobs.finish(limited, tmp_path / f"out-{budget}").out))
    assert found[1:] == found[:-1]
    # Inputs of 64, 64, 64 and 96 channels: the smallest budget holds one of 96 or two of 64.
    assert seen == [1, 1, 1, 1, 3, 3, 2, 2]


def test_twice_the_same_job_gives_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    found = [
        jobs.hashes(jobs.finish(jobs.make_job(llama, "smoothquant", "w8a8_row"), out).out)
        for out in (tmp_path / "one", tmp_path / "two")
    ]
    assert found[0] == found[1]


def padded(job: Job, extra: int) -> Job:
    """The job with `extra` tokens of padding after each sequence of its calibration."""
    assert job.calibration is not None
    ids, mask = job.calibration.ids, job.calibration.mask
    calibration = Calibration(
        ids=torch.nn.functional.pad(ids, (0, extra), value=7),
        mask=torch.nn.functional.pad(mask, (0, extra), value=False),
        record=job.calibration.record,
    )
    return dataclasses.replace(job, calibration=calibration)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_padding_does_not_count(kind: str, tmp_path: Path) -> None:
    model = jobs.build(kind, tmp_path / "model")
    job = jobs.make_job(model, "gptq", "w4a16_g32")
    plain = report_of(jobs.finish(job, tmp_path / "plain").out)
    other = report_of(jobs.finish(padded(job, 9), tmp_path / "padded").out)
    for a, b in zip(plain["weights"], other["weights"], strict=True):
        assert (a["name"], a["tokens"]) == (b["name"], b["tokens"])
        # Attention over other lengths sums in another order; a code near a tie may flip.
        assert a["error"] == pytest.approx(b["error"], rel=0.02)
    both = [jobs.logits(quantkit.load(tmp_path / out)) for out in ("plain", "padded")]
    assert jobs.distance(*both) < 0.01


def edited(model: Path, to: Path, **changes: Any) -> Path:
    """A copy of a model with some tensors changed by functions in place."""
    shutil.copytree(model, to)
    tensors = load_file(to / "model.safetensors")
    for name, change in changes.items():
        change(tensors[name])
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


DOWN = "model.layers.1.mlp.down_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.post_attention_layernorm.weight"


@pytest.mark.parametrize(
    ("method", "scheme"),
    [
        ("best", "w4a16_g32_asym"),
        ("awq", "w4a16_g32"),
        ("nf4", "nf4_b64_dq"),
        ("rtn", "w4a16_g32"),
        ("smoothquant", "w8a8_row"),
    ],
)
def test_degenerate_weights_are_survived_and_reported(
    method: str, scheme: str, llama: Path, tmp_path: Path
) -> None:
    def zero_rows(weight: torch.Tensor) -> None:
        weight[[3, 60]] = 0

    def constant(weight: torch.Tensor) -> None:
        weight[:, :32] = 0.25

    def dead(weight: torch.Tensor) -> None:
        weight[[5, 6]] = 0

    model = edited(llama, tmp_path / "model", **{DOWN: zero_rows, UP: constant, NORM: dead})
    out = jobs.finish(jobs.make_job(model, method, scheme), tmp_path / "out").out
    report = check_finished(model, out, most=0.4)
    assert "2 rows are all zero" in report["degraded"][DOWN]
    if method not in ("nf4", "rtn"):
        assert "2 input channels are dead in calibration" in report["degraded"][UP]
    decoded = jobs.dequantized(model, out).state_dict()
    assert not decoded[DOWN][[3, 60]].any()
    if method == "rtn":
        assert "groups are constant" in report["degraded"][UP]
    if method == "nf4":
        assert (decoded[UP][:, :32] - 0.25).abs().max() < 0.1


def test_gptq_copes_with_fewer_tokens_than_channels(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text((llama / "calibration.txt").read_text()[:60])
    recipe = quantkit.methods.recipe.load_recipe("gptq", scheme="w4a16_g32", samples=1, seq_len=40)
    out = jobs.finish(jobs.make_job(llama, recipe=recipe, text=text), tmp_path / "out").out
    report = check_finished(llama, out, most=0.6)
    assert {weight["tokens"] for weight in report["weights"]} == {40}
    assert "rank-deficient Hessian: 40 tokens" in report["degraded"][DOWN]


def test_a_gram_matrix_that_has_no_factor_is_reported(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = quantkit.methods.feedback._attempt

    def flaky(*arguments: Any) -> Any:
        return None if arguments[4] < 0.05 else attempt(*arguments)

    monkeypatch.setattr(quantkit.methods.feedback, "_attempt", flaky)
    out = jobs.finish(jobs.make_job(llama, "gptq", "w4a16_g32"), tmp_path / "out").out
    report = report_of(out)
    assert len(report["degraded"]) == 14
    assert all("damping raised to 0.1" in note for note in report["degraded"].values())
    monkeypatch.setattr(quantkit.methods.feedback, "_attempt", lambda *arguments: None)
    out = jobs.finish(jobs.make_job(llama, "gptq", "w4a16_g32"), tmp_path / "none").out
    notes = report_of(out)["degraded"].values()
    assert len(notes) == 14
    assert all("rounded to nearest: the Gram matrix has no" in note for note in notes)


@pytest.mark.parametrize("method", ["awq", "best"])
def test_an_expert_that_no_token_reaches_is_quantized_and_reported(
    method: str, tmp_path: Path
) -> None:
    model = jobs.build("mixtral", tmp_path / "source", num_experts_per_tok=1)
    router = "model.layers.0.block_sparse_moe.gate.weight"

    def never_two(weight: torch.Tensor) -> None:
        weight[2] = 0
        weight[3] = -weight[0]

    model = edited(model, tmp_path / "model", **{router: never_two})
    out = jobs.finish(jobs.make_job(model, method, "w4a16_g32"), tmp_path / "out").out
    assert verify(out, against=model).ok
    report = report_of(out)
    unreached = [w for w in report["weights"] if ".0.block_sparse_moe.experts.2." in w["name"]]
    assert [weight["tokens"] for weight in unreached] == [0, 0, 0]
    assert all("no calibration token reached this" in w["degraded"] for w in unreached)
