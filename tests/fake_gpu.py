"""A GPU that is none: tensors that say they lie on cuda:0, with their numbers in the host's memory.

Everything that runs on a GPU runs here, with its values, and what would fail there because tensors
lie on two devices fails here: operations that mix them raise what CUDA raises.  How often values
came to the host is counted, by the line that asked for them.  The kernel of GPTQ's inner loop is
left out.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

from quantkit.methods.columns import ColumnRounder
from quantkit.pipeline.duration import Speeds

GPU = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parents[1]
_ATEN = torch.ops.aten
# What takes tensors of both: copies, and indices that may come from the host.
_MIXED = {
    _ATEN._to_copy.default,
    _ATEN.copy_.default,
    _ATEN.index.Tensor,
    _ATEN.index_put_.default,
    _ATEN.index_put.default,
}
_TO_HOST = {_ATEN._local_scalar_dense.default, _ATEN.equal.default, _ATEN.is_nonzero.default}
_VALUES = {"__int__", "__float__", "__bool__", "__index__", "item", "tolist"}


class OnGpu(torch.Tensor):
    """A tensor of the GPU; `inner` has its numbers."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            # Where no CUDA is linked, guards of the real device fail: it is told when asked for.
            device="cpu",
            dispatch_device=True,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner.detach()
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGpu({self.inner})"

    def __deepcopy__(self, memo: dict[int, Any]) -> OnGpu:
        copied = OnGpu(self.inner.clone())
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True
        return copied

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


def _tensors(parts: Any) -> Iterator[Tensor]:
    if isinstance(parts, Tensor):
        yield parts
    elif isinstance(parts, list | tuple):
        for part in parts:
            yield from _tensors(part)
    elif isinstance(parts, dict):
        yield from _tensors(list(parts.values()))


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is torch.ops.prim.device.default:
        return GPU
    found = list(_tensors((args, kwargs)))
    here = any(isinstance(one, OnGpu) for one in found)
    if here and func not in _MIXED:
        strays = [one for one in found if not isinstance(one, OnGpu) and one.ndim]
        if strays:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! (in {func}: {[(str(one.device), *one.shape) for one in found]})"
            )
    if func in (_ATEN.index.Tensor, _ATEN.copy_.default, _ATEN.index_put_.default):
        # It is the first one that says where; a host's tensor takes no index from the GPU.
        first = args[0]
        stray = not isinstance(first, OnGpu) and here
        if func is not _ATEN.copy_.default and stray:
            raise RuntimeError("indices should be either on cpu or on the same device (cpu)")
        here = isinstance(first, OnGpu)
    if func is _ATEN._fused_sdp_choice.default:
        return 0
    if here and func in _TO_HOST:
        FakeGpu.visits[_place()] += 1
    device = kwargs.get("device")
    if device is not None:
        here = torch.device(device).type == "cuda"
        if here:
            kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)
    plain_args, plain_kwargs = tree_map(_inner, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    if not here:
        return out
    out = tree_map(lambda one: OnGpu(one) if isinstance(one, Tensor) else one, out)
    if device is not None or not any(isinstance(one, OnGpu) for one in found):
        return out
    return return_and_correct_aliasing(func, args, kwargs, out)


def _inner(part: Any) -> Any:
    return part.inner if isinstance(part, OnGpu) else part


def _place() -> str:
    """The innermost line of ours that is being run."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT / "quantkit"):
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "elsewhere"


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


class FakeGpu(TorchFunctionMode):
    """What torch's Python functions would refuse in a build without CUDA."""

    visits: ClassVar[Counter[str]] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.pop("pin_memory", False):
            kwargs["device"] = "cpu"
        if func in (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu):
            return _moved(func, args, kwargs)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and any(
            isinstance(one, OnGpu) for one in _tensors(args)
        ):
            return _indexed(func, *args)
        if getattr(func, "__name__", "") in _VALUES and isinstance(args[0], OnGpu):
            self.visits[_place()] += 1
            return func(args[0].inner)
        if func in (torch.tensor, torch.as_tensor) and _is_gpu(kwargs.get("device")):
            return OnGpu(func(*args, **{**kwargs, "device": "cpu"}))
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if "not linked with support for cuda" not in str(error):
                raise
            # Some of torch's Python functions want a guard of the device.
            found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
            return tree_map(lambda one: OnGpu(one) if isinstance(one, Tensor) else one, found)


def _indexed(func: Any, tensor: Tensor, index: Any, *value: Any) -> Any:
    """What C++ would do under a guard of the device."""
    here, masks = isinstance(tensor, OnGpu), [one for one in _tensors([index]) if one.ndim]
    if not here and any(isinstance(one, OnGpu) for one in masks):
        raise RuntimeError("indices should be either on cpu or on the same device (cpu)")
    # Slices are copied to from anywhere.
    strays = [one for one in _tensors(value) if isinstance(one, OnGpu) != here and one.ndim]
    if masks and strays:
        raise RuntimeError("Expected all tensors to be on the same device, cuda:0 and cpu")
    out = func(_inner(tensor), tree_map(_inner, index), *map(_inner, value))
    return OnGpu(out) if here and not value else out


def _is_gpu(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def _moved(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensor, *rest = args
    devices = [*rest, *kwargs.values()]
    to_gpu = func is torch.Tensor.cuda or any(_is_gpu(one) for one in devices)
    to_gpu |= any(isinstance(one, OnGpu) for one in rest)
    to_host = func is torch.Tensor.cpu or any(
        isinstance(one, str | torch.device) and torch.device(one).type == "cpu" for one in devices
    )
    if not to_gpu and not to_host:
        return func(*args, **kwargs)
    kept = [one for one in rest if isinstance(one, torch.dtype)]
    kept += [one for one in (kwargs.get("dtype"),) if one is not None]
    stays = isinstance(tensor, OnGpu) == to_gpu and (not kept or kept[0] == tensor.dtype)
    if stays and not kwargs.get("copy"):
        return tensor
    if isinstance(tensor, OnGpu) and to_host:
        FakeGpu.visits[_place()] += 1
    plain = _inner(tensor)
    plain = plain.to(kept[0], copy=True) if kept else plain.clone()
    return OnGpu(plain) if to_gpu else plain


@contextlib.contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """A machine whose cuda:0 is the fake one; gives how often values came to the host, by line."""
    answers: dict[str, Callable[..., Any]] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (1 << 34, 1 << 34),
        "max_memory_reserved": lambda *_: 0,
        "get_device_name": lambda *_: "none",
        "get_device_capability": lambda *_: (9, 0),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    plain_mm = torch.mm

    def mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        if out_dtype is None:
            return plain_mm(a, b)
        # Of 16-bit numbers, each product exact.
        return plain_mm(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch, "mm", mm)
    # The kernel has its own test; interpreted it takes minutes.
    made = ColumnRounder.__init__

    def plain(self: ColumnRounder, *scales: Any) -> None:
        made(self, *scales)
        self._grid = None

    monkeypatch.setattr(ColumnRounder, "__init__", plain)
    # That one too; its twin in PyTorch gives the sums in another order.
    if importlib.util.find_spec("triton") is not None:
        moments = importlib.import_module("quantkit_kernels.gpu.moments")
        monkeypatch.setattr(moments, "column_moments", moments.reference)
    # Products that measure a GPU's speed take minutes here.
    speeds = Speeds(own=1e14, wide=1e13, passes=1e12, share=1.0)
    monkeypatch.setattr(Speeds, "measure", lambda *_, **__: speeds)
    FakeGpu.visits = Counter()
    # A module's parameters become others instead of taking the data of others.
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Dispatch(), FakeGpu():
            yield FakeGpu.visits
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
