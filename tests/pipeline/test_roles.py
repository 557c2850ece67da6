"""Rules by role: weights are picked by what they are for, whatever they are called."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
import tiny_jobs as jobs
import tiny_models as tiny
import torch
import yaml
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.checks.verify import verify
from quantkit.errors import ModelError, QuantkitError, RecipeError
from quantkit.formats.open import open_source
from quantkit.methods.recipe import Recipe, load_recipe
from quantkit.methods.rules import ROLES, Rule
from quantkit.model.causal import CausalModel
from quantkit.model.decoded import open_decoded
from quantkit.model.probes.roles import purposes_of
from tools.sweep.shrink import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

SELF = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
DELTA = {*(f"linear_attn.in_proj_{x}" for x in ("qkv", "z", "a", "b")), "linear_attn.out_proj"}
SHARED = {f"mlp.shared_expert.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")}
EXPECTED: dict[str, dict[str, set[str]]] = {
    "llama": {"attention": SELF, "mlp": MLP},
    "gpt2": {"attention": {"attn.c_attn", "attn.c_proj"}, "mlp": {"mlp.c_fc", "mlp.c_proj"}},
    # Attention in code of its own, the last in a module within the one that holds it.
    "bloom": {
        "attention": {"self_attention.query_key_value", "self_attention.dense"},
        "mlp": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    },
    "gpt_neo": {
        "attention": {f"attn.attention.{x}_proj" for x in ("q", "k", "v", "out")},
        "mlp": {"mlp.c_fc", "mlp.c_proj"},
    },
    "gpt_oss": {
        "attention": SELF,
        "experts": {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"},
    },
    "qwen2_moe": {
        "attention": SELF,
        "shared-experts": SHARED,
        "experts": {f"mlp.experts.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")},
    },
    # Both kinds of mixers side by side in a block, and in turns.
    "falcon_h1": {
        "attention": SELF,
        "linear-attention": {"mamba.in_proj", "mamba.out_proj"},
        "mlp": {f"feed_forward.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")},
    },
    "qwen3_5_text": {"attention": SELF, "linear-attention": DELTA, "mlp": MLP},
}


def built(kind: str, directory: Path) -> Path:
    """A tiny model of the kind, from the sweep's configurations where there is no other."""
    if kind in tiny.CONFIGS or kind in tiny.OTHERS:
        return tiny.build(kind, directory)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", EXPECTED)
def test_what_weights_are_for_is_told_by_running_the_block(kind: str, tmp_path: Path) -> None:
    model = CausalModel.open(open_decoded(open_source(built(kind, tmp_path))))
    found = defaultdict(set)
    for index in range(model.num_blocks):
        for ref in model.weights(index):
            leaf = re.sub(r"(experts)\.\d+", r"\1", ref.name.removesuffix(".weight"))
            role = purposes_of(model).get(ref.name)
            assert (role is None) == (ref.role == "router"), ref.name
            if role is not None:
                found[role].add(leaf.split(f".{index}.", 1)[1])
    assert found == EXPECTED[kind]
    assert purposes_of(model)[model.head.name] == "head"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.build("qwen2_moe", tmp_path_factory.mktemp("mixture") / "model")


def schemes(job: jobs.Job) -> dict[str, set[str | None]]:
    roles = purposes_of(job.model)
    found = defaultdict(set)
    for weight in job.plan.weights:
        if (role := roles.get(weight.name)) is not None:
            found[role].add(None if weight.scheme is None else weight.scheme.name)
    return found


def test_each_role_gets_its_scheme(mixture: Path, tmp_path: Path) -> None:
    rules = ("experts=nvfp4a16", "attention=fp8a8_row", "shared-experts=keep", "head=w8a16_row")
    recipe = load_recipe("rtn", scheme="w4a16_g32", rules=rules)
    job = jobs.make_job(mixture, recipe=recipe, allow_unreadable=True)
    assert schemes(job) == {
        "experts": {"nvfp4a16"},
        "attention": {"fp8a8_row"},
        "shared-experts": {None},
        "head": {"w8a16_row"},
    }
    reasons = {fate.name: fate.reason for fate in job.plan.fates}
    assert reasons["model.layers.0.self_attn.q_proj.weight"] == "rule for attention"
    out = jobs.finish(job, tmp_path / "out").out
    assert verify(out, against=mixture).ok
    assert jobs.logits(quantkit.load(out)).isfinite().all()
    # What was used says it in the words that were given, and means the same again.
    used = Recipe.from_dict(yaml.safe_load((out / "quantkit/recipe.yaml").read_text()), "used")
    assert {"role": "experts", "scheme": "nvfp4a16"} in used.to_dict()["rules"]
    again = jobs.make_job(mixture, recipe=used, allow_unreadable=True)
    assert schemes(again) == schemes(job)


def test_the_plan_has_a_table_of_roles(
    mixture: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = ["plan", mixture, "--method", "rtn", "--allow-unreadable"]
    assert jobs.command(*line, "--rule", "experts=nvfp4a16", "--rule", "*.o_proj=keep") == 0
    text = capsys.readouterr().out
    assert re.search(r"role +weights +scheme\nexperts +\d+ +nvfp4a16\n", text)
    assert re.search(r"\nattention +8 +w4a16_g\d+ \(6\), kept \(2\)\n", text)
    assert "transformers         no: " in text and "vllm         " in text
    assert jobs.command(*line, "--json") == 0
    assert "roles" not in json.loads(capsys.readouterr().out)


def test_the_first_rule_decides_whatever_picks_it(mixture: Path) -> None:
    recipe = load_recipe(
        "rtn", scheme="w4a16_g32", skip=["*.layers.0.self_attn*"], rules=["attention=w8a16_g32"]
    )
    plan = jobs.make_job(mixture, recipe=recipe, allow_unreadable=True).plan
    found = {w.name: w.scheme and w.scheme.name for w in plan.weights}
    assert found["model.layers.0.self_attn.q_proj.weight"] is None
    assert found["model.layers.1.self_attn.q_proj.weight"] == "w8a16_g32"


def test_a_mix_of_asymmetric_weights_is_said_not_to_be_decoded(mixture: Path) -> None:
    """transformers decodes all dense layers by one scheme; the interop suite sees it fail."""
    rules = ["attention=w8a16_g32_asym"]
    recipe = load_recipe("rtn", scheme="w4a16_g32_asym", rules=rules)
    plan = jobs.make_job(mixture, recipe=recipe, allow_unreadable=True).plan
    assert "same bits and groups" in str(plan.readers["transformers"])
    with pytest.raises(QuantkitError, match="no runtime reads"):
        jobs.make_job(mixture, recipe=recipe)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("linear-attention=keep", "has that role; it has experts, shared-experts, attention, head"),
        ("embeddings=w8a16_row", "rule for embeddings: tables are quantized in gguf only"),
        ("experts", "--rule 'experts': write WHAT=SCHEME"),
        ("=keep", "write WHAT=SCHEME"),
        ("experts=w4", "scheme 'w4' is unknown"),
        ("expert=keep", "'expert' matches no tensor"),
    ],
)
def test_a_rule_that_picks_nothing_or_says_nothing_is_an_error(
    rule: str, message: str, mixture: Path
) -> None:
    with pytest.raises(QuantkitError, match=re.escape(message)):
        jobs.make_job(mixture, recipe=load_recipe("rtn", rules=[rule]), allow_unreadable=True)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"role": "brain", "keep": True}, "role 'brain' is unknown; known: experts, "),
        ({"role": "mlp", "match": "*", "keep": True}, "write {match: GLOB"),
        ({"role": "mlp"}, "rule 'mlp' needs either"),
    ],
)
def test_rules_of_a_recipe_are_checked(rule: dict[str, object], message: str) -> None:
    data = {**load_recipe("rtn").to_dict(), "rules": [rule]}
    with pytest.raises(RecipeError, match=re.escape(message)):
        Recipe.from_dict(data, "mine.yaml")


def test_a_body_of_one_block_has_no_roles(tmp_path: Path) -> None:
    model = built("hrm_text", tmp_path)
    recipe = load_recipe("rtn", rules=["attention=keep"])
    with pytest.raises(ModelError, match="worked on as one block"):
        jobs.make_job(model, recipe=recipe, allow_unreadable=True)


def test_words_come_back() -> None:
    for role in ROLES:
        rule = Rule.parse(f"{role}=keep")
        assert rule.to_value() == {"role": role, "keep": True} and rule.match == ""
    assert Rule.parse("*mlp*=w8a16_row").to_value() == {"match": "*mlp*", "scheme": "w8a16_row"}


def test_the_shipped_mix_is_for_mixtures(mixture: Path) -> None:
    path = Path(__file__).parents[2] / "recipes/examples/served-mix.yaml"
    recipe = load_recipe(path=path, samples=8, seq_len=32)
    job = jobs.make_job(mixture, recipe=recipe, allow_unreadable=True)
    found = schemes(job)
    assert found["experts"] == {"nvfp4a16"} and found["attention"] == {"fp8a8_row"}
    assert found["shared-experts"] == {None} and job.plan.cache is not None
    assert job.plan.readers["vllm"] is None
