"""Choosing a format, and which runtimes read the result."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from format_samples import MemorySource, planned

from quantkit.errors import FormatError
from quantkit.formats.registry import default_format, format_of, make_format
from quantkit.formats.stored import round_scale
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale, QuantizedTensor


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("w4a16_g128", "compressed-tensors"),
        ("w8a8_row", "compressed-tensors"),
        ("w2a16_g32", "compressed-tensors"),
        ("w3a16_g128_asym", "compressed-tensors"),
        ("w5a16_row", "compressed-tensors"),
        ("nf4_b64_dq", "bitsandbytes"),
        ("fp4_b64", "bitsandbytes"),
    ],
)
def test_default_formats(scheme: str, expected: str) -> None:
    assert default_format(Scheme.parse(scheme)) == expected


def test_unknown_formats_list_the_known() -> None:
    with pytest.raises(FormatError, match=r"'ggml' is unknown; known: awq, bitsandbytes, comp"):
        make_format("ggml")
    with pytest.raises(FormatError, match="cannot be imported"):
        make_format("quantkit.formats.format:Nothing")
    assert make_format("quantkit.formats.gptq_v2:GptqV2").name == "gptq_v2"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "not quantized"),
        (
            {"quantization_config": {"quant_method": "gptq", "checkpoint_format": "marlin"}},
            "'gptq' as 'marlin' is not read",
        ),
        ({"quantization_config": {"quant_method": "aqlm"}}, "'aqlm' is not read"),
    ],
)
def test_checkpoints_of_no_known_format_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        format_of(MemorySource(config=config, tensors={}))


# Readers: each row was found by loading such a checkpoint (see quantkit/formats/readers.py)


@pytest.mark.parametrize(
    ("model_type", "scheme", "options", "transformers", "vllm"),
    [
        ("llama", "w4a16_g128", {}, True, True),
        ("llama", "w4a16_g128_asym", {}, True, True),
        ("llama", "w8a16_row", {}, True, True),
        ("llama", "w8a16_row_asym", {}, True, False),
        ("llama", "w8a8_row", {}, True, True),
        ("llama", "w4a16_g48", {}, True, False),
        ("falcon", "w4a16_g128", {}, True, True),
        ("falcon", "nf4_b64_dq", {}, False, False),
        ("gpt2", "w4a16_g128", {"transposed": True}, False, True),
        ("gpt2", "nf4_b64_dq", {"transposed": True}, True, False),
        ("gpt2", "w3a16_g128", {"transposed": True}, False, False),
        ("mixtral", "w4a16_g128", {"expert": True}, True, True),
        ("mixtral", "w4a16_g128_asym", {"expert": True}, False, True),
        ("mixtral", "w8a8_row", {"expert": True}, False, True),
        ("mixtral", "nf4_b64_dq", {"expert": True}, False, False),
        ("mixtral", "w3a16_g128", {"expert": True}, True, False),
        ("llama", "nf4_b64", {}, True, False),
        ("llama", "w3a16_g128", {}, True, False),
        ("falcon", "w3a16_g128", {}, True, False),
        ("gpt_neo", "w4a16_g128", {}, True, False),
    ],
)
def test_readers(
    model_type: str, scheme: str, options: dict[str, Any], transformers: bool, vllm: bool
) -> None:
    weights = [
        planned("model.layers.0.mlp.experts.0.up.weight", (384, 384), scheme, **options),
        planned("model.layers.0.self_attn.q_proj.weight", (384, 384), None),
    ]
    readers = make_format(default_format(Scheme.parse(scheme))).readers(weights, model_type)
    found = {runtime: reason is None for runtime, reason in readers.items()}
    assert found == {"transformers": transformers, "vllm": vllm}


def test_vllm_reads_bloom_unless_its_fused_projection_is_packed() -> None:
    name = "transformer.h.0.self_attention.query_key_value.weight"
    dense = planned("transformer.h.0.mlp.dense.weight", (384, 384), "w4a16_g128")
    for chosen in map(make_format, ("compressed-tensors", "gptq_v2")):
        fused = planned(name, (384, 384), "w4a16_g128")
        assert "query_key_value" in str(chosen.readers([dense, fused], "bloom")["vllm"])
        kept = planned(name, (384, 384), None)
        assert chosen.readers([dense, kept], "bloom")["vllm"] is None
    eight = planned(name, (384, 384), "w8a8_row")
    assert make_format("compressed-tensors").readers([dense, eight], "bloom")["vllm"] is None


@pytest.mark.parametrize("scheme", ["w4a16_g128", "w8a8_row", "nf4_b64", "w3a16_g128", None])
def test_nobody_else_reads_experts_of_one_tensor_one_by_one(scheme: str | None) -> None:
    name = "model.layers.0.mlp.experts.0.down_proj.weight"
    weights = [
        planned(name, (384, 384), scheme, expert=True, split=True),
        planned("model.layers.0.self_attn.q_proj.weight", (384, 384), scheme or "w4a16_g128"),
    ]
    chosen = make_format(default_format(Scheme.parse(scheme or "w4a16_g128")))
    assert all(reason is not None for reason in chosen.readers(weights, "gpt_oss").values())
    assert "one by one" in str(chosen.readers(weights, "gpt_oss")["transformers"])


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq_v2", "awq"])
def test_transformers_joins_no_packed_rows(name: str) -> None:
    joined = planned("model.layers.0.mlp.up_proj.weight", (384, 384), "w4a16_g128", joined=True)
    assert "rows of several tensors" in str(
        make_format(name).readers([joined], "minimax_m3_vl_text")["transformers"]
    )


def test_kept_experts_and_mixed_symmetry_stop_transformers() -> None:
    chosen = make_format("compressed-tensors")
    dense = planned("model.layers.0.a.weight", (384, 384), "w4a16_g128")
    kept = planned("model.layers.0.experts.0.w1.weight", (384, 384), None, expert=True)
    packed = planned("model.layers.1.experts.0.w1.weight", (384, 384), "w4a16_g128", expert=True)
    assert chosen.readers([dense, packed], "mixtral")["transformers"] is None
    assert chosen.readers([dense, kept], "mixtral")["transformers"] is not None
    assert chosen.readers([dense, kept, packed], "mixtral")["transformers"] is not None
    other = planned("model.layers.1.a.weight", (384, 384), "w4a16_g128_asym")
    assert chosen.readers([dense, other], "llama")["transformers"] is not None
    assert chosen.readers([dense, other], "llama")["vllm"] is None


def test_negative_scales_keep_their_sign_when_they_are_rounded() -> None:
    scale = torch.tensor([[-0.1, 0.1], [-1e-9, 1e9]])
    tensor = QuantizedTensor(
        codes=torch.zeros(2, 64, dtype=torch.uint8),
        scale=PlainScale(tensor=scale),
        zero=None,
        scheme=Scheme.parse("w4a16_g32"),
        dtype=torch.float32,
    )
    rounded, told = round_scale(tensor, torch.float16)
    # The one that becomes zero is lost altogether, and that is said.
    assert (
        told is not None
        and told.startswith("4 of 4 scales")
        and told.endswith("by up to 1 of themselves")
    )
    expected = torch.tensor([[-0.1, 0.1], [-(2.0**-24), torch.finfo(torch.float16).max]]).half()
    assert torch.equal(rounded.scale.values(), expected.float())
    # No runtime wants a scale of zero: codes of zero make up for the smallest there is.
    assert not rounded.dequantize()[1, :32].any() and rounded.dequantize()[0].all()
    exact = dataclasses.replace(tensor, scale=PlainScale(tensor=-torch.ones(2, 2)))
    assert round_scale(exact, torch.float16) == (exact, None)
