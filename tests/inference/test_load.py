"""Quantized checkpoints loaded as Hugging Face models, and saved again bit for bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from quantkit.checkpoint.files import FileSource
from quantkit.checkpoint.live import LiveSource
from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.shards import ShardWriter, plan_shards
from quantkit.errors import CheckpointError, FormatError, ModelError
from quantkit.formats.format import PlannedWeight
from quantkit.formats.registry import make_format
from quantkit.inference.layers import QuantExperts, QuantLinear
from quantkit.inference.load import install_, load
from quantkit.methods.recipe import load_recipe
from quantkit.model.names import map_names
from quantkit.numbers.grid import blocks, grid_of, store_scale, unblocks
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import NestedScale, PlainScale, QuantizedTensor
from quantkit.pipeline.job import prepare
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.session import run

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL, attention_bias=True),
    "llama-tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=96,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=3),
    "qwen3_moe": Qwen3MoeConfig(
        **SMALL, num_experts=11, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16
    ),
}
CASES = [
    ("llama", "w4a16_g32", "compressed-tensors"),
    ("llama", "w8a8_row", "compressed-tensors"),
    ("llama", "w4a8_g32", "compressed-tensors"),
    ("llama", "w4afp8_g32", "compressed-tensors"),
    ("llama", "nf4_b64_dq", "bitsandbytes"),
    ("llama", "w3a16_g32_asym", "gptq_v2"),
    ("llama-tied", "w4a16_g32_asym", "compressed-tensors"),
    ("gpt2", "w4a16_g32", "compressed-tensors"),
    ("gpt2", "w8a8_row", "compressed-tensors"),
    ("mixtral", "w4a16_g32", "compressed-tensors"),
    ("qwen3_moe", "w8a16_row", "compressed-tensors"),
]


IDS = [f"{kind}-{scheme}" for kind, scheme, _ in CASES]


def make_model(kind: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind]), dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model.eval()


def quantize(weight_OI: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
    """Nearest codes on absmax scales."""
    grouped = blocks(weight_OI.float(), scheme)
    step = grouped.abs().amax(dim=1, keepdim=True)
    zero = None
    if not scheme.flat:
        step = store_scale(step * 2 / (2**scheme.bits - 1))
    if not scheme.symmetric:
        zero = torch.full_like(step, 2 ** (scheme.bits - 1) - 1)
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    straddles = scheme.flat and shape[1] % (scheme.group_size or 1) != 0
    scale_shape = (step.numel(),) if straddles else (shape[0], step.numel() // shape[0])
    scale: PlainScale | NestedScale = PlainScale(tensor=step.view(scale_shape))
    if scheme.double_quant:
        codes = (step.view(-1) * 255).round().clamp(0, 255).to(torch.uint8)
        outer = torch.rand(-(-codes.numel() // 256))
        table = torch.linspace(0, 1, 256)
        scale = NestedScale(
            codes=codes, table=table, absmax=outer, offset=torch.tensor(0.1), shape=scale_shape
        )
        step = scale.values().view(-1, 1)
    codes_OI = unblocks(grid_of(scheme).encode(grouped, step, zero), shape).to(torch.uint8)
    return QuantizedTensor(
        codes=codes_OI,
        scale=scale,
        zero=None if zero is None else zero.view(scale_shape).to(torch.uint8),
        scheme=scheme,
        dtype=weight_OI.dtype,
    )


def is_quantized(name: str) -> bool:
    """Which weights these tests quantize: projections, without one of the first block."""
    wanted = ("proj.weight", "c_attn.weight", "c_fc.weight", "c_proj.weight", "w1.weight")
    return name.endswith((*wanted, "w2.weight", "w3.weight")) and "0.self_attn.o_proj" not in name


def planned(name: str, shape: tuple[int, int], scheme: Scheme | None, gpt2: bool) -> PlannedWeight:
    return PlannedWeight(
        name=name,
        module=name.removesuffix(".weight"),
        shape=shape,
        scheme=scheme,
        transposed=gpt2,
        expert=".experts." in name,
    )


Written = tuple[Mapping[str, QuantizedTensor], dict[str, Any], tuple[PlannedWeight, ...]]


def write_quantized(model: Any, out: Path, scheme_name: str, format_name: str) -> Written:
    """A quantized checkpoint of the model at `out`; its tensors, quantization_config and plan."""
    source, fmt, scheme = LiveSource(model), make_format(format_name), Scheme.parse(scheme_name)
    gpt2 = model.config.model_type == "gpt2"
    tensors, weights, packed = {}, [], {}
    for name in source.names():
        value = source.read(name)
        if not is_quantized(name):
            packed[name] = value
            if value.ndim == 2:
                shape = (value.shape[0], value.shape[1])
                weights.append(planned(name, shape, None, False))
            continue
        weight_OI = value.t().contiguous() if gpt2 else value
        tensors[name] = quantize(weight_OI, scheme)
        weights.append(planned(name, tensors[name].shape, scheme, gpt2))
        packed.update(fmt.pack(weights[-1], tensors[name]))
    infos = [
        TensorInfo(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape))
        for name, tensor in sorted(packed.items())
    ]
    out.mkdir()
    with ShardWriter(out, plan_shards(infos, 60_000)) as writer:
        for name, tensor in packed.items():
            writer.put(name, tensor)
        writer.close()
    config = fmt.config(
        weights, model_type=model.config.model_type, dtype=torch.bfloat16, others=()
    )
    (out / "config.json").write_text(json.dumps({**source.config, "quantization_config": config}))
    for name, content in source.side_files().items():
        assert isinstance(content, bytes)
        (out / name).write_bytes(content)
    return tensors, config, tuple(weights)


def reference(model: Any, tensors: Mapping[str, QuantizedTensor], path: Path) -> Any:
    """The model with decoded weights, by way of transformers' own loading."""
    source = LiveSource(model)
    gpt2 = model.config.model_type == "gpt2"
    values = {}
    for name in source.names():
        values[name] = source.read(name)
        if name in tensors:
            decoded = tensors[name].dequantize()
            values[name] = decoded.t().contiguous() if gpt2 else decoded
    from safetensors.torch import save_file

    path.mkdir()
    (path / "config.json").write_text(json.dumps(source.config))
    save_file(values, path / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    source = FileSource(path)
    return {name: source.read(name) for name in source.names()}


def assert_same_tensors(
    found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> None:
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# What the hand-made checkpoints above lack: scaled embeddings, norms with an offset, fused qkv,
# no gates, positions with an offset, several masks, ALiBi.
TYPES = ["gemma2", "gemma3_text", "phi3", "opt", "gpt_neox", "falcon", "bloom", "cohere2", "olmo2"]


@pytest.mark.parametrize("kind", TYPES)
def test_every_model_type_loads_and_saves_what_the_pipeline_wrote(
    kind: str, tmp_path: Path
) -> None:
    model = tiny.build(kind, tmp_path / "model", dtype=torch.bfloat16)
    recipe = load_recipe("rtn", scheme="w8a16_row")
    job = prepare(str(model), QuantizeOptions(recipe=recipe, allow_unreadable=True))
    run(job, tmp_path / "out", progress=False)
    loaded = load(tmp_path / "out")
    assert count(loaded, QuantLinear) == len(job.plan.weights) - 1
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        logits, expected = loaded(IDS_BT).logits.float(), original(IDS_BT).logits.float()
    # 8 bits: weights within 0.7 %, bfloat16 activations; a wrong tensor gives an error of 1.
    assert (logits - expected).norm() < 0.1 * expected.norm()
    loaded.save_pretrained(tmp_path / "again")
    assert_same_tensors(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "out"))


IDS_BT = torch.arange(3, 3 + 20).view(2, 10)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("kind", "scheme", "fmt"), CASES, ids=IDS)
def test_load_runs_and_saves_the_checkpoint_again_bit_for_bit(
    kind: str, scheme: str, fmt: str, backend: str, tmp_path: Path
) -> None:
    model = make_model(kind)
    tensors, config, _ = write_quantized(model, tmp_path / "out", scheme, fmt)
    loaded = load(tmp_path / "out", backend=backend)
    assert not loaded.training
    with torch.no_grad():
        logits = loaded(IDS_BT).logits
        expected = reference(model, tensors, tmp_path / "reference")(IDS_BT).logits
    # Experts summed in another order, other roundings to bf16 in kernels: a few bf16 steps.
    inexact = "experts" in str(loaded) or backend == "auto"
    rounds_inputs = scheme in ("w8a8_row", "w4a8_g32", "w4afp8_g32")
    tolerance = 0.1 if rounds_inputs else 0.03 if inexact else 0.0
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()
    loaded.save_pretrained(tmp_path / "again", max_shard_size="80KB")
    assert_same_tensors(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "out"))
    saved = FileSource(tmp_path / "again").config
    assert saved["quantization_config"] == config
    assert saved["dtype"] == "bfloat16"
    again = load(tmp_path / "again", backend=backend)
    assert_same_tensors(again.state_dict(), loaded.state_dict())


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def test_layers_stay_quantized_in_memory(tmp_path: Path) -> None:
    model = make_model("llama")
    tensors, _, _ = write_quantized(model, tmp_path / "out", "w4a16_g32", "compressed-tensors")
    loaded = load(tmp_path / "out")
    assert count(loaded, QuantLinear) == len(tensors) == 13
    assert type(loaded.model.layers[0].self_attn.o_proj) is nn.Linear
    bias = loaded.model.layers[1].self_attn.q_proj.bias
    assert torch.equal(bias, model.model.layers[1].self_attn.q_proj.bias)


def test_tied_embeddings_are_one_parameter(tmp_path: Path) -> None:
    write_quantized(make_model("llama-tied"), tmp_path / "out", "w4a16_g32", "compressed-tensors")
    loaded = load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not loaded.lm_head.weight.is_meta


def test_generation_uses_the_cache_and_the_stored_generation_config(tmp_path: Path) -> None:
    model = make_model("llama")
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, max_new_tokens=7
    )
    tensors, _, _ = write_quantized(model, tmp_path / "out", "w4a16_g32", "compressed-tensors")
    loaded = load(tmp_path / "out")
    assert loaded.generation_config.max_new_tokens == 7
    expected = reference(model, tensors, tmp_path / "reference")
    tokens = loaded.generate(IDS_BT, do_sample=False, eos_token_id=None)
    assert tokens.shape == (2, 17)
    assert torch.equal(
        tokens,
        expected.generate(
            IDS_BT, do_sample=False, eos_token_id=None, max_new_tokens=7, pad_token_id=0
        ),
    )


def test_another_dtype_computes_in_it_and_saves_the_same_codes(tmp_path: Path) -> None:
    write_quantized(make_model("llama"), tmp_path / "out", "w4a16_g32", "compressed-tensors")
    loaded = load(tmp_path / "out", dtype=torch.float32)
    assert loaded.dtype == torch.float32
    assert loaded(IDS_BT).logits.dtype == torch.float32
    loaded.save_pretrained(tmp_path / "again")
    wanted = {
        name: tensor.float() if is_plain(name) else tensor
        for name, tensor in tensors_of(tmp_path / "out").items()
    }
    assert_same_tensors(tensors_of(tmp_path / "again"), wanted)


def is_plain(name: str) -> bool:
    return name.endswith(("weight", "bias"))


def test_a_copied_model_saves_the_same(tmp_path: Path) -> None:
    write_quantized(make_model("mixtral"), tmp_path / "out", "w4a16_g32", "compressed-tensors")
    copied = copy.deepcopy(load(tmp_path / "out"))
    assert count(copied, QuantExperts) == 2
    copied.save_pretrained(tmp_path / "again")
    assert_same_tensors(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "out"))


def test_tensors_no_module_takes_are_saved_too(tmp_path: Path) -> None:
    write_quantized(make_model("llama"), tmp_path / "out", "w4a16_g32", "compressed-tensors")
    extra = {"mtp.fc.weight": torch.randn(3, 5)}
    add_shard(tmp_path / "out", extra)
    load(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert_same_tensors(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "out"))
    assert "mtp.fc.weight" in tensors_of(tmp_path / "again")


def add_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path / "extra.safetensors")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"].update(dict.fromkeys(tensors, "extra.safetensors"))
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_parameter_added_after_loading_is_saved(tmp_path: Path) -> None:
    write_quantized(make_model("llama"), tmp_path / "out", "w4a16_g32", "compressed-tensors")
    loaded = load(tmp_path / "out")
    loaded.model.register_parameter("extra", nn.Parameter(torch.ones(3)))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(tensors_of(tmp_path / "again")["model.extra"], torch.ones(3))


@pytest.mark.parametrize(
    ("kind", "scheme", "fmt"),
    [CASES[0], CASES[4], CASES[6], CASES[7]],
    ids=[IDS[0], IDS[4], IDS[6], IDS[7]],
)
def test_install_gives_the_model_that_load_gives(
    kind: str, scheme: str, fmt: str, tmp_path: Path
) -> None:
    model = make_model(kind)
    tensors, config, _ = write_quantized(model, tmp_path / "out", scheme, fmt)
    names = map_names(model, LiveSource(model))
    install_(model, tensors, {}, names=names, fmt=make_format(fmt), quantization_config=config)
    loaded = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(IDS_BT).logits, loaded(IDS_BT).logits)
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "out"))
    assert FileSource(tmp_path / "again").config["quantization_config"] == config


def test_install_writes_rescaled_tensors_and_unties_a_quantized_head(tmp_path: Path) -> None:
    model = make_model("llama-tied")
    names = map_names(model, LiveSource(model))
    embedding = model.model.embed_tokens.weight.detach().clone()
    head = quantize(embedding, Scheme.parse("w8a16_row"))
    norm = torch.full((64,), 0.5)
    fmt = make_format("compressed-tensors")
    weight = planned("lm_head.weight", head.shape, head.scheme, False)
    config = fmt.config([weight], model_type="llama", dtype=torch.bfloat16, others=())
    install_(
        model,
        {"lm_head.weight": head},
        {"model.norm.weight": norm},
        names=names,
        fmt=fmt,
        quantization_config=config,
    )
    assert isinstance(model.lm_head, QuantLinear)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    model.save_pretrained(tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found["model.norm.weight"], norm.to(torch.bfloat16))
    assert "lm_head.weight_packed" in found and "model.embed_tokens.weight" in found
    loaded = load(tmp_path / "out")
    assert not loaded.config.tie_word_embeddings
    with torch.no_grad():
        assert torch.equal(model(IDS_BT).logits, loaded(IDS_BT).logits)


def test_install_refuses_a_name_the_model_does_not_have() -> None:
    model = make_model("llama")
    names = map_names(model, LiveSource(model))
    tensor = quantize(torch.randn(4, 32), Scheme.parse("w4a16_g32"))
    with pytest.raises(ModelError, match=r"model\.nothing\.weight"):
        install_(
            model,
            {"model.nothing.weight": tensor},
            {},
            names=names,
            fmt=make_format("compressed-tensors"),
            quantization_config={},
        )


def unfinish_name(out: Path) -> Path:
    return out.rename(out.with_name("out.partial")).with_name("out")


def unfinish_scratch(out: Path) -> Path:
    (out / ".scratch").mkdir()
    return out


def unfinish_manifest(out: Path) -> Path:
    (out / "quantkit").mkdir()
    return out


@pytest.mark.parametrize("unfinish", [unfinish_name, unfinish_scratch, unfinish_manifest])
def test_unfinished_outputs_are_refused(unfinish: Callable[[Path], Path], tmp_path: Path) -> None:
    write_quantized(make_model("llama"), tmp_path / "out", "w4a16_g32", "compressed-tensors")
    with pytest.raises(CheckpointError, match="unfinished"):
        load(unfinish(tmp_path / "out"))


def test_a_partial_directory_itself_is_refused(tmp_path: Path) -> None:
    write_quantized(
        make_model("llama"), tmp_path / "out.partial", "w4a16_g32", "compressed-tensors"
    )
    with pytest.raises(CheckpointError, match="unfinished"):
        load(tmp_path / "out.partial")


def test_an_unquantized_checkpoint_loads_as_the_plain_model(tmp_path: Path) -> None:
    model = make_model("mixtral")
    model.save_pretrained(tmp_path / "plain")
    loaded = load(tmp_path / "plain")
    assert count(loaded, QuantLinear) == count(loaded, QuantExperts) == 0
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    loaded.save_pretrained(tmp_path / "again")
    assert_same_tensors(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "plain"))


def test_a_format_quantkit_does_not_read_is_refused(tmp_path: Path) -> None:
    model = make_model("llama")
    model.config.quantization_config = {"quant_method": "aqlm", "bits": 4}
    model.save_pretrained(tmp_path / "foreign")
    with pytest.raises(FormatError, match="aqlm"):
        load(tmp_path / "foreign")


@pytest.mark.parametrize(
    "form, scheme",
    [
        ("gptq", "w4a16_g32"),
        ("awq", "w4a16_g32"),
        ("compressed-tensors", "mxfp4a16"),
        ("bitsandbytes", "w8a8_row"),
    ],
)
@pytest.mark.parametrize("told", [True, False], ids=["ours", "another tool's"])
def test_a_dtype_that_the_config_does_not_give_is_that_of_the_tensors(
    form: str, scheme: str, told: bool, tmp_path: Path
) -> None:
    model = tiny.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": None}))
    recipe = load_recipe("rtn", scheme=scheme)
    job = prepare(str(model), QuantizeOptions(recipe=recipe, format=form, allow_unreadable=True))
    out = run(job, tmp_path / "out", progress=False).out
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    if not told:
        (out / "config.json").write_text(json.dumps({**config, "dtype": None}))
    loaded = load(out)
    # In float16 a norm above 65504 would be infinity.
    assert loaded.dtype == torch.bfloat16
    layer = loaded.model.layers[0].mlp.up_proj
    assert layer.quantized_tensor.dtype == torch.bfloat16
