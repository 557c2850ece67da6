"""Default schemes on weights that groups of 128 do not divide: fitted, and said in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_jobs as jobs
import torch
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.checkpoint.files import FileSource
from quantkit.errors import ShapeError
from quantkit.methods.recipe import load_recipe
from quantkit.model.causal import CausalModel
from quantkit.model.fitting import fitting_scheme
from quantkit.numbers.scheme import Scheme
from quantkit.pipeline.plan import Plan, make_plan


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with 64 columns, 96 in down_proj."""
    return jobs.build("llama", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


def plan_of(
    model: Path, method: str = "rtn", format_name: str | None = None, **recipe: Any
) -> Plan:
    opened = CausalModel.open(FileSource(model))
    return make_plan(opened, load_recipe(method, **recipe), format_name=format_name)


def schemes(plan: Plan) -> dict[str, set[str]]:
    """Last part of a module's name -> its schemes."""
    found: dict[str, set[str]] = {}
    for weight in plan.weights:
        if weight.scheme is not None:
            found.setdefault(weight.name.split(".")[-2], set()).add(weight.scheme.name)
    return found


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ([4096], "w4a16_g128"),
        ([576], "w4a16_g64"),
        ([960, 2880], "w4a16_g64"),
        ([96, 128], "w4a16_g32"),
        ([128, 80], "w4a16_row"),
    ],
    ids=str,
)
def test_the_largest_group_that_divides_all_columns(columns: list[int], expected: str) -> None:
    assert fitting_scheme(Scheme.parse("w4a16_g128"), columns).name == expected


@pytest.mark.parametrize("name", ["w8a8_row", "nf4_b64_dq", "w4a16_g32_asym"])
def test_schemes_that_fit_stay(name: str) -> None:
    assert fitting_scheme(Scheme.parse(name), [96]).name == name


def test_weights_that_share_an_input_get_the_group_that_divides_it(llama: Path) -> None:
    plan = plan_of(llama, "rtn")
    found = schemes(plan)
    assert found.pop("down_proj") == {"w4a16_g32"}
    assert set(map(frozenset, found.values())) == {frozenset({"w4a16_g64"})}
    assert set(plan.readers.values()) == {None}
    assert plan.fitted == (
        "groups of 64 in 12 weights, groups of 32 in 2 weights, where groups of 128 do not fit; "
        "--scheme w4a16_g128 would insist"
    )
    (down, *_) = [f for f in plan.fates if f.name.endswith("0.mlp.down_proj.weight")]
    assert down.reason == "method rtn, groups of 32"


def test_one_size_where_mixed_ones_cost_a_reader(llama: Path) -> None:
    # transformers spreads the zeros of all layers by the groups of the first.
    plan = plan_of(llama, "awq")
    assert set.union(*schemes(plan).values()) == {"w4a16_g32_asym"}
    assert set(plan.readers.values()) == {None}


@pytest.mark.parametrize("name", ["awq", "gptq", "gptq_v2"])
def test_formats_with_one_group_size_get_one_that_divides_all(llama: Path, name: str) -> None:
    plan = plan_of(llama, "rtn", name)
    assert set.union(*schemes(plan).values()) == {"w4a16_g32"}
    assert None in plan.readers.values()


def test_experts_of_a_layer_get_one_group_size(tmp_path: Path) -> None:
    model = jobs.build("mixtral", tmp_path / "mixtral", dtype=torch.bfloat16)
    found = schemes(plan_of(model))
    assert found["w1"] == found["w2"] == found["w3"] == {"w4a16_g32"}
    assert found["q_proj"] == {"w4a16_g64"}


def test_rows_where_nothing_divides(tmp_path: Path) -> None:
    model = jobs.build("llama", tmp_path / "llama", intermediate_size=72, dtype=torch.bfloat16)
    assert schemes(plan_of(model))["down_proj"] == {"w4a16_row"}


def test_groups_that_divide_are_not_mentioned(tmp_path: Path) -> None:
    model = jobs.build("llama", tmp_path / "llama", hidden_size=128, intermediate_size=256)
    plan = plan_of(model)
    assert plan.fitted is None
    assert {fate.reason for fate in plan.fates if fate.fate == "quantized"} == {"method rtn"}


@pytest.mark.parametrize(
    "recipe",
    [{"scheme": "w4a16_g128"}, {"overrides": ["scheme=w4a16_g128"]}],
    ids=["--scheme", "--set"],
)
def test_a_named_scheme_is_refused_as_ever(llama: Path, recipe: dict[str, Any]) -> None:
    with pytest.raises(ShapeError, match="64 columns are not divisible by group_size 128"):
        plan_of(llama, **recipe)


def test_a_recipe_of_ones_own_is_fitted_only_if_it_says_so(llama: Path, tmp_path: Path) -> None:
    text = "method: mine\nscheme: w4a16_g128\nrange: minmax\nrounding: nearest\n"
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ShapeError):
        plan_of(llama, "mine", path=path)
    path.write_text(text + "fit: true\n")
    assert plan_of(llama, "mine", path=path).fitted is not None


def test_a_rules_scheme_is_never_fitted(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "method: mine\nscheme: w4a16_g128\nfit: true\nrange: minmax\nrounding: nearest\n"
        "rules: [{match: '*down_proj', scheme: w8a16_g128}]\n"
    )
    with pytest.raises(ShapeError, match=r"down_proj\.weight: 96 columns"):
        plan_of(llama, "mine", path=path)


@pytest.mark.parametrize("method", ["rtn", "best"])
def test_a_fitted_model_runs(method: str, llama: Path, tmp_path: Path) -> None:
    job = jobs.make_job(llama, method, None)
    out = jobs.finish(job, tmp_path / "out").out
    original = jobs.logits(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32))
    assert 0 < jobs.distance(jobs.logits(quantkit.load(out)), original) < 0.6
