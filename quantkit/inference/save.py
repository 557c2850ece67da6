"""What `save_pretrained` and `push_to_hub` write for a quantized model: the canonical checkpoint.

transformers asks a model's `hf_quantizer` for the tensors to save; `QuantkitQuantizer` answers with
the packed tensors of its format, under the checkpoint's names.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.shards import joined
from quantkit.checkpoint.source import Source
from quantkit.errors import FormatError, ModelError
from quantkit.formats.format import BuiltFormat, FormatReader, PlannedWeight, WholeFormat
from quantkit.formats.registry import check_supported, demand_writer
from quantkit.inference.experts import PackedExperts
from quantkit.inference.fused import FusedLinear, SharedProduct
from quantkit.inference.layers import QuantExperts, QuantLinear, RowParts
from quantkit.model.refs import Piece


@dataclass(frozen=True, kw_only=True)
class SavedTensors:
    """Where the tensors of a model's checkpoint are.

    pieces      one per checkpoint tensor or quantized weight; tied parameters appear once
    transposed  names of weights that the unquantized checkpoint stores [I, O] (Conv1D)
    extra       tensors that no module holds (MTP heads), with the source that has them
    beside      those of them that are in memory
    """

    pieces: tuple[Piece, ...]
    transposed: frozenset[str]
    extra: tuple[str, ...]
    source: Source | None
    beside: Mapping[str, Tensor] = field(default_factory=dict)


class QuantkitConfig(QuantizationConfigMixin):
    """A `quantization_config` kept as it is, in the form transformers wants."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        # Not a method transformers knows: its rules about moving and casting do not apply here.
        self.quant_method: Any = "quantkit"
        self.fields = dict(fields)

    def to_dict(self) -> dict[str, Any]:
        """The fields as config.json has them."""
        return copy.deepcopy(self.fields)


class QuantkitQuantizer(HfQuantizer):
    """Lets transformers save a model whose layers are quantkit's."""

    def __init__(
        self,
        fmt: FormatReader,
        config: Mapping[str, Any],
        saved: SavedTensors,
        *,
        compileable: bool,
    ) -> None:
        super().__init__(QuantkitConfig(config))
        self.format = fmt
        self.saved = saved
        self.compileable = compileable

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Checkpoint name -> CPU tensor of everything the model holds, and no metadata."""
        return canonical_tensors(model, self.format, self.saved), {}

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile its step, as it does for static caches on GPUs."""
        return self.compileable

    def is_serializable(self) -> bool:
        """True: the checkpoint's tensors can always be written."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters are trained through the codes, which stay as they are."""
        return True


def attach_quantizer_(
    model: PreTrainedModel, fmt: FormatReader, config: Mapping[str, Any], saved: SavedTensors
) -> None:
    """Makes `model.save_pretrained` and `push_to_hub` write the canonical quantized checkpoint."""
    # Experts run one by one read the routing back, which breaks graphs at every layer.
    loops = any(isinstance(part, QuantExperts) and not part.sorted for part in model.modules())
    model.hf_quantizer = QuantkitQuantizer(fmt, config, saved, compileable=not loops)
    model.is_quantized = True
    model.quantization_method = "quantkit"
    model.config.quantization_config = copy.deepcopy(dict(config))
    # The quantizer hands out checkpoint names: transformers must not convert them once more.
    model._weight_conversions = []


def canonical_tensors(
    model: nn.Module, fmt: FormatReader, saved: SavedTensors
) -> dict[str, Tensor]:
    """Checkpoint name -> CPU tensor: quantized weights packed, everything else as it is now.

    Parameters the checkpoint did not have (added since) come under their module path.  Raises
    ModelError if a quantized layer is no longer where it was, FormatError if the format only reads,
    or reads schemes that it does not write.
    """
    writer = demand_writer(fmt)
    if isinstance(writer, BuiltFormat | WholeFormat):
        made = writer.built_by if isinstance(writer, BuiltFormat) else "`quantkit quantize`"
        raise FormatError(
            f"{writer.name}: {made} makes its files, which are copied as they are; "
            "`quantkit export` writes them in another format"
        )
    tensors: dict[str, Tensor] = {}
    # What kernels read is no tensor of the checkpoint.
    covered: set[int] = {
        id(tensor)
        for module in model.modules()
        if isinstance(module, (PackedExperts, SharedProduct))
        for tensor in (*module.buffers(), *module.parameters())
    }
    slots = _slots(saved.pieces)
    sliced: list[TensorInfo] = []
    for piece in saved.pieces:
        found = _find(model, piece, slots.get(piece.name, 0))
        if isinstance(found, (QuantLinear, FusedLinear)):
            weight = PlannedWeight(
                name=piece.name,
                module=piece.parameter.rpartition(".")[0],
                shape=(found.out_features, found.in_features),
                scheme=found.scheme,
                transposed=piece.name in saved.transposed,
                expert=piece.expert is not None,
                split=piece.split,
            )
            covered.update(id(buffer) for buffer in found.buffers())
            check_supported(writer, [weight])
            numbers = found.quantized_tensor
            tensors.update(writer.pack(weight, numbers))
            sliced += [info for info in writer.layout(weight, numbers.dtype) if info.whole]
            continue
        covered.add(id(found))
        tensor = found.detach()
        part = piece.rows is not None or piece.transposed
        if found.ndim == 3 if piece.expert is not None else part:
            tensor = piece.part_of(tensor)
        tensors[piece.name] = _own_memory(tensor, found)
    for name, parts in joined(sliced)[1].items():
        tensors[name] = torch.stack([tensors.pop(part.name) for part in parts])
    for name in saved.extra:
        assert saved.source is not None
        tensors[name] = saved.source.read(name)
    tensors.update(saved.beside)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in covered:
            tensors[name] = tensor.detach().cpu()
    return tensors


def find_module(model: nn.Module, path: str) -> nn.Module:
    """The module at a path of the unquantized model; ModelError if it is gone."""
    module = model
    for part in path.split(".") if path else ():
        if isinstance(module, QuantExperts) and not hasattr(module, part):
            module = module.base
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            raise ModelError(
                f"{path}: the model has no such module any more; save it before changing its layers"
            )
        # An adapter stands in the layer's place and holds it.
        base = getattr(child, "base_layer", None)
        module = base if isinstance(base, (QuantLinear, FusedLinear)) else child
    return module


def _find(model: nn.Module, piece: Piece, slot: int) -> QuantLinear | FusedLinear | Tensor:
    """The layer or the tensor that holds a piece; `slot` counts the pieces of one expert."""
    path, _, leaf = piece.parameter.rpartition(".")
    module = find_module(model, path)
    if isinstance(module, QuantExperts):
        if leaf in module.projections and piece.expert is not None:
            module, leaf = module.linears(leaf, piece.expert)[slot], "weight"
        else:
            module = module.base
    if isinstance(module, RowParts) and leaf == "weight":
        module = module.parts[slot]
    if isinstance(module, (QuantLinear, FusedLinear)) and leaf == "weight":
        return module
    found = getattr(module, leaf, None)
    if not isinstance(found, Tensor):
        raise ModelError(
            f"{piece.parameter}: the model has no such parameter any more; save it before changing "
            "its layers"
        )
    return found


def _slots(pieces: tuple[Piece, ...]) -> dict[str, int]:
    """Name -> place among the pieces of the same parameter, of one expert, by their rows."""
    together: dict[tuple[str, int | None], list[Piece]] = {}
    for piece in pieces:
        if piece.expert is not None or piece.rows is not None:
            together.setdefault((piece.parameter, piece.expert), []).append(piece)
    slots = {}
    for found in together.values():
        found.sort(key=lambda piece: piece.rows or (0, 0))
        slots.update({piece.name: slot for slot, piece in enumerate(found)})
    return slots


def _own_memory(tensor: Tensor, whole: Tensor) -> Tensor:
    """On the CPU; a copy if it is a slice, since transformers writes no shared memory."""
    if tensor.device.type == "cpu" and tensor.numel() < whole.numel():
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.cpu().contiguous()
