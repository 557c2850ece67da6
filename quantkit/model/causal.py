"""One language model, one block at a time: the only way in to transformers' model classes.

Letters: O out features, I in features, B sequences, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from quantkit.checkpoint.files import Source
from quantkit.errors import ModelError, QuantkitError
from quantkit.model import skeleton, stacks
from quantkit.model.attention import Attention
from quantkit.model.extra_layers import find_extra_layers
from quantkit.model.fold import fold_
from quantkit.model.names import NameMap, check_complete, load_into, map_names
from quantkit.model.passes import Inputs, Layout, OnHead, Passes, as_float, call_block, load_outside
from quantkit.model.probes.kinds import Probes
from quantkit.model.probes.replay import check_replay
from quantkit.model.probes.scales import Found
from quantkit.model.refs import BlockCall, Folded, Role, ScaleGroup, WeightRef, weight_view
from quantkit.model.spread import Routed, SpreadTap
from quantkit.model.towers.loaded import Towers
from quantkit.model.trace import SHARED, UNNAMED, Tap, TapCallback, discover, noise_like, sketch_
from quantkit.model.uses import BlockTrace
from quantkit.model.views import converted, under_owners
from quantkit.model.watched import watched

__all__ = ["BlockCall", "CausalModel", "Folded", "ScaleGroup", "TapCallback", "WeightRef"]

_TRACE_TOKENS = 8


class CausalModel:
    """A transformers model of text whose blocks stay on disk until they are asked for.

    Holds the meta skeleton and the small tensors outside the blocks (norms, positions, rotary
    tables): token embedding rows are gathered per batch, the head is read in rows.
    `unmapped` are checkpoint tensors that no parameter takes (MTP heads, old buffers), `outside`
    those that belong to no block: embeddings, norms, head, other towers; `linears` all linear ones,
    `tables` what is looked up.  `whole`: the one block is the body, which reads token ids.
    `extra_layers` lie among the unmapped: those that predict further tokens.  `towers` is what
    turns images into embeddings.  `head` is the output projection [V, H], named like the embedding
    if tied; without one the model puts out hidden states.  `positions`: the most tokens it reads.
    `added`: what paths here have before those of transformers' class.
    """

    def __init__(
        self,
        *,
        model: Any,
        source: Source,
        names: NameMap,
        stack: stacks.Stack,
        device: torch.device,
    ) -> None:
        self.source, self.unmapped = source, names.unmapped
        self.dtype: torch.dtype = model.dtype
        self.text_config: Any = model.config.get_text_config()
        blocks = stack.blocks
        self.device, self.num_blocks, self.whole = device, len(blocks), stack.whole
        self._model, self._names = model, names
        self.linears = skeleton.linears(model.base_model if stack.added else model)
        self.tables = names.named(skeleton.tables(model))
        self._stack, self._blocks, self.added = stack, blocks, stack.added
        self._signatures = [skeleton.signature(block) for block in blocks]
        self._traces: dict[str, BlockTrace] = {}
        self._probes = Probes(self, self._signatures, self._traces)
        self._passes = Passes(
            model=model,
            stack=stack,
            source=source,
            names=names,
            device=device,
            outputs=lambda index: self._traces[self._signatures[index]].outputs,
        )
        inside = {name for index in range(len(blocks)) for name in self.block_tensors(index)}
        self._shared = names.shared_below(stack.root)
        self.head, self.positions = self._passes.head, skeleton.positions(model)
        self.head_tied = self.head is not None and self.head.name == self._passes.embedding_name
        # A text at a time, between special tokens.
        self.reads_texts = self.head is None or skeleton.fills_masks(model)
        self.outside = tuple(sorted(set(source.names()) - inside - set(names.unmapped)))
        self.extra_layers = find_extra_layers(names, source, stack.paths)
        self.towers = Towers(model, names, source, stack.root, self.device)

    @classmethod
    def open(
        cls,
        source: Source,
        *,
        trust_remote_code: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> CausalModel:
        """The model of a checkpoint; `dtype` None means the config's, else the stored one.

        Raises ModelError (unknown type, structure that cannot be streamed, experts that do not use
        transformers' interface), CheckpointError (a tensor is missing or misshapen).
        """
        opened = cls.traced(source, trust_remote_code=trust_remote_code, dtype=dtype, device=device)
        for signature in opened._traces:
            opened.weights(opened._signatures.index(signature))  # raises what planning would
        return opened

    @classmethod
    def traced(
        cls,
        source: Source,
        *,
        trust_remote_code: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> CausalModel:
        """As `open`, of a checkpoint that may hold its weights in ways in which none is read."""
        build = functools.partial(
            skeleton.build, source, trust_remote_code=trust_remote_code, dtype=dtype
        )
        return stacks.with_stack(
            build, lambda model, stack: cls._with_stack(model, source, stack, device)
        )

    @classmethod
    def _with_stack(
        cls,
        model: Any,
        source: Source,
        stack: stacks.Stack,
        device: torch.device | str,
    ) -> CausalModel:
        for config in (model.config, model.config.get_text_config()):
            # Kept hidden states of all blocks at once would be what streaming avoids.
            config.output_hidden_states = False
        source = converted(source, model)
        source = under_owners(source, model, map_names(model, source))
        names = map_names(model, source)
        outside = skeleton.outside_paths(model, stack.root)
        inside = [name for name in model.state_dict() if name.startswith(f"{stack.root}.")]
        check_complete(names, outside + inside)
        opened = cls(
            model=model, source=source, names=names, stack=stack, device=torch.device(device)
        )
        load_outside(model, outside, names, source, opened.device, stack)
        with skeleton.model_errors(model):
            opened._trace_blocks()
        return opened

    def block_path(self, index: int) -> str:
        """Path of a block in the model, such as "model.layers.3"."""
        return self._stack.paths[index]

    def block_tensors(self, index: int) -> tuple[str, ...]:
        """Checkpoint names of everything in a block, sorted."""
        found = self._names.under(self.block_path(index)).values()
        return tuple(sorted({piece.name for pieces in found for piece in pieces}))

    def block_bytes(self, index: int) -> int:
        """Bytes of a loaded block's parameters and stored buffers."""
        state = self._blocks[index].state_dict().values()
        return sum(value.numel() * value.element_size() for value in state)

    def load_block(self, index: int) -> nn.Module:
        """A fresh copy of a block with its weights, in eval mode on the model's device.

        Costs block_bytes plus one tensor; drop the reference to free it.  Raises NumericsError that
        names the tensor if a weight is NaN or infinite.
        """
        block = self.empty_block(index)
        self.fill_block_(block, index, self.device)
        return block.to(self.device)

    def fill_block_(self, block: nn.Module, index: int, device: torch.device) -> None:
        """Reads the weights of an `empty_block`; a thread of its own may do that."""
        load_into(block, self.block_path(index), self._names, self.source, device)

    def calls(
        self,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor | None = None,
        inputs: Inputs | None = None,
    ) -> tuple[torch.Tensor, tuple[BlockCall, ...]]:
        """Hidden states [B, T, H] that enter block 0, and every block's own other arguments.

        ids int64, mask 1 for tokens and 0 for padding (None: all tokens); `inputs` is what else a
        processor makes of text and images, which takes `towers.loaded()`.  Runs the model once with
        blocks that hand their input on.  Blocks share argument objects, so keeping them is cheap.
        """
        return self._passes.calls(ids_BT, mask_BT, inputs)

    def embedding_as(self, change: OnHead) -> AbstractContextManager[None]:
        """While active, rows [R, H] of the embedding are what `change` makes of them."""
        return self._passes.embedding_as(change)

    def run(self, block: nn.Module, hidden_BTH: torch.Tensor, call: BlockCall) -> torch.Tensor:
        """The block's hidden states [B, T, H]; no gradients."""
        with torch.no_grad():
            return self.output(block, hidden_BTH, call)

    def output(self, block: nn.Module, hidden_BTH: torch.Tensor, call: BlockCall) -> torch.Tensor:
        """The block's hidden states [B, T, H]; with gradients where they are enabled."""
        axis = self._passes.layout.sequences
        if call.added is not None:
            hidden_BTH = hidden_BTH + call.added
        output = call_block(block, hidden_BTH.movedim(0, axis), call)
        several = isinstance(output, (tuple, list, ModelOutput))
        hidden: torch.Tensor = output[0] if several else output
        return hidden.movedim(axis, 0)

    def check_replay(
        self, ids_BT: torch.Tensor | None = None, inputs: Inputs | None = None
    ) -> None:
        """Raises ModelError unless running block by block equals the model's own forward."""
        with skeleton.model_errors(self._model):
            check_replay(self, self._passes, self._signatures, ids_BT, inputs)

    def weights(self, index: int) -> tuple[WeightRef, ...]:
        """Every 2-D weight that the block multiplies by, in the order of use; loads nothing."""
        trace = self._traces[self._signatures[index]]
        keys = trace.keys()
        experts = {use.path for use in trace.uses if use.expert is not None}
        counts = {self._names.shapes[f"{self.block_path(index)}.{path}"][0] for path in experts}
        refs = []
        for use in trace.uses:
            role: Role = "expert" if use.expert is not None else "linear"
            if use.expert is None and experts and use.shape[0] in counts | {1}:
                role = "router"
            elif use.path in trace.read:
                role = "read"
            for piece in self._names.readable(f"{self.block_path(index)}.{use.path}", use.expert):
                if piece.split and piece.transposed != use.transposed:
                    raise ModelError(
                        f"{piece.name}: {use.path} has slices of {use.shape[0]} rows and columns, "
                        "which the model's code multiplies by the other way round than a linear "
                        "layer does; a file does not tell that apart, so keep this model as it is"
                    )
                rows = piece.rows or (0, use.shape[0])
                kept = trace.read.get(use.path) if role == "read" else None
                if role == "linear" and piece.name in self._shared:
                    kept = SHARED
                elif role == "linear" and not piece.name.endswith(".weight"):
                    kept = UNNAMED
                refs.append(
                    WeightRef(
                        name=piece.name,
                        block=index,
                        shape=(rows[1] - rows[0], use.shape[1]),
                        parameter=use.path,
                        input=keys[use.key],
                        role="read" if kept is not None else role,
                        expert=use.expert,
                        rows=piece.rows,
                        transposed=use.transposed,
                        split=piece.split,
                        kept=kept,
                    )
                )
        return tuple(refs)

    def sliced(self) -> dict[str, bool]:
        """Parameter path -> whether it holds [I, O], of all that are multiplied by in slices."""
        return {
            f"{self.block_path(index)}.{use.path}": use.transposed
            for index, signature in enumerate(self._signatures)
            for use in self._traces[signature].uses
            if use.expert is not None
        }

    def kept(self, index: int) -> dict[str, str]:
        """Checkpoint name -> reason, of the block's matrices that cannot be quantized.

        What they read, if anything, cannot be told: `trace.UNREACHED` or another reason.
        """
        trace = self._traces[self._signatures[index]]
        pieces = self._names.under(self.block_path(index))
        return {
            piece.name: reason
            for path, reason in sorted(trace.kept.items())
            for piece in pieces.get(path, ())
        }

    def weight(self, block: nn.Module, ref: WeightRef) -> torch.Tensor:
        """The weight as [O, I]: a view of the block's parameter (writes go through)."""
        return weight_view(block, ref)

    def set_weight_(self, block: nn.Module, ref: WeightRef, w_OI: torch.Tensor) -> None:
        """Copies [O, I] into the block's parameter, rounded to its dtype."""
        weight_view(block, ref).copy_(w_OI)

    def tensor(self, block: nn.Module, index: int, name: str) -> torch.Tensor:
        """A checkpoint tensor of block `index` as it is now, in its stored layout, model dtype.

        A view of the block's parameter.  KeyError if the block holds no such tensor.
        """
        for path, pieces in self._names.under(self.block_path(index)).items():
            for piece in pieces:
                if piece.name == name:
                    return piece.part_of(block.state_dict(keep_vars=False)[path])
        raise KeyError(name)

    @contextmanager
    def tap(
        self,
        index: int,
        block: nn.Module,
        mask_BT: torch.Tensor | None,
        callback: TapCallback,
        routed: Routed | None = None,
    ) -> Iterator[None]:
        """While active, run() calls callback(input_key, x [n, I]) once per distinct input.

        x holds valid tokens only (padding removed, of an expert the tokens routed to it; one that
        no token reaches is not called), in the model's dtype; do not keep or change it.  With
        `routed` experts get all tokens (see `spread`), and it hears how many were sent to them.
        """
        keys = self._traces[self._signatures[index]].keys()
        if mask_BT is not None and self._passes.layout != Layout():
            raise ModelError(
                f"{self.block_path(index)}: hidden states do not have a row for each token, so "
                "padding cannot be told apart; calibrate on windows without padding"
            )
        mode = (
            Tap(block, keys, mask_BT, callback)
            if routed is None
            else SpreadTap(block, keys, mask_BT, callback, routed=routed)
        )
        handle = block.register_forward_pre_hook(lambda _module, _args: mode.start())
        try:
            with mode:
                yield
        finally:
            handle.remove()

    def scale_groups(self, index: int) -> tuple[ScaleGroup, ...]:
        """All folds that leave the block's output unchanged, found by probing; loads nothing.

        Probes once per kind of block.
        """
        if self.whole or self._passes.layout.sequences:
            # Probes compare sequences row by row, which must follow one another, and see a weight
            # once, which a whole body may use several times.
            return ()
        with skeleton.model_errors(self._model):
            probed = self._probes.groups(index, skeleton.head_sizes(self._model))
        keys = self._traces[self._signatures[index]].keys()
        refs: dict[tuple[str, int | None], list[WeightRef]] = {}
        for ref in self.weights(index):
            refs.setdefault((ref.parameter, ref.expert), []).append(ref)
        groups = []
        for found in probed:
            names = self._producer_names(index, found)
            readers = tuple(ref for reader in found.readers for ref in refs[reader])
            if self._shared.intersection(names, (ref.name for ref in readers)):
                continue
            groups.append(
                ScaleGroup(
                    kind=found.kind,
                    block=index,
                    producer=found.producer,
                    bias=found.bias,
                    expert=found.expert,
                    transposed=found.transposed,
                    offset=found.offset,
                    rows=found.rows,
                    channel_map=found.channel_map,
                    inputs=tuple(dict.fromkeys(keys[reader] for reader in found.readers)),
                    readers=readers,
                    producer_names=names,
                )
            )
        return tuple(groups)

    def routed(self, index: int) -> bool | None:
        """Whether a block's experts can be given all tokens; None if it has none."""
        trace = self._traces[self._signatures[index]]
        return trace.routed if any(use.expert is not None for use in trace.uses) else None

    def fed(self, index: int) -> frozenset[str]:
        """Checkpoint names of weights that feed a state carried along the sequence, by probing.

        ModelError where that cannot be told.
        """
        with skeleton.model_errors(self._model):
            fed = self._probes.fed(index)
        return frozenset(r.name for r in self.weights(index) if (r.parameter, r.expert) in fed)

    def fold_(self, block: nn.Module, group: ScaleGroup, scale_C: torch.Tensor) -> Folded:
        """Divides the producer's channels by scale_C, multiplies the readers' columns: see fold."""
        return fold_(block, group, scale_C, stored=self.source.info(group.producer_names[0]).dtype)

    def attentions(self, index: int) -> Mapping[str, Attention]:
        """Path in the block -> what reads keys and values there."""
        return self._traces[self._signatures[index]].attentions

    def looking(self, index: int) -> tuple[str, ...]:
        """Paths in the block of the modules in which tokens are weighed by each other."""
        return self._traces[self._signatures[index]].looking

    def module_name(self, index: int, path: str) -> str:
        """What the checkpoint calls a module of a block: its tensors' names less their own."""
        return self._names.module(f"{self.block_path(index)}.{path}")

    @property
    def projection(self) -> WeightRef:
        """The head, where one is needed.  ModelError if the model has none."""
        return self._passes.projection()

    def head_hidden(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        """What the head reads [B, T, H'], from the last block's output: after the final norm."""
        return self._passes.head_hidden(hidden_BTH)

    def logits(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] from the last block's output; the head is read in ranges of rows."""
        return self._passes.finish(hidden_BTH)

    def head_rows(self, start: int, stop: int) -> torch.Tensor:
        """Vocabulary rows start..stop of the output projection, in the model's dtype."""
        rows = self.source.read_rows(self.projection.name, start, stop)
        return rows.to(self.device, self.dtype)

    def partial_logits(
        self, hidden_BTH: torch.Tensor, rows_VH: torch.Tensor, start: int, *, grad: bool = False
    ) -> torch.Tensor:
        """Logits of some of the vocabulary, from the last block's output and `head_rows`.

        Final norm, caps and scales are the model's own: they work on each logit alone.
        """
        return self._passes.finish_rows(hidden_BTH, rows_VH, start, grad=grad)

    def empty_block(self, index: int) -> nn.Module:
        """A copy of a block whose weights are on the meta device; what it computes is there."""
        block = skeleton.clone(self._blocks[index])
        skeleton.fill_buffers(self._model, block, self.block_path(index))
        return block

    def _trace_blocks(self) -> None:
        """Runs a sketch of each kind of block and checks that blocks follow one another."""
        last: list[torch.Tensor] = []

        def trace(index: int, hidden_BTH: torch.Tensor, call: BlockCall) -> torch.Tensor:
            if last and hidden_BTH.data_ptr() != last[0].data_ptr():
                raise stacks.StackError(
                    f"{self.block_path(index)}: this block does not read the output of the one "
                    "before it, so the model cannot be quantized block by block"
                )
            last[:] = [hidden_BTH]
            signature = self._signatures[index]
            if signature not in self._traces:
                drawn = sketch_(self.empty_block(index))
                noise = noise_like(hidden_BTH, 1)
                self._traces[signature] = discover(
                    drawn,
                    lambda block: call_block(block, noise, as_float(call)),
                    batch=1,
                    whole=self._stack.whole,
                )
            return hidden_BTH

        # Of an encoder's model padding alone would be no text.
        ids = torch.full((1, _TRACE_TOKENS), 3 if self.whole else 0, dtype=torch.int64)
        with watched(self._blocks) as read:
            try:
                self._passes.run(ids, None, trace)
            except QuantkitError:
                raise
            # The model's own code fails in its own way on blocks that only hand on their input.
            except Exception as error:
                raise stacks.StackError(
                    f"{type(self._model).__name__}: its forward fails with blocks that hand on "
                    f"hidden states alone, so it cannot be quantized block by block: {error}"
                ) from error
        if read:
            raise ModelError(
                f"{self._stack.root}.{min(read)}: {type(self._model).__name__} reads this weight "
                "outside the layer that multiplies by it and may change it on the way, which a "
                "quantized layer does not allow; keep this model in full precision"
            )
        if last[0].shape[:-1] != (1, _TRACE_TOKENS):
            self._passes.layout = self._passes.find_layout()

    def _producer_names(self, index: int, found: Found) -> tuple[str, ...]:
        """Checkpoint names of the tensors that hold a producer's rows and bias."""
        names = []
        for path in (found.producer, found.bias):
            if path is None:
                continue
            for piece in self._names.readable(f"{self.block_path(index)}.{path}", found.expert):
                rows = found.rows
                if piece.rows is not None:
                    rows = rows[(rows >= piece.rows[0]) & (rows < piece.rows[1])]
                if len(rows):
                    names.append(piece.name)
        return tuple(names)
