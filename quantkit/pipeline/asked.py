"""What can be wrong with a request and its model's directory, found without torch or transformers.

The command line asks here first: importing the rest takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quantkit.calibration.data.tokens import check_seed
from quantkit.checkpoint.files import refuse_quantized
from quantkit.checkpoint.live import LiveSource
from quantkit.checkpoint.source import Reader
from quantkit.errors import ModelError
from quantkit.formats.format import WholeFormat
from quantkit.formats.open import open_source
from quantkit.formats.registry import asked_format, make_format
from quantkit.inference.device import choose_device
from quantkit.pipeline.budget.wish import check_wish
from quantkit.pipeline.options import QuantizeOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_asked(
    model: str | PreTrainedModel, requests: Sequence[QuantizeOptions], *, tokenizer: Any = None
) -> Reader:
    """The model's tensors, once options and configuration allow a run.

    Raises the QuantkitError of what is wrong.
    """
    for request in requests:
        check_seed(request.seed)
        check_wish(request)
        _ = request.loaded, request.max_ram_bytes, request.max_vram_bytes, request.max_shard_bytes
        _ = request.until_seconds
        if request.format is not None:
            make_format(request.format)
    # To look for a GPU takes torch.
    if any(request.device != "auto" for request in requests):
        device_of(requests)
    first = requests[0]
    if not isinstance(model, str):
        source: Reader = LiveSource(model, tokenizer=tokenizer)
    else:
        source = open_source(model, revision=first.revision)
    # A quantized one is decoded first; what that decodes to is asked again.
    if not (first.requantize and isinstance(source.config.get("quantization_config"), dict)):
        refuse_quantized(source)
    return source


def whole_format(request: QuantizeOptions) -> WholeFormat | None:
    """The format, if it is a container of a whole model."""
    fmt = asked_format(request.format, request.loaded.scheme)
    return fmt if isinstance(fmt, WholeFormat) else None


def device_of(requests: Sequence[QuantizeOptions]) -> str:
    """Where the jobs run; blocks of ggml are fitted on the CPU.

    Raises BackendError or ModelError for what cannot be.
    """
    name = requests[0].device
    if all(whole_format(request) is None for request in requests):
        return choose_device(name)
    if name not in ("auto", "cpu"):
        raise ModelError(f"--device {name}: gguf files are quantized on the CPU")
    return "cpu"
