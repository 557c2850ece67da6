"""Recipes: what a file says, what the command line changes, what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from quantkit.errors import RecipeError
from quantkit.methods.parts import available, make_part
from quantkit.methods.recipe import Recipe, builtin_recipes, load_recipe
from quantkit.methods.rules import PartSpec, Rule
from quantkit.numbers.scheme import Scheme

MINE = {"method": "mine", "scheme": "w4a16_g32", "range": "minmax", "rounding": "nearest"}


def write(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump({**MINE, **changes}))
    return path


@pytest.mark.parametrize("method", sorted(builtin_recipes()))
def test_a_recipe_says_the_same_when_written_and_read(method: str, tmp_path: Path) -> None:
    recipe = load_recipe(method, skip=("*a*",), head="w8a16_row", samples=3, seq_len=5)
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    assert load_recipe(path=path) == recipe
    assert recipe.method == method and recipe.summary


def test_every_part_is_in_a_recipe_or_has_defaults() -> None:
    for kind in ("target", "range", "rounding", "transform"):
        for name in available(kind):
            make_part(kind, name, {})


def test_methods_without_statistics_need_no_calibration() -> None:
    calibrated = {name for name in builtin_recipes() if load_recipe(name).calibrated}
    assert calibrated == {"awq", "best", "gptq", "gptq_nf4", "smoothquant"}


@pytest.mark.parametrize(
    ("override", "part", "expected"),
    [
        ("rounding.damp=0.05", "rounding", {"name": "gptq", "damp": 0.05, "act_order": True}),
        ("rounding=nearest", "rounding", {"name": "nearest"}),
        ("rounding.name=nearest", "rounding", {"name": "nearest"}),
        ("range=minmax", "range", {"name": "minmax"}),
    ],
)
def test_an_override_changes_one_thing(
    override: str, part: str, expected: dict[str, object]
) -> None:
    plain, changed = load_recipe("gptq"), load_recipe("gptq", overrides=(override,))
    assert changed.to_dict()[part] == expected
    assert {**changed.to_dict(), part: 0} == {**plain.to_dict(), part: 0}


def test_an_override_reaches_transforms_and_plain_names() -> None:
    recipe = load_recipe("awq", overrides=("transforms.awq.grid=7", "rounding.name=gptq"))
    assert recipe.transforms == (PartSpec(name="awq", options=(("grid", 7),)),)
    assert recipe.rounding == PartSpec(name="gptq")
    recipe = load_recipe("rtn", overrides=("range.name=mse", "range.steps=5", "propagate=false"))
    assert recipe.range == PartSpec(name="mse", options=(("steps", 5),))
    assert recipe.propagate is False
    recipe = load_recipe("gptq", overrides=("calibration.samples=9",))
    assert (recipe.samples, recipe.seq_len) == (9, 2048)


def test_options_of_the_command_line_win(tmp_path: Path) -> None:
    rules = [{"match": "*x*", "scheme": "w8a16_row"}]
    path = write(tmp_path / "mine.yaml", rules=rules, head="w8a16_g32")
    recipe = load_recipe(
        path=path, scheme="nf4_b64", skip=("*a*", "*b*"), head="w4a16_row", samples=7, seq_len=8
    )
    assert recipe.scheme.name == "nf4_b64" and recipe.head == Scheme.parse("w4a16_row")
    assert [rule.match for rule in recipe.rules] == ["*a*", "*b*", "*x*"]
    assert [rule.scheme for rule in recipe.rules] == [None, None, Scheme.parse("w8a16_row")]
    assert (recipe.samples, recipe.seq_len) == (7, 8)
    names = [scheme.name for scheme in recipe.schemes]
    assert names == ["nf4_b64", "w8a16_row", "w4a16_row"]


@pytest.mark.parametrize(
    ("glob", "name", "expected"),
    [
        ("*down_proj", "model.layers.0.mlp.down_proj.weight", True),
        ("*down_proj.weight", "model.layers.0.mlp.down_proj.weight", True),
        ("*down_proj*", "model.layers.0.mlp.down_proj.weight", True),
        ("down_proj", "model.layers.0.mlp.down_proj.weight", False),
        ("*.[01].mlp*", "model.layers.1.mlp.up_proj.weight", True),
        ("*.[01].mlp*", "model.layers.11.mlp.up_proj.weight", False),
        ("*DOWN*", "model.layers.0.mlp.down_proj.weight", False),
    ],
)
def test_globs_match_names_with_or_without_weight(glob: str, name: str, expected: bool) -> None:
    assert Rule(match=glob, scheme=None).matches(name) is expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed": 1}, "unknown key 'speed'; known: method, summary, scheme"),
        (
            {"range": {"name": "minmax", "steps": 3}},
            "no option 'steps'; its options: none",
        ),
        ({"range": "best"}, "range 'best' is unknown; known: clip, minmax, mse, weighted_mse"),
        ({"range": 3}, "range: 3 given; write a name"),
        ({"rounding": {"name": "gptq", "damp": True}}, "option damp is True"),
        ({"rounding": {"name": "gptq", "damp": "0.1x"}}, "option damp is '0.1x'; it takes float"),
        ({"rounding": {"name": "gptq", "groups": "wild"}}, "option groups is 'wild'; it takes"),
        ({"rounding": {"name": "gptq", "damp": -1}}, r"damp -1: must lie in 0..1"),
        ({"transforms": "awq"}, "transforms must be a list"),
        ({"transforms": [{"name": "smoothquant", "alphas": [0.5, "x"]}]}, "option alphas is"),
        ({"propagate": "yes"}, "propagate is true or false, not 'yes'"),
        ({"rules": [{"match": "x", "keep": False}]}, "needs either"),
        ({"rules": [{"match": "x", "keep": True, "scheme": "nf4_b64"}]}, "needs either"),
        ({"rules": [{"scheme": "nf4_b64"}]}, "write {match: GLOB"),
        ({"calibration": {"tokens": 1}}, "calibration takes samples, seq_len only"),
        ({"calibration": {"seq_len": 0}}, r"calibration.seq_len is 0; give a number"),
    ],
    ids=str,
)
def test_what_a_recipe_cannot_say(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(path=write(tmp_path / "mine.yaml", **changes))


@pytest.mark.parametrize("key", ["method", "scheme", "range", "rounding"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(RecipeError, match=f"mine: '{key}' is missing"):
        Recipe.from_dict({k: v for k, v in MINE.items() if k != key}, "mine")


def test_a_file_of_another_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="its method is 'mine', not 'awq' as asked"):
        load_recipe("awq", path=write(tmp_path / "mine.yaml"))


@dataclass(frozen=True, kw_only=True)
class Halving:
    """A third party's rounding."""

    share: float = 0.5


def test_a_part_from_elsewhere_is_found_by_its_module() -> None:
    name = "json.decoder:JSONDecoder"
    with pytest.raises(RecipeError, match="must be a dataclass"):
        make_part("rounding", name, {})
    with pytest.raises(RecipeError, match="cannot be imported"):
        make_part("rounding", "no.such.module:Class", {})
    with pytest.raises(RecipeError, match="cannot be imported"):
        make_part("rounding", "json:Nothing", {})


def test_a_part_from_elsewhere_takes_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    monkeypatch.setattr(json, "Halving", Halving, raising=False)
    part = make_part("rounding", "json:Halving", {"share": 1})
    assert part == Halving(share=1)
    with pytest.raises(RecipeError, match="no option 'part'; its options: share"):
        make_part("rounding", "json:Halving", {"part": 1})
