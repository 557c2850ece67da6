"""Statistics of experts from all tokens: what counts, and what an unreached expert gains."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_jobs as jobs
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import ModelError, RecipeError
from quantkit.formats.open import open_source
from quantkit.methods.recipe import load_recipe
from quantkit.model.causal import CausalModel
from quantkit.model.spread import shares
from tools.sweep.one import _build

EXPERTS, SHY = 4, 3


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with jobs.one_thread():
        yield


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose router hardly ever sends a token to its last expert."""
    directory = jobs.build("qwen3_moe", tmp_path_factory.mktemp("mixture"))
    tensors = load_file(directory / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith("mlp.gate.weight"):
            # Less than the mean of the others' logits on every token.
            value[SHY] = value[:SHY].mean(0) - 0.2 * (value[:SHY].amax(0) - value[:SHY].mean(0))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_shares_are_the_odds_against_the_last_expert_chosen() -> None:
    logits = torch.randn(37, 5, generator=torch.Generator().manual_seed(0))
    index = logits.topk(2).indices
    index[3, 1] = 5  # a number out of range means no expert
    index[4] = 7
    share, sent = shares(logits, index)
    for token in range(37):
        chosen = [e for e in index[token].tolist() if e < 5]
        for expert in range(5):
            assert bool(sent[token, expert]) == (expert in chosen)
            odds = 0.0
            if chosen:
                last = min(float(logits[token, e]) for e in chosen)
                odds = min(1.0, float(torch.tensor(float(logits[token, expert]) - last).exp()))
            wanted = 1.0 if expert in chosen else odds
            # Seen: 1e-7 of float32.
            assert abs(float(share[token, expert]) - wanted) < 1e-6


def test_every_expert_reads_every_token_and_the_output_stays(mixture: Path) -> None:
    model = CausalModel.open(open_source(str(mixture)))
    ids = torch.randint(3, 300, (3, 17), generator=torch.Generator().manual_seed(1))
    hidden, calls = model.calls(ids)
    block = model.load_block(0)
    plain: dict[str, torch.Tensor] = {}
    spread: dict[str, torch.Tensor] = {}
    sent: dict[str, int] = {}
    with model.tap(0, block, None, lambda key, x: plain.update({key: x.clone()})):
        wanted = model.run(block, hidden, calls[0])

    def keep(key: str, x: torch.Tensor) -> None:
        spread[key] = x.clone()

    with model.tap(0, block, None, keep, lambda key, count: sent.update({key: count})):
        found = model.run(block, hidden, calls[0])
    # The same sums in products of other shapes.
    assert torch.allclose(found, wanted, atol=1e-5)
    for expert in range(EXPERTS):
        key = f"mlp.experts.{expert}:in"
        assert len(spread[key]) == ids.numel()
        assert sent[key] == sent[f"mlp.experts.{expert}:mid"] == len(plain.get(key, ()))
    assert torch.equal(spread["self_attn.q_proj"], plain["self_attn.q_proj"])


def test_padding_counts_for_no_expert(mixture: Path) -> None:
    model = CausalModel.open(open_source(str(mixture)))
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    hidden, calls = model.calls(ids, mask)
    lengths: dict[str, int] = {}

    def keep(key: str, x: torch.Tensor) -> None:
        lengths[key] = len(x)

    block = model.load_block(0)
    with model.tap(0, block, mask, keep, lambda key, count: None):
        model.run(block, hidden, calls[0])
    assert set(lengths.values()) == {int(mask.sum())}


@pytest.mark.parametrize("method", ["gptq", "awq", "best"])
def test_an_expert_without_tokens_is_calibrated_on_all(
    method: str, mixture: Path, tmp_path: Path
) -> None:
    reports = {}
    for experts in ("routed", "all"):
        recipe = load_recipe(
            method, scheme="w4a16_g32", samples=4, seq_len=16, overrides=[f"experts={experts}"]
        )
        job = jobs.make_job(mixture, recipe=recipe, allow_unreadable=True)
        out = jobs.finish(job, tmp_path / experts).out
        reports[experts] = json.loads((out / "quantkit/report.json").read_bytes())
        text = (out / "quantkit/report.md").read_text()
        assert "Tokens that the router sent to each expert" in text
    routed, every = reports["routed"], reports["all"]
    assert every["recipe"]["experts"] == "all" and "experts" not in routed["recipe"]
    assert len(routed["experts"]) == 2
    for layer in routed["experts"] + every["experts"]:
        # Two experts for each of 64 tokens.
        assert sum(layer["tokens"]) == 2 * 64 and len(layer["tokens"]) == EXPERTS
    assert routed["experts"][0] == every["experts"][0]
    shy = f"experts.{SHY}."
    unreached = "no calibration token"
    starved = {n for n, why in routed["degraded"].items() if shy in n and unreached in why}
    assert len(starved) == 3 * sum(not layer["tokens"][SHY] for layer in routed["experts"])
    assert not any(unreached in why for why in every["degraded"].values())


@pytest.mark.parametrize(
    ("model_type", "method", "error", "match"),
    [
        ("llama", "gptq", RecipeError, "no experts"),
        ("qwen3_moe", "rtn", RecipeError, "needs no text"),
        ("jetmoe", "gptq", ModelError, "code of its own"),
    ],
)
def test_where_it_cannot_be_it_is_refused(
    model_type: str, method: str, error: type[Exception], match: str, tmp_path: Path
) -> None:
    if model_type == "jetmoe":
        with torch.no_grad():
            _build("causal", model_type, tmp_path, torch.randint(3, 200, (1, 8)))
        jobs.write_text(tmp_path)
    else:
        jobs.build(model_type, tmp_path)
    recipe = load_recipe(method, scheme="w4a16_g32", overrides=["experts=all"])
    with pytest.raises(error, match=match):
        jobs.make_job(tmp_path, recipe=recipe, allow_unreadable=True)


def test_other_values_are_refused() -> None:
    with pytest.raises(RecipeError, match="experts is routed or all"):
        load_recipe("gptq", experts="some")
