"""What writing a GGUF file will need: resident memory, disk and time, before any work is done.

Letters: O out features, I in features.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch

from quantkit.calibration.gather import gram_bytes
from quantkit.calibration.stream import BATCH_TOKENS
from quantkit.calibration.tokens import Calibration
from quantkit.checkpoint.memory import current_rss
from quantkit.formats.gguf.blocks import BLOCK_TYPES, BlockType
from quantkit.formats.gguf.mixes import Choice
from quantkit.formats.gguf.names import Place
from quantkit.formats.gguf.solve import FIT_WEIGHTS, fit
from quantkit.methods.stats import Needs
from quantkit.model.causal import CausalModel
from quantkit.pipeline.predict import Prediction, products_per_second

NEEDS = Needs(moments=True, gram=-1)
# Weights solved together: bounds memory, and a function of the shape alone.
CHUNK = 1 << 23
# Allocator slack, lazily imported modules, thread stacks and copy buffers.
_OVERHEAD_BYTES = 96 * 2**20
# Float32 copies of a chunk while it is solved: weight, values, codes, differences; and with
# statistics targets, errors and what the differences cost.
_CHUNK_COPIES, _CALIBRATED_COPIES = 4, 6
# Float32 copies of the blocks that are fitted at a time.
_FIT_COPIES = 16
# Float32 copies of a tensor while the block is read.
_LOAD_COPIES = 2
# Weights that a fit is timed with.
_TIMED_WEIGHTS = 1 << 18
# Products with the Gram matrix: GPTQ's own, and the costs of error and weight.
_GRAM_PRODUCTS = 3
# Square matrices beside the Gram matrix while it is factorised.
_FACTOR_COPIES = 3


def predict_gguf(
    model: CausalModel,
    types: Mapping[str, Choice],
    placed: Mapping[str, list[tuple[str, Place]]],
    tokens: Calibration | None,
    num_bytes: int,
) -> Prediction:
    """The prediction for tensors of these types.  Times a fit of each, a quarter of a second."""
    # Before the trials, whose memory may stay with the process for a while.
    base = current_rss() + _OVERHEAD_BYTES
    calibrated = tokens is not None
    # A name stands twice where two tensors of the file are made of it.
    fitted = [
        (name, choice.type)
        for target, choice in types.items()
        if choice.type in BLOCK_TYPES
        for name, _ in placed[target]
    ]
    chosen = {name for name, _ in fitted}
    pace = {label: _fit_seconds(BLOCK_TYPES[label]) for label in {label for _, label in fitted}}
    shapes = {name: model.source.info(name).shape for name in chosen}
    seconds = sum(pace[label] * math.prod(shapes[name]) for name, label in fitted)
    blocks = [
        [ref for ref in model.weights(i) if ref.name in chosen] for i in range(model.num_blocks)
    ]
    gram = grams = solve = largest = 0
    products = 0.0
    for refs in blocks:
        columns = {ref.input: ref.shape[1] for ref in refs}
        sizes = [gram_bytes(size, NEEDS) if calibrated else 0 for size in columns.values()]
        gram, grams = max([gram, *sizes]), max(grams, sum(sizes))
        for ref in refs:
            rows, width = ref.shape
            largest = max(largest, rows * width)
            solve = max(solve, _solve_bytes(rows, width, calibrated=calibrated))
            products += _solve_products(rows, width, calibrated=calibrated)
    for name in chosen.difference(ref.name for refs in blocks for ref in refs):
        rows, width = shapes[name][:2]
        # The head's statistics lie beside no block, the embedding has none.
        head = gram_bytes(width, NEEDS) if calibrated else 0
        solve = max(solve, head + _solve_bytes(rows, width, calibrated=calibrated))
        products += _solve_products(rows, width, calibrated=calibrated)
    forward = hidden = 0
    if tokens is not None:
        samples, length = tokens.ids.shape
        batch = max(BATCH_TOKENS["cpu"], length)
        widths = [size for refs in blocks for ref in refs for size in ref.shape]
        forward = batch * max(widths, default=0) * (3 * 4 + 2 * 4)
        hidden = 2 * samples * length * model.text_config.hidden_size * 4
        weights = sum(ref.shape[0] * ref.shape[1] for refs in blocks for ref in refs)
        products += 4.0 * samples * length * weights
    block = max(model.block_bytes(index) for index in range(model.num_blocks))
    return Prediction(
        base=base,
        block=block,
        forward=forward,
        gram=gram,
        grams=grams,
        solve=max(solve, 4 * _LOAD_COPIES * largest),
        # The packed rows wait beside the file that is put together from them.
        disk=2 * num_bytes + hidden + (grams if calibrated else 0),
        seconds=seconds + products / products_per_second() + num_bytes / 2e8,
    )


def _solve_bytes(rows: int, columns: int, *, calibrated: bool) -> int:
    """Working copies while a weight is factorised, fitted and solved chunk by chunk."""
    chunk = min(rows, max(1, CHUNK // columns)) * columns
    gram = gram_bytes(columns, NEEDS) if calibrated else 0
    copies = _CALIBRATED_COPIES if calibrated else _CHUNK_COPIES
    fitting = 4 * (chunk + _FIT_COPIES * max(columns, min(chunk, FIT_WEIGHTS)))
    # One factor stays while the weight is solved.
    solving = max(_FACTOR_COPIES * gram + 4 * chunk, gram + max(fitting, 4 * copies * chunk))
    return solving + rows * columns


def _solve_products(rows: int, columns: int, *, calibrated: bool) -> float:
    """Floating point operations beside the fit."""
    return _GRAM_PRODUCTS * 2.0 * rows * columns * columns if calibrated else 0.0


def _fit_seconds(kind: BlockType) -> float:
    """Seconds per weight of fitting blocks to it: a quarter of a second's trial for each type."""
    weight = torch.randn(_TIMED_WEIGHTS // 1024, 1024, generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    fit(weight, kind, torch.ones(1024))
    return (time.perf_counter() - began) / _TIMED_WEIGHTS
