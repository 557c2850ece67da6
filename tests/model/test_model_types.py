"""Every supported model type through the pipeline: each tensor ends as planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_jobs as jobs
import torch
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.checkpoint.files import FileSource
from quantkit.checks.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")

TYPES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "opt",
    "gpt_neox",
    "falcon",
    "bloom",
    "cohere2",
    "olmo2",
    "mixtral",
    "qwen3_moe",
]
# Parts of names that only unquantized tensors have, whatever the model calls its layers.
KEPT = ("norm", "embed", "wte", "wpe", "ln_", "lm_head", "embed_out", "mlp.gate.weight", "bias")
ROUTERS = {"mixtral": "block_sparse_moe.gate.weight", "qwen3_moe": "mlp.gate.weight"}


@pytest.fixture(scope="module", params=TYPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_every_tensor_of_a_type_ends_as_planned(method: str, model: Path, tmp_path: Path) -> None:
    job = jobs.make_job(model, method, "w4a16_g32", allow_unreadable=True)
    out = jobs.finish(job, tmp_path / "out").out
    result = verify(out, against=model)
    assert result.ok, result.text()

    names = set(FileSource(model).names())
    report = json.loads((out / "quantkit/report.json").read_bytes())
    fates = {tensor["name"]: tensor["fate"] for tensor in report["tensors"]}
    assert fates == {fate.name: fate.fate for fate in job.plan.fates}
    assert set(fates) == names
    quantized = {name for name, fate in fates.items() if fate == "quantized"}
    assert len(quantized) >= 8
    assert not [name for name in quantized if any(part in name for part in KEPT)]
    routers = [name for name in names if name.endswith(ROUTERS.get(job.plan.model_type, "-"))]
    assert len(routers) == (2 if job.plan.model_type in ROUTERS else 0)
    assert {fates[name] for name in routers} <= {"kept", "rescaled"}
    if method == "awq":
        # olmo2 norms what a block adds, so its folds go from one matrix into the next.
        assert report["folded"]
        assert ("rescaled" in fates.values()) == (job.plan.model_type != "olmo2")

    original = jobs.logits(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    # Seen: 0.08 to 0.4.  A fold that misses a reader, or a permuted weight, gives about 1.4.
    assert 0 < jobs.distance(jobs.logits(quantkit.load(out)), original) < 0.6
