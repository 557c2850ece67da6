"""Writes the figures of README and docs from results files: none there is typed by hand.

readme.py            rewrites the text between the marks in README.md and pages of docs/
readme.py --check    exit code 1 if it would change
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import common
import kernel_figures
import scaling_figures

# Labels in accuracy.json that the README shows, in its order, and what they are called there.
_SHOWN = {
    "rtn": "rtn",
    "awq": "awq",
    "gptq": "gptq",
    "best symmetric": "best, symmetric",
    "best": "best",
    "nf4": "nf4",
    "gptq_nf4": "gptq_nf4",
    "int8": "int8",
    "int8 w8a8": "int8, 8-bit activations",
    "smoothquant": "smoothquant",
    "llm-compressor rtn": "llm-compressor RTN, symmetric",
    "llm-compressor awq": "llm-compressor AWQ, asymmetric",
    "llm-compressor gptq": "llm-compressor GPTQ, symmetric",
    "AutoRound 200": "AutoRound, 200 iterations, symmetric",
    "gptq 3 bit": "3 bit: gptq, symmetric",
    "best symmetric 3 bit": "3 bit: best, symmetric",
    "best 3 bit": "3 bit: best",
    "AutoRound 200, 3 bit": "3 bit: AutoRound, 200 iterations, symmetric",
    "best symmetric 2 bit": "2 bit: best, symmetric",
    "best 2 bit": "2 bit: best",
    "AutoRound 200, 2 bit": "2 bit: AutoRound, 200 iterations, symmetric",
}


def main() -> None:
    decoding = kernel_figures.decoding("kernels/bench/results").rstrip()
    parts = (
        _accuracy(),
        _speed(),
        _startup(),
        _on_gpu(),
        decoding,
        _memory(),
        _eval_memory(),
        _durability(),
        _outliers(),
    )
    changed = [_rewrite("README.md", "results", "## Measured\n" + "\n".join(filter(None, parts)))]
    for name, text in (
        ("cpu", kernel_figures.products("../kernels/bench/results")),
        ("gpu", kernel_figures.on_gpu("../kernels/bench/results")),
        ("decode", kernel_figures.decoding("../kernels/bench/results")),
        ("rounding", kernel_figures.rounding("../eval/results")),
    ):
        changed.append(_rewrite("docs/kernels.md", name, text.strip()))
    caches = "\n".join(_cache(name) for name in ("cache", "cache_smollm2")).strip()
    changed.append(_rewrite("docs/cache.md", "cache", caches))
    changed.append(_rewrite("docs/formats.md", "formats", _formats()))
    if (figures := _figures("scaling")) is not None:
        for name, write in (
            ("measured", scaling_figures.measured),
            ("paper", scaling_figures.paper),
        ):
            changed.append(_rewrite("docs/scaling.md", name, write(figures)))
    if "--check" in sys.argv[1:]:
        sys.exit(int(any(changed)))


def _rewrite(name: str, mark: str, text: str) -> bool:
    """Puts the text between two marks of a file unless only checking; whether that changes it."""
    path = common.ROOT / name
    old = path.read_text(encoding="utf-8")
    marks = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    new, count = marks.subn(lambda found: f"{found[1]}{text}\n{found[2]}", old)
    if count != 1:
        raise ValueError(f"{name}: {count} pairs of marks <!-- {mark} --> and <!-- /{mark} -->")
    if "--check" not in sys.argv[1:]:
        path.write_text(new, encoding="utf-8")
    return new != old


def _figures(name: str) -> dict[str, Any] | None:
    path = common.RESULTS / f"{name}.json"
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {**result["figures"], "hardware": result["hardware"]}


def _formats() -> str:
    """Every scheme's files beside each other; empty before any was measured."""
    found = _figures("formats")
    if found is None:
        return "Not measured yet: `eval/bench/formats.py`."
    seen, read = found["evaluation"], found["calibration"]
    lines = [
        f"KL divergence to the float32 model ({found['model']}) on {seen['windows']} x "
        f"{seen['seq_len']} unseen tokens, calibrated on {read['samples']} x {read['seq_len']}; "
        "beside a peer's file what quantkit's first one of the scheme has more, paired by window "
        "([formats.json](../eval/results/formats.json)):\n",
        "| scheme | tool | how | bits | KL, 95 % interval | quantkit's less it |",
        "|---|---|---|---|---|---|",
    ]
    for scheme in found["schemes"]:
        for row in scheme["files"]:
            against = row["against"]
            change = ""
            if against is not None:
                change = f"{against[0]:+.5f} [{against[1]:+.5f}, {against[2]:+.5f}]"
            lines.append(
                f"| `{scheme['scheme']}` | {row['tool']} | {row['name']} "
                f"| {row['bits_per_weight']:.2f} | {_kl(row['kl'])} [{_kl(row['low'])}, "
                f"{_kl(row['high'])}] | {change} |"
            )
    return "\n".join(lines)


def _accuracy() -> str:
    found = _figures("accuracy")
    if found is None:
        return ""
    rows = {row["name"]: row for row in found["rows"]}
    lines = [
        f"\nKL divergence to the float32 model ({found['model']}, 8.4 M parameters) on "
        f"{found['evaluation']['tokens']} unseen tokens, calibrated on "
        f"{found['calibration']['samples']} x {found['calibration']['seq_len']} tokens "
        "([accuracy.json](eval/results/accuracy.json)):\n",
        "| | KL, 95 % interval | top token kept | bits per quantized weight | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, shown in _SHOWN.items():
        if name in rows:
            quality, bits = rows[name]["quality"], rows[name]["bits_per_weight"]
            seconds = rows[name]["seconds"]
            lines.append(
                f"| {shown} | {_kl(quality['kl_mean'])} "
                f"[{_kl(quality['kl_low'])}, {_kl(quality['kl_high'])}] "
                f"| {100 * quality['top1_agreement']:.1f} % "
                f"| {'' if bits is None else f'{bits:.3f}'} "
                f"| {'' if seconds is None else f'{seconds:.0f}'} |"
            )
    return "\n".join(lines)


def _cache(name: str) -> str:
    found = _figures(name)
    if found is None:
        return ""
    lines = [
        f"\nKL divergence to the float32 model ({found['model']}, int8 weights) on "
        f"{found['windows']} x {found['seq_len']} unseen tokens "
        f"([{name}.json](../eval/results/{name}.json)):\n",
        "| cache | scales hold | calibrated on | KL, 95 % interval | top token kept |",
        "|---|---|---|---|---|",
    ]
    held = {"twice absmax": "twice the largest (ours)", "absmax": "the largest", "ones": "448"}
    for row in found["rows"]:
        packed = ", packed" if row["cache"] in ("int8", "int4") else ""
        cache = "as computed" if row["cache"] == "none" else f"`{row['cache']}`{packed}"
        lines.append(
            f"| {cache} | {held.get(row['scales'], '')} | {row['calibration']} "
            f"| {_kl(row['kl'])} [{_kl(row['low'])}, {_kl(row['high'])}] "
            f"| {100 * row['top1_agreement']:.1f} % |"
        )
    return "\n".join(lines)


def _kl(value: float) -> str:
    return f"{value:.5f}" if value >= 1e-4 else f"{value:.1e}"


def _speed() -> str:
    found = _figures("speed")
    if found is None:
        return ""
    lines = [
        f"\nSeconds for the whole command, start-up included ({found['model']}, "
        f"{found['samples']} x {found['seq_len']} tokens, {found['threads']} threads, medians of "
        "alternating runs; [speed.json](eval/results/speed.json)):\n",
        "| method | runs | quantkit | llm-compressor | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in found["methods"]:
        ours, theirs = row["quantkit"], row["llmcompressor"]
        if theirs is not None:
            lines.append(
                f"| {row['method']} | {len(ours['seconds'])} | {ours['median_seconds']:.0f} "
                f"| {theirs['median_seconds']:.0f} | {row['ratio']:.2f}x |"
            )
    return "\n".join(lines)


def _startup() -> str:
    """Processor seconds of commands before work begins, beside their goals."""
    found = _figures("startup")
    if found is None:
        return ""
    load = sorted((found["load_before"], found["load_after"]))
    lines = [
        f"\nProcessor seconds before work begins, in one thread (medians of {found['runs']} runs, "
        f"on {found['hardware']['cores']} cores with a load of {load[0]:.0f} to {load[1]:.0f}; "
        f"{found['model']}; [startup.json](eval/results/startup.json)):\n",
        "| | seconds | goal |",
        "|---|---|---|",
    ]
    for row in found["rows"]:
        beyond = "" if row["beyond"] is None else f", beyond `{row['beyond']}`"
        goal = "" if row["goal_seconds"] is None else f"{row['goal_seconds']:g}"
        name = row["name"] if row["name"].startswith(("a ", "an ")) else f"`{row['name']}`"
        lines.append(f"| {name}{beyond} | {row['own_seconds']:.2f} | {goal} |")
    return "\n".join(lines)


def _on_gpu() -> str:
    """Of each GPU: seconds that quantizing a random model took, and what was predicted."""
    parts = []
    for path in sorted(common.RESULTS.glob("gpu_*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        parts += [
            f"\nQuantizing {found['model']['parameters'] / 1e9:.1f} B parameters on one "
            f"{found['hardware']['gpu']} (random weights of Llama's 8 B shapes, "
            f"{found['samples']} x {found['seq_len']} tokens, reading, checking and hashing "
            f"included; [{path.name}](eval/results/{path.name})):\n",
            "| method | seconds | predicted | a block | statistics and forward, of it "
            "| GPU memory |",
            "|---|---|---|---|---|---|",
        ]
        for row in found["speed"]:
            work = sum(row["phases"].get(name, 0.0) for name in ("statistics", "forward"))
            parts.append(
                f"| {row['method'].replace(':', ', ')} | {row['seconds']:.0f} "
                f"| {row['predicted_seconds']:.0f} | {row['seconds_per_block']:.2f} "
                f"| {work / row['blocks']:.2f} | {row['peak_vram_bytes'] / 1e9:.1f} GB |"
            )
    return "\n".join(parts)


def _memory() -> str:
    found = _figures("memory")
    if found is None:
        return ""
    peaks = ", ".join(
        f"{row['method']} {row['peak_bytes'] / 2**30:.2f} GiB" for row in found["methods"]
    )
    return (
        f"\nPeak memory of quantizing a {found['model_bytes'] / 1e9:.1f} GB model under "
        f"`--max-ram {found['max_ram_bytes'] / 2**30:g}GiB`, as the operating system counts it: "
        f"{peaks} ([memory.json](eval/results/memory.json))."
    )


def _eval_memory() -> str:
    found = _figures("eval_memory")
    if found is None:
        return ""
    return (
        f"\nPeak memory of evaluating a {found['original_bytes'] / 1e9:.1f} GB model against its "
        f"4-bit version under `--max-ram {found['max_ram_bytes'] / 2**30:g}GiB`: "
        f"{found['peak_bytes'] / 2**30:.2f} GiB "
        "([eval_memory.json](eval/results/eval_memory.json))."
    )


def _durability() -> str:
    lines = []
    for name in ("durability", "durability_awq"):
        found = _figures(name)
        if found is not None:
            lines.append(
                f"\n`{found['method']}` killed with `kill -9` at {found['kills']} random points, "
                f"{found['interrupted_while_unfinished']} of them with the output unfinished, and "
                f"run again: {found['identical_outputs']} of {found['kills']} outputs equal to an "
                f"uninterrupted run byte for byte, {found['loadable_before_resume']} loadable "
                f"before they were complete ([{name}.json](eval/results/{name}.json))."
            )
    return "\n".join(lines)


def _outliers() -> str:
    found = _figures("outliers")
    if found is None:
        return ""
    return (
        f"\nWith outlier channels planted, SmoothQuant W8A8 has {found['smoothquant_ratio']:.2f}x "
        "the KL divergence that W8A8 has without outliers; per-tensor INT8, the negative control, "
        f"{found['per_tensor_ratio']:.0f}x ([outliers.json](eval/results/outliers.json))."
    )


if __name__ == "__main__":
    main()
