"""GPTQ, version 1: zeros are stored less one.  Bytes: quantkit/formats/_gptq_layout.py."""

from __future__ import annotations

from typing import ClassVar

from quantkit.formats._gptq_layout import GptqLayout


class Gptq(GptqLayout):
    """Weight-only integers of 2, 3, 4 and 8 bits, zeros less one (AutoGPTQ, vLLM)."""

    name: ClassVar[str] = "gptq"
    stored_less: ClassVar[int] = 1
