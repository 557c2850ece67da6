"""What calibration saw at one matmul input, kept as sums so that batches and processes add up.

Shapes: T tokens, I in features, S sampled tokens.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from quantkit_kernels.lazy import torch

from quantkit.errors import NumericsError

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE_ROWS = 512
# Column tiles of the Gram product: only tiles on and below the diagonal are computed.  Narrow
# ones compute less that is mirrored; the bits are the same for any width.
_GRAM_TILE = 192
# A whole number of those, at whose borders the upper triangle is filled in.
_GPU_GRAM_TILE = 10 * _GRAM_TILE
# Columns whose tokens are added up together in float64: few enough to stay in a core's cache.
_SUM_COLUMNS = 128

Stream = Literal["original", "quantized"]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Which statistics a method reads; the rest is not gathered.

    `gram` is 0 for none, -1 for the full matrix, or a block size for its block diagonal only.
    `drift` takes a second run, of the original model on its own hidden states.
    """

    moments: bool = False
    gram: int = 0
    sample: bool = False
    drift: bool = False

    def __or__(self, other: Needs) -> Needs:
        gram = max(self.gram, other.gram)
        if -1 in (self.gram, other.gram) or any(g and gram % g for g in (self.gram, other.gram)):
            gram = -1
        return Needs(
            moments=self.moments or other.moments,
            gram=gram,
            sample=self.sample or other.sample,
            drift=self.drift or other.drift,
        )

    def __bool__(self) -> bool:
        return self.moments or self.gram != 0 or self.sample or self.drift


@dataclass(kw_only=True)
class Stats:
    """Sums over the tokens that reached one input of I features.

    count        tokens
    sum_abs      float64 [I]
    sum_sq       float64 [I]
    max_abs      float32 [I]
    gram         float32 [I, I] = XᵀX, or [I/g, g, g] its block diagonal, or None
    sample       up to 512 token rows [S, I] in the activation's dtype, chosen by a hash of the
                 token's position (`sample_keys` int64 [S]), so batching does not change it
    drift        float32 [I, I] = Xᵀ(X₀ - X), X₀ what the original model has where this one has X;
                 None if not asked for, or if not every token comes here (routed experts)
    lack         float32 [I, O] = XᵀR, R what the block's output lacks of the original's before the
                 last matrix is quantized, if that matrix adds to it; then there is no drift
    stream       whose activations: the original model's, or the ones carrying quantization error
    base         position of the first token, for the hash: parts that are merged differ in it
    factor       what methods/feedback.py keeps of the Gram matrix between a range and a rounding
    """

    features: int
    stream: Stream = "quantized"
    count: int = 0
    sum_abs: Tensor = field(default_factory=lambda: torch.empty(0))
    sum_sq: Tensor = field(default_factory=lambda: torch.empty(0))
    max_abs: Tensor = field(default_factory=lambda: torch.empty(0))
    gram: Tensor | None = None
    sample: Tensor | None = None
    sample_keys: Tensor | None = None
    drift: Tensor | None = None
    lack: Tensor | None = None
    base: int = 0
    factor: object | None = field(default=None, repr=False, compare=False)

    @classmethod
    def empty(
        cls,
        features: int,
        needs: Needs,
        *,
        stream: Stream = "quantized",
        device: str = "cpu",
        base: int = 0,
    ) -> Stats:
        """Statistics of no tokens yet, with room for what `needs` names."""
        stats = cls(
            features=features,
            stream=stream,
            base=base,
            sum_abs=torch.zeros(features, dtype=torch.float64, device=device),
            sum_sq=torch.zeros(features, dtype=torch.float64, device=device),
            max_abs=torch.zeros(features, dtype=torch.float32, device=device),
        )
        if needs.gram == -1:
            stats.gram = torch.zeros(features, features, device=device)
        elif needs.gram:
            assert features % needs.gram == 0, "group sizes are checked against shapes first"
            stats.gram = torch.zeros(features // needs.gram, needs.gram, needs.gram, device=device)
        if needs.drift:
            stats.drift = torch.zeros(features, features, device=device)
        if needs.sample:
            stats.sample_keys = torch.empty(0, dtype=torch.int64, device=device)
        return stats

    def update_(
        self,
        x_TI: Tensor,
        *,
        name: str,
        original: Tensor | None = None,
        lack_TO: Tensor | None = None,
    ) -> None:
        """Adds the tokens x [T, I].  Raises NumericsError naming the input if one is not finite.

        original [T, I]: what the original model has for the same tokens; lack [T, O], in its place:
        what the block's output lacks of the original's.
        """
        if x_TI.shape[0] == 0:
            return
        sum_abs, sum_sq, largest = _moments(x_TI)
        if not bool(torch.isfinite(largest).all()):
            raise NumericsError(
                f"{name}: an activation is NaN or infinite; the model overflows on this text "
                f"in {x_TI.dtype}, or a weight before it is damaged"
            )
        self.sum_abs += sum_abs
        self.sum_sq += sum_sq
        self.max_abs = torch.maximum(self.max_abs, largest)
        if self.gram is not None:
            if self.gram.ndim == 3:
                x = x_TI.to(torch.float32)
                grouped = x.view(x.shape[0], self.gram.shape[0], -1).permute(1, 2, 0)
                self.gram.baddbmm_(grouped, grouped.transpose(1, 2))
            else:
                add_gram_(self.gram, x_TI)
        if self.drift is not None:
            if original is None:
                self.drift = None
            else:
                add_product_(self.drift, x_TI, original.to(torch.float32) - x_TI)
        if lack_TO is not None:
            if self.lack is None:
                shape = (self.features, lack_TO.shape[1])
                self.lack = torch.zeros(shape, device=x_TI.device)
            add_product_(self.lack, x_TI, lack_TO.to(torch.float32))
        if self.sample_keys is not None:
            self._update_sample_(x_TI)
        self.count += x_TI.shape[0]

    def _update_sample_(self, x_TI: Tensor) -> None:
        first = self.base + self.count
        positions = torch.arange(first, first + x_TI.shape[0], device=x_TI.device)
        self._keep_smallest_(_scramble(positions), x_TI)

    def _keep_smallest_(self, keys: Tensor, rows: Tensor) -> None:
        assert self.sample_keys is not None
        if self.sample is not None:
            keys, rows = torch.cat([self.sample_keys, keys]), torch.cat([self.sample, rows])
        order = torch.argsort(keys, stable=True)[:SAMPLE_ROWS]
        self.sample_keys, self.sample = keys[order], rows[order].clone()

    def merge_(self, other: Stats) -> None:
        """Adds another part's sums; the order that keeps the bytes is that of a tree.

        Both before `finish_`.
        """
        assert self.features == other.features and self.stream == other.stream
        self.sum_abs += other.sum_abs
        self.sum_sq += other.sum_sq
        self.max_abs = torch.maximum(self.max_abs, other.max_abs)
        if self.gram is not None and other.gram is not None:
            self.gram += other.gram
        if self.drift is None or other.drift is None:
            self.drift = None
        else:
            self.drift += other.drift
        if self.lack is None:
            self.lack = other.lack
        elif other.lack is not None:
            self.lack += other.lack
        if other.sample is not None and other.sample_keys is not None:
            self._keep_smallest_(other.sample_keys, other.sample)
        self.count += other.count

    def finish_(self) -> None:
        """Mirrors the Gram matrix's lower triangle; called once, after the last update."""
        if self.gram is not None and self.gram.ndim == 2:
            for start in range(0, self.features, _GRAM_TILE):
                stop = min(start + _GRAM_TILE, self.features)
                self.gram[start:stop, stop:] = self.gram[stop:, start:stop].T

    @property
    def mean_abs(self) -> Tensor:
        """Mean |x| per channel, float32 [I]; zeros if no token was seen."""
        return (self.sum_abs / max(self.count, 1)).to(torch.float32)

    @property
    def mean_sq(self) -> Tensor:
        """Mean x² per channel, float32 [I]: the importance of a weight's column."""
        return (self.sum_sq / max(self.count, 1)).to(torch.float32)

    def rescaled(self, scale_I: Tensor) -> Stats:
        """The statistics of x / scale: what readers see once a transform divided by `scale`."""
        inverse = (1.0 / scale_I.to(torch.float64)).to(self.sum_abs.device)
        gram, drift = self.gram, self.drift
        factor = inverse.to(torch.float32)
        if drift is not None:
            drift = (drift * factor[:, None]).mul_(factor[None, :])
        if gram is not None:
            if gram.ndim == 3:
                factor = factor.view(gram.shape[0], -1)
                gram = gram * factor[:, :, None] * factor[:, None, :]
            else:
                gram = (gram * factor[:, None]).mul_(factor[None, :])
        sample = self.sample
        if sample is not None:
            sample = (sample.to(torch.float64) * inverse).to(torch.float32)
        return Stats(
            features=self.features,
            stream=self.stream,
            count=self.count,
            sum_abs=self.sum_abs * inverse,
            sum_sq=self.sum_sq * inverse**2,
            max_abs=(self.max_abs.to(torch.float64) * inverse).to(torch.float32),
            gram=gram,
            sample=sample,
            sample_keys=self.sample_keys,
            drift=drift,
            lack=None if self.lack is None else self.lack * factor[:, None],
        )


def _moments(x_TI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ|x|, Σx² (float64 [I]) and max |x| (float32 [I]) over tokens; on a GPU one kernel."""
    if x_TI.is_cuda and importlib.util.find_spec("triton") is not None:
        from quantkit_kernels.gpu.moments import column_moments

        return column_moments(x_TI)
    magnitude = x_TI.to(torch.float32, copy=True).abs_()
    largest = magnitude.amax(0)
    return _column_sums(magnitude), _column_sums(magnitude.square_()), largest


def _column_sums(x_TI: Tensor) -> Tensor:
    """Sums over tokens in float64 [I]: on a CPU the bits of `sum`, four times as fast."""
    if x_TI.is_cuda:
        return x_TI.sum(0, dtype=torch.float64)
    sums = torch.empty(x_TI.shape[1], dtype=torch.float64, device=x_TI.device)
    for start in range(0, x_TI.shape[1], _SUM_COLUMNS):
        part = slice(start, start + _SUM_COLUMNS)
        torch.sum(x_TI[:, part].to(torch.float64), 0, out=sums[part])
    return sums


def add_gram_(gram_II: Tensor, x_TI: Tensor) -> None:
    """Adds XᵀX to the tiles on and below the diagonal; about half the work of the full product.

    Activations in 16 bits are multiplied as such where the hardware can, with float32 accumulation:
    the products are exact.  On CPUs with bfloat16 instructions that takes half the time, on GPUs a
    tenth (there sums are off by some 6e-5 of the diagonal, a hundredth of GPTQ's damping).
    """
    if x_TI.is_cuda:
        for start in range(0, x_TI.shape[1], _GPU_GRAM_TILE):
            stop = start + _GPU_GRAM_TILE
            add_product_(gram_II[start:, start:stop], x_TI[:, start:], x_TI[:, start:stop])
        return
    exact = x_TI.dtype == torch.bfloat16 and has_bf16_units()
    x = x_TI.to(torch.float32)
    with _bf16_products() if exact else contextlib.nullcontext():
        for start in range(0, x.shape[1], _GRAM_TILE):
            stop = min(start + _GRAM_TILE, x.shape[1])
            gram_II[start:, start:stop].addmm_(x[:, start:].T, x[:, start:stop])


def add_product_(sum_IO: Tensor, x_TI: Tensor, y_TO: Tensor) -> None:
    """Adds XᵀY; on GPUs a bfloat16 X meets a float32 Y in two parts of bfloat16, 16 bits of it."""
    if not _half_on_gpu(x_TI) or (y_TO.dtype == torch.float32 and x_TI.dtype != torch.bfloat16):
        sum_IO.addmm_(x_TI.to(torch.float32).T, y_TO.to(torch.float32))
        return
    parts = [y_TO]
    if y_TO.dtype == torch.float32:
        high = y_TO.to(torch.bfloat16)
        parts = [high, y_TO.sub(high).to(torch.bfloat16)]
    x_TI = x_TI.contiguous()
    for part in parts:
        # Column tiles bound the product that waits to be added.
        for start in range(0, part.shape[1], _GPU_GRAM_TILE):
            columns = slice(start, start + _GPU_GRAM_TILE)
            tile = part[:, columns].contiguous()
            sum_IO[:, columns].add_(torch.mm(x_TI.T, tile, out_dtype=torch.float32))


def _half_on_gpu(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def has_bf16_units() -> bool:
    """True if this CPU multiplies bfloat16 matrices in hardware."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and (
        "avx512" in torch.backends.cpu.get_cpu_capability().lower()
        or "amx" in torch.backends.cpu.get_cpu_capability().lower()
    )


@contextlib.contextmanager
def _bf16_products() -> Iterator[None]:
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _scramble(index: Tensor) -> Tensor:
    """A fixed pseudo-random int64 per position: splitmix64's finaliser (Steele et al. 2014)."""
    x = index.to(torch.int64) * -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
