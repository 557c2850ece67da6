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
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quantkit_kernels.gpu import (
    channels as channels_triton,
)
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
    moments as moments_triton,
)
from quantkit_kernels.gpu import (
    reduce as reduce_triton,
)
from quantkit_kernels.gpu import (
    w8a8 as w8a8_triton,
)

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Shared memory one program may use, in bytes: CUDA C++ programming guide, technical specifications.
SHARED_LIMIT = {
    **{80: 163 << 10, 86: 99 << 10, 89: 99 << 10},
    **{90: 227 << 10, 100: 227 << 10, 120: 99 << 10},
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_SIXTEEN = [["tt.divisibility", 16]]
# Kernels whose longest loop goes over the columns, and how often it may wait for its products.
_OVER_COLUMNS = ("int4", "int8", "fp8", "nf4", "e2m1", "w8a8", "experts")
_WAITS = 2
# What still stalls: Triton 3.7 loads operands of tcgen05's 8-bit products to registers, there some
# scales of groups of 16 too, and on sm_120 zeros of groups of 32 by the byte; Triton 3.6 multiplies
# scaled weights step by step.
_KNOWN = {
    ("e2m1 g16 bf16, 128x16, 8 warps", 100),
    ("e2m1 g16 bf16, 128x64, 8 warps", 100),
    ("e2m1 g16 fp16, 128x16, 8 warps", 100),
    ("fp8a8, 128x16, 8 warps", 100),
    ("fp8a8, 128x64, 8 warps", 100),
    ("int4 g32 asym bf16, 128x16, 8 warps", 120),
    ("experts int4 g32 asym bf16, 128x16, 8 warps", 120),
}
# Integers that are multiples of 16 when kernels run.
_ALIGNED = ("N_PAD", "K", "C", "K_PAD", "stride_x", "stride_packed", "stride_scale")


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
    """What the compiler made of a build; `stalls` is what it should not have.

    `loop` counts the instructions of the longest loop, per thread; `opcodes` those of the kernel,
    `loop_opcodes` those of that loop.
    """

    name: str
    arch: int
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    loop: int
    opcodes: Mapping[str, int]
    loop_opcodes: Mapping[str, int]

    def stalls(self) -> list[str]:
        """What makes the loop over the columns wait, though it could be scheduled otherwise."""
        found: list[str] = []
        older = triton.__version__.startswith("3.6.") and " g32 " in self.name
        known = (self.name, self.arch) in _KNOWN or (older and self.arch == 90)
        if known or not self.name.startswith(_OVER_COLUMNS):
            return found
        # A load to a register is waited for where it is used; cp.async (LDGSTS) is not.
        loads = _counted(self.loop_opcodes, "LDG.")
        if loads:
            found.append(f"{loads} loads that no pipeline holds")
        # One for the products of the block before and one for a copy: more, and wgmma is serial.
        waits = _counted(self.loop_opcodes, "WARPGROUP.DEPBAR")
        if waits > _WAITS:
            found.append(f"{waits} waits for matrix products; at most {_WAITS}")
        return found


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
    found.append(_fused("nf4", 64, "bf16", tokens=64, warps=8))
    found.append(_fused("fp8", 0, "bf16", warps=4))
    found.append(_fused("fp8", 0, "bf16", tokens=64, warps=8))
    found.append(_fused("fp8", 128, "fp16", warps=4))
    found.append(_fused("e2m1", 32, "bf16", warps=few))
    found.append(_fused("e2m1", 16, "bf16", warps=few, outer=True))
    found.append(_fused("e2m1", 16, "bf16", tokens=64, warps=8, outer=True))
    found.append(_fused("e2m1", 16, "fp16", warps=few, outer=True))
    for tokens, warps in ((16, few), (64, 8)):
        found.append(_experts(128, "bf16", tokens=tokens, warps=warps))
    found.append(_experts(32, "bf16", warps=few, zero=True))
    found += [_decoder("int4", 128), _decoder("int8", 0), _decoder("nf4", 64), _decoder("fp8", 0)]
    found.append(_decoder("e2m1", 16, outer=True))
    for tokens, warps in ((16, few), (64, 8), (128, 8)):
        if tokens < 128 or arch == 90:
            found.append(_eight("w8a8", "*i8", tokens, warps))
            # Products of 8-bit floats came with sm_89.
            if arch >= 89:
                found.append(_eight("fp8a8", "*fp8e4nv", tokens, 8))
    found.append(_quantizer("tokens", w8a8_triton.quantize_kernel, "codes", "*i8"))
    if arch >= 89:
        kernel = fp8_triton.quantize_kernel
        found.append(_quantizer("tokens to e4m3", kernel, "numbers", "*fp8e4nv"))
    found.append(_reducer())
    found += [_moments("bf16"), _moments("fp32"), _total()]
    found += [_channels(kind) for kind in ("int", "int asym", "block", "table", "e2m1", "e4m3")]
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
        loop=len(loop),
        opcodes=dict(Counter(instructions)),
        loop_opcodes=dict(Counter(loop)),
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
    outer: bool = False,
) -> Build:
    wide = group >= 64
    label = f"{kind} {'row' if group == 0 else f'g{group}'}{' asym' if zero else ''}"
    return Build(
        name=f"{label} {dtype}, 128x{tokens}, {warps} warps",
        kernel=fused_triton.fused_kernel,
        types={
            "x": f"*{dtype}",
            "packed": "*i32",
            "scale": "*fp32" if wide else "*bf16",
            "zero": "*i32" if wide else "*u8",
            "outer": "*fp32",
            "bias": f"*{dtype}",
            "out": "*fp32",
            "M": "i32",
            "SHARE": "i32",
            "N": "i32",
            "N_PAD": "i32",
            "K": "i32",
            "stride_x": "i32",
        },
        constants={
            "KIND": kind,
            "GROUP": group,
            "HAS_ZERO": zero,
            "HAS_OUTER": outer,
            "HAS_BIAS": False,
            "EVEN_K": True,
            "BN": 128,
            "BM": tokens,
            "STAGES": 3,
            "ASM": True,
        },
        warps=warps,
        stages=3,
    )


def _experts(group: int, dtype: str, *, warps: int, tokens: int = 16, zero: bool = False) -> Build:
    names = ("S", "SHARE", "N", "N_PAD", "K", "E", "stride_x", "stride_packed", "stride_scale")
    return Build(
        name=f"experts int4 g{group}{' asym' if zero else ''} {dtype}, 128x{tokens}, {warps} warps",
        kernel=experts_triton.experts_kernel,
        types={
            "x": f"*{dtype}",
            "source": "*i64",
            "offsets": "*i32",
            "packed": "*i32",
            "scale": "*fp32" if group >= 64 else "*bf16",
            "zero": "*i32" if group >= 64 else "*u8",
            "out": "*fp32",
            **dict.fromkeys(names, "i32"),
        },
        constants={
            "GROUP": group,
            "HAS_ZERO": zero,
            "EVEN_K": True,
            "E_PAD": 128,
            "BN": 128,
            "BM": tokens,
            "STAGES": 3,
            "ASM": True,
        },
        warps=warps,
        stages=3,
    )


def _decoder(kind: str, group: int, *, outer: bool = False) -> Build:
    return Build(
        name=f"decode {kind}, 64 rows, 4 warps",
        kernel=fused_triton.decode_kernel,
        types={
            "packed": "*i32",
            "scale": "*bf16" if group < 64 else "*fp32",
            "zero": "*i32",
            "outer": "*fp32",
            "out": "*bf16",
            "N": "i32",
            "N_PAD": "i32",
            "K": "i32",
        },
        constants={
            "KIND": kind,
            "GROUP": group,
            "HAS_ZERO": False,
            "HAS_OUTER": outer,
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
            "SHARE": "i32",
            "N": "i32",
            "K_PAD": "i32",
        },
        constants={
            "HAS_BIAS": True,
            "EVEN_K": True,
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


def _channels(kind: str) -> Build:
    numbers = ("targets", "weights", "errors", "factors", "scales", "zeros", "values", "midpoints")
    return Build(
        name=f"channels in turn, {kind}, 2 warps",
        kernel=channels_triton.channels_kernel,
        types={
            **dict.fromkeys(numbers, "*fp32"),
            "group_of": "*i32",
            **dict.fromkeys(("R", "COUNT", "stride_r", "stride_f"), "i32"),
            **dict.fromkeys(("low", "high", "center"), "fp32"),
        },
        constants={
            "KIND": kind.split()[0],
            "HAS_ZERO": kind in ("int asym", "block"),
            "DOWN": True,
            "BB": channels_triton.MOST,
            "BR": 16,
        },
        warps=2,
        stages=3,
    )


def _moments(dtype: str) -> Build:
    return Build(
        name=f"moments of {dtype}, 4 warps",
        kernel=moments_triton.moments_kernel,
        types={
            "x": f"*{dtype}",
            **{"sums": "*fp64", "squares": "*fp64", "largest": "*fp32"},
            **dict.fromkeys(("T", "C", "stride_x"), "i32"),
        },
        constants={"PART": moments_triton.PART, "BT": 16, "BC": 128},
        warps=4,
        stages=3,
    )


def _total() -> Build:
    return Build(
        name="sum of moments, 4 warps",
        kernel=moments_triton.total_kernel,
        types={"parts": "*fp64", "out": "*fp64", "P": "i32", "C": "i32"},
        constants={"BC": 128},
        warps=4,
        stages=3,
    )


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def _counted(opcodes: Mapping[str, int], start: str) -> int:
    return sum(count for name, count in opcodes.items() if name.startswith(start))


def _instructions(listing: str) -> tuple[list[str], list[str]]:
    """Opcodes of a disassembly, and those that the longest backward branch spans."""
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    loop: list[str] = []
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
            span = opcodes[labels[target[1]] :]
            # A program ends in a branch to itself.
            if len(span) > max(1, len(loop)):
                loop = span
    return opcodes, loop


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles and prints; exits 1 if a loop stalls."""
    parser = argparse.ArgumentParser(prog="quantkit_kernels.aot", description=__doc__)
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--part", default="1/1", help="i/n: every n-th build from the i-th on")
    parser.add_argument("--sample", action="store_true", help="all on sm_90, elsewhere a sixth")
    chosen = parser.parse_args(arguments)
    place, count = (int(number) for number in chosen.part.split("/"))
    jobs = [
        (arch, build)
        for arch in chosen.arch or ARCHITECTURES
        for number, build in enumerate(builds(arch))
        if not chosen.sample or arch == 90 or number % 6 == ARCHITECTURES.index(arch)
    ]
    rows = []
    for arch, build in jobs[place - 1 :: count]:
        rows.append(compile_build(build, arch))
        if not chosen.markdown:
            print(json.dumps(asdict(rows[-1])), flush=True)
    if chosen.markdown:
        print(markdown(rows))
    stalls = [f"{row.name}, sm_{row.arch}: {reason}" for row in rows for reason in row.stalls()]
    if stalls:
        sys.exit("\n".join(stalls))


if __name__ == "__main__":
    main()
