"""The calibration's hidden states on their way through the blocks, and statistics taken of them.

Letters: N sequences, T tokens, H hidden size.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantkit.calibration.batches import Batch, batches_of
from quantkit.calibration.data.tokens import Calibration
from quantkit.calibration.gather import Forward, Seen, Shares, StatsBook, gather
from quantkit.calibration.hidden import HiddenStore
from quantkit.calibration.kept_calls import KeptCalls
from quantkit.calibration.processes.ranks import ALONE, World
from quantkit.calibration.processes.tree import leaves_of
from quantkit.calibration.rounded_cache import CacheSeen, counting
from quantkit.calibration.rounded_inputs import QuantizedActivations
from quantkit.calibration.spans import phase
from quantkit.methods.stats import Needs, Stats, Stream
from quantkit.model.attention import keys_and_values
from quantkit.model.causal import CausalModel, TapCallback
from quantkit.model.refs import BlockCall, WeightRef
from quantkit.numbers.activations import InputRounding

# A matrix is a summand of the block's output up to what hidden states in 16 bits round away.
_ROUNDED = 0.05
# Times the seconds that saving takes which pass before what memory holds is saved again.
TIMES_SAVING = 20


class _Enough(Exception):
    """Ends the run of a block: what is asked for was seen."""


class _Told:
    """Hands on a block's inputs, each with what the original has there; ends the run after all.

    The input `held` waits for what the block's output lacks.
    """

    def __init__(
        self,
        seen: Seen,
        left: set[str],
        kept: dict[str, Tensor],
        tokens: int,
        held: str | None,
    ) -> None:
        self._seen, self._left, self._kept, self._tokens = seen, left, kept, tokens
        self._held_key, self._held = held, torch.empty(0)

    def tell(self, key: str, x_TI: Tensor) -> None:
        """The tokens of an input."""
        if key not in self._left:
            return
        if key == self._held_key:
            self._held = x_TI.clone()
            return
        self._left.remove(key)
        original = self._kept.pop(key, None)
        # A row of one is not that of the other where only some tokens come.
        if original is not None and (len(x_TI) != len(original) or len(x_TI) % self._tokens):
            original = None
        self._seen(key, x_TI, original)
        if not self._left:
            raise _Enough

    def release(self, lack_TO: Tensor) -> None:
        """The tokens of the input that waited."""
        assert self._held_key is not None
        self._seen(self._held_key, self._held, None, lack_TO)


class CalibrationStream:
    """Hidden states of all sequences in two generations of files; generation i enters block i.

    Each rank of a `world` has its own sequences at their places in the same files, so that any
    number of processes goes on with them.  With `original` those of the original model go along
    beside them, under that name.
    """

    def __init__(
        self,
        model: CausalModel,
        calibration: Calibration,
        *,
        device: str,
        scratch: Path,
        gram_budget: int | None,
        stack: contextlib.ExitStack,
        original: bool = False,
        keep: bool = False,
        spread: bool = False,
        world: World = ALONE,
    ) -> None:
        """keep: a GPU with room to spare holds the hidden states, and saves them now and then.

        spread: statistics of experts are of all tokens, see `model.spread`.
        """
        self.model, self.calibration, self.device = model, calibration, device
        self.scratch, self.gram_budget = scratch, gram_budget
        self.world = world
        leaves = leaves_of(list(batches_of(calibration, device)))
        self.shares = Shares(world=world, leaves=leaves)
        self.batches = self.shares.batches
        # Without their images some models refuse the tokens that stand for them.
        text = calibration.ids[:1] if calibration.pictured is None else calibration.ids[:1] * 0
        with torch.no_grad():
            first, _ = model.calls(text)
        shape = (len(calibration.ids), *first.shape[1:])
        kept_on = device if keep else None
        mine = sum(batch.stop - batch.start for batch in self.batches)

        def store(name: str) -> HiddenStore:
            made = HiddenStore(scratch, shape, first.dtype, name, kept_on=kept_on, mine=mine)
            return stack.enter_context(made)

        self.hidden = store("hidden")
        self.original = store("original") if original else None
        # What one has no room for, none keeps: they save together.
        keeps = all(world.gathered(all(each.keeps for each in self._stores)))
        for each in self._stores:
            each.keeps = keeps
        # When hidden states were saved last, and the seconds it took.
        self._saved_at, self._saving = 0.0, 0.0
        self._calls: dict[int, tuple[BlockCall, ...]] = {}
        self._spread = spread
        # The block at work; input of an expert -> first sequence of a batch -> tokens sent there.
        self._sent: tuple[int, dict[str, dict[int, int]]] = (-1, {})
        self._kept: KeptCalls | None = None
        if calibration.pictured is not None:
            self._kept = KeptCalls(scratch / "calls")

    @property
    def _stores(self) -> list[HiddenStore]:
        return [self.hidden] if self.original is None else [self.hidden, self.original]

    def embed(self) -> None:
        """Writes what enters the first block; images pass the towers."""
        with contextlib.ExitStack() as stack:
            if self._kept is not None:
                stack.enter_context(self.model.towers.loaded())
            for batch in self.batches:
                hidden = self._padded(self._embedded(batch))
                self.hidden.write(0, batch.start, hidden)
                if self.original is not None:
                    self.original.write(0, batch.start, hidden)

    def _embedded(self, batch: Batch) -> Tensor:
        """What enters the first block for a batch; keeps what a tower gives to the others."""
        ids = self.calibration.ids[batch.start : batch.stop, : batch.length]
        pictured = self.calibration.pictured
        if pictured is None or self._kept is None:
            return self.model.calls(ids, batch.mask)[0]
        hidden, calls = self.model.calls(ids, inputs=pictured.inputs(batch.start))
        self._kept.write(batch.start, calls)
        return hidden

    def entering(self, batch: Batch) -> tuple[Tensor, tuple[BlockCall, ...]]:
        """What enters the first block for a batch, made anew, and every block's other arguments."""
        ids = self.calibration.ids[batch.start : batch.stop, : batch.length]
        if self.calibration.pictured is None:
            return self.model.calls(ids, batch.mask)
        with self.model.towers.loaded():
            return self.model.calls(ids, inputs=self.calibration.pictured.inputs(batch.start))

    def _padded(self, hidden_BTH: Tensor) -> Tensor:
        """Hidden states of as many tokens as the stores have, zeros behind a shorter sequence."""
        short = self.hidden.shape[1] - hidden_BTH.shape[1]
        return functional.pad(hidden_BTH, (0, 0, 0, short)) if short else hidden_BTH

    def sync(self, generation: int) -> bool:
        """Whether the generation is on the disk, from where an interrupted run can go on.

        Always, but where a GPU holds it: there it is saved when a small part of the time since the
        last one was enough for that, and not over the one that is on the disk.
        """
        if any(store.keeps for store in self._stores):
            if all(store.saved == generation for store in self._stores):
                return True
            if not self.world.first(lambda: self._is_time(generation)):
                return False
        began = time.monotonic()
        for store in self._stores:
            store.sync(generation)
        # Nobody says so before all have saved theirs.
        self.world.gathered(None)
        self._saved_at = time.monotonic()
        self._saving = self._saved_at - began
        return True

    def _is_time(self, generation: int) -> bool:
        early = time.monotonic() - self._saved_at < TIMES_SAVING * self._saving
        return not early and all(store.has_file_for(generation) for store in self._stores)

    def gather(
        self,
        index: int,
        block: nn.Module,
        needs: Mapping[str, Needs],
        features: Mapping[str, int],
        *,
        stream: Stream,
        write: bool,
        taps: Mapping[str, tuple[str, ...]] | None = None,
        owners: Mapping[str, int] | None = None,
    ) -> StatsBook:
        """Statistics of the block's inputs; with `write`, the same pass stores its output.

        `owners`: the rank that gets each input's.
        `taps`: input key -> the keys in `needs` that take its tokens (default: itself).
        """

        def forward(first: bool, keys: Set[str], seen: Seen, batches: Sequence[Batch]) -> None:
            tapped = seen if taps is None else _fan_out(seen, taps)
            self.forward(index, block, tapped, write=write and first, batches=batches)

        return self._gathered(index, needs, features, forward, stream, owners)

    def forward(
        self,
        index: int,
        block: nn.Module,
        callback: TapCallback | None,
        *,
        write: bool,
        rounded: Mapping[str, InputRounding] | None = None,
        cached: CacheSeen | None = None,
        batches: Sequence[Batch] | None = None,
    ) -> None:
        """Runs the block over this rank's batches, or some of them.

        With `write` what enters the next one is stored.

        Inputs of the parameters named in `rounded` are rounded so.  `cached` is told of an
        attention module's path, and its keys and values [B, H, T, D] of tokens that count.
        """
        for batch in self.batches if batches is None else batches:
            with contextlib.ExitStack() as modes:
                if cached is not None:
                    modes.enter_context(keys_and_values(block, counting(cached, batch.mask)))
                out = self._run(index, block, batch, self.hidden, callback, rounded)
            if write:
                with phase("writing"):
                    self.hidden.write(index + 1, batch.start, self._padded(out))

    def _gathered(
        self,
        index: int,
        needs: Mapping[str, Needs],
        features: Mapping[str, int],
        forward: Forward,
        stream: Stream,
        owners: Mapping[str, int] | None,
    ) -> StatsBook:
        book = gather(
            needs,
            features,
            forward,
            shares=self.shares,
            owners=owners or {},
            directory=self.scratch / f"rank-{self.world.rank}",
            budget=self.gram_budget,
            stream=stream,
            device=self.device,
            label=self.model.block_path(index),
        )
        if self._spread:
            for block, counts in self.world.gathered(self._sent):
                for key, found in counts.items() if block == index else ():
                    for start, count in found.items():
                        self._note_sent(index, start, key, count)
        return book

    def _run(
        self,
        index: int,
        block: nn.Module,
        batch: Batch,
        store: HiddenStore,
        callback: TapCallback | None,
        rounded: Mapping[str, InputRounding] | None = None,
    ) -> Tensor:
        """The block's output for a batch of one of the two streams."""
        with phase("reading"):
            hidden = self.read(store, index, batch)
        with phase("forward"), contextlib.ExitStack() as modes:
            if callback is not None:
                sent = functools.partial(self._note_sent, index, batch.start)
                routed = sent if self._spread else None
                modes.enter_context(self.model.tap(index, block, batch.mask, callback, routed))
            if rounded:
                modes.enter_context(QuantizedActivations(block, rounded))
            return self.model.run(block, hidden, self._call(index, batch))

    def output(self, index: int, block: nn.Module, batch: Batch) -> Tensor:
        """The block's output for a batch, with gradients where they are enabled."""
        with phase("reading"):
            hidden = self.read(self.hidden, index, batch)
        with phase("forward"):
            return self.model.output(block, hidden, self._call(index, batch))

    def sent(self, index: int, key: str) -> int | None:
        """Tokens that the router sent to an expert's input, where statistics are of all tokens."""
        block, counts = self._sent
        return sum(counts[key].values()) if block == index and key in counts else None

    def _note_sent(self, index: int, start: int, key: str, count: int) -> None:
        if self._sent[0] != index:
            self._sent = (index, {})
        # Blocks run several times over a batch, with the same tokens.
        self._sent[1].setdefault(key, {})[start] = count

    def read(self, store: HiddenStore, index: int, batch: Batch) -> Tensor:
        """A batch's hidden states that enter block `index`, without what was padded."""
        hidden = store.read(index, batch.start, batch.stop, self.device)
        return hidden if batch.length is None else hidden[:, : batch.length].contiguous()

    def gather_paired(
        self,
        index: int,
        original: nn.Module,
        block: nn.Module,
        needs: Mapping[str, Needs],
        features: Mapping[str, int],
        *,
        rounded: Mapping[str, InputRounding],
        write: bool,
        summand: str | None = None,
        owners: Mapping[str, int] | None = None,
    ) -> StatsBook:
        """Statistics of the block's inputs beside those of its original on its own hidden states.

        Inputs of the block's parameters named in `rounded` are rounded so.  With `write` what the
        original hands on is stored.  Of the input `summand` the tokens come with what the block's
        output lacks, which takes both runs to their end.
        """

        def forward(first: bool, keys: Set[str], seen: Seen, batches: Sequence[Batch]) -> None:
            paired = {key for key in keys if needs[key].drift and key != summand}
            whole = summand in keys
            for batch in batches:
                kept, wanted = self._original_inputs(
                    index, original, batch, paired, write=write and first, whole=whole
                )
                told = _Told(seen, set(keys), kept, self.tokens(batch), held=summand)
                with contextlib.suppress(_Enough):
                    out = self._run(index, block, batch, self.hidden, told.tell, rounded)
                    if wanted is not None and whole:
                        told.release(self.rows(batch, wanted.float() - out.float()))

        return self._gathered(index, needs, features, forward, "quantized", owners)

    def adds_up(self, index: int, block: nn.Module, ref: WeightRef) -> bool:
        """Whether the outputs of a matrix are a summand of the block's, on the first batch."""
        return self.world.first(lambda: self._adds_up(index, block, ref))

    def _adds_up(self, index: int, block: nn.Module, ref: WeightRef) -> bool:
        batch, found = self.batches[0], {}

        def keep(key: str, x_TI: Tensor) -> None:
            if key == ref.input:
                found[key] = x_TI.to(torch.float32)

        def rows(callback: TapCallback | None) -> Tensor:
            out = self._run(index, block, batch, self.hidden, callback)
            return self.rows(batch, out.to(torch.float32))

        whole, weight = rows(keep), self.model.weight(block, ref)
        if ref.input not in found:
            # An expert that no token of the batch reaches.
            return False
        own = found[ref.input] @ weight.to(torch.float32).t()
        kept = weight.clone()
        weight.zero_()
        rest = rows(None)
        weight.copy_(kept)
        if own.shape != whole.shape:
            return False
        return bool((whole - rest - own).norm() <= _ROUNDED * own.norm())

    def forward_original(self, index: int, block: nn.Module) -> None:
        """Stores what the original hands on to the next block."""
        assert self.original is not None
        for batch in self.batches:
            out = self._run(index, block, batch, self.original, None)
            with phase("writing"):
                self.original.write(index + 1, batch.start, self._padded(out))

    def _original_inputs(
        self,
        index: int,
        original: nn.Module,
        batch: Batch,
        keys: Set[str],
        *,
        write: bool,
        whole: bool,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """What the original has at the inputs `keys`; runs no further than to the last of them.

        With `write` or `whole` it runs to the end, and what it hands on comes too, or is stored.
        """
        assert self.original is not None
        kept: dict[str, Tensor] = {}
        out: Tensor | None = None
        if not keys and not write and not whole:
            return kept, out

        def keep(key: str, x_TI: Tensor) -> None:
            if key in keys:
                kept[key] = x_TI.clone()
                if len(kept) == len(keys) and not write and not whole:
                    raise _Enough

        with contextlib.suppress(_Enough):
            out = self._run(index, original, batch, self.original, keep)
            if write:
                with phase("writing"):
                    self.original.write(index + 1, batch.start, self._padded(out))
        return kept, out

    def tokens(self, batch: Batch) -> int:
        """Tokens of a batch that count."""
        if batch.mask is not None:
            return int(batch.mask.sum())
        return self.calibration.ids[batch.start : batch.stop, : batch.length].numel()

    def rows(self, batch: Batch, hidden_BTH: Tensor) -> Tensor:
        """Hidden states [T, H] of the tokens that count."""
        if batch.mask is not None:
            return hidden_BTH[batch.mask.to(hidden_BTH.device).bool()]
        return hidden_BTH.flatten(0, -2)

    def head_stats(self, features: int, needs: Needs, *, stream: Stream) -> Stats | None:
        """Statistics of what the output head reads, after the final norm; rank 0 has them."""

        def read(store: HiddenStore, batch: Batch) -> Tensor:
            hidden = self.read(store, self.model.num_blocks, batch)
            return self.rows(batch, self.model.head_hidden(hidden))

        def forward(first: bool, keys: Set[str], seen: Seen, batches: Sequence[Batch]) -> None:
            for batch in batches:
                original = None
                if needs.drift and self.original is not None:
                    original = read(self.original, batch)
                seen("input", read(self.hidden, batch), original)

        book = gather(
            {"input": needs},
            {"input": features},
            forward,
            shares=self.shares,
            owners={},
            directory=self.scratch,
            budget=None,
            stream=stream,
            device=self.device,
            label="head",
        )
        return book.get("input") if book.holds("input") else None

    def _call(self, index: int, batch: Batch) -> BlockCall:
        """The block's other arguments; without padding they depend on the batch's shape only, but
        where images take part on these too.

        A whole body gets token ids among them.
        """
        if self._kept is not None:
            return self._kept.read(batch.start, index, self.model.device)
        ids = self.calibration.ids[batch.start : batch.stop]
        if batch.mask is not None or self.model.whole:
            return self.model.calls(ids, batch.mask)[1][index]
        if ids.shape[0] not in self._calls:
            self._calls[ids.shape[0]] = self.model.calls(ids, None)[1]
        return self._calls[ids.shape[0]][index]


def _fan_out(callback: TapCallback, taps: Mapping[str, tuple[str, ...]]) -> TapCallback:
    def tell(key: str, x_TI: Tensor) -> None:
        for name in taps.get(key, ()):
            callback(name, x_TI)

    return tell
