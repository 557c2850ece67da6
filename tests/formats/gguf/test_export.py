"""Checkpoints as GGUF files and back: names, values, metadata, tokenizer, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_gguf import export_gguf, quantize, types
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import quantkit
from quantkit.checks.inspection import inspect
from quantkit.checks.verify import verify
from quantkit.demo.files import demo_path
from quantkit.errors import CheckpointError, FormatError
from quantkit.formats.format import PlannedWeight
from quantkit.formats.gguf.container import MODEL_FILE
from quantkit.formats.gguf.families import FAMILIES, family_of
from quantkit.formats.gguf.file import read_gguf
from quantkit.formats.gguf.format import Gguf, why_not
from quantkit.formats.gguf.names import checkpoint_names, place_of
from quantkit.formats.gguf.source import GgufSource
from quantkit.formats.gguf.tokenizer import describe_tokenizer
from quantkit.formats.open import open_source
from quantkit.formats.registry import format_of
from quantkit.numbers.grid import store_scale
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

gguf = pytest.importorskip("gguf")

_BASE: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.08,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_BASE, "rope_parameters": _LLAMA3, "attention_bias": True},
    "mistral": {**_BASE, "head_dim": 32, "sliding_window": None},
    "qwen2": {**_BASE, "tie_word_embeddings": True},
    "qwen3": {**_BASE, "head_dim": 32},
    "gemma2": {**_BASE, **_GEMMA},
    "gemma3_text": {**_BASE, **_GEMMA, "num_hidden_layers": 7},
    "phi3": {**_BASE},
    "gpt2": {
        "vocab_size": 2048,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "mixtral": {**_BASE, "num_local_experts": 3},
    "qwen3_moe": {
        **_BASE,
        "head_dim": 16,
        "num_experts": 3,
        "num_local_experts": 3,
        "moe_intermediate_size": 64,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
}


def save_model(directory: Path, model_type: str, **changes: Any) -> Path:
    """A random model of the type with the demo's tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(CONFIGS[model_type] | changes))
    model = AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(demo_path()).save_pretrained(directory)
    return directory


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(40)[None] * 37 % 2048
    with torch.no_grad():
        found: torch.Tensor = model(ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_model_comes_back_from_its_file(tmp_path: Path, model_type: str) -> None:
    source = save_model(tmp_path / "source", model_type)
    exported = export_gguf(source, tmp_path / "out")
    loaded = quantkit.load(exported.out / MODEL_FILE)
    original = quantkit.load(source)
    assert type(loaded) is type(original) or model_type == "mistral"
    # Float32 throughout; 1 + w and back costs gemma's norms a bit.
    assert torch.allclose(logits(loaded), logits(original), atol=1e-4)
    again = GgufSource(exported.out / MODEL_FILE)
    assert len(again.names()) >= len(again.header.tensors) - 1


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_transformers_reads_the_file_alike(tmp_path: Path, model_type: str) -> None:
    changes = {} if model_type != "llama" else {"rope_parameters": None, "attention_bias": False}
    source = save_model(tmp_path / "source", model_type, **changes)
    out = export_gguf(source, tmp_path / "out").out
    theirs = AutoModelForCausalLM.from_pretrained(out, gguf_file=MODEL_FILE, dtype=torch.float32)
    assert torch.allclose(logits(theirs.eval()), logits(quantkit.load(source)), atol=1e-4)


def test_every_family_has_a_case() -> None:
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_names_are_the_owners(model_type: str) -> None:
    family = family_of(model_type)
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[family.architecture]
    table = gguf.get_tensor_name_map(arch, 2)
    for theirs in (*family.outside, *(f"{family.prefix}1.{stem}" for stem in family.block)):
        place = place_of(family, theirs + ".weight")
        assert place is not None
        # A gemma2 checkpoint may store its tied head; there is no place for another.
        if (model_type, theirs) != ("gemma2", "lm_head"):
            assert table.get_name(theirs) == place.name.removesuffix(".weight"), theirs
        back = checkpoint_names(family, place.name)
        assert back is not None and back[0] == theirs + ".weight"
    for template in family.experts:
        name = f"{family.prefix}1.{template.replace('{e}', '5')}.weight"
        place = place_of(family, name)
        assert place is not None and place.expert == 5
        merged = f"{family.prefix}1.{template.replace('.{e}', '')}".replace(
            "model.layers.1.block_sparse_moe", "layers.1.feed_forward"
        )
        assert table.get_name(merged) == place.name.removesuffix(".weight")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_metadata_keys_are_the_owners(model_type: str) -> None:
    family = family_of(model_type)
    known = {
        value.replace("{arch}", family.architecture)
        for group in (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope)
        for value in vars(group).values()
        if isinstance(value, str)
    }
    for key in family.metadata:
        assert f"{family.architecture}.{key.suffix}" in known


CODES = [(bits, symmetric) for bits in range(2, 9) for symmetric in (True, False)]


@pytest.mark.parametrize(("bits", "symmetric"), CODES)
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_codes_and_scales_survive(bits: int, symmetric: bool, group: int | None) -> None:
    scheme = Scheme(kind="int", bits=bits, group_size=group, symmetric=symmetric)
    if not symmetric and bits > 5:
        assert "minimum" in str(why_not(scheme))
        return
    assert why_not(scheme) is None
    generator = torch.Generator().manual_seed(bits)
    shape = (6, 256)
    groups = 256 // (group or 256)
    wide = torch.rand(6, groups, generator=generator) * 10 ** torch.randn(6, groups)
    scale = store_scale(wide, half=True)
    zero = None
    if not symmetric:
        zero = torch.randint(1, 2**bits, (6, groups), generator=generator).to(torch.uint8)
    codes = torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8)
    tensor = QuantizedTensor(
        codes=codes,
        scale=PlainScale(tensor=scale),
        zero=zero,
        scheme=scheme,
        dtype=torch.float32,
    )
    held, rounded = Gguf().represent(tensor)
    assert (rounded is None) or not symmetric
    assert held.scheme == Gguf().stored_as(scheme)
    planned = PlannedWeight(name="w", module="w", shape=shape, scheme=held.scheme)
    data = Gguf().pack(planned, held)["w"].numpy()
    label = held.scheme.name.upper()
    theirs = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[label]))
    assert torch.equal(theirs, held.dequantize(torch.float32))
    expected = tensor.dequantize(torch.float32)
    if symmetric:
        assert torch.equal(theirs, expected)
    else:
        # Half a unit of the minimum's last place: 2**-11 of it; and the last bits of float32.
        assert zero is not None
        low = (zero * scale).repeat_interleave(256 // groups, 1)
        assert bool(((theirs - expected).abs() <= low * 2**-11 + expected.abs() * 1e-6).all())


def test_scales_that_float16_does_not_hold_are_told() -> None:
    scheme, scale = Scheme.parse("w4a16_g32"), torch.full((2, 2), 0.5)
    codes = torch.randint(0, 16, (2, 64)).to(torch.uint8)
    for value, told in (
        (0.25, None),
        (2.0**-24, None),
        (1.25 * 2.0**-22, None),
        (2.0**-30, "1 of"),
    ):
        scale[1, 1] = value
        tensor = QuantizedTensor(
            codes=codes,
            scale=PlainScale(tensor=scale.clone()),
            zero=None,
            scheme=scheme,
            dtype=torch.float32,
        )
        held, rounded = Gguf().represent(tensor)
        assert rounded == (
            told and f"{told} 4 scales rounded from float32 to float16, by up to 1 of themselves"
        )
        close = torch.isclose(held.dequantize(), tensor.dequantize(), rtol=0, atol=16 * 2.0**-30)
        assert bool(close.all())


@pytest.mark.parametrize(
    ("scheme", "kind"), [("w4a16_g32", "Q4_0"), ("w8a16_row", "Q8_0"), ("w8a8_row", "Q8_0")]
)
def test_a_quantized_checkpoint_is_exact(tmp_path: Path, scheme: str, kind: str) -> None:
    out = quantkit.quantize(
        demo_path(), "rtn", scheme=scheme, out=tmp_path / "q", progress=False, device="cpu"
    )
    exported = export_gguf(out, tmp_path / "g")
    assert types(exported.out)[kind] == 28 and exported.rounded == ()
    source = GgufSource(exported.out / MODEL_FILE)
    fmt = format_of(open_source(out))
    checkpoint = open_source(out)
    for name, weight in fmt.weights(checkpoint).items():
        expected = fmt.unpack(weight, checkpoint).dequantize(torch.float32)
        assert torch.equal(source.read(name), expected)
    # With the embeddings in bfloat16 both compute in it.
    assert "BF16" in types(exported.out)
    inspected = inspect(exported.out / MODEL_FILE)
    assert inspected.model_type == "llama"
    assert {group.scheme for group in inspected.groups} == {None, kind}
    assert "FROM ./model.gguf" in (exported.out / "Modelfile").read_text()


def test_minima_are_rounded_only_on_request(tmp_path: Path) -> None:
    scheme = "w4a16_g128_asym"
    out = quantkit.quantize(
        demo_path(), "rtn", scheme=scheme, out=tmp_path / "q", progress=False, device="cpu"
    )
    with pytest.raises(FormatError, match="--allow-rounding"):
        export_gguf(out, tmp_path / "g")
    assert not (tmp_path / "g").exists() and not (tmp_path / "g.partial").exists()
    exported = export_gguf(out, tmp_path / "g", allow_rounding=True)
    assert len(exported.rounded) == 28 and types(exported.out)["Q4_1"] == 28


def test_a_codebook_is_refused(tmp_path: Path) -> None:
    out = quantkit.quantize(demo_path(), "nf4", out=tmp_path / "q", progress=False, device="cpu")
    with pytest.raises(FormatError, match="cannot be gguf: ggml has no block type with nf4"):
        export_gguf(out, tmp_path / "g")


REFUSED = {
    "window pattern": ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    "attention scale": ("gemma2", {"query_pre_attn_scalar": 50}, "query_pre_attn_scalar"),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    "expert weights": ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    "rope": (
        "qwen2",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rope_parameters of type 'dynamic'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path: Path, name: str) -> None:
    model_type, changes, message = REFUSED[name]
    source = save_model(tmp_path / "source", model_type)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(FormatError, match=message):
        export_gguf(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_without_a_place_is_refused() -> None:
    with pytest.raises(FormatError, match=r"model\.layers\.0\.extra\.weight: gguf has no place"):
        place_of(family_of("llama"), "model.layers.0.extra.weight")
    with pytest.raises(FormatError, match="gguf is written for gemma2"):
        family_of("opt")


UNUSED = {
    "mtp.fc.weight": (64, 128),
    "model.layers.2.eh_proj.weight": (64, 128),
    "model.layers.2.self_attn.q_proj.weight": (64, 64),
    "model.layers.2.shared_head.norm.weight": (64,),
}


@pytest.mark.parametrize("road", ["export", "export quantized", "quantize"])
def test_prediction_heads_are_left_out_and_told(tmp_path: Path, road: str) -> None:
    source = save_model(tmp_path / "source", "qwen2")
    tensors = load_file(source / "model.safetensors")
    tensors |= {name: torch.ones(shape) for name, shape in UNUSED.items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    note = (
        "4 tensors that Qwen2ForCausalLM does not compute with are left out, as prediction heads "
        "are: model.layers.2.eh_proj.weight"
    )
    if road == "quantize":
        out = quantize(source, tmp_path / "out", "q8_0")
        report = json.loads((out / "quantkit" / "report.json").read_text())
        assert report["notes"] == [note]
        left = {t["name"]: t["reason"] for t in report["tensors"] if t["fate"] == "left out"}
        assert left == dict.fromkeys(UNUSED, "no parameter of the model class takes it")
    else:
        given = source
        if road == "export quantized":
            given = quantkit.quantize(
                source, "rtn", scheme="w8a16_g32", out=tmp_path / "q", progress=False, device="cpu"
            )
        done = export_gguf(given, tmp_path / "out")
        assert done.notes == (note,)
        out = done.out
    names = read_gguf(out / MODEL_FILE).tensors
    assert not any(name.startswith("blk.2.") for name in names) and "blk.1.attn_q.weight" in names
    assert (found := verify(out, against=source)).ok, found.text()


def test_a_mistral_window_becomes_the_context_length(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "mistral", sliding_window=64)
    exported = export_gguf(source, tmp_path / "out")
    assert "sliding window" in exported.notes[0]
    assert read_gguf(exported.out / MODEL_FILE).count("llama.context_length") == 64


def test_scaled_rotary_embeddings_come_back(tmp_path: Path) -> None:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    source = save_model(tmp_path / "source", "qwen2", rope_parameters=rope)
    out = export_gguf(source, tmp_path / "out").out
    assert torch.allclose(
        logits(quantkit.load(out / MODEL_FILE)), logits(quantkit.load(source)), atol=1e-4
    )


@pytest.mark.parametrize("length", [64, 1024, 8192])
def test_the_length_behind_the_frequencies_of_llama_3_is_found(tmp_path: Path, length: int) -> None:
    rope = {**_LLAMA3, "original_max_position_embeddings": length}
    source = save_model(tmp_path / "source", "llama", rope_parameters=rope)
    out = export_gguf(source, tmp_path / "out").out
    assert torch.allclose(logits(quantkit.load(out)), logits(quantkit.load(source)), atol=1e-4)


def test_an_unknown_architecture_is_inspected_and_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_tensor("v.blk.0.w", torch.ones(2, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert inspect(path).model_type == "clip"
    with pytest.raises(CheckpointError, match=r"general\.architecture 'clip' is not read"):
        quantkit.load(path)


def spm_tokenizer(directory: Path) -> None:
    """A tokenizer built as Llama 2's: BPE over text with marked spaces, bytes as a last resort."""
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("\u2581", "hello")]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["\u2581", "h", "e", "l", "o", *(left + right for left, right in merges)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: index for index, word in enumerate(words)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.ByteFallback()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)


def test_a_tokenizer_in_the_manner_of_sentencepiece_has_scores_by_merge_rank(
    tmp_path: Path,
) -> None:
    source = save_model(tmp_path / "source", "llama", vocab_size=269)
    spm_tokenizer(source)
    entries = describe_tokenizer(open_source(source), 269)
    found = {entry.key.removeprefix("tokenizer.ggml."): entry.value for entry in entries}
    tokens, scores, kinds = found["tokens"], found["scores"], found["token_type"]
    assert found["model"] == "llama" and found["add_space_prefix"] is True
    order = [tokens.index(word) for word in ("he", "ll", "hell", "hello", "\u2581hello")]
    assert [scores[index] for index in order] == [0.0, -1.0, -2.0, -3.0, -4.0]
    assert kinds[:4] == (3, 3, 3, 6) and kinds[order[0]] == 1
    assert found["bos_token_id"] == 1 and found["add_bos_token"] is False


def test_an_unknown_way_to_cut_text_is_refused(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama")
    data = json.loads((source / "tokenizer.json").read_text())
    data["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Whitespace"},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        ],
    }
    (source / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(FormatError, match="Whitespace"):
        export_gguf(source, tmp_path / "out")
