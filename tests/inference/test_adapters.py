"""Training adapters of peft through quantized layers: real steps, and the decoded model beside."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from inference.test_load import make_model, write_quantized
from kernel_ops.test_gradients import decode_
from quantkit_kernels.ops import int8_dot
from test_docs import DOCS, fences
from tiny_models import tokenizer
from torch import Tensor

import quantkit
from quantkit.errors import ModelError
from quantkit.inference.fused import FusedLinear
from quantkit.inference.layers import QuantLinear
from quantkit.inference.load import load
from quantkit.inference.save import canonical_tensors

peft = pytest.importorskip("peft", reason="adapters are peft's")

FORMATS = [
    ("w4a16_g32", "compressed-tensors"),
    ("nf4_b64_dq", "bitsandbytes"),
    ("fp8a16_row", "compressed-tensors"),
]
EVERY = [
    *FORMATS,
    ("w8a8_row", "compressed-tensors"),
    ("w4a8_g32", "compressed-tensors"),
    ("w4afp8_g32", "compressed-tensors"),
    ("w3a16_g32_asym", "gptq_v2"),
]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(3, 3 + 48).view(2, 24)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny quantized checkpoints by scheme."""
    folder = tmp_path_factory.mktemp("adapters")
    for scheme, fmt in EVERY:
        write_quantized(make_model("llama"), folder / scheme, scheme, fmt)
    return {scheme: folder / scheme for scheme, _ in EVERY}


def with_adapters(model: Any, targets: list[str] = TARGETS) -> Any:
    """The model with adapters, the same numbers each time, in training mode."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, quantkit.prepare_lora(config)).train()
    draw = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            # From zeros the other half would have no gradient.
            torch.nn.init.normal_(parameter, std=0.02, generator=draw)
    return adapted


def trainable(model: Any) -> dict[str, Tensor]:
    return {name: part for name, part in model.named_parameters() if part.requires_grad}


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: part.grad for name, part in trainable(model).items()}
    assert found and all(grad is not None for grad in found.values())
    return {name: grad.double() for name, grad in found.items() if grad is not None}


def decoded_twin(path: Path, dtype: torch.dtype) -> Any:
    model = load(path, backend="reference", dtype=dtype)
    decode_(model)
    return model


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], limit: float) -> bool:
    """Whether all gradients as one vector differ by so much of its length."""
    assert found.keys() == wanted.keys()
    one, other = (torch.cat([part[name].flatten() for name in wanted]) for part in (found, wanted))
    return bool((one - other).norm() <= limit * other.norm())


# A decoded model in bfloat16 is 0.008 from one in float32.
CASES = [("auto", torch.bfloat16, 0.02), ("reference", torch.float32, 1e-6)]
CASES += [("cpu-int8", torch.float32, 0.02)]


@pytest.mark.parametrize("fuse", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize(("backend", "dtype", "limit"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("scheme", [scheme for scheme, _ in EVERY])
def test_adapters_have_the_gradients_of_the_decoded_model(
    scheme: str, backend: Any, dtype: torch.dtype, limit: float, fuse: bool, outputs: Any
) -> None:
    if backend == "cpu-int8" and (reason := int8_dot.unavailable()):
        pytest.skip(reason)
    if backend == "reference" and scheme in ("w8a8_row", "w4a8_g32", "w4afp8_g32"):
        # Rounded activations are other numbers than the decoded model's.
        limit = 0.02
    wanted = gradients(with_adapters(decoded_twin(outputs[scheme], torch.float32)))
    model = load(outputs[scheme], backend=backend, dtype=dtype, fuse=fuse)
    assert close(gradients(with_adapters(model)), wanted, limit)


def train(model: Any, steps: int) -> list[float]:
    """The loss of every step of AdamW."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("scheme", [scheme for scheme, _ in FORMATS])
def test_training_lowers_the_loss_and_leaves_the_codes(scheme: str, outputs: Any) -> None:
    model = load(outputs[scheme], dtype=torch.bfloat16)
    before = {
        name: copy.deepcopy(part.quantized_tensor)
        for name, part in model.named_modules()
        if isinstance(part, QuantLinear)
    }
    adapted = with_adapters(model)
    losses = train(adapted, 40)
    twin = train(with_adapters(decoded_twin(outputs[scheme], torch.bfloat16)), 40)
    assert losses[-1] < 0.8 * losses[0]
    # Rounded gradients go other ways by and by.
    assert abs(losses[-1] - twin[-1]) < 0.1 * twin[-1]
    after = [part for part in adapted.modules() if isinstance(part, QuantLinear)]
    assert len(after) == len(before) == 13
    for tensor, layer in zip(before.values(), after, strict=True):
        assert torch.equal(tensor.codes, layer.quantized_tensor.codes)
    assert all("lora_" in name for name in trainable(adapted))


def test_checkpointed_activations_give_the_same_gradients(outputs: Any) -> None:
    for fuse in (False, True):
        model = with_adapters(load(outputs["w4a16_g32"], fuse=fuse))
        wanted = gradients(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert close(gradients(model), wanted, 1e-6)


def test_adapters_are_saved_and_read_without_the_weights(tmp_path: Path, outputs: Any) -> None:
    adapted = with_adapters(load(outputs["nf4_b64_dq"]))
    train(adapted, 2)
    adapted.save_pretrained(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    config = quantkit.prepare_lora(peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(
        load(outputs["nf4_b64_dq"]), tmp_path / "adapter", config=config
    )
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS).logits, adapted.eval()(IDS).logits)


def test_the_checkpoint_under_adapters_stays_bit_for_bit(tmp_path: Path, outputs: Any) -> None:
    model = load(outputs["w4a16_g32"])
    wanted = canonical_tensors(model, model.hf_quantizer.format, model.hf_quantizer.saved)
    with_adapters(model)
    found = canonical_tensors(model, model.hf_quantizer.format, model.hf_quantizer.saved)
    assert wanted.keys() <= found.keys()
    assert all("lora_" in name for name in found.keys() - wanted.keys())
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_transformers_own_ways_to_train_take_the_model(tmp_path: Path, outputs: Any) -> None:
    from transformers import Trainer, TrainingArguments

    model = load(outputs["w4a16_g32"])
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model.add_adapter(quantkit.prepare_lora(config))
    before = {name: part.detach().clone() for name, part in trainable(model).items()}
    options = TrainingArguments(
        output_dir=tmp_path, max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model=model, args=options, train_dataset=rows).train()
    assert any(not torch.equal(before[name], part) for name, part in trainable(model).items())


@pytest.mark.parametrize("fuse", [False, True], ids=["separate", "fused"])
def test_adapters_follow_the_layer_and_are_not_merged(fuse: bool, outputs: Any) -> None:
    adapted = with_adapters(load(outputs["w4a16_g32"], fuse=fuse, dtype=torch.float16))
    kind = FusedLinear if fuse else QuantLinear
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.base_layer, kind)
    stand_in = layer.base_layer.weight
    assert stand_in.shape == (64, 64) and stand_in.isnan().all()
    assert stand_in.dtype == torch.float16 and stand_in.untyped_storage().nbytes() == 2
    with pytest.raises(ModelError, match="adapters cannot be merged into quantized weights"):
        adapted.merge_and_unload()


def test_all_linear_is_refused() -> None:
    with pytest.raises(ModelError, match="finds no quantized layers; name them"):
        quantkit.prepare_lora(peft.LoraConfig(target_modules="all-linear"))


def test_the_example_of_the_docs_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (source,) = [
        body for title, body in fences(DOCS / "python.md", "python") if title == "train.py"
    ]
    core = make_model("llama")
    core.resize_token_embeddings(300)
    write_quantized(core, tmp_path / "OUT", "nf4_b64", "bitsandbytes")
    tokenizer().save_pretrained(tmp_path / "OUT")
    (tmp_path / "text.txt").write_text("To train is to repeat. " * 100)
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "train.py", "exec"), {"__name__": "__main__"})
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0]
    assert (tmp_path / "ADAPTER" / "adapter_config.json").is_file()


def test_a_missing_peft_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "quantkit.inference.adapters", raising=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match="pip install peft"):
        quantkit.prepare_lora  # noqa: B018
