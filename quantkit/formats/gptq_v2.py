"""GPTQ, version 2: zeros are stored as they are.  Bytes: quantkit/formats/gptq.py."""

from __future__ import annotations

from typing import ClassVar

from quantkit.formats.gptq import Gptq


class GptqV2(Gptq):
    """Weight-only integers of 2, 3, 4 and 8 bits, zeros as they are (GPTQModel)."""

    name: ClassVar[str] = "gptq_v2"
    stored_less: ClassVar[int] = 0
