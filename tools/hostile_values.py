"""What hostile files and command lines are made of: values that nobody expects, and damage."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import yaml

_LONG = "x" * 5000
_DEEP = "[" * 5000
TEXTS = (
    "", " ", "x", "é漢🙂", "\ud800", "a\ud800b", "\u202ex", "../../x", "/dev/zero", "~nobody/x",
    _LONG, "float16", "nn", "float32", "auto", "sdpa", "None", "nan", "1e400", "0x10", "{}",
    "%s", "\n", "\x1b[31m", "gpt2", "mixtral", "gemma3", "gemma3_text", "qwen2", "qwen3_moe",
    "mamba", "t5", "opt", "bloom", "gpt_neox", "phi3", "whisper", "clip", "llava", "deepseek_v3",
    "auto", "silu", "w4a16_g32", "rtn",
)  # fmt: skip
NUMBERS = (
    -1, 0, 1, 2, 3, 7, 16, 63, 64, 65, 320, 4096, 10**6, 10**9, 2**31, 2**32, 2**63, 2**64,
    10**30, -(2**63), 10**400, 0.5, -0.0, 1e-300, 1e300, 3.5,
)  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None, True, False, [], {}, [[]], [1, 2], ["x"], {"x": 1}, {"x": {"x": []}}, [None],
)  # fmt: skip
# Of config.json.
FIELDS = (
    "model_type", "architectures", "auto_map", "dtype", "torch_dtype", "text_config",
    "vision_config", "quantization_config", "compression_config", "num_hidden_layers", "n_layer",
    "num_labels", "id2label", "label2id", "output_hidden_states", "output_attentions",
    "return_dict", "is_encoder_decoder", "use_cache", "sliding_window", "layer_types",
    "max_window_layers", "use_sliding_window", "rope_scaling", "rope_theta", "rope_parameters",
    "partial_rotary_factor", "max_position_embeddings", "vocab_size", "hidden_size", "head_dim",
    "num_attention_heads", "num_key_value_heads", "intermediate_size", "hidden_act",
    "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias", "pad_token_id",
    "bos_token_id", "eos_token_id", "attn_implementation", "_attn_implementation",
    "experts_implementation", "per_layer_config", "chunk_size_feed_forward",
    "transformers_version", "_name_or_path", "problem_type", "pretraining_tp",
    "num_local_experts", "num_experts_per_tok", "is_decoder", "add_cross_attention",
    "cross_attention_hidden_size", "initializer_range", "attention_dropout",
    "base_model_tp_plan", "name_or_path", "gradient_checkpointing", "sub_configs",
    "generation_config", "keys_to_ignore_at_inference", "attribute_map", "torchscript",
)  # fmt: skip
# Relative ones are made by `fuzz_config.Stage`.
PLACES = (
    "", ".", "..", "/", "./", "/dev/null", "/dev/zero", "/proc/self/mem", "/proc/self/fd",
    "~nobody/x", "~", _LONG, "y" * 300, "circle", "pipe", "zeros", "note.txt", "note.txt/x",
    "nowhere", "a[1]*.jsonl", "*", "é漢🙂/x/y", "no/such/place", "file:///x/y", "http://x/y/z",
    "s3://x/y", "a::b/c/d", "-", "#", "x#y/z/w", "report.json", "big.json", "locked",
)  # fmt: skip
# Kind of option -> values.
VALUES_OF: dict[str, tuple[str, ...]] = {
    "number": (
        "-1", "0", "1", "2", "7", "1e3", "x", "", "0x10", str(2**31), str(2**63), str(2**64),
        "1" * 400,
    ),
    "size": (
        "", "0", "-1", "1", "1B", "9" * 400, "9" * 15 + "TiB", "lots", "1e3", "nan", "inf",
        "6GiB", "٣GiB",
    ),
    "device": (
        "cpu", "auto", "cuda", "cuda:0", "cpu:0", "cpu:foo", "tpu", "", "meta",
        "cuda:" + "9" * 50, _LONG,
    ),
    "scheme": (
        "w4a16_g32", "w4a16_row", "w8a8_row", "w4a16_g1", "w4a16_g0", "w4a16_g" + "9" * 400,
        "w9a16", "nf4_b64", "nf4_b" + "9" * 30, "fp8a8_row", "q4_k_m", "mxfp4_g32", "", "x",
        _LONG,
    ),
    "format": (
        "compressed-tensors", "gptq", "gptq_v2", "awq", "bitsandbytes", "gguf", "onnx", ":x",
        ".x:Y", "x:", "os.path:join", "os:path", "json:JSONDecoder", "builtins:int", "no_such:X",
        "a b:c", "", ":", "::", _LONG,
    ),
    "method": (
        "rtn", "gptq", "awq", "int8", "smoothquant", "nf4", "best", "magic", "", "../rtn", _LONG,
    ),
    "set": (
        "a", "=", "a=", "=1", "a=2001-99-99", "a=!!int x", "a=" + _DEEP, "range.name=:x",
        "rounding.damp=.nan", "rounding.damp=1e400", "range=" + "9" * 5000, "transforms.x.y=1",
        "rules=[{match: '*', keep: true}]", "rules=[&a x, *a]",
        "calibration.samples=" + "9" * 30, "scheme=[]", "head={a: 1}", "method=3",
        "rounding.name=gptq", "rounding.name=os.path:join", "range.name=[1]", "propagate=maybe",
        "a..b=1", "\ud800=1", "transforms=[{name: awq, grid: 0}]", "transforms=[awq, awq, awq]",
        "range.steps=0", "range.steps=-5", "summary=" + _LONG, "rounding={name: gptq, block: 0}",
    ),
    "glob": (
        "*", "", "[", "[!", "x", "*.q_proj*", "*down_proj*", "?" * 300, "[a-", "\ud800", _LONG,
        "**",
    ),
    "text": TEXTS,
    "place": PLACES,
}  # fmt: skip
KIND_OF = {
    "--method": "method", "--scheme": "scheme", "--format": "format", "--calib": "place",
    "--samples": "number", "--seq-len": "number", "--seed": "number", "--recipe": "place",
    "--set": "set", "--skip": "glob", "--lm-head": "scheme", "--max-ram": "size",
    "--max-vram": "size", "--device": "device", "--max-shard-size": "size", "--revision": "text",
    "--out": "place", "--prompt": "text", "--max-new-tokens": "number", "--backend": "text",
    "--dtype": "text", "--against": "place", "--runtime": "text", "--runtime-python": "place",
    "--text": "place", "--tasks": "place", "--fail-if": "text", "--questions": "number",
    "--windows": "number", "--stride": "number", "--protocol": "text", "--prompts": "number",
    "--methods": "text", "--bits": "text",
    "--batches": "number", "--prompt-tokens": "number", "--new-tokens": "number",
    "--repeats": "number",
}  # fmt: skip
_PLANNED = (
    "--method", "--scheme", "--format", "--calib", "--samples", "--seq-len", "--seed",
    "--recipe", "--set", "--skip", "--lm-head", "--max-ram", "--max-vram", "--device",
    "--max-shard-size", "--out",
)  # fmt: skip
OPTIONS_OF: dict[str, tuple[str, ...]] = {
    "quantize": _PLANNED,
    "plan": _PLANNED,
    "inspect": (),
    "verify": (
        "--against", "--runtime-python",
    ),
    "bench": ("--batches", "--prompt-tokens", "--new-tokens", "--repeats", "--device", "--backend"),
    "compare": (
        "--methods", "--bits", "--calib", "--text", "--tasks", "--samples", "--seq-len",
        "--windows", "--fail-if", "--prompts", "--max-ram", "--device", "--seed", "--out",
    ),
    "generate": (
        "--prompt", "--max-new-tokens", "--backend", "--dtype", "--device",
    ),
    "export": (
        "--format", "--out", "--max-shard-size",
    ),
    "eval": (
        "--out", "--text", "--tasks", "--questions", "--seq-len", "--windows", "--stride",
        "--protocol", "--prompts", "--fail-if", "--max-ram", "--device", "--backend", "--seed",
    ),
}  # fmt: skip


def damaged_json(content: bytes, rng: random.Random, fields: tuple[str, ...]) -> bytes:
    """Fields changed, added, dropped; or bytes flipped, cut, put in."""
    if rng.random() < 0.15:
        return _damaged_bytes(content, rng)
    value = json.loads(content)
    for _ in range(rng.randint(1, 3)):
        damage(value, rng, fields)
    return to_json(value)


def to_json(value: Any) -> bytes:
    # An integer of 400 digits is more than `json` writes by itself in some versions.
    return json.dumps(value).encode()


def _damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(found) or 1)
        action = rng.randrange(6)
        if action == 0 and found:
            found[place] ^= 1 << rng.randrange(8)
        elif action == 1:
            del found[place : place + rng.randrange(1, 20)]
        elif action == 2:
            found[place:place] = rng.randbytes(rng.randrange(1, 20))
        elif action == 3:
            found[place:place] = _DEEP.encode()
        elif action == 4:
            found[place:place] = b"\\ud800"
        else:
            del found[place:]
    return bytes(found)


def damage(value: Any, rng: random.Random, fields: tuple[str, ...]) -> None:
    """Changes one thing somewhere in a tree of dictionaries and lists."""
    if isinstance(value, dict) and fields and rng.random() < 0.4:
        value[rng.choice(fields)] = _any_value(rng)
        return
    keys: list[Any] = sorted(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys:
        if isinstance(value, list):
            value.append(_any_value(rng))
        return
    key = rng.choice(keys)
    inner = value[key]
    if isinstance(inner, (dict, list)) and inner and rng.random() < 0.7:
        damage(inner, rng, ())
    elif rng.random() < 0.2:
        del value[key]
    elif isinstance(value, dict) and rng.random() < 0.1:
        value[rng.choice(TEXTS)] = value.pop(key)
    else:
        value[key] = _any_value(rng)


def _any_value(rng: random.Random) -> Any:
    pool = rng.choice((TEXTS, NUMBERS, OTHERS, NUMBERS))
    value = copy.deepcopy(rng.choice(pool))
    if rng.random() < 0.02:
        for _ in range(rng.choice((10, 60, 200))):
            value = [value] if rng.random() < 0.5 else {"x": value}
    return value


def damaged_recipe(text: str, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        return _damaged_bytes(text.encode(), rng)
    value = yaml.safe_load(text)
    for _ in range(rng.randint(1, 3)):
        damage(
            value,
            rng,
            (
                "scheme",
                "head",
                "target",
                "range",
                "rounding",
                "transforms",
                "rules",
                "calibration",
                "method",
            ),
        )
    try:
        return yaml.safe_dump(value).encode("utf-8", "surrogatepass")
    except (ValueError, UnicodeEncodeError):
        return json.dumps(value).encode()
