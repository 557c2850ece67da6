"""`--towers`: linear layers beside the text, kept under names that readers know, or rounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_images as images
import tiny_jobs as jobs
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForImageTextToText

import quantkit
from quantkit.checkpoint.files import FileSource
from quantkit.checks.verify import verify
from quantkit.errors import FormatError, RecipeError
from quantkit.methods.recipe import load_recipe
from quantkit.model.decoded import Unpacked
from quantkit.model.towers import linears
from quantkit.pipeline.session import Job

pytestmark = pytest.mark.usefixtures("one_thread")

# One type of each tower: SigLIP, Qwen's with windows and without, Idefics's, Pixtral, InternViT.
KINDS = ("gemma3", "qwen2_vl", "qwen3_vl", "idefics3", "mistral3", "internvl")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in found:
            found[kind] = images.build(kind, tmp_path_factory.mktemp(kind))
        return found[kind]

    return get


def job_of(model: Path, towers: str | None, **options: Any) -> Job:
    recipe = load_recipe("rtn", scheme="w4a16_g32", towers=towers)
    return jobs.make_job(model, recipe=recipe, allow_unreadable=True, **options)


def decoded(out: Path, directory: Path) -> nn.Module:
    """What transformers makes of the output's decoded weights."""
    view = Unpacked.open(FileSource(out))
    directory.mkdir()
    tensors = {name: view.read(name).contiguous() for name in view.names()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(view.config))
    return AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_tower_loads_and_computes_what_its_weights_decode_to(
    kind: str, built: Any, tmp_path: Path
) -> None:
    job = job_of(built(kind), "w8a16_row")
    mine = {ref.name for ref in job.model.towers.weights if ref.kept is None}
    done = {fate.name for fate in job.plan.fates if fate.reason == "--towers"}
    assert done == mine and len(mine) >= 9
    out = jobs.finish(job, tmp_path / "out").out
    given = images.inputs(kind)
    loaded = quantkit.load(out, dtype=torch.float32, backend="reference")
    with torch.no_grad():
        found = loaded(**given).logits
        wanted = decoded(out, tmp_path / "decoded")(**given).logits
        original = AutoModelForImageTextToText.from_pretrained(built(kind), dtype=torch.float32)
        before = original.eval()(**given).logits
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert not torch.equal(found, before)
    assert verify(out, against=str(built(kind))).ok
    # What is saved again are the same tensors.
    loaded.save_pretrained(tmp_path / "again")
    first, again = FileSource(out), FileSource(tmp_path / "again")
    assert all(torch.equal(first.read(name), again.read(name)) for name in first.names())


def test_a_tower_stays_as_it_is_and_is_named_for_readers(built: Any, tmp_path: Path) -> None:
    job = job_of(built("qwen2_vl"), "keep")
    assert (
        job.plan.recipe.towers is None
        and job.plan.recipe == job_of(built("qwen2_vl"), None).plan.recipe
    )
    out = jobs.finish(job, tmp_path / "out").out
    source, original = FileSource(out), FileSource(built("qwen2_vl"))
    ignored = set(source.config["quantization_config"]["ignore"])
    for ref in job.model.towers.weights:
        assert torch.equal(source.read(ref.name), original.read(ref.name))
        module = ref.parameter.removesuffix(".weight")
        assert {module, ref.name.removesuffix(".weight")} <= ignored
    reasons = {fate.name: fate.reason for fate in job.plan.fates}
    assert reasons["visual.patch_embed.proj.weight"] == "in a tower beside the text"


def test_a_weight_that_other_code_reads_stays(built: Any) -> None:
    kept = {
        ref.name for ref in job_of(built("qwen2_vl"), "w8a16_row").model.towers.weights if ref.kept
    }
    assert kept == {"visual.blocks.0.mlp.fc2.weight"}
    kept = {
        ref.name for ref in job_of(built("gemma3"), "w8a16_row").model.towers.weights if ref.kept
    }
    assert kept == {"vision_tower.head.attention.out_proj.weight"}


class _Reads(nn.Module):
    """Names its own layers in the ways that code does."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.free = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.many = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        nn.init.zeros_(self.free.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The weight of `free` is read here in words alone: self.free.weight."""
        for number in range(2):
            x = x.to(self.many[number].weight.dtype)
        inner = self
        return self.free(x.to(self.one.weight.dtype) + inner.two.weight.sum())


def test_code_is_read_and_not_its_comments() -> None:
    model = _Reads()
    read = {
        path for path in dict(model.named_modules()) if path and linears._is_read(model, path, {})
    }
    assert read == {"one", "two", "many", "many.0", "many.1"}


def test_towers_of_another_scheme_are_known_to_transformers_or_refused(built: Any) -> None:
    recipe = load_recipe("rtn", scheme="w4a16_g32", towers="w8a16_row")
    with pytest.raises(
        FormatError, match=r"its SiglipVisionModel sets the weight .*w8a8_row has one"
    ):
        jobs.make_job(built("gemma3"), recipe=recipe)
    assert job_of(built("gemma3"), "w8a8_row").plan.readers["transformers"] is None
    assert job_of(built("qwen2_vl"), "w8a16_row").plan.readers["transformers"] is None


@pytest.mark.parametrize(
    ("kind", "towers", "told"),
    [
        ("llama", "w8a16_row", "the model has no tower with linear layers; leave it out"),
        ("gemma3", "fp8a8_tensor", "choose one without static activations"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    kind: str, towers: str, told: str, built: Any, llama: Path
) -> None:
    recipe = load_recipe("rtn", scheme="w4a16_g32", towers=towers)
    model = llama if kind == "llama" else built(kind)
    with pytest.raises(RecipeError, match=told):
        jobs.make_job(model, recipe=recipe)


def test_rules_speak_of_towers_too(built: Any) -> None:
    recipe = load_recipe("rtn", scheme="w4a16_g32", towers="w8a16_row", skip=("*fc2*",))
    job = jobs.make_job(built("idefics3"), recipe=recipe)
    reasons = {
        fate.name: fate.reason for fate in job.plan.fates if fate.name.endswith("fc2.weight")
    }
    assert reasons and set(reasons.values()) == {"rule '*fc2*'"}


def test_a_recipe_holds_what_was_asked_for() -> None:
    recipe = load_recipe("rtn", towers="w8a16_row")
    assert recipe.to_dict()["towers"] == "w8a16_row"
    assert "towers" not in load_recipe("rtn", towers="keep").to_dict()
