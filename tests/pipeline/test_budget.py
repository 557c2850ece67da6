"""A mean of bits instead of a scheme: what is measured, what is chosen, what is refused."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny_jobs as jobs
import torch
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.files import FileSource
from quantkit.errors import BudgetError, FormatError, QuantkitError, RecipeError, StoppedError
from quantkit.formats.registry import make_format
from quantkit.methods.recipe import load_recipe
from quantkit.model.causal import CausalModel
from quantkit.numbers.scheme import Scheme
from quantkit.pipeline.budget import choose as choosing
from quantkit.pipeline.budget import divergence, sensitivity
from quantkit.pipeline.budget.allocate import Option, allocate, pareto
from quantkit.pipeline.budget.candidates import budget_groups, mixes, sizes_of
from quantkit.pipeline.job import prepare
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.session import Job
from quantkit.pipeline.solve import quantize_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.build("llama", tmp_path_factory.mktemp("llama"), vocab_size=333)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> CausalModel:
    folder = tmp_path_factory.mktemp("mixtral")
    return CausalModel.open(FileSource(jobs.build("mixtral", folder)))


def options(model: Path, **given: Any) -> QuantizeOptions:
    asked = {
        "calibration": str(model / "calibration.txt"),
        "samples": jobs.SAMPLES,
        "seq_len": jobs.SEQ_LEN,
        "device": "cpu",
        "progress": False,
        **given,
    }
    return QuantizeOptions(**asked)


def job(model: Path, out: Path | None = None, **given: Any) -> Job:
    return prepare(str(model), options(model, **given), out=out)


# Allocation


def by_trial(groups: list[list[Option]], capacity: int) -> float:
    """The least loss of all combinations that fit."""
    return min(
        sum(option.loss for option in chosen)
        for chosen in itertools.product(*groups)
        if sum(option.num_bytes for option in chosen) <= capacity
    )


@pytest.mark.parametrize("seed", range(25))
def test_allocation_is_as_good_as_trying_everything(seed: int) -> None:
    draw = random.Random(seed)
    groups = [
        [
            Option(num_bytes=draw.choice([3, 7, 7, draw.randrange(1, 60)]), loss=draw.random() ** 6)
            for _ in range(draw.randrange(1, 6))
        ]
        for _ in range(draw.randrange(1, 7))
    ]
    least = sum(min(option.num_bytes for option in group) for group in groups)
    most = sum(max(option.num_bytes for option in group) for group in groups)
    for capacity in {least, (2 * least + most) // 3, (least + most) // 2, most, most + 5}:
        chosen = [group[k] for group, k in zip(groups, allocate(groups, capacity), strict=True)]
        assert sum(option.num_bytes for option in chosen) <= capacity
        # Sums of few doubles in another order.
        assert sum(option.loss for option in chosen) == pytest.approx(
            by_trial(groups, capacity), rel=1e-9
        )


def test_what_does_not_fit_is_an_error_and_dominated_options_are_dropped() -> None:
    group = [Option(num_bytes=4, loss=1.0), Option(num_bytes=5, loss=1.0)]
    assert pareto([*group, Option(num_bytes=6, loss=0.5)]) == [0, 2]
    with pytest.raises(ValueError, match="smallest"):
        allocate([group], 3)


def test_many_groups_are_allocated_at_once() -> None:
    draw = random.Random(1)
    groups = [
        [
            Option(num_bytes=1000 * bits + draw.randrange(50), loss=draw.uniform(1, 3) * 4.0**-bits)
            for bits in range(2, 9)
        ]
        for _ in range(400)
    ]
    chosen = [group[k] for group, k in zip(groups, allocate(groups, 1_700_000), strict=True)]
    assert 1_699_000 < sum(option.num_bytes for option in chosen) <= 1_700_000


# Measurement


def test_divergences_by_rows_of_the_head_equal_those_of_whole_logits(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CausalModel.open(FileSource(llama))
    torch.manual_seed(0)
    states = [torch.randn(2, 5, 64) for _ in range(3)]
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    # 333 rows in ranges of 100.
    monkeypatch.setattr(divergence, "_LOGIT_BYTES", 100 * 4 * 10)
    found = divergence.mean_divergences(model, lambda k, _: states[k], [mask], 2)
    logs = [model.logits(state)[mask].double().log_softmax(-1) for state in states]
    for k, kl in enumerate(found):
        expected = (logs[0].exp() * (logs[0] - logs[k + 1])).sum(-1).mean()
        # Logits are float32.
        assert kl == pytest.approx(float(expected), rel=1e-4, abs=1e-7)


def test_a_loss_is_that_of_the_model_with_the_group_alone_quantized(
    llama: Path, tmp_path: Path
) -> None:
    model = CausalModel.open(FileSource(llama))
    recipe = load_recipe("rtn", samples=jobs.SAMPLES, seq_len=jobs.SEQ_LEN)
    calibration = job(llama, method="gptq", scheme="w4a16_g32").calibration
    assert calibration is not None
    groups = budget_groups(model, recipe)
    assert [len(group.refs) for group in groups] == [3, 1, 2, 1] * 2
    schemes = [{Scheme.parse(f"w{bits}a16_g32_asym"): 0 for bits in (2, 4, 6)} for _ in groups]
    losses = sensitivity.measure(
        model, recipe, groups, schemes, calibration,
        scratch=tmp_path, gram_budget=None, device="cpu", progress=False,
    )  # fmt: skip
    ids = sensitivity.split_calibration(calibration)[0].ids
    probed = Scheme.parse("w4a16_g32_asym")
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
        base = plain(ids).logits.double().log_softmax(-1)
        for k in (0, 3, 6):
            dense = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
            state = dense.state_dict()
            for ref in groups[k].refs:
                (solved,) = quantize_weights(
                    [ref], [state[ref.name]], probed, None,
                    target=None, range_part=recipe.make_range(), rounding=recipe.make_rounding(),
                    dtype=torch.float32,
                )  # fmt: skip
                state[ref.name].copy_(solved.tensor.dequantize())
            other = dense(ids).logits.double().log_softmax(-1)
            expected = float((base.exp() * (base - other)).sum(-1).mean())
            # Divergences of a random model are near the noise of its float32 logits.
            assert losses[k][probed] == pytest.approx(expected, rel=0.02, abs=2e-9)
    for each in losses:
        assert list(each.values()) == sorted(each.values(), reverse=True)


# Choice


def test_a_budget_is_kept_and_the_report_compares(llama: Path, tmp_path: Path) -> None:
    made = job(llama, bits=4.9, reader="vllm", allow_unreadable=True)
    assert made.plan.recipe.method == "best" and made.plan.readers["vllm"] is None
    assert made.plan.bits_per_quantized_weight <= 4.9
    schemes = {name: weight.scheme for name, weight in made.plan.weight_of.items()}
    for block in range(2):
        prefix = f"model.layers.{block}"
        fused = {schemes[f"{prefix}.self_attn.{part}_proj.weight"] for part in "qkv"}
        assert len(fused) == 1 and None not in fused
    jobs.finish(made, tmp_path / "out")
    report = json.loads((tmp_path / "out/quantkit/report.json").read_text())
    budget = report["budget"]
    assert budget["bits"] == 4.9 and budget["reader"] == "vllm"
    assert budget["bits_chosen"] == report["size"]["bits_per_quantized_weight"]
    assert budget["predicted_kl"] == pytest.approx(sum(g["kl"] for g in budget["groups"]))
    assert len({g["scheme"] for g in budget["groups"]}) > 1


def test_more_bits_never_cost_more(llama: Path) -> None:
    found = []
    for bits in (4.0, 6.0):
        chosen = job(llama, method="rtn", bits=bits).budget
        assert chosen is not None and chosen.reader == "transformers"
        found.append(chosen.kl)
    assert found == sorted(found, reverse=True)


def test_bits_of_the_model_count_everything(llama: Path) -> None:
    made = job(llama, method="rtn", bits=15.5, bits_of="model")
    assert 15.0 < made.plan.bits_per_weight <= 15.5


def test_a_run_that_goes_on_takes_the_first_choice(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = job(llama, out, method="rtn", bits=5.0)
    jobs.finish(first, tmp_path / "whole")
    with pytest.raises(StoppedError):
        jobs.finish(first, out, deadline=0.0)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(choosing, "measure", fail)
    again = job(llama, out, method="rtn", bits=5.0)
    assert again.budget == first.budget and again.fingerprint == first.fingerprint
    jobs.finish(again, out)
    assert jobs.hashes(out) == jobs.hashes(tmp_path / "whole")
    assert not jobs.finish(job(llama, out, method="rtn", bits=5.0), out).written
    with pytest.raises(AssertionError, match="measured again"):
        job(llama, out, method="rtn", bits=5.1)
    with pytest.raises(AssertionError, match="measured again"):
        job(llama, out, method="rtn", bits=5.0, fresh=True)


def test_the_same_command_chooses_the_same(llama: Path) -> None:
    first, second = (job(llama, method="gptq", bits=4.6).budget for _ in range(2))
    assert first == second


def test_a_graph_mixes_what_its_operators_hold(llama: Path) -> None:
    made = job(llama, method="rtn", bits=4.4, reader="onnxruntime")
    assert made.plan.format.name == "onnx" and made.plan.readers["onnxruntime"] is None
    schemes = {weight.scheme for weight in made.plan.weights if weight.scheme is not None}
    assert len(schemes) > 1 and all(s.kind == "int" for s in schemes)
    assert 4.0 < made.plan.bits_per_quantized_weight <= 4.4


def test_rules_come_before_the_budget(llama: Path) -> None:
    made = job(llama, method="rtn", bits=5.0, skip=("*layers.0.*",))
    kept = [w for w in made.plan.weights if w.scheme is None]
    assert sum(".layers.0." in weight.name for weight in kept) == 7
    with pytest.raises(RecipeError, match="rules decide every weight"):
        job(llama, method="rtn", bits=5.0, skip=("*layers*",))


def test_experts_of_a_layer_are_one_group_and_get_what_their_runtime_mixes(
    mixtral: CausalModel,
) -> None:
    recipe, fmt = load_recipe("rtn"), make_format("compressed-tensors")
    groups = budget_groups(mixtral, recipe)
    assert sorted(len(group.refs) for group in groups) == [1, 1, 3, 3, 12, 12]
    (mixed,) = mixes(mixtral, recipe, fmt, groups, reader="vllm", unreadable=False).values()
    assert {scheme.bits for scheme in mixed} == {4, 8}
    sizes = sizes_of(mixtral, fmt, groups[0], mixed)
    assert {scheme.group_size for scheme in sizes} == {32, None}
    # transformers decompresses all fused experts with the same bits.
    with pytest.raises(FormatError, match=r"no mix of schemes .* transformers: "):
        mixes(mixtral, recipe, fmt, groups, reader="transformers", unreadable=False)


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"bits": 1.5}, BudgetError, r"--bits 1.5: mixed schemes .* reach \d\.\d+ to \d+\.\d+"),
        ({"bits": 12.0}, BudgetError, "choose a number between them"),
        ({"bits": 3.0, "reader": "vllm"}, BudgetError, r"as vllm reads them reach [45]\."),
        ({"bits": 4.0, "scheme": "w4a16_g32"}, RecipeError, "--scheme w4a16_g32 names one"),
        ({"reader": "vllm"}, RecipeError, "give --bits too"),
        ({"bits": 4.0, "bits_of": "heads"}, RecipeError, "choose linears or model"),
        ({"bits": float("nan")}, RecipeError, "as in 4.25"),
        ({"bits": 4.0, "reader": "sglang"}, FormatError, "transformers and vllm"),
        ({"bits": 4.0, "reader": "onnxruntime", "size": 9}, RecipeError, "the same wish"),
        ({"bits": 4.0, "format": "awq"}, FormatError, "no mix of schemes in awq"),
        ({"bits": 4.0, "format": "gptq"}, FormatError, "no mix of schemes in gptq"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_in_a_sentence(
    given: dict[str, Any],
    error: type[QuantkitError],
    told: str,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choosing, "measure", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(error, match=told):
        job(llama, **given)


def test_the_command_line_says_what_was_chosen(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        *("--bits", 5, "--for", "transformers", "--method", "rtn"),
        *("--calib", llama / "calibration.txt", "--samples", 8, "--seq-len", 32),
    ]
    assert jobs.command("plan", llama, *asked) == 0
    assert "budget     5 bits of the linears, as transformers" in capsys.readouterr().out
    assert jobs.command("quantize", llama, *asked, "--out", tmp_path / "out", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["budget"]["bits_chosen"] <= 5 and told["readers"]["transformers"] is None
    assert jobs.command("plan", llama, "--bits", "0.5", *asked[2:]) == 2
    assert "bits of the linears" in capsys.readouterr().err
