"""Kernels compiled ahead of time, without a GPU, and what the compiler made of them.

`python -m quantkit_kernels.aot [--arch 90]... [--markdown]` compiles every build of `builds` for
every architecture and prints one JSON object a line, or the table of docs/kernels.md.  Needs only
the tools that come with Triton; kernels must not be interpreted (TRITON_INTERPRET unset).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quantkit_kernels.gpu import (
    experts as experts_triton,
)
from quantkit_kernels.gpu import (
    fp8 as fp8_triton,
)
from quantkit_kernels.gpu import (
    fused as fused_triton,
)
from quantkit_kernels.gpu import (
    reduce as reduce_triton,
)
from quantkit_kernels.gpu import (
    w8a8 as w8a8_triton,
)

ARCHITECTURES = (80, 89, 90, 100)
# Shared memory one program may use, in bytes: CUDA C++ programming guide, technical specifications.
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_SIXTEEN = [["tt.divisibility", 16]]
# Integers that are multiples of 16 when kernels run.
_ALIGNED = ("N_PAD", "K", "K_PAD", "stride_x", "stride_packed", "stride_scale")


@dataclass(frozen=True, kw_only=True)
class Build:
    """One compilation: types of the arguments in order, values of the constants."""

    name: str
    kernel: object
    types: Mapping[str, str]
    constants: Mapping[str, int | bool | str]
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler made of a build.

    `loop` counts the instructions of the longest loop, per thread; `opcodes` those of the kernel.
    """

    name: str
    arch: int
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    loop: int
    opcodes: Mapping[str, int]


def builds(arch: int) -> list[Build]:
    """Every kernel with every tile that the heuristic gives on sm_`arch`, and each decoder."""
    found = []
    few = 8 if arch >= 100 else 4
    for tokens, warps in ((16, few), (32, 8), (64, 8)):
        found.append(_fused("int4", 128, "bf16", tokens=tokens, warps=warps))
    found.append(_fused("int4", 128, "fp16", warps=few))
    found.append(_fused("int4", 128, "bf16", warps=few, zero=True))
    found.append(_fused("int4", 128, "fp16", warps=few, zero=True))
    found.append(_fused("int4", 64, "bf16", warps=few))
    found.append(_fused("int4", 32, "bf16", warps=few, zero=True))
    found.append(_fused("int4", 0, "bf16", warps=few))
    found.append(_fused("int8", 0, "bf16", warps=4))
    found.append(_fused("int8", 0, "bf16", tokens=64, warps=8))
    found.append(_fused("int8", 128, "fp16", warps=4))
    found.append(_fused("nf4", 64, "bf16", warps=few))
    found.append(_fused("nf4", 64, "bf16", warps=few, nested=True))
    found.append(_fused("nf4", 64, "bf16", tokens=64, warps=8))
    found.append(_fused("fp8", 0, "bf16", warps=4))
    found.append(_fused("fp8", 0, "bf16", tokens=64, warps=8))
    found.append(_fused("fp8", 128, "fp16", warps=4))
    for tokens, warps in ((16, few), (64, 8)):
        found.append(_experts(128, "bf16", tokens=tokens, warps=warps))
    found.append(_experts(32, "bf16", warps=few, zero=True))
    found += [_decoder("int4", 128), _decoder("int8", 0), _decoder("nf4", 64), _decoder("fp8", 0)]
    for tokens, warps in ((16, few), (64, 8), (128, 8)):
        if tokens < 128 or arch == 90:
            found.append(_eight("w8a8", "*i8", tokens, warps))
            # Products of 8-bit floats came with sm_89.
            if arch >= 89:
                found.append(_eight("fp8a8", "*fp8e4nv", tokens, warps))
    found.append(_quantizer("tokens", w8a8_triton.quantize_kernel, "codes", "*i8"))
    if arch >= 89:
        kernel = fp8_triton.quantize_kernel
        found.append(_quantizer("tokens to e4m3", kernel, "numbers", "*fp8e4nv"))
    found.append(_reducer())
    return found


def compile_build(build: Build, arch: int) -> Compiled:
    """The statistics of one build for sm_`arch`; raises what Triton or ptxas raise."""
    names = build.kernel.arg_names  # type: ignore[attr-defined]
    signature = {
        name: "constexpr" if name in build.constants else build.types[name] for name in names
    }
    aligned = {
        (place,): _SIXTEEN
        for place, name in enumerate(names)
        if signature[name].startswith("*") or name in _ALIGNED
    }
    source = ASTSource(
        fn=build.kernel, signature=signature, constexprs=dict(build.constants), attrs=aligned
    )
    made = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": build.warps,
            "num_stages": build.stages,
            "enable_fp_fusion": True,
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        listing = _tool("nvdisasm", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    instructions, loop = _instructions(listing)
    return Compiled(
        name=build.name,
        arch=arch,
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        local_bytes=int(found[3]),
        shared_bytes=int(made.metadata.shared),
        loop=loop,
        opcodes=dict(Counter(instructions)),
    )


def markdown(rows: Sequence[Compiled]) -> str:
    """The table of docs/kernels.md."""
    lines = [
        "| kernel | sm | registers | shared KiB | loop instructions | matrix instructions |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        matrix = ", ".join(
            f"{count} {name}" for name, count in sorted(row.opcodes.items()) if "MMA" in name
        )
        lines.append(
            f"| {row.name} | {row.arch} | {row.registers} | {row.shared_bytes / 1024:.1f} | "
            f"{row.loop or '-'} | {matrix or '-'} |"
        )
    return "\n".join(lines)


def _fused(
    kind: str,
    group: int,
    dtype: str,
    *,
    warps: int,
    tokens: int = 16,
    zero: bool = False,
    nested: bool = False,
) -> Build:
    scale = "*u8" if nested else "*fp32" if kind == "nf4" else "*bf16"
    label = f"{kind} {'row' if group == 0 else f'g{group}'}{' asym' if zero else ''}"
    label += " double" if nested else ""
    return Build(
        name=f"{label} {dtype}, 128x{tokens}, {warps} warps",
        kernel=fused_triton.fused_kernel,
        types={
            "x": f"*{dtype}",
            "packed": "*i32",
            "scale": scale,
            "zero": "*u8",
            "table": "*fp32",
            "absmax": "*fp32",
            "offset": "*fp32",
            "bias": f"*{dtype}",
            "out": "*fp32",
            "M": "i32",
            "N": "i32",
            "N_PAD": "i32",
            "K": "i32",
            "stride_x": "i32",
        },
        constants={
            "KIND": kind,
            "GROUP": group,
            "HAS_ZERO": zero,
            "NESTED": nested,
            "HAS_BIAS": False,
            "EVEN_K": True,
            "SPLIT": 4,
            "BN": 128,
            "BM": tokens,
            "STAGES": 3,
            "ASM": True,
        },
        warps=warps,
        stages=3,
    )


def _experts(group: int, dtype: str, *, warps: int, tokens: int = 16, zero: bool = False) -> Build:
    names = ("S", "N", "N_PAD", "K", "E", "stride_x", "stride_packed", "stride_scale")
    return Build(
        name=f"experts int4 g{group}{' asym' if zero else ''} {dtype}, 128x{tokens}, {warps} warps",
        kernel=experts_triton.experts_kernel,
        types={
            "x": f"*{dtype}",
            "source": "*i64",
            "offsets": "*i32",
            "packed": "*i32",
            "scale": "*bf16",
            "zero": "*u8",
            "out": "*fp32",
            **dict.fromkeys(names, "i32"),
        },
        constants={
            "GROUP": group,
            "HAS_ZERO": zero,
            "EVEN_K": True,
            "SPLIT": 4,
            "E_PAD": 128,
            "BN": 128,
            "BM": tokens,
            "STAGES": 3,
            "ASM": True,
        },
        warps=warps,
        stages=3,
    )


def _decoder(kind: str, group: int) -> Build:
    return Build(
        name=f"decode {kind}, 64 rows, 4 warps",
        kernel=fused_triton.decode_kernel,
        types={
            "packed": "*i32",
            "scale": "*fp32" if kind == "nf4" else "*bf16",
            "zero": "*u8",
            "table": "*fp32",
            "absmax": "*fp32",
            "offset": "*fp32",
            "out": "*bf16",
            "N": "i32",
            "N_PAD": "i32",
            "K": "i32",
        },
        constants={
            "KIND": kind,
            "GROUP": group,
            "HAS_ZERO": False,
            "NESTED": False,
            "BN": 64,
            "ASM": True,
        },
        warps=4,
        stages=3,
    )


def _eight(op: str, numbers: str, tokens: int, warps: int) -> Build:
    return Build(
        name=f"{op}, 128x{tokens}, {warps} warps",
        kernel=w8a8_triton.product_kernel,
        types={
            "codes": numbers,
            "weight": numbers,
            "x_scale": "*fp32",
            "scale": "*fp32",
            "bias": "*bf16",
            "out": "*bf16",
            "M": "i32",
            "N": "i32",
            "K_PAD": "i32",
        },
        constants={
            "HAS_BIAS": True,
            "EVEN_K": True,
            "SPLIT": 1,
            "BN": 128,
            "BM": tokens,
            "BK": 128,
            "STAGES": 3,
        },
        warps=warps,
        stages=3,
    )


def _quantizer(name: str, kernel: object, output: str, numbers: str) -> Build:
    types = {"x": "*bf16", output: numbers, "scale": "*fp32"}
    types |= dict.fromkeys(("K", "K_PAD", "stride_x"), "i32")
    return Build(
        name=f"quantize {name}, 8 warps",
        kernel=kernel,
        types=types,
        constants={"BLOCK": 4096},
        warps=8,
        stages=3,
    )


def _reducer() -> Build:
    return Build(
        name="sum of 8 splits, 4 warps",
        kernel=reduce_triton.reduce_kernel,
        types={"partial": "*fp32", "bias": "*bf16", "out": "*bf16", "M": "i32", "N": "i32"},
        constants={"SPLIT": 8, "HAS_BIAS": True, "BLOCK": 512},
        warps=4,
        stages=3,
    )


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def _instructions(listing: str) -> tuple[list[str], int]:
    """Opcodes of a disassembly, and how many the longest backward branch spans."""
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    loop = 0
    for line in listing.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
            continue
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\S+?)[\s;](.*)", line)
        if found is None:
            continue
        opcodes.append(found[1])
        target = re.search(r"\.(L_x_\d+)\)", found[2])
        if found[1].startswith("BRA") and target and target[1] in labels:
            span = len(opcodes) - labels[target[1]]
            # A program ends in a branch to itself.
            loop = max(loop, span if span > 1 else 0)
    return opcodes, loop


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(prog="quantkit_kernels.aot", description=__doc__)
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--part", default="1/1", help="i/n: every n-th build from the i-th on")
    parser.add_argument("--sample", action="store_true", help="all on sm_90, elsewhere a fourth")
    chosen = parser.parse_args(arguments)
    place, count = (int(number) for number in chosen.part.split("/"))
    jobs = [
        (arch, build)
        for arch in chosen.arch or ARCHITECTURES
        for number, build in enumerate(builds(arch))
        if not chosen.sample or arch == 90 or number % 4 == ARCHITECTURES.index(arch)
    ]
    rows = []
    for arch, build in jobs[place - 1 :: count]:
        rows.append(compile_build(build, arch))
        if not chosen.markdown:
            print(json.dumps(asdict(rows[-1])), flush=True)
    if chosen.markdown:
        print(markdown(rows))


if __name__ == "__main__":
    main()
