"""What an evaluation needs in memory, and how much of the output projections fits beside it."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.checkpoint.memory import current_rss, format_size, with_spare
from quantkit.errors import BudgetError
from quantkit_eval.figures.layers import SAMPLED_TOKENS
from quantkit_eval.figures.stream import ModelStream

# Allocator slack, lazily imported modules, thread stacks and copy buffers.
_OVERHEAD_BYTES = 96 * 2**20
# Rows of all heads that must fit at least: fewer, and states are read too often.
_MIN_HEAD_BYTES = 32 * 2**20
_LOGIT_BYTES = 4 << 22
# Running sums of one scored token, and the scores that come of them.
_SCORE_BYTES = 48


def check_budget(streams: Sequence[ModelStream], max_ram: int | None) -> int | None:
    """Bytes of output projections that may be in memory at once; None without a limit.

    Raises BudgetError with the smallest --max-ram that works.
    """
    if max_ram is None:
        return None
    blocks = max(_block_bytes(stream) for stream in streams)
    if (pictured := streams[0].workload.pictured) is not None:
        towers = max(stream.model.towers.working_bytes(pictured.largest) for stream in streams)
        blocks = max(blocks, towers)
    scoring = (2 * len(streams) + 2) * _LOGIT_BYTES
    fixed = current_rss() + _OVERHEAD_BYTES
    scores = len(streams) * streams[0].workload.scored_tokens * _SCORE_BYTES
    needed = fixed + max(blocks, scores + scoring + _MIN_HEAD_BYTES)
    if needed > max_ram:
        raise BudgetError(
            f"--max-ram {format_size(max_ram)} is too small: evaluating needs "
            f"{format_size(needed)} (process {format_size(fixed)}, one block or the towers "
            f"with activations {format_size(blocks)}); the smallest that works is --max-ram "
            f"{with_spare(needed) // 2**20}MiB"
        )
    return max_ram - fixed - scores - scoring


def _block_bytes(stream: ModelStream) -> int:
    """One block, the activations of one batch in it, its samples and one weight's comparison."""
    model = stream.model
    batch = max(found.ids.numel() for found in stream.workload.batches)
    most = 0
    for index in range(model.num_blocks):
        refs = model.weights(index)
        width = max(max(ref.shape) for ref in refs)
        inputs = {ref.input: ref.shape[1] for ref in refs}
        samples = SAMPLED_TOKENS * sum(inputs.values()) * 4
        # Codes, decoded, the original, their difference, and outputs on the sampled tokens.
        weight = max(ref.shape[0] * ref.shape[1] for ref in refs) * (1 + 4 * 4)
        activations = batch * width * 4 * 5
        most = max(most, model.block_bytes(index) + samples + max(weight, activations))
    return most
