"""What tools/matrix.py runs: tiny models with awkward shapes, and the commands that quantize them.

All paths are relative to the folder that the matrix works in, so that none is in its results.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT = "text.txt"
_RECIPE = "mixed.yaml"
_VOCABULARY = 331
_WORDS = ("all", "work", "and", "no", "play", "makes", "a", "dull", "text", "to", "calibrate")
_CALIBRATION = ("--calib", TEXT, "--samples", "8", "--seq-len", "48")
# Parts that no built-in method combines, a rule that keeps, and one with another scheme.
_MIXED = """\
method: mixed
scheme: w4a16_g32_asym
propagate: false
transforms: [awq]
range: mse
rounding: gptq
rules:
  - {match: "*layers.0*o_proj*", keep: true}
  - {match: "*q_proj*", scheme: w8a16_g32}
  - {match: "*k_proj*", scheme: w8a16_g32}
  - {match: "*v_proj*", scheme: w8a16_g32}
"""

_COMMON: Mapping[str, Any] = {
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# No width of the narrow ones is a power of two; the wide ones hold K-quants, which need 256.
_NARROW: Mapping[str, Any] = {
    **_COMMON,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
_WIDE: Mapping[str, Any] = {
    **_COMMON,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
_EXPERTS: Mapping[str, Any] = {"num_experts_per_tok": 2}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A random model; `dtype` names torch's."""

    model_type: str
    dtype: str
    settings: Mapping[str, Any]


MODELS: Mapping[str, Model] = {
    "dense": Model(model_type="llama", dtype="bfloat16", settings=_NARROW),
    "moe": Model(
        model_type="mixtral",
        dtype="bfloat16",
        settings={**_NARROW, **_EXPERTS, "num_local_experts": 4},
    ),
    "wide": Model(
        model_type="qwen3", dtype="float32", settings={**_WIDE, "tie_word_embeddings": True}
    ),
    "widemoe": Model(
        model_type="qwen3_moe",
        dtype="float16",
        settings={
            **_WIDE,
            **_EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 256,
            "norm_topk_prob": True,
        },
    ),
    "conv1d": Model(
        model_type="gpt2",
        dtype="float32",
        settings={
            **_COMMON,
            "n_embd": 96,
            "n_layer": 2,
            "n_head": 3,
            "n_positions": 128,
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command of `quantkit`.

    kill_at   lines of the journal at which a process with this command is killed, one after
              another, before it may finish
    same_as   the case whose files its own must equal
    printed   what it prints is the result, and must be equal too
    package   a package that it needs beyond quantkit's own
    """

    name: str
    arguments: tuple[str, ...]
    kill_at: tuple[int, ...] = ()
    same_as: str | None = None
    printed: bool = False
    package: str | None = None


def out_of(name: str) -> str:
    """Where a case writes."""
    return f"cases/{name}/out"


def cases() -> tuple[Case, ...]:
    """All cases; one that reads another's output comes after it."""
    found = (
        *_quantized(),
        *_with_options(),
        *_gguf(),
        *_exported(),
        *_killed(),
        *_asked(),
    )
    names = [case.name for case in found]
    assert len(set(names)) == len(names), "two cases of one name"
    return found


def write_inputs(folder: Path) -> None:
    """Builds the models, the calibration text and a recipe in `folder`; equal bytes every time."""
    words = random.Random(0)
    text = " ".join(words.choice(_WORDS) for _ in range(1000))
    (folder / TEXT).write_text(text)
    (folder / _RECIPE).write_text(_MIXED)
    for name, model in MODELS.items():
        _build(model, folder / "models" / name)


def _build(model: Model, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model.model_type, **model.settings)
    # What quantkit draws, if it does, must not depend on the models built before.
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        built = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        for parameter in built.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise * 0.2)
                # Outliers: without them no scale of AWQ or SmoothQuant is worth choosing.
                parameter[5::32] *= 6
    built.to(getattr(torch, model.dtype)).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _tokenizer() -> Any:
    """A token a byte, three special ones and two merges: fewer than the vocabulary has rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = ["<pad>", "<s>", "</s>", *symbols, "al", "all"]
    vocabulary = {text: number for number, text in enumerate(texts)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "l"), ("al", "l")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


# Format -> the methods it holds, each with a scheme.
_HELD: Mapping[str, tuple[tuple[str, str], ...]] = {
    "compressed-tensors": (
        ("rtn", "w4a16_g32"),
        ("rtn", "w8a16_g32_asym"),
        ("int8", "w8a16_row"),
        ("int8", "w8a8_row"),
        ("fp8", "fp8a8_row"),
        ("fp8", "fp8a16_row"),
        ("smoothquant", "w8a8_row"),
        ("gptq", "w4a16_g32"),
        ("awq", "w4a16_g32_asym"),
        ("best", "w4a16_g32_asym"),
    ),
    "gptq": (
        ("rtn", "w4a16_g32"),
        ("gptq", "w4a16_g32"),
        ("awq", "w4a16_g32_asym"),
        ("best", "w8a16_row"),
    ),
    "gptq_v2": (
        ("rtn", "w2a16_g32_asym"),
        ("gptq", "w3a16_g32"),
        ("awq", "w4a16_row_asym"),
        ("best", "w4a16_g32_asym"),
    ),
    "awq": (
        ("rtn", "w4a16_g32_asym"),
        ("gptq", "w4a16_g32"),
        ("awq", "w4a16_g32_asym"),
        ("best", "w4a16_g32_asym"),
    ),
    "bitsandbytes": (
        ("nf4", "nf4_b64_dq"),
        ("nf4", "fp4_b64"),
        ("gptq_nf4", "nf4_b64_dq"),
        ("int8", "w8a8_row"),
        ("smoothquant", "w8a8_row"),
    ),
}
_UNCALIBRATED = ("rtn", "int8", "fp8", "nf4")


def _quantize(model: str, name: str, *options: str, method: str | None, **more: Any) -> Case:
    """A run of `quantize`; without a method of its own, calibrated."""
    calibration = () if method in _UNCALIBRATED else _CALIBRATION
    chosen = () if method is None else ("--method", method)
    where = ("quantize", f"models/{model}", "--out", out_of(name))
    return Case(name=name, arguments=(*where, *chosen, *options, *calibration, "--json"), **more)


def _quantized() -> Iterator[Case]:
    for model in ("dense", "moe"):
        # Few runtimes read quantized mixtures.
        extra = ("--allow-unreadable",) if model == "moe" else ()
        for format_name, held in _HELD.items():
            for method, scheme in held:
                options = ("--format", format_name, "--scheme", scheme, *extra)
                name = f"{model}/{format_name}/{method}-{scheme}"
                yield _quantize(model, name, *options, method=method)


def _with_options() -> Iterator[Case]:
    group, asymmetric = ("--scheme", "w4a16_g32"), ("--scheme", "w4a16_g32_asym")
    for model in ("wide", "widemoe"):
        extra = ("--allow-unreadable",) if model == "widemoe" else ()
        yield _quantize(model, f"{model}/defaults/gptq", *extra, method="gptq")
        yield _quantize(model, f"{model}/defaults/awq", *extra, method="awq")
    shards = ("--max-shard-size", "100KB")
    yield _quantize("dense", "dense/options/shards", *group, *shards, method="gptq")
    skip = ("--skip", "*.layers.1.*", "--skip", "*down_proj*")
    yield _quantize("dense", "dense/options/skip", *asymmetric, *skip, method="awq")
    head = ("--lm-head", "w8a16_g32")
    yield _quantize("dense", "dense/options/head", *group, *head, method="gptq")
    yield _quantize("wide", "wide/options/untied-head", *group, *head, method="gptq")
    parts = ("--set", "rounding.damp=0.05", "--set", "rounding.act_order=false", "--seed", "3")
    yield _quantize("dense", "dense/options/set", *group, *parts, method="gptq")
    recipe = ("--recipe", _RECIPE)
    yield _quantize("dense", "dense/options/recipe", *recipe, method=None)
    unreadable = ("--allow-unreadable",)
    yield _quantize("conv1d", "conv1d/options/gptq", *group, *unreadable, method="gptq")
    yield _quantize("conv1d", "conv1d/options/awq", *asymmetric, *unreadable, method="awq")


_GGUF: Mapping[str, tuple[tuple[str, str], ...]] = {
    "dense": (("q4_0", "gptq"), ("q8_0", "rtn"), ("q4_k_m", "gptq")),
    "moe": (("q4_0", "gptq"), ("q5_1", "rtn"), ("q4_1", "gptq"), ("q5_0", "rtn")),
    "wide": (
        ("q2_k", "gptq"),
        ("q3_k_m", "gptq"),
        ("q4_k_m", "gptq"),
        ("q4_k_m", "rtn"),
        ("q5_k_m", "rtn"),
        ("q6_k", "gptq"),
    ),
    "widemoe": (("q4_k_m", "gptq"), ("q6_k", "rtn")),
    "conv1d": (("q8_0", "gptq"),),
}


def _gguf() -> Iterator[Case]:
    for model, schemes in _GGUF.items():
        for scheme, method in schemes:
            name = f"{model}/gguf/{method}-{scheme}"
            yield _quantize(model, name, "--format", "gguf", "--scheme", scheme, method=method)
    options = ("--format", "gguf", "--scheme", "q4_0", "--lm-head", "q8_0", "--skip", "*o_proj*")
    yield _quantize("dense", "dense/gguf/options", *options, method="gptq")


def _killed() -> Iterator[Case]:
    """Kills after the embedding and after blocks; the bytes are those of a run in peace."""
    chosen = {
        "dense/compressed-tensors/gptq-w4a16_g32": (4,),
        "dense/compressed-tensors/gptq-w4a16_g32/to-gptq": (3,),
        "dense/awq/awq-w4a16_g32_asym": (3, 5),
        "dense/gguf/gptq-q4_0": (3,),
        "moe/compressed-tensors/best-w4a16_g32_asym": (4,),
        "moe/bitsandbytes/gptq_nf4-nf4_b64_dq": (3,),
        "moe/gguf/gptq-q4_0": (3,),
    }
    whole = {case.name: case for case in (*_quantized(), *_gguf(), *_exported())}
    for name, kill_at in chosen.items():
        own = f"{name}/killed"
        arguments = tuple(
            out_of(own) if word == out_of(name) else word for word in whole[name].arguments
        )
        yield Case(name=own, arguments=arguments, kill_at=kill_at, same_as=name)


def _export(origin: str, format_name: str, *options: str, **more: Any) -> Case:
    name = f"{origin}/to-{format_name}"
    where = ("export", out_of(origin), "--format", format_name, "--out", out_of(name))
    return Case(name=name, arguments=(*where, *options, "--json"), **more)


def _exported() -> Iterator[Case]:
    symmetric, eight = "compressed-tensors/gptq-w4a16_g32", "compressed-tensors/int8-w8a8_row"
    asymmetric = "compressed-tensors/awq-w4a16_g32_asym"
    for model in ("dense", "moe"):
        unreadable = ("--allow-unreadable",) if model == "moe" else ()
        yield _export(f"{model}/{symmetric}", "gptq", *unreadable)
        yield _export(f"{model}/{asymmetric}", "awq", *unreadable)
        yield _export(f"{model}/awq/best-w4a16_g32_asym", "gptq_v2", *unreadable)
        yield _export(f"{model}/gptq/gptq-w4a16_g32", "compressed-tensors", *unreadable)
        yield _export(f"{model}/{eight}", "bitsandbytes", *unreadable)
        yield _export(f"{model}/{symmetric}", "gguf")
        yield _export(f"{model}/{asymmetric}", "gguf", "--allow-rounding")
        yield _export(f"{model}/{eight}", "gguf")
    for origin in (f"dense/{symmetric}", f"dense/{asymmetric}", f"dense/{eight}"):
        yield _export(origin, "onnx", package="onnxruntime_genai")
    yield _export(f"dense/{symmetric}/to-onnx", "compressed-tensors", package="onnxruntime_genai")
    plain = "dense/plain/to-gguf"
    where = ("export", "models/dense", "--format", "gguf", "--out", out_of(plain), "--json")
    yield Case(name=plain, arguments=where)
    for origin in (f"dense/{symmetric}", "dense/gguf/rtn-q8_0", "moe/bitsandbytes/nf4-nf4_b64_dq"):
        name = f"{origin}/requantized"
        yield Case(
            name=name,
            arguments=(
                *("quantize", out_of(origin), "--out", out_of(name), "--requantize", "--json"),
                *("--method", "rtn", "--scheme", "w8a16_g32", "--allow-unreadable"),
            ),
        )


def _asked() -> Iterator[Case]:
    """Questions about what was written: their answers are told; generated text must be equal."""
    for model in ("dense", "moe"):
        for origin in (
            f"{model}/compressed-tensors/awq-w4a16_g32_asym",
            f"{model}/bitsandbytes/gptq_nf4-nf4_b64_dq",
            f"{model}/gguf/gptq-q4_0",
        ):
            path = out_of(origin)
            yield Case(name=f"{origin}/inspect", arguments=("inspect", path, "--json"))
            against = ("verify", path, "--against", f"models/{model}", "--json")
            yield Case(name=f"{origin}/verify", arguments=against)
            # A GGUF file has no tokenizer that could be loaded.
            if "/gguf/" not in origin:
                yield _generated(origin)
        plan = ("plan", f"models/{model}", "--method", "best", "--scheme", "w4a16_g32_asym")
        yield Case(name=f"{model}/plan", arguments=(*plan, *_CALIBRATION, "--json"))
    yield _generated("dense/gptq_v2/gptq-w3a16_g32")
    yield _generated("dense/compressed-tensors/smoothquant-w8a8_row")
    yield _generated("dense/compressed-tensors/fp8-fp8a8_row")


def _generated(origin: str) -> Case:
    words = ("--prompt", "all work and no play", "--max-new-tokens", "16", "--dtype", "float32")
    arguments = ("generate", out_of(origin), *words, "--backend", "reference")
    return Case(name=f"{origin}/generate", arguments=arguments, printed=True)
