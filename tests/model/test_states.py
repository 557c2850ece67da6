"""Weights that feed a state carried along the sequence: which are found, and what the plan makes
of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_jobs as jobs
import torch
from transformers import AutoModelForCausalLM

from quantkit.errors import ModelError, RecipeError
from quantkit.formats.open import open_source
from quantkit.methods.recipe import load_recipe
from quantkit.model.causal import CausalModel
from quantkit.model.probes.states import find_fed, probe_tokens
from quantkit.model.trace import discover, noise_like, sketch_
from quantkit.pipeline.plan import make_plan
from tools.sweep.shrink import tiny_config

# Type -> what feeds a state in its first block that has one, by the ends of names.
FED = {
    # Selective scan: what the state takes in, and how long it lasts.
    "mamba": {"mixer.in_proj", "mixer.x_proj"},
    "bamba": {"mamba.in_proj"},
    # Attention stands beside the scan and is not meant.
    "falcon_h1": {"mamba.in_proj"},
    # Gated delta rule: queries are fused with what is carried, gates of the output are not.
    "qwen3_5_text": {"linear_attn.in_proj_qkv", "linear_attn.in_proj_a", "linear_attn.in_proj_b"},
    # Decays in two factors; queries by themselves.
    "kimi_linear": {
        *(f"self_attn.{part}_proj" for part in ("k", "v", "b")),
        *(f"self_attn.forget_gate.f_{part}_proj" for part in ("a", "b")),
    },
    "minimax": {"self_attn.qkv_proj"},
    "recurrent_gemma": {"temporal_block.linear_x"},
    "xlstm": {f"mlstm_layer.{part}" for part in ("k", "v", "igate_preact", "fgate_preact")},
    # A short convolution forgets.
    "lfm2": set(),
    "llama": set(),
    "bloom": set(),
    "gpt_neox": set(),
    "deepseek_v4": set(),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with jobs.one_thread():
        yield


def build(model_type: str, directory: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> CausalModel:
    return CausalModel.open(open_source(str(build("qwen3_5_text", tmp_path_factory.mktemp("q")))))


@pytest.mark.parametrize("model_type", FED)
def test_what_feeds_a_state_is_found_by_probing(model_type: str, tmp_path: Path) -> None:
    model = CausalModel.open(open_source(str(build(model_type, tmp_path))))
    found = [
        {ref.parameter.removesuffix(".weight") for ref in model.weights(i) if ref.name in fed}
        for i in range(model.num_blocks)
        for fed in [model.fed(i)]
    ]
    assert next((names for names in found if names), set()) == FED[model_type]


class _Leaky(torch.nn.Module):
    """A moving average of 23 features, read beside a value that is not averaged."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.into = torch.nn.Linear(64, 23, bias=False)
        self.beside = torch.nn.Linear(64, 23, bias=False)
        self.out = torch.nn.Linear(23, 64, bias=False)
        self.window = window

    def forward(self, x_BTH: torch.Tensor) -> torch.Tensor:
        taken = self.into(x_BTH)
        if self.window is None:
            states, state = [], torch.zeros_like(taken[:, 0])
            for t in range(taken.shape[1]):
                state = 0.5 * state + taken[:, t]
                states.append(state)
            mixed = torch.stack(states, 1)
        else:
            padded = torch.nn.functional.pad(taken, (0, 0, self.window - 1, 0))
            mixed = padded.unfold(1, self.window, 1).mean(-1)
        return x_BTH + self.out(mixed * self.beside(x_BTH))


@pytest.mark.parametrize(("window", "fed"), [(None, {"into.weight"}), (4, set())])
def test_a_window_is_no_state(window: int | None, fed: set[str]) -> None:
    with torch.device("meta"):
        block = _Leaky(window)
    sketch = sketch_(block)
    noise = noise_like(torch.zeros(1, probe_tokens(sketch), 64), 1)
    with torch.no_grad():
        trace = discover(sketch, lambda part: part(noise), batch=1)
        assert {path for path, _ in find_fed(sketch, trace, lambda part: part(noise))} == fed


def test_the_plan_gives_a_scheme_to_what_feeds_a_state(hybrid: CausalModel) -> None:
    recipe = load_recipe("rtn", scheme="w4a16_g32", recurrent="w8a16_g32")
    plan = make_plan(hybrid, recipe, allow_unreadable=True)
    eight = {w.name for w in plan.weights if w.scheme is not None and w.scheme.bits == 8}
    fed = {name for i in range(hybrid.num_blocks) for name in hybrid.fed(i)}
    # The gate of the output reads the same input, which vLLM fuses.
    beside = {name for name in eight if name.endswith("in_proj_z.weight")}
    assert eight == fed | beside and fed and len(beside) == 3
    reasons = {fate.name: fate.reason for fate in plan.fates}
    assert all("--recurrent w8a16_g32: feeds a state" in reasons[name] for name in fed)
    assert all("reads the input of" in reasons[name] for name in beside)


def test_a_rule_comes_before_it(hybrid: CausalModel) -> None:
    recipe = load_recipe("rtn", scheme="w4a16_g32", recurrent="w8a16_g32", skip=["*linear_attn*"])
    plan = make_plan(hybrid, recipe, allow_unreadable=True)
    kept = [fate for fate in plan.fates if ".linear_attn.in_proj" in fate.name]
    assert kept and all(fate.fate == "kept" and "rule" in fate.reason for fate in kept)


def test_keep_leaves_them_as_they_are(hybrid: CausalModel) -> None:
    plan = make_plan(hybrid, load_recipe("rtn", recurrent="keep"), allow_unreadable=True)
    told = {fate.name: fate.fate for fate in plan.fates}
    assert {told[name] for name in hybrid.fed(0)} == {"kept"}
    assert load_recipe("rtn", recurrent="keep").to_dict()["recurrent"] == "keep"


def test_a_model_without_a_state_refuses_it(tmp_path: Path) -> None:
    model = CausalModel.open(open_source(str(build("llama", tmp_path))))
    recipe = dataclasses.replace(load_recipe("rtn"), recurrent="keep")
    with pytest.raises(RecipeError, match="no weight of this model feeds a state"):
        make_plan(model, recipe)


def test_a_model_that_is_one_block_refuses_it(tmp_path: Path) -> None:
    model = CausalModel.open(open_source(str(build("xlm", tmp_path))))
    with pytest.raises(ModelError, match="worked on as one block"):
        make_plan(model, load_recipe("rtn", recurrent="keep"))


def test_where_a_trial_run_gives_no_numbers_it_is_refused(tmp_path: Path) -> None:
    model = CausalModel.open(open_source(str(build("zamba", tmp_path))))
    with pytest.raises(ModelError, match="gives NaN or infinity, so what feeds a state"):
        make_plan(model, load_recipe("rtn", recurrent="keep"), allow_unreadable=True)
