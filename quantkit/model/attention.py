"""What attention reads: keys and values, seen or replaced where transformers hands them over.

Models call the function that `ALL_ATTENTION_FUNCTIONS` gives for their implementation, with keys
and values as a cache returns them: after rotation, before heads are repeated.
Letters: B sequences, H heads of keys and values, T tokens, D head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SOFTMAX = frozenset({functional.softmax, torch.softmax, Tensor.softmax})
# Takes an attention module's path, keys and values [B, H, T, D], and gives what stands in for them.
KeysValues = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]
# Of query [B, Q, T, D], keys, values and mask; the output [B, T, Q, D] comes first of two.
Function = Callable[[Tensor, Tensor, Tensor, Tensor | None], Any]
# Takes the module, its function, query, keys, values and mask, and gives what the function would.
Attend = Callable[[nn.Module, Function, Tensor, Tensor, Tensor, Tensor | None], Any]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """An attention module of a block: its heads of keys and values and their sizes."""

    heads: int
    key_size: int
    value_size: int


@contextlib.contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """While active, every attention of any model is what `attend` makes of its function."""
    registry: Any = ALL_ATTENTION_FUNCTIONS
    plain = registry.get_interface

    def get_interface(*names: Any, **more: Any) -> Any:
        function = plain(*names, **more)

        def interface(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any
        ) -> Any:
            # The mask comes by place, by name, or not at all.
            mask, *others = rest or (named.pop("attention_mask", None),)

            def function_of(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Any:
                return function(module, query, key, value, mask, *others, **named)

            return attend(module, function_of, query, key, value, mask)

        return interface

    outer = vars(registry).get("get_interface")
    registry.get_interface = get_interface
    try:
        yield
    finally:
        if outer is None:
            del registry.get_interface
        else:
            registry.get_interface = outer


def keys_and_values(block: nn.Module, seen: KeysValues) -> contextlib.AbstractContextManager[None]:
    """While active, every attention inside the block reads what `seen` returns."""
    paths = {id(module): path for path, module in block.named_modules()}

    def attend(
        module: nn.Module,
        function: Function,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
    ) -> Any:
        if (path := paths.get(id(module))) is not None:
            key, value = seen(path, key, value)
        return function(query, key, value, mask)

    return attending(attend)


@contextlib.contextmanager
def attentions(block: nn.Module) -> Iterator[dict[str, Attention]]:
    """The block's attention modules by path, as they are called while this is active."""
    found: dict[str, Attention] = {}

    def seen(path: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        found[path] = Attention(
            heads=key.shape[1], key_size=key.shape[-1], value_size=value.shape[-1]
        )
        return key, value

    with keys_and_values(block, seen):
        yield found


@contextlib.contextmanager
def running(block: nn.Module) -> Iterator[list[str]]:
    """While active, the paths of the block's modules whose forward runs, the innermost last."""
    stack: list[str] = []
    handles = []
    for path, module in block.named_modules():
        handles += [
            module.register_forward_pre_hook(lambda *_, path=path: stack.append(path)),
            module.register_forward_hook(lambda *_: _drop(stack), always_call=True),
        ]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def _drop(stack: list[str]) -> None:
    stack.pop()


def looks_up(func: Callable[..., Any], result: Any) -> bool:
    """Whether a call weighs tokens by each other, as attention's own code does."""
    if func is functional.scaled_dot_product_attention:
        return True
    if func not in SOFTMAX or not isinstance(result, Tensor):
        return False
    square = result.dim() == 3 and result.shape[-1] == result.shape[-2]
    return result.dim() > 3 or square


def caches_latent(config: Any) -> bool:
    """Whether a cache holds what keys and values are computed from (multi-head latent attention).

    Its scales are not those of the keys and values that attention reads.
    """
    return bool(getattr(config, "kv_lora_rank", None))
