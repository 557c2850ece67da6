"""GPTQ: codes chosen one input channel after the other, each making up for the errors before it.

Shapes: O out features, I in features, G groups per row, B channels in a block, R rows in a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from quantkit_kernels.lazy import torch

from quantkit.methods.columns import column_rounder
from quantkit.methods.extent import extent_of, scale_and_zero
from quantkit.methods.feedback import Feedback, feedback_of
from quantkit.methods.parts import Rounded, Work
from quantkit.methods.rounding._descent import Descent, normal_matrix
from quantkit.methods.rounding.nearest import nearest_codes
from quantkit.methods.stats import Needs, Stats
from quantkit.numbers.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

# Rows solved together: a function of the shape and the kind of device alone, so that codes never
# depend on the budget.
_CHUNK_ROWS, _CHUNK_ELEMENTS = 4096, 1 << 24
# On a GPU, where a chunk has to fill the chip.
_GPU_CHUNK_ELEMENTS = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Gptq:
    """GPTQ (Frantar, Ashkboos, Hoefler, Alistarh 2022, https://arxiv.org/abs/2210.17323, alg. 1).

    damp       added to the Gram matrix's diagonal, as a part of its mean
    act_order  round the channels with the largest mean square first
    block      channels between two updates of the remaining weights; speed only
    sweeps     coordinate descent afterwards: each sweep takes every group's scale (least squares,
               groups of up to 256) and every code anew; none can raise the error
    groups     "static": scales come from the range, of the original weights; "dynamic": each
               group's full range is taken anew when its first channel is due, from the weights as
               corrected so far (integers with groups only, act_order false)

    Sweeps over codes follow QuantEase (Behdin et al. 2023, https://arxiv.org/abs/2309.01885,
    algorithm 1), which starts from nearest codes and leaves the scales alone.

    Deviations: updates in the LDLQ form (see methods/feedback.py), equal in exact arithmetic;
    groups stay in the original channel order although rounding does not (static, so no index of
    groups at run time); a channel that calibration never saw active is rounded to nearest, not set
    to zero; a failed factorisation raises the damping, then uses float64, then rounds to nearest,
    and says so; `dynamic` sees the corrections made within the current block (the reference code
    takes a group's range from weights that lack them).
    """

    damp: float = 0.01
    act_order: bool = True
    block: int = 128
    sweeps: int = 0
    groups: Literal["static", "dynamic"] = "static"

    def __post_init__(self) -> None:
        if not 0 <= self.damp <= 1:
            raise ValueError(f"damp {self.damp}: must lie in 0..1")
        if self.block < 1:
            raise ValueError(f"block {self.block}: must be at least 1")
        if self.sweeps < 0:
            raise ValueError(f"sweeps {self.sweeps}: must be 0 or more")
        if self.groups not in ("static", "dynamic"):
            raise ValueError(f"groups {self.groups!r}: must be static or dynamic")
        if self.groups == "dynamic" and self.act_order:
            raise ValueError("groups dynamic needs act_order false: groups follow the channels")

    def needs(self, scheme: Scheme) -> Needs:
        """The full Gram matrix."""
        return Needs(gram=-1)

    def work(self, rows: int, columns: int, scheme: Scheme) -> Work:
        """A factorisation, the feeding forward of errors, and each sweep's."""
        products = 2.0 * columns**3 + (1 + 2 * self.sweeps) * 2.0 * rows * columns**2
        return Work(products=products, passes=(1 + self.sweeps) * 60.0 * rows * columns)

    def __call__(
        self,
        weight_OI: Tensor,
        scheme: Scheme,
        scale: Tensor,
        zero: Tensor | None,
        stats: Stats | None,
    ) -> Rounded:
        """Codes of a float32 weight; scale and zero: float32 [O, G]."""
        reason = None
        if stats is None or stats.count == 0:
            reason = "no calibration token reached this weight"
        elif scale.ndim != 2:
            reason = f"blocks of {scheme.group_size} straddle rows of {weight_OI.shape[1]} columns"
        if reason is None:
            assert stats is not None
            # Weights on block types come one by one and share the factorisation.
            keep = scheme.kind == "ggml"
            feedback = feedback_of(stats, damp=self.damp, act_order=self.act_order, keep=keep)
            if feedback is not None:
                rounded = self._solve(weight_OI, scheme, scale, zero, feedback)
                del feedback
                return self._descend(weight_OI, scheme, scale, zero, rounded, stats)
            reason = "the Gram matrix has no Cholesky factor, even damped and in float64"
        codes = nearest_codes(weight_OI, scheme, scale, zero)
        return Rounded(codes=codes, degraded=f"rounded to nearest: {reason}")

    def _solve(
        self,
        weight_OI: Tensor,
        scheme: Scheme,
        scale_OG: Tensor,
        zero_OG: Tensor | None,
        feedback: Feedback,
    ) -> Rounded:
        """Algorithm 1, rows in chunks."""
        dynamic = self.groups == "dynamic" and scheme.kind == "int"
        codes = torch.empty(weight_OI.shape, dtype=torch.uint8, device=weight_OI.device)
        if dynamic:
            scale_OG, zero_OG = scale_OG.clone(), None if zero_OG is None else zero_OG.clone()
        for part in _chunks(weight_OI):
            zero = None if zero_OG is None else zero_OG[part]
            rows = _Rows(
                weight_OI[part], scheme, scale_OG[part], zero, feedback, self.block, dynamic
            )
            codes[part] = rows.solve()
        note = None
        if feedback.damp > self.damp or feedback.double:
            note = f"damping raised to {feedback.damp:g}" + (
                ", in float64" if feedback.double else ""
            )
        if not dynamic:
            return Rounded(codes=codes, degraded=note)
        return Rounded(codes=codes, degraded=note, scale=scale_OG, zero=zero_OG)

    def _descend(
        self,
        weight_OI: Tensor,
        scheme: Scheme,
        scale_OG: Tensor,
        zero_OG: Tensor | None,
        rounded: Rounded,
        stats: Stats,
    ) -> Rounded:
        """The sweeps of coordinate descent, rows in chunks."""
        if not self.sweeps:
            return rounded
        assert stats.gram is not None
        matrix, diagonal = normal_matrix(stats.gram, self.damp)
        codes = rounded.codes
        scale = (scale_OG if rounded.scale is None else rounded.scale).clone()
        zero = zero_OG if rounded.zero is None else rounded.zero
        for part in _chunks(weight_OI):
            descent = Descent(
                weight_OI[part],
                codes[part],
                scheme,
                scale[part],
                None if zero is None else zero[part],
                matrix,
                diagonal,
            )
            for _ in range(self.sweeps):
                descent.sweep()
            codes[part], scale[part] = descent.result()
        if rounded.scale is None and torch.equal(scale, scale_OG):
            return Rounded(codes=codes, degraded=rounded.degraded)
        return Rounded(codes=codes, degraded=rounded.degraded, scale=scale, zero=zero)


def _chunks(weight_OI: Tensor) -> Iterator[slice]:
    rows, columns = weight_OI.shape
    if weight_OI.is_cuda:
        step = max(1, _GPU_CHUNK_ELEMENTS // columns)
    else:
        step = max(1, min(_CHUNK_ROWS, _CHUNK_ELEMENTS // columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class _Rows:
    """GPTQ for a chunk of rows, transposed so that a channel's weights lie side by side.

    Channels are kept in the feedback's order and rounded from the last to the first.
    """

    def __init__(
        self,
        weight_RI: Tensor,
        scheme: Scheme,
        scale_RG: Tensor,
        zero_RG: Tensor | None,
        feedback: Feedback,
        block: int,
        dynamic: bool,
    ) -> None:
        self.scheme, self.lower, self.order = scheme, feedback.lower, feedback.order
        self.scale_RG, self.zero_RG, self.dynamic = scale_RG, zero_RG, dynamic
        self.group_size = weight_RI.shape[1] // scale_RG.shape[1]
        # A group's range is taken between blocks, when every correction due has been made.
        self.block = self.group_size if dynamic and self.group_size % block else block
        self.round = column_rounder(scheme, scale_RG, zero_RG)
        self.inner = self.round.inner
        if scheme.kind == "ggml" and not weight_RI.is_cuda:
            # Blocks of ggml had one step of feedback from the start, and keep their bytes.
            self.inner = self.block
        self.group_of = (feedback.order // self.group_size).to(torch.int32)
        # `weight` stays as it is; `target` carries the corrections made so far.
        self.weight = weight_RI.t()[feedback.order]
        self.target = self.weight.clone()
        self.codes = torch.empty_like(self.weight, dtype=torch.uint8)

    def solve(self) -> Tensor:
        """Codes uint8 [R, I] in the original order of channels."""
        for stop in range(self.weight.shape[0], 0, -self.block):
            start = max(stop - self.block, 0)
            if self.dynamic and (self.weight.shape[0] - stop) % self.group_size == 0:
                self._take_range(stop)
            error = self._solve_block(start, stop)
            if start:
                self.target[:start].addmm_(self.lower[start:stop, :start].t(), error)
        codes = torch.empty_like(self.codes)
        codes[self.order] = self.codes
        return codes.t()

    def _take_range(self, stop: int) -> None:
        """Sets the range of the group whose channels end at `stop` from the corrected weights."""
        group, part = int(self.group_of[stop - 1]), slice(stop - self.group_size, stop)
        # `target` holds what rounded channels ask for; the rest of the group answers to that, as
        # if it could be left unrounded.
        delta = torch.linalg.solve_triangular(
            self.lower[part, part].t(),
            self.target[part] - self.weight[part],
            upper=True,
            unitriangular=True,
        )
        corrected = delta.add_(self.weight[part]).t()
        scale, zero = scale_and_zero(extent_of(corrected), self.scheme)
        self.scale_RG[:, group : group + 1] = scale
        if zero is not None and self.zero_RG is not None:
            self.zero_RG[:, group : group + 1] = zero
        self.round.set_group_(group, scale[:, 0], None if zero is None else zero[:, 0])

    def _solve_block(self, start: int, stop: int) -> Tensor:
        """Rounds channels start..stop; returns weight - value of each, [B, R]."""
        error = torch.empty_like(self.weight[start:stop])
        for inner_stop in range(stop, start, -self.inner):
            inner_start = max(inner_stop - self.inner, start)
            done = error[inner_start - start : inner_stop - start]
            self._solve_inner(inner_start, inner_stop, done)
            if inner_start > start:
                factor = self.lower[inner_start:inner_stop, start:inner_start].t()
                self.target[start:inner_start].addmm_(factor, done)
        return error

    def _solve_inner(self, start: int, stop: int, error_BR: Tensor) -> None:
        """Rounds channels start..stop one by one; `error_BR` receives weight - value of each."""
        part = slice(start, stop)
        self.round.solve(
            self.group_of[part],
            self.target[part],
            self.weight[part],
            error_BR,
            self.codes[part],
            self.lower[part, part],
            down=True,
        )
