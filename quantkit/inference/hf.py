"""quantkit's kernels behind `AutoModelForCausalLM.from_pretrained`.

transformers picks a quantizer by the config's `quant_method` and refuses another one on a quantized
checkpoint.  `hf_config` therefore replaces the checkpoint's `quantization_config` by one of method
"quantkit", whose quantizer is registered on the first call.
"""

from __future__ import annotations

import copy
import os
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantkit.checkpoint.output import refuse_unfinished
from quantkit.errors import ModelError
from quantkit.formats.open import open_source
from quantkit.formats.registry import format_of
from quantkit.inference.backend import check_backend, moved
from quantkit.inference.fused import fuse_
from quantkit.inference.load import (
    Target,
    check_all_used,
    pieces_of,
    read_missing_,
    replace_modules_,
    stored_names,
    targets_of,
)
from quantkit.inference.save import QuantkitQuantizer, SavedTensors, attach_quantizer_, find_module
from quantkit.model import skeleton
from quantkit.model.decoded import Unpacked
from quantkit.model.names import map_names, read_parameter
from quantkit.numbers.tensor import QuantizedTensor

_METHOD = "quantkit"


def hf_config(
    path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    fuse: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedConfig:
    """A config with which `from_pretrained(path, config=...)` runs on quantkit's kernels.

    For every format quantkit reads; `backend` and `fuse` are those of `quantkit.load`.  Of an
    unquantized checkpoint it is the plain config.  What the model saves is the canonical checkpoint
    again.  Raises what `quantkit.load` raises.
    """
    check_backend(backend, "cuda" if backend == "triton" else "cpu")
    refuse_unfinished(path)
    source = open_source(path, revision=revision)
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        path, revision=revision, trust_remote_code=trust_remote_code
    )
    fields = source.config.get("quantization_config")
    if fields is None:
        return config
    format_of(source)  # raises for formats that are not read
    _register()
    config.quantization_config = {
        "quant_method": _METHOD,
        "fields": fields,
        "path": os.fspath(path),
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "backend": backend,
        "fuse": fuse,
    }
    return config


class RuntimeConfig(QuantizationConfigMixin):
    """What `hf_config` puts into a config: where the checkpoint is, and what shall run it.

    `fields` is the checkpoint's own `quantization_config`, which is what gets saved.
    """

    def __init__(
        self,
        fields: dict[str, Any],
        path: str,
        backend: str,
        fuse: bool,
        revision: str | None,
        trust_remote_code: bool,
        quant_method: str = _METHOD,
    ) -> None:
        self.quant_method: Any = quant_method
        self.fields = fields
        self.path = path
        self.backend = backend
        self.fuse = fuse
        self.revision = revision
        self.trust_remote_code = trust_remote_code

    def to_dict(self) -> dict[str, Any]:
        """The checkpoint's own fields."""
        return copy.deepcopy(self.fields)


class _Placeholder(nn.Module):
    """Stands where a quantized layer will be, with nothing to read or to initialise."""

    def __init__(self) -> None:
        super().__init__()
        # Some models' initialisation reaches for it by name; the mark makes it pass over.
        self.weight = torch.empty(0)
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]


class LoadingQuantizer(HfQuantizer):
    """Hides quantized layers from transformers' reading, then puts quantkit's in their place."""

    requires_calibration = True
    quantization_config: RuntimeConfig

    def validate_environment(self, *args: object, **options: Any) -> None:
        """Raises ModelError for a device map over several devices."""
        places = options.get("device_map")
        if isinstance(places, dict) and len(set(places.values())) > 1:
            raise ModelError(
                f"device_map spreads the model over {sorted(map(str, set(places.values())))}; "
                "quantkit's layers want one device, as in device_map={'': 'cuda'}"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        # The caller makes new tensors on the meta device; what is read here is real.
        with torch.device("cpu"):
            self._hide(model)

    def _hide(self, model: PreTrainedModel) -> None:
        config = self.quantization_config
        self._source = open_source(config.path, revision=config.revision)
        self._format = format_of(self._source)
        self._stored = self._format.weights(self._source)
        self._view = Unpacked(self._source, self._format, self._stored)
        self._view.transposed = skeleton.conv1d_names(model, self._view.names())
        self._names = map_names(model, self._view)
        check_all_used(self._stored, self._names, model, self._view)
        self._targets = tuple(targets_of(model, self._names, frozenset(self._stored)))
        unread = {name for weight in self._stored.values() for name in weight.tensors}
        for target in self._targets:
            _put(model, target, _Placeholder())
            inside = [path for path in self._names.pieces if path.startswith(f"{target.path}.")]
            unread.update(piece.name for path in inside for piece in self._names.of(path))
        known = set(model._keys_to_ignore_on_load_unexpected or ())
        patterns = {f"^{re.escape(name)}$" for name in unread}
        model._keys_to_ignore_on_load_unexpected = known | patterns

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        device = model.device
        backend = check_backend(self.quantization_config.backend, device)
        for target in self._targets:
            _put(model, target, target.module)

        def unpack(name: str) -> QuantizedTensor:
            tensor = self._format.unpack(self._stored[name], self._source)
            return moved(tensor, lambda part: part.to(device))

        def keep(path: str, old: Tensor) -> Tensor:
            return read_parameter(self._names, path, self._view, old.dtype).to(device)

        replace_modules_(model, self._names, frozenset(self._stored), unpack, keep, backend)
        if self.quantization_config.fuse:
            fuse_(model)
        read_missing_(model, self._names, self._view)
        model.to(device)
        saved = SavedTensors(
            pieces=pieces_of(self._names),
            transposed=self._view.transposed,
            extra=(*stored_names(self._names.unmapped, self._stored), *self._view.cache_names),
            source=self._source,
        )
        attach_quantizer_(model, self._format, self.quantization_config.fields, saved)
        assert isinstance(model.hf_quantizer, QuantkitQuantizer)
        model.requires_grad_(False)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype asked for."""
        return dtype

    def is_serializable(self) -> bool:
        """True: the checkpoint's tensors can always be written."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: codes have no gradients."""
        return False


def _register() -> None:
    """Makes transformers know the method "quantkit"; may be repeated."""
    if _METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(_METHOD)(RuntimeConfig)
        register_quantizer(_METHOD)(LoadingQuantizer)


def _put(model: nn.Module, target: Target, module: nn.Module) -> None:
    parent, _, leaf = target.path.rpartition(".")
    setattr(find_module(model, parent), leaf, module)
