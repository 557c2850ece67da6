"""A quantized checkpoint as numbers to compute with: its weights decoded, not rounded again."""

from __future__ import annotations

from typing import ClassVar

import torch

from quantkit.checkpoint.source import Source
from quantkit.formats.format import reader_of
from quantkit.model.decoded import Unpacked
from quantkit.model.split_experts import split_experts
from quantkit.numbers.scheme import Scheme


class Decoded(Unpacked):
    """`Unpacked` whose quantized weights are read in float32, though `info` names their own dtype:
    who computes in it rounds nothing."""

    decoded_dtype: ClassVar[torch.dtype | None] = torch.float32

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Scheme of every quantized weight by its checkpoint name."""
        return {name: weight.scheme for name, weight in self.stored.items()}


def open_decoded(source: Source, *, trust_remote_code: bool = False) -> Source | Decoded:
    """The source, experts one by one, if it is not quantized, else its decoded view.

    Raises FormatError for a quantized checkpoint in an unknown format.
    """
    if reader_of(source) is None:
        return split_experts(source, trust_remote_code=trust_remote_code)
    return Decoded.open(source, trust_remote_code=trust_remote_code)
