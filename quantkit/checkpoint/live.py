"""A Hugging Face model in memory as a source: the tensors `save_pretrained` would write, unwritten.

Names are checkpoint names: transformers' own reverse conversion is applied, so that fused experts
come out one by one and tied weights are left out.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.dtypes import LABELS
from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.source import Reader
from quantkit.errors import CheckpointError

_Tensors = dict[str, "torch.Tensor"]


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """How one checkpoint tensor comes about: convert these parameters, take this result."""

    parameters: tuple[str, ...]
    # Slice of the one fused parameter to convert alone; None converts whole parameters.
    slice: int | None
    result: str


class LiveSource(Reader):
    """The checkpoint of a model in memory; converts a parameter at a time, when it is read.

    Refers to the model's tensors as they are now and copies what is read; config and side files are
    those `save_pretrained` writes, and with `tokenizer` its files too.  Raises CheckpointError for
    something that is no such model, an adapter, a quantized or an offloaded one.
    """

    def __init__(self, model: Any, *, tokenizer: Any = None) -> None:
        from transformers import PreTrainedModel
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        if not isinstance(model, PreTrainedModel):
            raise CheckpointError(
                f"{type(model).__name__}: not a model; give a transformers PreTrainedModel, "
                "a directory or a repository name on the Hub"
            )
        _refuse_unsuited(model)
        self._model = model
        state = model.state_dict()
        for name in model._keys_to_ignore_on_save or ():
            state.pop(name, None)
        for name, tensor in state.items():
            if tensor.device.type == "meta":
                raise CheckpointError(
                    f"{name}: the weight is offloaded, not in memory; load the model without "
                    "device_map offloading, or give the directory of its checkpoint"
                )
        self._state: _Tensors = remove_tied_weights_from_state_dict(state, model)
        self._origins, self._infos = _trace(model, self._state)
        for info in self._infos.values():
            if info.label not in LABELS:
                raise CheckpointError(f"{info.name}: safetensors cannot hold {info.dtype}")
        self._recent: dict[tuple[tuple[str, ...], int | None], _Tensors] = {}
        self._files = _saved_files(model, tokenizer)
        self._config_content = self._files.pop("config.json")

    @property
    def config(self) -> dict[str, Any]:
        """config.json as `save_pretrained` writes it, parsed anew at each call."""
        config: dict[str, Any] = json.loads(self._config_content)
        return config

    def names(self) -> tuple[str, ...]:
        """Names of all tensors `save_pretrained` would write, sorted."""
        return tuple(sorted(self._infos))

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor; CheckpointError if there is none of this name."""
        try:
            return self._infos[name]
        except KeyError:
            raise CheckpointError(f"the model has no tensor {name}") from None

    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of the flattened tensor [stop - start], fresh CPU memory."""
        info = self.info(name)
        if not 0 <= start <= stop <= info.numel:
            raise IndexError(f"{name}: elements {start}..{stop} of {info.numel}")
        tensor = self._convert(name)
        if not tensor.is_contiguous() and info.shape[0] > 1:
            # Flattening a transposed or sliced view copies it: take only the rows concerned.
            row = max(info.numel // info.shape[0], 1)
            first = start // row
            tensor = tensor[first : -(-stop // row)]
            start, stop = start - first * row, stop - first * row
        return tensor.reshape(-1)[start:stop].to("cpu", copy=True)

    def side_files(self) -> dict[str, Path | bytes]:
        """Relative name -> content of generation config, remote code and the tokenizer's files."""
        return dict(sorted(self._files.items()))

    def _config_bytes(self) -> bytes:
        return self._config_content

    def _convert(self, name: str) -> torch.Tensor:
        """The tensor on its device, maybe a view of the model's parameter: not to be written to."""
        origin = self._origins[name]
        key = (origin.parameters, origin.slice)
        if key not in self._recent:
            # Two results: names in sorted order alternate between an expert's two parameters.
            while len(self._recent) > 1:
                del self._recent[next(iter(self._recent))]
            group = {parameter: self._state[parameter] for parameter in origin.parameters}
            if origin.slice is not None:
                part = slice(origin.slice, origin.slice + 1)
                group = {parameter: tensor[part] for parameter, tensor in group.items()}
            self._recent[key] = _revert(self._model, group)
        return self._recent[key][origin.result]


def _revert(model: Any, state: Mapping[str, torch.Tensor]) -> _Tensors:
    """The checkpoint tensors of these parameters, by transformers' reverse conversion."""
    from transformers.core_model_loading import revert_weight_conversion

    result: _Tensors = revert_weight_conversion(model, dict(state))
    return result


def _trace(
    model: Any, state: Mapping[str, torch.Tensor]
) -> tuple[dict[str, _Origin], dict[str, TensorInfo]]:
    """Where each checkpoint tensor comes from and what it is, found by converting empty tensors.

    Parameters are converted alone where that gives what converting all of them gives, else a layer
    together, else all.  Raises CheckpointError if nothing reproduces the whole conversion.
    """
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    whole = _infos(_revert(model, empty))
    keys: tuple[Callable[[str], str], ...] = (
        lambda name: name,
        lambda name: re.sub(r"(\.\d+\.).*", r"\1", name),
        lambda name: "",
    )
    for key in keys:
        groups: dict[str, list[str]] = {}
        for name in state:
            groups.setdefault(key(name), []).append(name)
        origins = _try_groups(model, empty, groups.values(), whole)
        if origins is not None:
            _slice_experts(model, state, empty, origins)
            return origins, whole
    raise AssertionError("converting all parameters together must equal itself")


def _try_groups(
    model: Any,
    empty: _Tensors,
    groups: Iterable[list[str]],
    whole: Mapping[str, TensorInfo],
) -> dict[str, _Origin] | None:
    """The origins of all tensors if each group is converted alone; None if that gives others."""
    origins: dict[str, _Origin] = {}
    found: dict[str, TensorInfo] = {}
    for group in groups:
        try:
            infos = _infos(_revert(model, {name: empty[name] for name in group}))
        except Exception:
            # Conversions that need more parameters fail in their own ways; a larger group follows.
            return None
        if set(infos) & set(found):
            return None
        found |= infos
        for name in infos:
            origins[name] = _Origin(parameters=tuple(group), slice=None, result=name)
    return origins if found == whole else None


def _slice_experts(
    model: Any, state: Mapping[str, torch.Tensor], empty: _Tensors, origins: dict[str, _Origin]
) -> None:
    """Changes `origins` so that experts fused in a parameter [E, ...] are converted one at a time.

    Done if converting the first slice gives the names of expert 0, and converting the last two
    slices together and one by one gives the same values.
    """
    results: dict[str, set[str]] = {}
    for name, origin in origins.items():
        if len(origin.parameters) == 1:
            results.setdefault(origin.parameters[0], set()).add(name)
    for parameter, names in results.items():
        shape = empty[parameter].shape
        if len(shape) < 3 or shape[0] < 2 or len(names) % shape[0]:
            continue
        try:
            first = _revert(model, {parameter: empty[parameter][:1]})
            pair = _revert(model, {parameter: state[parameter][-2:]})
            last = _revert(model, {parameter: state[parameter][-1:]})
        except Exception:
            # Not a conversion of independent slices: the parameter is converted whole.
            continue
        numbered = {name: _numbered(name, shape[0], names) for name in first}
        covered = {name for family in numbered.values() for name in family}
        if covered != names or len(first) * shape[0] != len(names):
            continue
        if not all(torch.equal(pair[family[1]], last[name]) for name, family in numbered.items()):
            continue
        for result, family in numbered.items():
            for expert, name in enumerate(family):
                origins[name] = _Origin(parameters=(parameter,), slice=expert, result=result)


def _numbered(name: str, count: int, names: set[str]) -> list[str]:
    """The names with 0..count-1 in place of that number 0 of `name` for which all exist, or []."""
    for match in re.finditer(r"(?<=\.)0(?=\.)", name):
        family = [
            f"{name[: match.start()]}{number}{name[match.end() :]}" for number in range(count)
        ]
        if names.issuperset(family):
            return family
    return []


def _infos(state: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape))
        for name, tensor in state.items()
    }


def _refuse_unsuited(model: Any) -> None:
    """Raises CheckpointError if what the model holds is not the plain weights of a checkpoint."""
    name = type(model).__name__
    if getattr(model, "hf_quantizer", None) is not None:
        raise CheckpointError(
            f"{name}: the model is already quantized; load the original full-precision model"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise CheckpointError(
            f"{name}: the model carries PEFT adapters; merge them (merge_and_unload) first"
        )


def _saved_files(model: Any, tokenizer: Any) -> dict[str, bytes]:
    """Name -> content of the files beside the weights, as `save_pretrained` writes them."""
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if model.is_remote_code():
            from transformers.dynamic_module_utils import custom_object_save

            custom_object_save(model, folder, config=config)
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
