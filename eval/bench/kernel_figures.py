"""What README and docs/kernels.md say of speed on CPUs, from the results beside the kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import common

_FOLDER = common.ROOT / "kernels" / "bench" / "results"
# What decode.py ran, as it is called in a sentence, the reference first.
_RUNS: dict[str, dict[str, Any]] = {
    "bfloat16": {"program": "quantkit", "scheme": None},
    "4 bit": {"scheme": "w4a16_g32", "backend": "auto", "fuse": True, "compiled": False},
    "4 bit compiled": {"scheme": "w4a16_g32", "backend": "auto", "compiled": True},
    "8 bit": {"scheme": "w8a16_row", "backend": "auto"},
    "4 bit with int8 activations": {
        "scheme": "w4a16_g32",
        "backend": "cpu-int8",
        "compiled": False,
    },
    "compiled": {"scheme": "w4a16_g32", "backend": "cpu-int8", "compiled": True},
    "8 bit with int8 activations": {
        "scheme": "w8a16_row",
        "backend": "cpu-int8",
        "compiled": False,
    },
    "8 bit so compiled": {"scheme": "w8a16_row", "backend": "cpu-int8", "compiled": True},
    "llama.cpp Q4_0": {"program": "llama.cpp", "scheme": "Q4_0"},
    "llama.cpp Q8_0": {"program": "llama.cpp", "scheme": "Q8_0"},
    "llama.cpp F16": {"program": "llama.cpp", "scheme": "F16"},
}


def decoding(folder: str) -> str:
    """Tokens per second beside llama.cpp; `folder` is how a link from the text reaches kernels/."""
    path, found = _newest("decode")
    if found is None:
        return ""
    speeds = []
    for name, wanted in _RUNS.items():
        for row in found["rows"]:
            if all(key in row and row[key] == value for key, value in wanted.items()):
                speeds.append(f"{name} {row['tokens_per_second']:.1f}")
    machine = found["machine"]
    return (
        f"\nDecoding with a random Llama of half a billion parameters at batch 1, "
        f"{_threads(machine)} ({machine['level'].upper()}), in tokens per second: "
        f"{', '.join(speeds)} ([{path.name}]({folder}/{path.name})).\n"
    )


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
