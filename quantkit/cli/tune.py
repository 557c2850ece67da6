"""`quantkit tune`: times the kernels on this GPU for the shapes of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from quantkit_kernels.gpu import measure, tuning
from quantkit_kernels.gpu.tuning import Entry, Problem

from quantkit.errors import BackendError, CheckpointError
from quantkit.formats.format import StoredWeight
from quantkit.formats.open import open_source
from quantkit.formats.registry import format_of


def tune(path: Path, dtype: str, echo: Callable[[str], object]) -> None:
    """Times the kernels for the shapes of a checkpoint and keeps the best in this GPU's table."""
    if dtype not in ("bfloat16", "float16"):
        raise BackendError(f"dtype {dtype!r}: the kernels take bfloat16 or float16")
    if not torch.cuda.is_available():
        raise BackendError("tuning needs a CUDA device; on CPUs there is nothing to tune")
    source = open_source(path)
    if "quantization_config" not in source.config:
        raise CheckpointError(f"{path}: not quantized, so there is nothing to tune")
    weights = format_of(source).weights(source).values()
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor

    def time(problem: Problem) -> Entry:
        entry = measure.best(
            measure.candidate(problem, device),
            properties.multi_processor_count,
            capability,
            measure.graph_microseconds,
        )
        echo(describe(entry))
        return entry

    name = tuning.device_name(device.index)
    written = tune_shapes(wanted(weights, getattr(torch, dtype)), time, tuning.cache_path(name))
    echo(f"{len(written)} measured, kept in {tuning.cache_path(name)}")


def wanted(weights: Iterable[StoredWeight], dtype: torch.dtype) -> list[Problem]:
    """The problems of all different shapes that have a kernel."""
    found: dict[Problem, None] = {}
    for weight in weights:
        scheme = weight.scheme
        op = None
        if scheme.kind == "nf4" and scheme.group_size == 64:
            op = "nf4"
        elif scheme.kind == "fp8":
            op = f"fp8a{scheme.activation_bits}"
        elif scheme.kind == "int" and scheme.bits in (4, 8):
            op = "w8a8" if scheme.centered else f"w{scheme.bits}a16"
        if op is None:
            continue
        for problem in measure.problems(op, scheme.group_size or 0, *weight.shape, dtype):
            found[problem] = None
    return list(found)


def tune_shapes(
    problems: Iterable[Problem], time: Callable[[Problem], Entry], path: Path
) -> list[Entry]:
    """The entries of all problems, added to the table at `path` one by one."""
    written = []
    for problem in problems:
        entry = time(problem)
        written.append(entry)
        known = tuning.read_table(path) if path.is_file() else tuning.Table(())
        tuning.write_table(path, known.merged([entry]))
    return written


def describe(entry: Entry) -> str:
    """One line about a measured choice."""
    problem, tile = entry.problem, entry.tile
    shape = f"{problem.op} g{problem.group} {problem.rows}x{problem.columns}"
    choice = "decode + matmul" if tile is None else str(tile)
    return f"{shape}, {problem.tokens} rows: {entry.microseconds:.1f} us, {choice}"
