"""A model's blocks: the list of those that follow one another, some of them, or its whole body.

What cannot be run block by block (layers that are called several times, lists in turn, an encoder
before a decoder) is one block: all of the model but its head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from quantkit.errors import ModelError, QuantkitError
from quantkit.model.skeleton import owner_of

Opened = TypeVar("Opened")


class Enclosed(PreTrainedModel):
    """A model without a head as the body of one that has nothing else, at its usual path."""

    def __init__(self, body: PreTrainedModel) -> None:
        # That of PreTrainedModel would set up attention anew for this class.
        nn.Module.__init__(self)
        self.config = body.config
        self.base_model_prefix = body.base_model_prefix or "body"
        setattr(self, self.base_model_prefix, body)
        tied = {**getattr(body, "all_tied_weights_keys", {})}
        self.all_tied_weights_keys = {
            f"{self.base_model_prefix}.{path}": f"{self.base_model_prefix}.{origin}"
            for path, origin in tied.items()
        }

    def get_input_embeddings(self) -> Any:
        """The body's."""
        return self.base_model.get_input_embeddings()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the body returns."""
        return self.base_model(*args, **kwargs)


class StackError(ModelError):
    """A model whose blocks do not follow one another; `called` are those that run, if in order."""

    def __init__(self, message: str, *, called: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.called = called


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A model's blocks in the order in which they run, and the path of each.

    All of them are below the path `root`.  `whole`: the one block is the model's whole body, which
    reads token ids instead of hidden states.  `added` stands before paths here that transformers'
    class does not have.
    """

    root: str
    paths: tuple[str, ...]
    blocks: nn.ModuleList
    whole: bool = False
    added: str = ""

    def only(self, indices: Sequence[int]) -> Stack:
        """The stack of some of its blocks."""
        return Stack(
            root=self.root,
            paths=tuple(self.paths[index] for index in indices),
            blocks=nn.ModuleList(self.blocks[index] for index in indices),
        )


def find_stack(model: PreTrainedModel) -> Stack:
    """The outermost of the decoder's lists of blocks.

    Of several it is the one whose elements have parts (others are lists of projections) and whose
    model has the text's configuration (others are towers).  Raises StackError unless there is one.
    """
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and _has_matrices(module):
            lists[path] = module
    decoder = model.get_decoder()
    inner = {id(module) for module in decoder.modules()} if decoder is not None else set()
    chosen = [path for path, module in lists.items() if len(lists) == 1 or id(module) in inner]
    if len(chosen) > 1:
        text = model.config.get_text_config()
        chosen = [
            path
            for path in chosen
            if any(True for _ in lists[path][0].children())
            and owner_of(model, path).config.get_text_config().model_type == text.model_type
        ] or chosen
    if len(chosen) != 1:
        raise StackError(
            f"{type(model).__name__}: {len(chosen)} lists of blocks ({', '.join(chosen)}); "
            "quantkit needs one stack of decoder blocks"
        )
    blocks = lists[chosen[0]]
    paths = tuple(f"{chosen[0]}.{index}" for index in range(len(blocks)))
    return Stack(root=chosen[0], paths=paths, blocks=blocks)


def head_of(model: PreTrainedModel) -> nn.Module | None:
    """The output projection: the model's own, or that of a causal language model within it.

    None for encoders and rerankers, which predict no tokens.
    """
    inner = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    for part in inner:
        if (head := part.get_output_embeddings()) is not None:
            found: nn.Module = head
            return found
    return None


def whole_body(model: PreTrainedModel) -> Stack:
    """All of the model but its head as one block, which reads token ids.

    ModelError if its class has no such part.
    """
    body, head = model.base_model, head_of(model)
    paths = [path for path, module in model.named_modules() if module is body]
    if head is None and isinstance(model, Enclosed):
        blocks, root = nn.ModuleList([body]), paths[0]
        return Stack(root=root, paths=(root,), blocks=blocks, whole=True, added=f"{root}.")
    if body is model or any(module is head for module in body.modules()):
        raise ModelError(f"{type(model).__name__}: its blocks are not apart from its head")
    return Stack(root=paths[0], paths=tuple(paths[:1]), blocks=nn.ModuleList([body]), whole=True)


def likely_root(model: PreTrainedModel) -> str:
    """Path below which the blocks are, before anything has run.  ModelError if there are none."""
    try:
        return find_stack(model).root
    except StackError:
        return whole_body(model).root


def with_stack(
    build: Callable[[], PreTrainedModel], opened: Callable[[PreTrainedModel, Stack], Opened]
) -> Opened:
    """What `opened` makes of a model and its stack, if need be of the blocks that run or of all.

    Each try is on a model of its own.  Raises the first try's StackError if the second fails too.
    """
    model = build()
    try:
        return opened(model, find_stack(model))
    except StackError as error:
        model = build()
        try:
            if error.called:
                return opened(model, find_stack(model).only(error.called))
            if head_of(model) is None and model.base_model is model:
                model = Enclosed(model)
            return opened(model, whole_body(model))
        except QuantkitError:
            raise error from None


def _has_matrices(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())
