"""The model's own forward with stand-ins for its blocks: the way to masks, positions and logits.

The skeleton has no block weights; in a pass every block's place is taken by a function.  The token
embedding looks up rows gathered from the checkpoint, the head is read in ranges of rows.

Letters: O out features, I in features, B sequences, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from quantkit.checkpoint.files import Source
from quantkit.errors import ModelError, NumericsError
from quantkit.model import skeleton, stacks
from quantkit.model.names import NameMap, load_into
from quantkit.model.refs import BlockCall, WeightRef

_HEAD_BYTES = 64 * 2**20
OnBlock = Callable[[int, torch.Tensor, BlockCall], torch.Tensor]
OnHead = Callable[[torch.Tensor], torch.Tensor]
Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where sequences and tokens lie in the hidden states that blocks hand on.

    `sequences` is an axis of them; to everyone else sequences come first, and then `tokens` is the
    axis of tokens, each of which has `rows` there, and `extra` are the model's own (prompts).
    """

    sequences: int = 0
    tokens: int = 1
    rows: int = 1
    extra: int = 0


class Passes:
    """Runs a skeleton with functions in place of its blocks.

    To them hidden states have sequences first, whatever the model's `layout`.

    `outputs(index)` tells the length of the tuple that a block's forward returns, None if it
    returns the hidden states themselves.
    """

    def __init__(
        self,
        *,
        model: Any,
        stack: stacks.Stack,
        source: Source,
        names: NameMap,
        device: torch.device,
        outputs: Callable[[int], int | None],
    ) -> None:
        self.device = device
        self.layout = Layout()
        self._model, self._blocks, self._source = model, stack.blocks, source
        self._whole = stack.whole
        self._outputs = outputs
        self._embedding: Any = model.get_input_embeddings()
        self._head: Any = stacks.head_of(model)
        # Without a head the states of tokens are the output; what a reranker's layers make of
        # them, at one token of each text, nobody asks for here.
        self._body: Any = model.base_model if self._head is None else model
        paths = lazy_paths(model)
        self.embedding_name = names.of(paths[0])[0].name
        self.head_path = paths[1] if len(paths) > 1 else None
        self._head_name = None if self.head_path is None else names.of(self.head_path)[0].name
        # What stands for rows of the embedding that are read; None: they themselves.
        self._changed: OnHead | None = None

    @property
    def head(self) -> WeightRef | None:
        """The output projection [V, H]; its name is the embedding's if the two are tied.

        None if the model has none.
        """
        if self.head_path is None or self._head_name is None:
            return None
        shape = self._source.info(self._head_name).shape
        return WeightRef(
            name=self._head_name,
            block=None,
            shape=(shape[0], shape[1]),
            parameter=self.head_path,
            input=self.head_path.rpartition(".")[0],
            role="head",
        )

    def projection(self) -> WeightRef:
        """The head, where one is needed.  ModelError if the model has none."""
        if (head := self.head) is None:
            raise ModelError(
                f"{type(self._body).__name__} has no head that predicts tokens, which --lm-head, "
                "--bits and scales that are healed need; leave them out"
            )
        return head

    def run(
        self,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor | None,
        on_block: OnBlock,
        on_head: OnHead | None = None,
        *,
        inputs: Inputs | None = None,
        grad: bool = False,
    ) -> torch.Tensor:
        """What the model returns as logits when `on_block` stands in for every block.

        `on_head` stands in for the head; without it the logits mean nothing.  Of a model that has
        none it returns the last hidden states [B, T, H'].  `inputs` are what the
        model's forward takes beside ids and mask; floating ones come in the model's dtype.  Raises
        ModelError unless every block is called once, in order.
        """
        order: list[int] = []

        def enter(index: int, *args: Any, **kwargs: Any) -> Any:
            if index <= max(order, default=-1):
                raise stacks.StackError(
                    f"block {index} is called as number {len(order)}; only models that call their "
                    "blocks once each, one after the other, can be quantized block by block"
                )
            order.append(index)
            if self._whole:
                hidden_BTH, call = self._body_call(args, kwargs)
                return _Handed([on_block(index, hidden_BTH, call)])
            hidden_BTH, call = _record(args, kwargs)
            axis = self.layout.sequences
            output = on_block(index, hidden_BTH.movedim(axis, 0), call).movedim(0, axis)
            outputs = self._outputs(index)
            return output if outputs is None else (output,) + (None,) * (outputs - 1)

        stand_ins: list[tuple[nn.Module, Callable[..., Any]]] = [
            (block, functools.partial(enter, index)) for index, block in enumerate(self._blocks)
        ]
        if self._head is not None:
            stand_ins.append((self._head, on_head or _first_column))
        if not self._whole:
            stand_ins.append((self._embedding, self._embed))
        # An attribute of our own skeleton's modules shadows the forward of their class.
        for module, forward in stand_ins:
            module.__dict__["forward"] = forward
        try:
            with torch.set_grad_enabled(grad), _Stage(self._embedding, self._gather, self.device):
                mask = None if mask_BT is None else mask_BT.to(self.device)
                ids = ids_BT.to(self.device)
                more = {name: self._placed(value) for name, value in (inputs or {}).items()}
                if self._whole and getattr(self._model.config, "is_encoder_decoder", False):
                    # The decoder reads the same text, where the body holds an encoder too.
                    more["decoder_input_ids"] = ids
                output = self._body(input_ids=ids, attention_mask=mask, use_cache=False, **more)
        finally:
            for module, _ in stand_ins:
                module.__dict__.pop("forward", None)
        if len(order) != len(self._blocks):
            raise stacks.StackError(
                f"{len(order)} of {len(self._blocks)} blocks are called in a forward",
                called=tuple(order),
            )
        found: torch.Tensor = output.last_hidden_state if self._head is None else output.logits
        return found

    def _body_call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, BlockCall]:
        """What stands for hidden states before the whole body, zeros, and all that it is given."""
        ids_BT = args[0] if args else kwargs["input_ids"]
        width = self._model.config.get_text_config().hidden_size
        hidden_BTH = torch.zeros(*ids_BT.shape, width, dtype=self._model.dtype, device=self.device)
        return hidden_BTH, BlockCall(args=args, kwargs=dict(kwargs), hidden_name="")

    def _placed(self, value: torch.Tensor) -> torch.Tensor:
        """An input where the model is, in its dtype."""
        return value.to(self.device, self._model.dtype if value.is_floating_point() else None)

    @contextlib.contextmanager
    def embedding_as(self, change: OnHead) -> Iterator[None]:
        """While active, rows [R, H] of the embedding are what `change` makes of them."""
        self._changed = change
        try:
            yield
        finally:
            self._changed = None

    def calls(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None, inputs: Inputs | None
    ) -> tuple[torch.Tensor, tuple[BlockCall, ...]]:
        """What enters block 0 [B, T, H], and every block's other arguments; see CausalModel.

        With `inputs` blocks hand zeros on, so that what the model adds between two of them shows.
        """
        first: list[torch.Tensor] = []
        calls: list[BlockCall] = []

        def hand_on(index: int, hidden_BTH: torch.Tensor, call: BlockCall) -> torch.Tensor:
            if index == 0:
                first.append(hidden_BTH)
            elif inputs is not None and bool(hidden_BTH.any()):
                call = replace(call, added=hidden_BTH)
            calls.append(call)
            return hidden_BTH if inputs is None else torch.zeros_like(hidden_BTH)

        self.run(ids_BT, mask_BT, hand_on, inputs=inputs)
        return first[0], tuple(calls)

    def find_layout(self) -> Layout:
        """Where sequences and tokens are, by comparing one with two of each.

        Raises ModelError if the shape does not tell.
        """

        def shape(sequences: int, tokens: int) -> torch.Size:
            entered: list[torch.Size] = []

            def look(index: int, hidden_BTH: torch.Tensor, call: BlockCall) -> torch.Tensor:
                entered.append(hidden_BTH.shape)
                return hidden_BTH

            self.run(torch.zeros(sequences, tokens, dtype=torch.int64), None, look)
            return entered[0]

        first, more, longer = shape(1, 8), shape(2, 8), shape(1, 9)
        axes = [a for a, (old, new) in enumerate(zip(first, more, strict=True)) if old != new]
        placed = [a for a, (old, new) in enumerate(zip(first, longer, strict=True)) if old != new]
        if len(axes) != 1 or len(placed) != 1:
            raise ModelError(
                f"{type(self._model).__name__}: hidden states {list(first)} enter its blocks, in "
                "which sequences and tokens cannot be told apart; keep this model as it is"
            )
        (axis,), (token,) = axes, placed
        rows = longer[token] - first[token]
        return Layout(
            sequences=axis,
            tokens=token + (token < axis),
            rows=rows,
            extra=first[token] - 8 * rows,
        )

    def finish(
        self, hidden_BTH: torch.Tensor, on_head: OnHead | None = None, *, grad: bool = False
    ) -> torch.Tensor:
        """Logits [B, T, V] from the last block's output: final norm, head, caps and scales.

        Of a model without a head the last hidden states [B, T, H'].
        """
        last = len(self._blocks) - 1

        def replace(index: int, entered: torch.Tensor, call: BlockCall) -> torch.Tensor:
            return hidden_BTH.to(self.device) if index == last else entered

        layout = self.layout
        tokens = (hidden_BTH.shape[layout.tokens] - layout.extra) // layout.rows
        ids_BT = torch.zeros(len(hidden_BTH), tokens, dtype=torch.int64)
        return self.run(ids_BT, None, replace, on_head or self._project, grad=grad)

    def finish_rows(
        self, hidden_BTH: torch.Tensor, rows_VH: torch.Tensor, start: int, *, grad: bool = False
    ) -> torch.Tensor:
        """Logits of the vocabulary rows `start`... that `rows` are, as `finish` gives them."""
        bias = getattr(self._head, "bias", None)
        part = None if bias is None else bias[start : start + len(rows_VH)].to(rows_VH.dtype)
        return self.finish(hidden_BTH, lambda x: nn.functional.linear(x, rows_VH, part), grad=grad)

    def head_hidden(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        """What the head reads [B, T, H'] when the last block puts out `hidden`.

        Without a head it is what the model returns.
        """
        if self._head is None:
            return self.finish(hidden_BTH)
        read: list[torch.Tensor] = []

        def keep(x: torch.Tensor) -> torch.Tensor:
            read.append(x)
            return _first_column(x)

        self.finish(hidden_BTH, keep)
        return read[0]

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """The embedding module's own forward on a table of the used rows only."""
        rows, compact = torch.unique(ids, return_inverse=True)
        table = self._gather(rows)
        whole = self._embedding._parameters["weight"]
        padding = getattr(self._embedding, "padding_idx", None)
        self._embedding._parameters["weight"] = nn.Parameter(table, requires_grad=False)
        self._embedding.padding_idx = None  # concerns gradients only, and may be out of range now
        try:
            embedded: torch.Tensor = type(self._embedding).forward(self._embedding, compact)
        finally:
            self._embedding._parameters["weight"] = whole
            self._embedding.padding_idx = padding
        return embedded

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The named rows of the token embedding, in the model's dtype."""
        dtype = self._embedding.weight.dtype
        try:
            table = self._source.gather(self.embedding_name, rows.cpu()).to(self.device, dtype)
        except IndexError as error:
            raise ModelError(
                f"{self.embedding_name}: a token id up to {int(rows.max())} is outside the "
                "vocabulary; the tokenizer belongs to another model"
            ) from error
        if not bool(table.isfinite().all()):
            raise NumericsError(f"{self.embedding_name}: an embedding is NaN or infinite")
        return table if self._changed is None else self._changed(table)

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        """The head's product with its rows read in ranges."""
        head = self.projection()
        step = max(_HEAD_BYTES // (head.shape[1] * x.element_size()), 1)
        parts = []
        for start in range(0, head.shape[0], step):
            stop = min(start + step, head.shape[0])
            rows = self._source.read_rows(head.name, start, stop).to(x.device, x.dtype)
            parts.append(nn.functional.linear(x, rows))
        logits = torch.cat(parts, dim=-1)
        bias = getattr(self._head, "bias", None)
        return logits if bias is None else logits + bias


class _Stage(TorchFunctionMode):
    """What a skeleton's code finds besides its blocks during a pass.

    A row of the embedding's weight that the model reads itself, of a padding token say, comes from
    `gather`; what it puts on the device of a tower that stays empty goes to the real `device`.
    """

    def __init__(self, embedding: Any, gather: OnHead, device: torch.device) -> None:
        super().__init__()
        self._embedding, self._gather, self._device = embedding, gather, device

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.__getitem__ and args[0] is self._embedding._parameters["weight"]:
            first, *rest = args[1] if isinstance(args[1], tuple) else (args[1],)
            if isinstance(first, int):
                row = self._gather(torch.tensor([first]))[0]
                return row[tuple(rest)] if rest else row
        if func is torch.Tensor.to and any(_is_empty(arg) for arg in args[1:]):
            args = (args[0], *(self._device if _is_empty(arg) else arg for arg in args[1:]))
        kwargs = kwargs or {}
        if _is_empty(kwargs.get("device")):
            kwargs = {**kwargs, "device": self._device}
        return func(*args, **kwargs)


def _is_empty(device: Any) -> bool:
    return isinstance(device, torch.device | str) and str(device) == "meta"


def lazy_paths(model: Any) -> tuple[str, ...]:
    """Parameter paths of the token embedding and, if there is one, the head: never loaded whole."""
    modules = (model.get_input_embeddings(), stacks.head_of(model))
    paths = {module: path for path, module in model.named_modules()}
    return tuple(f"{paths[module]}.weight" for module in modules if module is not None)


def load_outside(
    model: Any,
    paths: Sequence[str],
    names: NameMap,
    source: Source,
    device: torch.device,
    stack: stacks.Stack,
) -> None:
    """Loads what is at these paths outside the blocks, but for the `lazy_paths`."""
    lazy = set(lazy_paths(model))
    if stack.whole:
        # The body reads its own embedding.
        lazy.discard(lazy_paths(model)[0])
    for path in paths:
        if path not in lazy and names.tied.get(path) not in lazy:
            owner, _, leaf = path.rpartition(".")
            load_into(model.get_submodule(owner), owner, names, source, device, only=leaf)
    skeleton.fill_buffers(model, model, "", skip=stack.blocks)
    for path in lazy:
        # Empty but real: models move token ids to wherever the embedding is.
        module = model.get_submodule(path.rpartition(".")[0])
        empty = torch.empty(0, module.weight.shape[-1], dtype=model.dtype, device=device)
        module._parameters["weight"] = nn.Parameter(empty, requires_grad=False)


def call_block(block: nn.Module, hidden_BTH: torch.Tensor, call: BlockCall) -> Any:
    """What the block's forward returns."""
    if call.hidden_name == "":
        return block(*call.args, **call.kwargs)
    if call.hidden_name is None:
        return block(hidden_BTH, *call.args, **call.kwargs)
    return block(*call.args, **{call.hidden_name: hidden_BTH}, **call.kwargs)


def as_float(call: BlockCall) -> BlockCall:
    """The call with its floating tensors in float32 on the CPU, as sketches compute."""

    def cast(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.cpu().float() if value.is_floating_point() else value.cpu()

    return BlockCall(
        args=tree_map(cast, call.args),
        kwargs=tree_map(cast, call.kwargs),
        hidden_name=call.hidden_name,
    )


def _record(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, BlockCall]:
    """Splits a block's arguments into the hidden states and the rest."""
    if args:
        return args[0], BlockCall(args=args[1:], kwargs=dict(kwargs))
    rest = dict(kwargs)
    return rest.pop("hidden_states"), BlockCall(args=(), kwargs=rest, hidden_name="hidden_states")


class _Handed(tuple[Any, ...]):
    """What stands for a body's output: the last hidden states, and None under every other name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None


def _first_column(x: torch.Tensor) -> torch.Tensor:
    return x[..., :1]
