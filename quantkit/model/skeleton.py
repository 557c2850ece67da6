"""A transformers model without weights: built on the meta device, its blocks found.

Everything that must know transformers' ways of building models is here and in `names`.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from quantkit.checkpoint.config import check_config, check_counts
from quantkit.checkpoint.files import Source
from quantkit.errors import ModelError, QuantkitError
from quantkit.model import experts


def build(source: Source, *, trust_remote_code: bool, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model on the meta device, in eval mode, with our experts loop.

    Raises ModelError if the model type is unknown or needs code that is not trusted.
    """
    experts.register()
    config = load_config(source, trust_remote_code)
    dtype = dtype or model_dtype(source, config)
    auto = _auto_class(config)
    try:
        with torch.device("meta"):
            model = auto.from_config(
                config,
                dtype=dtype,
                experts_implementation=experts.IMPLEMENTATION,
                trust_remote_code=trust_remote_code,
                **_without_pooler(auto, config, source),
            )
    # Model code, some of it remote, fails in any way it likes on a config it does not expect.
    except Exception as error:
        raise ModelError(
            f"model type {config.model_type!r} cannot be built as "
            f"{_first_name(config) or 'a causal language model'}: {_first_line(error)}"
        ) from error
    _empty_(model, dtype)
    model.eval()
    model.requires_grad_(False)
    return model


def _empty_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Puts parameters and persistent buffers that were made elsewhere on the meta device too.

    Some classes draw them in ways that heed no device; what holds numbers would count as loaded.
    """
    made: dict[int, torch.Tensor] = {}

    def emptied(tensor: torch.Tensor) -> torch.Tensor:
        own = dtype if tensor.is_floating_point() else tensor.dtype
        return made.setdefault(id(tensor), torch.empty_like(tensor, device="meta", dtype=own))

    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                empty = nn.Parameter(emptied(parameter), requires_grad=False)
                module._parameters[key] = made[id(parameter)] = empty
        for key, buffer in module._buffers.items():
            stored = key not in module._non_persistent_buffers_set
            if buffer is not None and not buffer.is_meta and stored:
                module._buffers[key] = emptied(buffer)


def _auto_class(config: PreTrainedConfig) -> Any:
    """The class of the kind that the checkpoint names among its architectures.

    One that names none of them is a causal LM, else an encoder with its head, a multimodal model,
    of which the text part is quantized, or at last a model without a head.
    """
    kind = type(config)
    named = _first_name(config)
    for mapping, auto in (
        (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification),
        (MODEL_MAPPING, AutoModel),
        (MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM),
    ):
        if kind in mapping and named in _class_names(mapping[kind]):
            return auto
    for mapping, auto in (
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
        (MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM),
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
        (MODEL_MAPPING, AutoModel),
    ):
        if kind in mapping:
            return auto
    remote = getattr(config, "auto_map", None) or {}
    for auto in (AutoModelForSequenceClassification, AutoModel, AutoModelForMaskedLM):
        if str(remote.get(auto.__name__)).rpartition(".")[2] == named:
            return auto
    return AutoModelForCausalLM


def is_encoder(source: Source, *, trust_remote_code: bool = False) -> bool:
    """Whether a checkpoint is a masked language model, whose tokens see those after them."""
    return _auto_class(load_config(source, trust_remote_code)) is AutoModelForMaskedLM


def _first_name(config: PreTrainedConfig) -> str:
    """The class that a checkpoint says it is of; "" if it does not say."""
    return str((getattr(config, "architectures", None) or [""])[0])


def _class_names(classes: Any) -> tuple[str, ...]:
    """Names of an entry of transformers' mappings, which may be several classes."""
    found = classes if isinstance(classes, tuple) else (classes,)
    return tuple(one.__name__ for one in found)


def _without_pooler(auto: Any, config: PreTrainedConfig, source: Source) -> dict[str, bool]:
    """What makes a headless model without the pooler that its checkpoint does not hold.

    The states of tokens, which embeddings are made of, do not depend on it.
    """
    found = MODEL_MAPPING.get(type(config), None)
    if auto is not AutoModel or found is None or isinstance(found, tuple):
        return {}
    option = "add_pooling_layer"
    if option not in inspect.signature(found.__init__).parameters:
        return {}
    held = any("pooler" in name.split(".") for name in source.names())
    return {} if held else {option: False}


def load_config(source: Source, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration object of a checkpoint."""
    data = source.config
    check_config(data, "config.json")
    check_counts(data, source.names(), "config.json")
    model_type = data.get("model_type")
    remote = any(str(name).startswith("AutoModel") for name in data.get("auto_map") or {})
    if remote and trust_remote_code:
        path = getattr(source, "path", None)
        if path is None:
            raise ModelError("remote code needs a checkpoint on disk; save the model and give that")
        return AutoConfig.from_pretrained(path, trust_remote_code=True)
    if model_type is None:
        raise ModelError("config.json has no model_type; this is no Transformers checkpoint")
    if model_type not in CONFIG_MAPPING:
        hint = (
            "the checkpoint brings its own code: pass --trust-remote-code if you trust it"
            if remote
            else "a newer transformers may know it"
        )
        raise ModelError(f"model type {model_type!r} is unknown to transformers; {hint}")
    try:
        return _configured(model_type, data)
    # Validation of configurations raises errors of several libraries.
    except Exception as error:
        named = _culprit(model_type, data)
        due = "" if named is None else f" (because of {named}: {ascii(data[named])[:60]})"
        raise ModelError(
            f"config.json is no valid configuration of {model_type!r}: {_first_line(error)}{due}"
        ) from error


def model_dtype(source: Source, config: PreTrainedConfig) -> torch.dtype:
    """The config's dtype, else that of most of the stored bytes.

    Raises ModelError if that is no type to compute in.
    """
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype is None:
        sizes: dict[torch.dtype, int] = {}
        for name in source.names():
            info = source.info(name)
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        dtype = max(sizes, key=lambda key: sizes[key])
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ModelError(f"weights in {dtype} cannot be quantized; give float32, float16, bfloat16")
    return dtype


def conv1d_names(model: nn.Module, names: tuple[str, ...]) -> frozenset[str]:
    """The checkpoint names of Conv1D weights, whose own storage is [I, O]."""
    paths = [f"{path}.weight" for path, module in model.named_modules() if type(module) is Conv1D]
    prefix = getattr(model, "base_model_prefix", "")
    held = {*paths, *(path.removeprefix(f"{prefix}.") for path in paths)}
    return frozenset(held.intersection(names))


def tables(model: nn.Module) -> list[str]:
    """Paths of the weights that are looked up by number: embeddings of tokens and positions."""
    found = model.named_modules()
    return [f"{path}.weight" for path, module in found if isinstance(module, nn.Embedding)]


def positions(model: PreTrainedModel) -> int | None:
    """The longest text the model reads, in tokens; None if its configuration sets no limit.

    Of a table of positions that has one for padding, those up to it stand for no token.
    """
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(found, int | float) or found < 1:
        return None
    tokens = model.get_input_embeddings()
    for module in model.modules():
        table = isinstance(module, nn.Embedding) and module is not tokens
        if table and module.num_embeddings == found and module.padding_idx is not None:
            return int(found) - int(module.padding_idx) - 1
    return int(found)


def fills_masks(model: PreTrainedModel) -> bool:
    """Whether it is an encoder whose head tells masked tokens."""
    kind = type(model.config)
    known = kind in MODEL_FOR_MASKED_LM_MAPPING
    return known and type(model).__name__ in _class_names(MODEL_FOR_MASKED_LM_MAPPING[kind])


def linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Module path -> (O, I) of every linear layer, those of other towers included."""
    return {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def outside_paths(model: PreTrainedModel, blocks: str) -> list[str]:
    """Parameters and persistent buffers that the text path may need besides the blocks.

    Leaves out what hangs together with another stack of blocks: vision and audio towers.
    """
    others = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not f"{path}.".startswith(f"{blocks}."):
            parent = path.rpartition(".")[0]
            while parent and f"{blocks}.".startswith(f"{parent}."):
                parent = ""
            if parent:
                others.append(_tower(parent, blocks))
    skipped = [f"{blocks}.", *(f"{path}." for path in others)]
    return [
        path
        for path in model.state_dict()
        if not any(path.startswith(prefix) for prefix in skipped)
    ]


def fill_buffers(
    model: PreTrainedModel, part: nn.Module, path: str, *, skip: nn.Module | None = None
) -> None:
    """Computes the non-persistent buffers (rotary tables and the like) below `part`, on the CPU.

    `path` is where `part`, or the original of it, is in the model: its owner initialises it.
    Nothing below `skip` is touched.  Raises ModelError for one that its owner leaves as it is.
    """
    skipped = set() if skip is None else set(skip.modules())
    for name, module in part.named_modules():
        if module in skipped:
            continue
        wanted = [
            key
            for key in module._non_persistent_buffers_set
            if (value := module._buffers.get(key)) is not None and value.is_meta
        ]
        if not wanted:
            continue
        blank = {key: torch.empty_like(module._buffers[key], device="cpu") for key in wanted}
        module._buffers.update(blank)
        full = ".".join(filter(None, (path, name)))
        with torch.no_grad():
            owner_of(model, full)._init_weights(module)
            left = {key: value for key, value in blank.items() if not _is_set(module, key, value)}
            if left:
                _ask_ancestors(model, full, left)
        for key, buffer in left.items():
            if not _is_set(module, key, buffer):
                raise ModelError(
                    f"{full}.{key}: {type(module).__name__} computes this buffer when it is made "
                    "and nowhere else, but models are built without values first; its code has to "
                    "compute it in _init_weights too, as transformers 5 demands"
                )


def _is_set(module: nn.Module, key: str, blank: torch.Tensor) -> bool:
    """Whether a buffer that was `blank` has been written or replaced since."""
    return module._buffers[key] is not blank or blank._version > 0 or not blank.numel()


def _ask_ancestors(model: PreTrainedModel, path: str, blank: Mapping[str, torch.Tensor]) -> None:
    """Lets modules around the one at `path` compute its buffers, as falcon_h1's stack does.

    The blanks stand in the model for the time being: `path` may have been copied.
    """
    module = model.get_submodule(path)
    before = {key: module._buffers[key] for key in blank}
    module._buffers.update(blank)
    try:
        parts = path.split(".")
        for end in range(len(parts) - 1, -1, -1):
            around = ".".join(parts[:end])
            if all(_is_set(module, key, value) for key, value in blank.items()):
                return
            owner_of(model, around)._init_weights(model.get_submodule(around))
    finally:
        module._buffers.update(before)


def clone(block: nn.Module) -> nn.Module:
    """A copy of a meta block that shares its configuration objects."""
    configs = {
        id(value): value
        for module in block.modules()
        for value in vars(module).values()
        if isinstance(value, PreTrainedConfig)
    }
    memo: dict[int, Any] = dict(configs)
    shadow = block.__dict__.pop("forward", None)
    try:
        return copy.deepcopy(block, memo)
    finally:
        if shadow is not None:
            block.__dict__["forward"] = shadow


def signature(block: nn.Module) -> str:
    """Equal for blocks that differ in weights and position only."""
    digest = hashlib.sha256()
    for path, module in block.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str)) and key not in ("layer_idx", "layer_id")
        }
        shapes = {
            key: None if p is None else tuple(p.shape) for key, p in module._parameters.items()
        }
        digest.update(repr((path, type(module), sorted(plain.items()), shapes)).encode())
    return digest.hexdigest()


def head_sizes(model: PreTrainedModel) -> tuple[int, ...]:
    """Sizes an attention head may have, by the configuration."""
    config = model.config.get_text_config()
    hidden = getattr(config, "hidden_size", None)
    heads = _values(config, "num_attention_heads")
    sizes = {*_values(config, "head_dim"), *(hidden // count for count in heads if hidden)}
    return tuple(sorted(size for size in sizes if size))


def _values(config: PreTrainedConfig, name: str) -> set[int]:
    """The values of a field, which may differ from layer to layer; without None and 0."""
    varied = getattr(config, "is_heterogeneous", False)
    found = (getattr(one, name, None) for one in (config.per_layer_config if varied else [config]))
    return {value for value in found if isinstance(value, int) and value}


def _with_floats(value: Any) -> Any:
    """The value with transformers' spelling of numbers that JSON lacks undone.

    They are written as {"__float__": "Infinity"}.
    """
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_floats(part) for key, part in value.items()}
    return [_with_floats(part) for part in value] if isinstance(value, list) else value


@contextmanager
def model_errors(model: nn.Module) -> Iterator[None]:
    """A context in which what a model's own code raises becomes a ModelError.

    Its values may have the right types and still contradict each other.
    """
    try:
        yield
    except QuantkitError:
        raise
    except Exception as error:
        if _raised_by_quantkit(error):
            raise
        raise ModelError(
            f"{type(model).__name__}: its code fails on this config.json: "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error


def _raised_by_quantkit(error: Exception) -> bool:
    """True if the innermost function outside of torch is one of ours.

    Those that torch hands every call to, while a pass runs, are not counted.
    """
    names = [
        str(frame.f_globals.get("__name__", ""))
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name != "__torch_function__"
    ]
    outside = [name for name in names if not f"{name}.".startswith("torch.")]
    return not outside or outside[-1].partition(".")[0] in ("quantkit", "quantkit_eval")


def _configured(model_type: str, data: Mapping[str, Any]) -> PreTrainedConfig:
    config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(_with_floats(dict(data)))
    for part in (config, config.get_text_config()):
        # Models of today fail on the tuples that this asked older ones for.
        part.return_dict = True
    return config


def _culprit(model_type: str, data: Mapping[str, Any]) -> str | None:
    """The field of config.json without which the rest is valid; None if that is no single one."""
    for name in data:
        try:
            _configured(model_type, {k: v for k, v in data.items() if k != name})
        except Exception:
            continue
        return name
    return None


def _first_line(error: Exception) -> str:
    """What an error says in one line; of a failed validation the field and what it takes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    shown = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    # A name alone, or half of a character, is no sentence.
    return ascii(shown)[1:-1] if isinstance(error, KeyError) or not shown.isprintable() else shown


def _tower(parent: str, blocks: str) -> str:
    """The outermost ancestor of `parent` that does not hold the blocks."""
    parts = parent.split(".")
    for end in range(1, len(parts) + 1):
        ancestor = ".".join(parts[:end])
        if not f"{blocks}.".startswith(f"{ancestor}."):
            return ancestor
    return parent


def owner_of(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The innermost PreTrainedModel around a module path."""
    found, module = model, model
    for part in path.split("."):
        module = getattr(module, part, None)
        if module is None:
            break
        if isinstance(module, PreTrainedModel):
            found = module
    return found
