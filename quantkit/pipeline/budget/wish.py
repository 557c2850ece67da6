"""The same wish in other words: bits, bytes of the weight files, or the memory of a GPU.

What a server needs beside the weights is estimated from the model's shapes; see `Room`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from quantkit.checkpoint.memory import format_size, parse_size
from quantkit.errors import BudgetError, RecipeError

if TYPE_CHECKING:
    from quantkit.model.causal import CausalModel
    from quantkit.pipeline.options import QuantizeOptions

Counted = Literal["linears", "model", "files"]
# Tokens of a prompt that a server reads at once (vLLM's default); longer ones come in pieces.
CHUNK_TOKENS = 2048
# Keys, values and activations are in 16 bits unless a cache is asked for that is not.
_ITEM_BYTES = 2
_BITS_OF = ("linears", "model")
_CONTEXT = re.compile(r"(\d+)\s*([kK]?)")


@dataclass(frozen=True, kw_only=True)
class Room:
    """The memory of a GPU in bytes, and what a server needs of it beside the weights.

    context      tokens in the cache, of all sequences together
    cache        keys and values of that many tokens; layers with a window keep no more than that
    activations  of one piece of a prompt in the widest product of a block, and one row of logits
    """

    limit: int
    context: int
    cache: int
    cache_type: str
    activations: int

    @property
    def weights(self) -> int:
        """What is left for weights."""
        return self.limit - self.cache - self.activations

    def told(self) -> str:
        """For people: where the rest goes."""
        return (
            f"beside {format_size(self.cache)} of keys and values ({self.context:,} tokens in "
            f"{self.cache_type}) and {format_size(self.activations)} of activations"
        )


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A budget as it was asked for.

    flag    as the user wrote it
    counted what the bytes are of: quantized weights, all tensors, or the weight files
    bits    per weight, if that was asked for
    limit   bytes of the files, if those were
    room    where the limit comes from memory
    """

    flag: str
    counted: Counted
    bits: float | None = None
    limit: int | None = None
    room: Room | None = None

    def capacity(self, parameters: int) -> int:
        """Bytes of what is counted, which has so many weights."""
        if self.limit is not None:
            return self.limit
        assert self.bits is not None
        return math.floor(self.bits * parameters / 8)

    def told(self, parameters: int) -> str:
        """For people: what it was turned into."""
        if self.limit is None:
            return f"{self.bits:g} bits of the {self.counted}"
        bits = 8 * self.limit / max(parameters, 1)
        beside = "" if self.room is None else f" {self.room.told()}"
        return f"{self.flag}: {format_size(self.limit)} of weights{beside}, {bits:.3f} bits each"

    def range(self, low: int, high: int, parameters: int) -> str:
        """From the smallest to the largest that can be had, in the words of the wish."""
        if self.limit is None:
            least, most = (8 * size / parameters for size in (low, high))
            shown = f"{math.ceil(1000 * least) / 1000:.3f} to {math.floor(1000 * most) / 1000:.3f}"
            return f"{shown} bits of the {self.counted}; choose a number between them"
        if self.room is None:
            return f"{low:,} to {high:,} bytes of files; choose a size between them"
        beside = self.room.cache + self.room.activations
        return (
            f"{low + beside:,} to {high + beside:,} bytes {self.room.told()}; give more memory, "
            "less --context, or --kv fp8"
        )


def check_wish(request: QuantizeOptions) -> None:
    """Raises RecipeError or BudgetError if the options of a budget contradict each other."""
    given = [
        flag
        for flag, value in (
            ("--bits", request.bits),
            ("--size", request.size),
            ("--fit-vram", request.fit_vram),
        )
        if value is not None
    ]
    if (request.fit_vram is None) != (request.context is None):
        raise RecipeError(
            "--fit-vram and --context go together: a cache of so many tokens has to fit beside "
            "the weights, as in --fit-vram 24GiB --context 32k"
        )
    if not given:
        if request.reader is not None or request.bits_of != "linears":
            raise RecipeError(
                "--for and --bits-of say more about a budget; give --bits too (or for --for --size "
                "or --fit-vram)"
            )
        return
    if len(given) > 1:
        raise RecipeError(f"{' and '.join(given)} are the same wish in two words; give one of them")
    flag = given[0]
    if request.bits_of not in _BITS_OF:
        raise RecipeError(f"--bits-of {request.bits_of!r}: choose {' or '.join(_BITS_OF)}")
    if request.bits is None and request.bits_of != "linears":
        raise RecipeError(f"--bits-of {request.bits_of}: {flag} counts whole files; leave it out")
    if request.bits is not None and not 0 < request.bits <= 32:
        raise RecipeError(f"--bits {request.bits}: give a mean of bits per weight, as in 4.25")
    for size in (request.size, request.fit_vram):
        if size is not None and _bytes(size) < 1:
            raise BudgetError(f"{flag} {size}: give a size above nothing, as in 3GiB")
    if request.context is not None:
        parse_context(request.context)
    if request.recurrent is not None:
        raise RecipeError(
            f"{flag} chooses the schemes of recurrences too; leave --recurrent out, or write a "
            "rule in a recipe"
        )
    if request.scheme is not None:
        raise RecipeError(
            f"{flag} chooses schemes and --scheme {request.scheme} names one; give one of the two"
        )


def wish_of(request: QuantizeOptions, model: CausalModel) -> Wish:
    """What a request with a budget asks for.

    Raises BudgetError if the cache alone takes more than the memory.
    """
    if request.bits is not None:
        counted: Counted = "model" if request.bits_of == "model" else "linears"
        return Wish(flag=f"--bits {request.bits:g}", counted=counted, bits=request.bits)
    if request.size is not None:
        return Wish(flag=f"--size {request.size}", counted="files", limit=_bytes(request.size))
    assert request.fit_vram is not None and request.context is not None
    context = parse_context(request.context)
    flag = f"--fit-vram {request.fit_vram} --context {request.context}"
    largest = getattr(model.text_config, "max_position_embeddings", None)
    if isinstance(largest, int) and context > largest:
        raise BudgetError(f"{flag}: the model has {largest:,} positions; give a context up to that")
    kv = request.loaded.kv
    room = Room(
        limit=_bytes(request.fit_vram),
        context=context,
        cache=_cache_bytes(model, context, _ITEM_BYTES if kv is None else 1),
        cache_type="16 bits" if kv is None else kv.name,
        activations=_activation_bytes(model, min(context, CHUNK_TOKENS)),
    )
    if room.weights < 1:
        raise BudgetError(
            f"{flag}: no room is left for weights {room.told()}; give more memory, less --context, "
            "or --kv fp8"
        )
    return Wish(flag=flag, counted="files", limit=room.weights, room=room)


def parse_context(text: str | int) -> int:
    """Tokens of "32k" (1,024 each) or "8192".  Raises BudgetError showing how to write them."""
    found = _CONTEXT.fullmatch(str(text).strip())
    tokens = 0 if found is None else int(found[1][:12]) * (1024 if found[2] else 1)
    if not 1 <= tokens <= 2**30:
        raise BudgetError(f"--context {str(text)[:30]!r}: write tokens, as in 32k or 8192")
    return tokens


def _bytes(size: int | str) -> int:
    return parse_size(size) if isinstance(size, str) else size


def _cache_bytes(model: CausalModel, context: int, item: int) -> int:
    """Keys and values of so many tokens in all layers.

    With multi-head latent attention a layer keeps one latent vector and one rotated key per token.
    """
    config = model.text_config
    kinds = getattr(config, "layer_types", None) or ()
    window = getattr(config, "sliding_window", None)
    latent = getattr(config, "kv_lora_rank", None)
    total = 0
    for index in range(model.num_blocks):
        for one in model.attentions(index).values():
            numbers = one.heads * (one.key_size + one.value_size)
            if latent:
                numbers = latent + getattr(config, "qk_rope_head_dim", 0)
            near = index < len(kinds) and kinds[index] == "sliding_attention"
            tokens = min(context, window) if near and isinstance(window, int) else context
            total += tokens * numbers * item
    return total


def _activation_bytes(model: CausalModel, tokens: int) -> int:
    """Of so many tokens at once: the stream, what the widest products read and put out; logits."""
    widest = max(
        (width for index in range(model.num_blocks) for width in _widths(model, index)), default=0
    )
    vocabulary, hidden = model.projection.shape
    return tokens * (2 * hidden + widest) * _ITEM_BYTES + 4 * vocabulary


def _widths(model: CausalModel, index: int) -> Iterator[int]:
    """Numbers per token of each input in a block and of all that is computed from it at once."""
    chosen = getattr(model.text_config, "num_experts_per_tok", None) or 1
    outputs: dict[tuple[str, int], int] = {}
    for ref in model.weights(index):
        rows, columns = ref.shape
        if ref.role != "expert":
            outputs[ref.input, columns] = outputs.get((ref.input, columns), 0) + rows
        elif ref.expert is not None:
            # Every token reaches so many experts; gate and up of one stand side by side.
            yield chosen * (columns + 2 * rows)
    for (_, columns), rows in outputs.items():
        yield columns + rows
