"""What a block multiplies by and what each product reads, seen through torch's own hook.

A `TorchFunctionMode` sees every torch call, so nothing depends on module classes: linears, Conv1D,
fused experts and bare parameters look alike.  Weights are recognised by their storage, so slices,
views and casts of a parameter count as the parameter.

Letters: O out features, I in features, B sequences, T tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.pytorch_utils import Conv1D

from quantkit.errors import ModelError
from quantkit.model.attention import attentions, looks_up, running
from quantkit.model.experts import Routing, mark_tokens, route
from quantkit.model.stacks import StackError
from quantkit.model.uses import BlockTrace, Use, with_all_slices
from quantkit.model.watched import watched

# Why a matrix stays as it is.
UNREACHED = "a pass over text does not reach it"
OUTSIDE = "the model's code reads this weight outside its layer"
BARE = "no linear layer holds this weight"
SHARED = "several blocks share this weight"
UNNAMED = 'its name does not end in ".weight", so codes and scales could not be named after it'
_CASTS = frozenset(
    {
        torch.Tensor.to,
        torch.Tensor.type,
        torch.Tensor.type_as,
        torch.Tensor.float,
        torch.Tensor.bfloat16,
        torch.Tensor.half,
        torch.Tensor.contiguous,
        torch.Tensor.clone,
    }
)
_PRODUCTS = frozenset(
    {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm}
)
_STACKED = _PRODUCTS | {torch.bmm, torch.Tensor.bmm}
_BATCHED = frozenset({torch.bmm, torch.Tensor.bmm, torch.baddbmm, torch.einsum})


class MatmulMode(TorchFunctionMode, ABC):
    """Sees every product with a parameter of a block, of two or more dimensions.

    Subclasses get `product`; returning a tensor there replaces the product.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._parameters: dict[int, tuple[str, torch.Tensor]] = {
            _storage(parameter): (path, parameter)
            for path, parameter in block.named_parameters()
            if parameter.dim() > 1
        }
        self._casts: list[torch.Tensor] = []
        self._marked: tuple[torch.Tensor, torch.Tensor] | None = None

    @abstractmethod
    def product(
        self, use: Use, x: torch.Tensor, token_n: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Called before a product; x [..., I]; token_n: the tokens of its rows, for experts."""

    def produced(self, use: Use, y: torch.Tensor) -> None:
        """Hears of what a product gives, [..., O]."""

    def batched(self, path: str) -> None:
        """Hears of a weight that takes part in a product of many matrices at once."""

    def routing(self, index_TK: torch.Tensor, weight_TK: torch.Tensor, num_experts: int) -> Routing:
        """Which tokens go to which expert."""
        return route(index_TK, weight_TK, num_experts)

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Any call that is not a product with a weight."""
        return func(*args, **kwargs)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is route:
            return self.routing(*args, **kwargs)
        if func is mark_tokens:
            # Held, or its memory could become another tensor's.
            self._marked = (args[0], args[1])
            return args[0]
        x, weight, linear = _operands(func, args, kwargs)
        if x is not None and weight is not None:
            use = self._use(weight, linear)
            if use is not None:
                result = self.product(use, x, self._tokens(x))
                result = func(*args, **kwargs) if result is None else result
                self.produced(use, result)
                return result
        if func in _STACKED and len(args) == 2 and not kwargs:
            stacked = self._stacked(func, args[0], args[1])
            if stacked is not None:
                return stacked
        if func in _BATCHED:
            for arg in args:
                if self._is_weight(arg):
                    self.batched(self._parameters[_storage(arg)][0])
        result = self.other(func, args, kwargs)
        if func in _CASTS and self._is_weight(args[0]) and not self._is_weight(result):
            self._parameters[_storage(result)] = (self._parameters[_storage(args[0])][0], result)
            self._casts.append(result)
        return result

    def _stacked(self, func: Callable[..., Any], x: Any, weight: Any) -> torch.Tensor | None:
        """The product of all slices of a weight at once, slice by slice; None if it is none."""
        if not self._is_weight(weight) or weight.dim() != 3 or x.dim() != 3:
            return None
        if not len(x) == len(weight) == len(self._parameters[_storage(weight)][1]):
            return None
        parts = []
        for number in range(len(weight)):
            use = self._use(weight[number], False)
            if use is None:
                return None
            part = self.product(use, x[number], None)
            parts.append(
                func(x[number : number + 1], weight[number : number + 1])[0]
                if part is None
                else part
            )
        return torch.stack(parts)

    def _tokens(self, x: torch.Tensor) -> torch.Tensor | None:
        if self._marked is None or _storage(self._marked[0]) != _storage(x):
            return None
        return self._marked[1]

    def _is_weight(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and _storage(value) in self._parameters

    def _use(self, weight: torch.Tensor, linear: bool) -> Use | None:
        if weight.dim() != 2 or not self._is_weight(weight):
            return None
        path, parameter = self._parameters[_storage(weight)]
        as_OI = weight if linear else weight.t()
        matrix, expert = parameter, None
        if parameter.dim() == 3:
            expert = (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
            matrix = parameter[expert]
        if matrix.dim() != 2 or matrix.numel() != weight.numel():
            raise ModelError(
                f"{path}: the model multiplies by a part {tuple(weight.shape)} of the parameter "
                f"{tuple(parameter.shape)}; only whole matrices can be quantized"
            )
        straight = as_OI.shape == matrix.shape and as_OI.stride() == matrix.stride()
        return Use(
            path=path,
            expert=expert,
            shape=(as_OI.shape[0], as_OI.shape[1]),
            transposed=not straight,
        )


def _operands(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor | None, torch.Tensor | None, bool]:
    """(input, weight, whether the weight is [O, I]) of a product; Nones for anything else."""
    if func is nn.functional.linear:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        return args[0] if args else kwargs["input"], weight, True
    if func in _PRODUCTS and len(args) == 2:
        return args[0], args[1], False
    if func is torch.addmm and len(args) == 3:
        return args[1], args[2], False
    return None, None, False


def _storage(tensor: torch.Tensor) -> int:
    """Identity of the memory behind a tensor, the same for all its views; works on meta too.

    0 within vmap, whose tensors have none: masks are made there.
    """
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:
        return 0


class NoiseMode(MatmulMode):
    """Runs a sketch: every product is replaced by noise, the same in each of `batch` sequences.

    So no weights are needed, and what a product reads is a function of the other products' outputs.
    """

    def __init__(self, block: nn.Module, *, batch: int) -> None:
        super().__init__(block)
        self.batch = batch
        self._substitutes: dict[int, torch.Tensor] = {}
        self._kept: list[torch.Tensor] = []
        self._count = 0

    def noise(self, like: torch.Tensor, features: int) -> torch.Tensor:
        """Noise [..., features] for a product with input `like`, new at each call."""
        self._count += 1
        rows = like.numel() // like.shape[-1]
        if rows % self.batch:
            raise ModelError(f"a product reads {rows} rows of {self.batch} sequences")
        # Not always as many as tokens: blocks may pool them, or carry several streams.
        base = make_noise(rows // self.batch, features, seed=self._count)
        return base.repeat(self.batch, 1).reshape(*like.shape[:-1], features)

    def routing(self, index_TK: torch.Tensor, weight_TK: torch.Tensor, num_experts: int) -> Routing:
        rows = len(index_TK)
        weight = torch.full((rows,), 1.0 / num_experts)
        return [(expert, torch.arange(rows), weight) for expert in range(num_experts)]

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Matrices that are no weights (convolutions, tables) meet real values: give them some.
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if any(t.is_meta for t in tensors) and not all(t.is_meta for t in tensors):
            args, kwargs = tree_unflatten([self._real(leaf) for leaf in leaves], structure)
        return func(*args, **kwargs)

    def _real(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_meta:
            return value
        key = _storage(value)
        if key not in self._substitutes:
            generator = torch.Generator().manual_seed(len(self._substitutes))
            size = value.untyped_storage().nbytes() // value.element_size()
            self._substitutes[key] = torch.rand(size, generator=generator)
            self._kept.append(value)
        whole = self._substitutes[key]
        return whole.as_strided(value.shape, value.stride(), value.storage_offset())


class _Discover(NoiseMode):
    """Records all products and which of them read the same tensor."""

    def __init__(self, block: nn.Module, *, batch: int) -> None:
        super().__init__(block, batch=batch)
        self.uses: list[Use] = []
        self.inputs: list[int] = []
        self.kept: dict[str, str] = {}
        self.routed = False
        self.looking: list[str] = []
        self.running: list[str] = []
        self._block = block
        self._seen: dict[tuple[Any, ...], int] = {}

    def product(
        self, use: Use, x: torch.Tensor, token_n: torch.Tensor | None
    ) -> torch.Tensor | None:
        self._kept.append(x)  # else its memory, and with it its identity, is used again
        number = self._seen.setdefault(_identity(x), len(self._seen))
        if use.key not in {seen.key for seen in self.uses}:
            self.uses.append(use)
            self.inputs.append(number)
        return self.noise(x, use.shape[0])

    def routing(self, index_TK: torch.Tensor, weight_TK: torch.Tensor, num_experts: int) -> Routing:
        self.routed = any(use.expert is None and use.shape[0] == num_experts for use in self.uses)
        return super().routing(index_TK, weight_TK, num_experts)

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().other(func, args, kwargs)
        if self.running and looks_up(func, result):
            self.looking.append(self.running[-1])
        return result

    def batched(self, path: str) -> None:
        owner = self._block.get_submodule(path.rpartition(".")[0])
        self.kept[path] = (
            f"{type(owner).__name__} multiplies by this weight in a product of more than two "
            "dimensions, of which rows and columns cannot be told apart"
        )


def _identity(x: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two tensors with the same memory, layout of rows and version."""
    try:
        flat = x.view(-1, x.shape[-1])
    except RuntimeError:
        return (id(x),)
    return (_storage(x), flat.storage_offset(), flat.shape, flat.stride(), x._version)


def noise_like(hidden_BTH: torch.Tensor, batch: int) -> torch.Tensor:
    """Noise in the shape of one sequence's hidden states [1, ..., H], the same `batch` times.

    Of hidden states that do not have sequences first it is noise throughout.
    """
    shape = hidden_BTH.shape if hidden_BTH.shape[0] != batch else (1, *hidden_BTH.shape[1:])
    noise = make_noise(math.prod(shape[:-1]), shape[-1], seed=0).view(shape)
    return noise if noise.shape == hidden_BTH.shape else noise.expand_as(hidden_BTH).contiguous()


def make_noise(tokens: int, features: int, *, seed: int) -> torch.Tensor:
    """Noise [tokens, features], magnitudes 0.5..1.5; of the first two tokens one sign each.

    So that behind a ReLU no channel is dead for all tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(tokens, features, generator=generator) + 0.5
    sign = torch.randint(0, 2, (tokens, features), generator=generator) * 2 - 1
    sign[:1], sign[1:2] = 1, -1
    return noise * sign


def sketch_(block: nn.Module) -> nn.Module:
    """The meta block itself, in float32: vectors get random values, matrices stay without any."""
    generator = torch.Generator().manual_seed(0)
    for module in block.modules():
        own = dict(module.named_parameters(recurse=False))
        for name, parameter in own.items():
            value = (
                torch.empty_like(parameter, dtype=torch.float32)
                if parameter.dim() > 1
                else torch.rand(parameter.shape, generator=generator) + 0.5
            )
            # Noise stands for a product with its bias; some models add the bias themselves.
            if name == "bias" and "weight" in own and own["weight"].dim() > 1:
                value.zero_()
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return block


def discover(
    drawn: nn.Module, forward: Callable[[nn.Module], Any], *, batch: int, whole: bool = False
) -> BlockTrace:
    """The trace of a block from its sketch; `forward` calls it with recorded arguments.

    Raises ModelError if the trial run fails, or if it leaves out layers of a list, which of a
    `whole` body are other towers.
    """
    mode = _Discover(drawn, batch=batch)
    try:
        with (
            torch.no_grad(),
            mode,
            watched(drawn) as read,
            attentions(drawn) as attended,
            running(drawn) as mode.running,
        ):
            output = forward(drawn)
    # The block's own code fails on what it does not expect in its own way.
    except ModelError:
        raise
    except Exception as error:
        raise StackError(
            f"{type(drawn).__name__}: a trial run of the block on noise fails, so its weights "
            f"cannot be listed: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    used = {use.path for use in mode.uses}
    linears = (
        f"{path}.weight"
        for path, module in drawn.named_modules()
        if isinstance(module, nn.Linear) or hasattr(module, "nf")
    )
    kept = dict(mode.kept)
    for path in linears:
        if path in used or path in kept:
            continue
        if not whole and any(part.isdigit() for part in path.split(".")):
            raise StackError(
                f"{path}: the block {type(drawn).__name__} does not multiply by this weight in a "
                "trial run; blocks that choose among layers of a list cannot be quantized"
            )
        kept[path] = OUTSIDE if path in read else UNREACHED
    fused = {use.path for use in mode.uses if use.expert is not None}
    uses, inputs = with_all_slices(
        mode.uses, mode.inputs, {path: len(drawn.get_parameter(path)) for path in fused}
    )
    return BlockTrace(
        uses=uses,
        inputs=inputs,
        outputs=len(output) if isinstance(output, (tuple, list)) else None,
        read={
            **{use.path: BARE for use in mode.uses if _is_bare(drawn, use)},
            **dict.fromkeys(read, OUTSIDE),
        },
        kept=kept,
        attentions=attended,
        routed=mode.routed,
        looking=tuple(dict.fromkeys(attended or mode.looking)),
    )


def _is_bare(block: nn.Module, use: Use) -> bool:
    """Whether the weight belongs to no layer that a quantized one can replace."""
    owner, _, leaf = use.path.rpartition(".")
    linear = isinstance(block.get_submodule(owner), (nn.Linear, Conv1D)) and leaf == "weight"
    return use.expert is None and not linear


TapCallback = Callable[[str, torch.Tensor], None]


class Tap(MatmulMode):
    """Calls back once per distinct input with the valid tokens' rows [n, I]."""

    def __init__(
        self,
        block: nn.Module,
        keys: dict[tuple[str, int | None], str],
        mask_BT: torch.Tensor | None,
        callback: TapCallback,
    ) -> None:
        super().__init__(block)
        self._keys, self._callback = keys, callback
        valid = None if mask_BT is None else mask_BT.reshape(-1).bool()
        self._valid = None if valid is None or bool(valid.all()) else valid
        # Input -> the weight that was the first to read it.
        self._done: dict[str, tuple[str, int | None]] = {}

    def start(self) -> None:
        """Forgets which inputs were seen: a new forward begins."""
        self._done.clear()
        self._marked = None

    def product(
        self, use: Use, x: torch.Tensor, token_n: torch.Tensor | None
    ) -> torch.Tensor | None:
        key = self._keys.get(use.key)
        if key is None or self._done.setdefault(key, use.key) != use.key:
            # Another weight that reads the same; a weight that is used again reads something new.
            return None
        if use.expert is not None and not x.numel():
            return None
        rows_nI = x.reshape(-1, x.shape[-1])
        if self._valid is not None:
            valid = self._valid.to(rows_nI.device)
            if token_n is None and len(rows_nI) != len(valid):
                raise ModelError(
                    f"{use.path}: reads {len(rows_nI)} rows of {len(valid)} tokens, so padding "
                    "cannot be told apart; use batches without padding"
                )
            kept = valid if token_n is None else valid[token_n]
            rows_nI = rows_nI[kept]
            token_n = None if token_n is None else token_n[kept]
        self.tell(use, key, rows_nI, token_n)
        return None

    def tell(self, use: Use, key: str, x_nI: torch.Tensor, token_n: torch.Tensor | None) -> None:
        """Calls back with the rows of an input; token_n: which tokens they are, for experts."""
        self._callback(key, x_nI)
