"""What README and docs/kernels.md say of the kernels' speed, from the results beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import common

_FOLDER = common.ROOT / "kernels" / "bench" / "results"
# Rows of the table, and what of decode.py's rows each shows in 16, 4 and 8 bits.
_WAYS: dict[str, dict[str, Any]] = {
    "quantkit, `cpu`": {"backend": "auto", "compiled": False},
    "quantkit, `cpu`, compiled": {"backend": "auto", "compiled": True},
    "quantkit, `cpu-int8`": {"backend": "cpu-int8", "compiled": False, "float32": False},
    "quantkit, `cpu-int8`, compiled": {
        "backend": "cpu-int8",
        "compiled": True,
        "float32": False,
    },
    "the same in float32": {"backend": "cpu-int8", "compiled": True, "float32": True},
    "llama.cpp": {"program": "llama.cpp"},
}
_BITS = ((None, "F16"), ("w4a16_g32", "Q4_0"), ("w8a16_row", "Q8_0"))


def decoding(folder: str) -> str:
    """A table of tokens per second beside llama.cpp; `folder` is the results' in a link."""
    path, found = _newest("decode")
    if found is None:
        return ""
    machine = found["machine"]
    lines = [
        f"\nTokens per second of a random Llama of half a billion parameters at batch 1, "
        f"{_threads(machine)} ({machine['level'].upper()}), the output head in 8 bits "
        f"([{path.name}]({folder}/{path.name})):\n",
        "| | 16 bit | 4 bit in groups of 32 | 8 bit |",
        "|---|---|---|---|",
    ]
    for way, wanted in _WAYS.items():
        cells = [_speed(found["rows"], wanted, schemes) for schemes in _BITS]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _speed(rows: list[dict[str, Any]], wanted: dict[str, Any], schemes: tuple[Any, ...]) -> str:
    """The last row that fits: with projections fused, where both were timed."""
    fitting = [
        row["tokens_per_second"]
        for row in rows
        if row["scheme"] in schemes and all(row.get(key) == wanted[key] for key in wanted)
    ]
    return f"{fitting[-1]:.1f}" if fitting else ""


def products(folder: str) -> str:
    """A table of ratios to bfloat16, a column for every number of rows."""
    path, found = _newest("cpu")
    if found is None:
        return ""
    tokens = sorted({row["tokens"] for row in found["rows"]})
    names = list(dict.fromkeys(row["name"] for row in found["rows"]))
    machine = found["machine"]
    lines = [
        f"\nTimes as fast as `linear` in bfloat16 at {' x '.join(map(str, found['shape']))}, "
        f"{_threads(machine)} ({machine['level'].upper()}"
        f"{'' if machine['bfloat16_instructions'] else ', where bfloat16 is a scalar loop'}), "
        f"medians of {found['rounds']} ([{path.name}]({folder}/{path.name})):\n",
        f"| rows | {' | '.join(map(str, tokens))} |",
        "|---" * (len(tokens) + 1) + "|",
    ]
    for name in names:
        ratios = {row["tokens"]: row["times_bf16"] for row in found["rows"] if row["name"] == name}
        if name != "bf16":
            lines.append(f"| {name} | {' | '.join(f'{ratios[count]:.2f}' for count in tokens)} |")
    return "\n".join(lines) + "\n"


# What is shown of a GPU's rows: name -> what a reader calls it; columns are rows of x.
_ON_GPU = {
    "w4a16_g128": "int4, groups of 128",
    "nvfp4a16": "NVFP4",
    "nf4_b64": "NF4, blocks of 64",
    "w8a16_row": "int8",
    "w8a8_row": "W8A8",
    "fp8a8_row": "FP8 with FP8 activations, our kernel alone",
    "torch int4 g128": "torch `_weight_int4pack_mm`",
    "torch _int_mm, x ready": "torch `_int_mm`, x in int8 already, unscaled",
    "torch _scaled_mm, x ready": "torch `_scaled_mm`, x in e4m3 already",
}
_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 2048)


def on_gpu(folder: str) -> str:
    """Of each GPU that was measured: what was checked, and a table of ratios to bfloat16."""
    parts = []
    for path in sorted(_FOLDER.glob("gpu_*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        machine, checked = found["machine"], found["correctness"]
        worst = max(row["norm"] for row in checked)
        parts.append(
            f"\n{machine['device']}, torch {machine['torch']}, Triton {machine['triton']}, "
            f"untuned ([{path.name}]({folder}/{path.name})): "
            f"{sum(row['products'] for row in checked)} products of "
            f"{len({row['scheme'] for row in checked})} schemes are right (norm of the error at "
            f"most {worst:.1e} of the result's, bfloat16 rounds by up to 3.9e-03), the same bits "
            f"twice.  Times as fast as `linear` in bfloat16, medians of 20 replays of a CUDA "
            f"graph, the weights rotated through more than the cache, a copy of memory at "
            f"{found['roofline']['nbytes'] / 1e12:.1f} TB/s:\n"
        )
        for shape in ((14336, 4096), (28672, 8192)):
            parts.append(_ratios(found["speed"], shape))
    for path in sorted(_FOLDER.glob("decode_*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if "decode" in found:
            rates = {row["scheme"]: row["tokens_per_second"] for row in found["decode"]}
            shown = (
                f"{_ON_GPU.get(name, name)} {rate:.0f} ({rate / rates['bf16']:.2f}x)"
                for name, rate in rates.items()
                if name != "bf16"
            )
            parts.append(
                f"\nTokens per second of transformers' `generate` with an 8 B Llama of random "
                f"weights at batch 1, compiled, {found['machine']['device']} "
                f"([{path.name}]({folder}/{path.name})): bfloat16 {rates['bf16']:.0f}, "
                f"{', '.join(shown)}."
            )
    return "\n".join(parts)


def _ratios(rows: list[dict[str, Any]], shape: tuple[int, int]) -> str:
    lines = [
        f"| {shape[0]} x {shape[1]}, rows of x | {' | '.join(map(str, _TOKENS))} |",
        "|---" * (len(_TOKENS) + 1) + "|",
    ]
    for name, shown in _ON_GPU.items():
        ratios = {
            row["tokens"]: f"{row['times_bf16']:.2f}"
            for row in rows
            if row["name"] == name and (row.get("rows"), row.get("columns")) == shape
        }
        if ratios:
            lines.append(f"| {shown} | {' | '.join(ratios.get(n, '') for n in _TOKENS)} |")
    return "\n".join(lines) + "\n"


def rounding(folder: str) -> str:
    """What int8 activations cost, beside bfloat16 and W8A8."""
    path = common.RESULTS / "rounded_input.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))["figures"]
    costs = {(row["method"], row["way"]): row["kl_to_exact"] for row in found["costs"]}
    way = {
        "in a float32 model": "cpu-int8, float32",
        "in a bfloat16 model": "cpu-int8, bfloat16",
        "bfloat16 alone (backend cpu)": "cpu, bfloat16",
    }
    said = [f"{name} {costs['gptq', key]:.1e}" for name, key in way.items()]
    said.append(f"W8A8's one scale per token {costs['int8', 'w8a8, per token, float32']:.1e}")
    said.append(f"with FP8 weights {costs['fp8:fp8a16_row', 'cpu-int8, float32']:.1e}")
    per_token = costs["fp8:fp8a16_row", "fp8a8, per token, float32"]
    said.append(f"e4m3 activations per token {per_token:.1e}")
    return (
        f"\nKL divergence to the same weights with float32 activations ({found['model']}, gptq, "
        f"{found['windows'] * found['seq_len']} unseen tokens): {', '.join(said)} "
        f"([{path.name}]({folder}/{path.name})).\n"
    )


def _newest(kind: str) -> tuple[Path, Any]:
    """The result on the widest instruction set that was measured."""
    for level in ("avx512", "avx2"):
        path = _FOLDER / f"{kind}_{level}.json"
        if path.exists():
            return path, json.loads(path.read_text(encoding="utf-8"))
    return _FOLDER / kind, None


def _threads(machine: dict[str, Any]) -> str:
    count = machine["threads"]
    return f"{count} thread{'' if count == 1 else 's'} of {machine['processor']}"
