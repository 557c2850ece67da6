"""Every number of a model comes from its checkpoint, or from code that computes it on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_jobs as jobs
import tiny_models as tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import quantkit
from quantkit.checkpoint.files import FileSource
from quantkit.errors import CheckpointError, ModelError
from quantkit.model import skeleton
from quantkit.model.causal import CausalModel
from quantkit.model.watched import watched

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind in ("diffllama", "xlnet", "openai-gpt", "rwkv"):
        found[kind] = tiny.build(kind, tmp_path_factory.mktemp(kind) / "model")
        jobs.write_text(found[kind])
    return found


@pytest.mark.parametrize("kind", ["diffllama", "xlnet", "openai-gpt", "rwkv"])
def test_a_plain_model_has_the_owners_logits(kind: str, built: dict[str, Path]) -> None:
    owner = AutoModelForCausalLM.from_pretrained(built[kind]).eval()
    # The random numbers that a class draws differ from one model to the next.
    torch.manual_seed(1)
    assert torch.equal(jobs.logits(quantkit.load(built[kind])), jobs.logits(owner))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_has_numbers_before_they_are_read(
    dtype: torch.dtype, built: dict[str, Path]
) -> None:
    for path in built.values():
        model = skeleton.build(FileSource(path), trust_remote_code=False, dtype=dtype)
        for name, tensor in model.state_dict().items():
            assert tensor.is_meta, name
            assert not tensor.is_floating_point() or tensor.dtype == dtype, name


@pytest.mark.parametrize(("kind", "own"), [("diffllama", "lambda_"), ("openai-gpt", ".ln_1.")])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_model_is_quantized_with_its_own_parameters(
    kind: str, own: str, method: str, built: dict[str, Path], tmp_path: Path
) -> None:
    job = jobs.make_job(built[kind], method, "w8a16_g32", allow_unreadable=True)
    out = jobs.finish(job, tmp_path / "out").out
    source, result = FileSource(built[kind]), FileSource(out)
    kept = [name for name in source.names() if own in name]
    assert kept and all(torch.equal(source.read(n), result.read(n)) for n in kept)
    model = AutoModelForCausalLM.from_pretrained(built[kind]).eval()
    loaded = quantkit.load(out, backend="reference")
    # 8 bits in groups of 32 cost about a hundredth.
    assert jobs.distance(jobs.logits(loaded), jobs.logits(model)) < 0.03


def test_a_parameter_that_the_checkpoint_lacks_is_named(
    built: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny.build("diffllama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.self_attn.lambda_k2"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    for read in (quantkit.load, lambda path: CausalModel.open(FileSource(path))):
        with pytest.raises(
            CheckpointError, match=r"no tensor for .*layers\.1\.self_attn\.lambda_k2"
        ):
            read(model)


def test_a_forward_that_changes_weights_is_refused_in_the_plan(built: dict[str, Path]) -> None:
    with pytest.raises(
        ModelError, match=r"rwkv\.blocks\.0\.attention\.output\.weight: Rwkv.* reads"
    ):
        jobs.make_job(built["rwkv"], "rtn", "w8a16_g32", allow_unreadable=True)


def test_fused_attention_matrices_are_refused_in_the_plan(built: dict[str, Path]) -> None:
    with pytest.raises(
        ModelError, match="XLNetRelativeAttention multiplies by this weight in a product"
    ):
        jobs.make_job(built["xlnet"], "rtn", "w8a16_g32", allow_unreadable=True)


class _Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(4.0) + 1, persistent=False)


class _Tables(PreTrainedModel):
    """As code of others may be: one buffer that only its constructor computes."""

    config_class = LlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.good, self.bad = _Table(), _Table()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.good:
            module.table.copy_(torch.arange(4.0) + 1)


def test_a_buffer_that_nothing_computes_is_named() -> None:
    with torch.device("meta"):
        model = _Tables(LlamaConfig(num_hidden_layers=1))
    skeleton.fill_buffers(model, model.good, "good")
    assert model.good.table.tolist() == [1, 2, 3, 4]
    with pytest.raises(
        ModelError, match=r"bad\.table: _Table computes this buffer when it is made"
    ):
        skeleton.fill_buffers(model, model.bad, "bad")


class _Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain, self.asked = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        asked: torch.Tensor = self.asked(self.plain(x).to(self.asked.weight.dtype))
        return asked


def test_weights_that_others_read_are_seen() -> None:
    part, x = _Reads(), torch.randn(2, 4)
    with watched(part) as read:
        out = part(x)
    assert read == {"asked.weight"}
    assert torch.equal(out, part(x)) and isinstance(part.asked, nn.Linear)


def test_a_weight_that_its_block_reads_is_kept(
    built: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.diffllama.modeling_diffllama import DiffLlamaMLP

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        out: torch.Tensor = self.down_proj(hidden.to(self.down_proj.weight.dtype))
        return out

    monkeypatch.setattr(DiffLlamaMLP, "forward", forward)
    plan = jobs.make_job(built["diffllama"], "rtn", "w8a16_g32").plan
    fates = {fate.name: fate for fate in plan.fates}
    kept = fates["model.layers.0.mlp.down_proj.weight"]
    assert (kept.fate, kept.reason) == (
        "kept",
        "the model's code reads this weight outside its layer",
    )
    assert fates["model.layers.0.mlp.up_proj.weight"].fate == "quantized"
