"""Which code multiplies by a quantized weight: fused kernels where they exist, else the reference.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, cast, get_args, runtime_checkable

import torch
from quantkit_kernels.ops import int8_dot
from quantkit_kernels.ops.device import Device
from torch import Tensor

from quantkit.errors import BackendError
from quantkit.inference.kernels import RoundedInputKernel, kernel_class
from quantkit.inference.reference import ReferenceKernel
from quantkit.numbers.tensor import QuantizedTensor, tensors_of, with_tensors

Backend = Literal["auto", "triton", "cpu", "cpu-int8", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)


@runtime_checkable
class WeightKernel(Protocol):
    """A quantized weight in the layout of one backend; also an nn.Module.

    `decodes_always`: on a CPU one row of x costs as much decoding as many, since no op reads the
    codes.
    """

    name: str
    decodes_always: bool

    @property
    def quantized_tensor(self) -> QuantizedTensor:
        """The tensor it was made of, bit for bit."""
        ...

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., I] -> [..., O] in the dtype of x."""
        ...


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A kernel, and why it is not the one that the backend is for (None: it is)."""

    kernel: WeightKernel
    reason: str | None


def check_backend(backend: str, device: torch.device | str) -> Backend:
    """The backend's name; BackendError if it is unknown or cannot run on the device."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise BackendError(f"device {str(device)[:40]!r}: {str(error).splitlines()[0]}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"device {device}: torch {torch.__version__} sees no GPU; use cpu")
    if backend not in BACKENDS:
        raise BackendError(f"backend {backend!r} is unknown; allowed: {', '.join(BACKENDS)}")
    if backend == "triton" and kind != "cuda":
        raise BackendError(
            f"backend triton runs on CUDA devices, the model is on {kind}; "
            "use auto, cpu or reference, or load it with device='cuda'"
        )
    if backend in ("cpu", "cpu-int8") and kind != "cpu":
        raise BackendError(
            f"backend {backend}: the model is on {kind}; use auto, triton or reference"
        )
    if backend == "cpu-int8" and (reason := int8_dot.unavailable()):
        raise BackendError(f"backend cpu-int8: {reason}; use auto, cpu or reference")
    return cast(Backend, backend)


def choose_kernel(tensor: QuantizedTensor, backend: Backend, dtype: torch.dtype) -> Chosen:
    """The weight repacked for a backend and the device it is on; `dtype` is what x will have."""
    if backend == "reference":
        return Chosen(kernel=ReferenceKernel(tensor), reason=None)
    kind = tensor.codes.device.type
    if kind not in ("cpu", "cuda"):
        return Chosen(kernel=ReferenceKernel(tensor), reason=f"no kernels for {kind} devices")
    device: Device = "triton" if kind == "cuda" else "cpu"
    missed = None
    if backend == "cpu-int8":
        missed = RoundedInputKernel.supported(tensor, dtype, device)
        if missed is None:
            return Chosen(kernel=RoundedInputKernel(tensor, device), reason=None)
    make = kernel_class(tensor)
    if make is None:
        return Chosen(kernel=ReferenceKernel(tensor), reason=f"{tensor.scheme.name} has no kernel")
    reason = make.supported(tensor, dtype, device)
    if reason is not None:
        both = reason if missed is None else f"{missed}; {reason}"
        return Chosen(kernel=ReferenceKernel(tensor), reason=both)
    return Chosen(kernel=make(tensor, device), reason=missed)


def moved(tensor: QuantizedTensor, move: Callable[[Tensor], Tensor]) -> QuantizedTensor:
    """The tensor with all its parts moved; dtypes stay."""
    parts = {name: move(part) for name, part in tensors_of(tensor.scale).items()}
    return dataclasses.replace(
        tensor,
        codes=move(tensor.codes),
        scale=with_tensors(tensor.scale, parts),
        zero=None if tensor.zero is None else move(tensor.zero),
        columns=None if tensor.columns is None else move(tensor.columns),
        input_scale=None if tensor.input_scale is None else move(tensor.input_scale),
    )
