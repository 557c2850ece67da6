"""Which runtimes read which checkpoints, and why others do not.

transformers: found by loading tiny models of every type with transformers 5.23, compressed-tensors
0.20, bitsandbytes 0.50 and GPTQModel 7.7 (through optimum 2.3), and comparing logits.
vLLM: model types tried with vLLM 0.32 on a CPU (log probabilities compared); which kernels take
which weights on a GPU is read in its source.
"""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.formats.format import PlannedWeight
from quantkit.numbers.scheme import Scheme

# Architectures for which vLLM 0.32 has no class of its own and which its fallback does not take.
_NOT_IN_VLLM = frozenset({"gpt_neo"})
# Groups for which a CUDA kernel exists: Marlin, for 4 bit also Triton.  None is one per row.
_VLLM_GROUPS = {4: (None, 32, 64, 128, 256), 8: (None, 32, 64, 128)}
# Projections that vLLM stacks on others, below which a block of rows must not go on.
_STACKED = ("q_proj", "k_proj", "gate_proj", ".w1")
_GPTQMODEL_GROUPS = (None, 16, 32, 64, 128, 256, 512, 1024)


def outside_blocks(weight: PlannedWeight) -> bool:
    """True for the head: no component of its module's path is a block's number."""
    return not any(part.isdigit() for part in weight.module.split("."))


def decompresses_at_load(weights: Sequence[PlannedWeight], model_type: str) -> bool:
    """True if a compressed-tensors file should ask transformers to decompress while loading.

    Asymmetric weights need it, and falcon, whose layers look at their weight before the first
    forward pass decompresses it.  With Conv1D modules it turns random weights into an error.
    """
    schemes = _schemes(weights)
    if any(not scheme.symmetric for scheme in schemes):
        return True
    wanted = model_type == "falcon" or any(w.transposed for w in weights if w.scheme is not None)
    return wanted and _one_decompressor(schemes)


def may_decode_at_load(weights: Sequence[PlannedWeight]) -> bool:
    """True if transformers, decoding a compressed-tensors file while loading, changes no number."""
    return _one_decompressor(_schemes(weights))


def compressed_tensors_readers(
    weights: Sequence[PlannedWeight], model_type: str
) -> dict[str, str | None]:
    """Runtime -> None if it reads compressed-tensors files of these weights, else why not."""
    return {
        "transformers": _transformers_compressed(weights, model_type),
        "vllm": _vllm_compressed(weights, model_type),
    }


def bitsandbytes_readers(
    weights: Sequence[PlannedWeight], model_type: str
) -> dict[str, str | None]:
    """Runtime -> None if it reads bitsandbytes files of these weights, else why not."""
    return {
        "transformers": _transformers_bitsandbytes(weights, model_type),
        "vllm": "vLLM 0.32 has no bitsandbytes layers",
    }


def fp8_readers(weights: Sequence[PlannedWeight], model_type: str) -> dict[str, str | None]:
    """Runtime -> None if it reads fp8 files of these weights in 128 x 128 blocks, else why not."""
    return {
        "transformers": _transformers_fp8(weights, model_type),
        "vllm": _vllm_lacks(weights, model_type) or _vllm_stacks(weights),
    }


def mxfp4_readers(model_type: str) -> dict[str, str | None]:
    """Runtime -> None if it reads mxfp4 experts of the type, else why not."""
    if model_type == "gpt_oss":
        return {"transformers": None, "vllm": None}
    only = "reads experts in mxfp4 of gpt_oss only"
    return {"transformers": f"it {only}", "vllm": f"vLLM 0.32 {only}"}


def modelopt_readers(weights: Sequence[PlannedWeight], model_type: str) -> dict[str, str | None]:
    """Runtime -> None if it reads ModelOpt's layout of these weights, else why not.

    TensorRT-LLM cannot run here: its column is read in its source alone.
    """
    lacking = _vllm_lacks(weights, model_type) or _vllm_stacks(weights)
    split = _lacks_split_experts(weights, model_type)
    return {
        "transformers": "transformers 5.24 does not know ModelOpt's layout",
        "vllm": lacking or _vllm_modelopt(weights),
        "tensorrt-llm": split or _tensorrt_modelopt(weights),
    }


def gptq_readers(weights: Sequence[PlannedWeight], model_type: str) -> dict[str, str | None]:
    """Runtime -> None if it reads gptq_v2 files of these weights, else why not."""
    return {
        "transformers": _transformers_gptq(weights, model_type),
        "vllm": _vllm_gptq(weights, model_type),
    }


def awq_readers(weights: Sequence[PlannedWeight], model_type: str) -> dict[str, str | None]:
    """Runtime -> None if it reads awq files of these weights, else why not."""
    group_sizes = {scheme.group_size for scheme in _schemes(weights)}
    served = _vllm_lacks(weights, model_type)
    if served is None and not group_sizes <= {None, 32, 64, 128}:
        served = f"vLLM 0.32 reads AWQ groups of 32, 64, 128 or a row, not {group_sizes}"
    return {"transformers": _transformers_gptqmodel(weights, model_type), "vllm": served}


def _schemes(weights: Sequence[PlannedWeight]) -> list[Scheme]:
    return list(dict.fromkeys(weight.scheme for weight in weights if weight.scheme is not None))


def _lacks_split_experts(weights: Sequence[PlannedWeight], model_type: str) -> str | None:
    """Why others do not find the experts of a type in what quantkit writes."""
    if any(weight.split and weight.expert for weight in weights):
        return f"it reads the experts of {model_type} from one tensor for all, not one by one"
    return None


def _one_decompressor(schemes: Sequence[Scheme]) -> bool:
    """True if transformers, which decompresses all dense layers alike, would be right for all."""
    # Zeros are spread over columns by the first scheme's groups; scales by their own shape.
    kinds = {
        (s.kind, s.bits, s.activation_bits, s.symmetric or f"g{s.group_size}") for s in schemes
    }
    decodable = all(s.activation_bits == 16 and not s.coarse_scales for s in schemes)
    return len(kinds) == 1 and decodable


def _transformers_bitsandbytes(weights: Sequence[PlannedWeight], model_type: str) -> str | None:
    if reason := _lacks_split_experts(weights, model_type):
        return reason
    if any(weight.joined and weight.scheme is not None for weight in weights):
        return "it joins rows of several tensors, but not of packed ones"
    if any(weight.expert and weight.scheme is not None for weight in weights):
        return "it cannot put bitsandbytes experts into its fused parameters"
    if model_type == "falcon":
        return "it replaces no FalconLinear by a bitsandbytes layer"
    return None


def _transformers_compressed(weights: Sequence[PlannedWeight], model_type: str) -> str | None:
    if reason := _lacks_split_experts(weights, model_type):
        return reason
    if any(weight.joined and weight.scheme is not None for weight in weights):
        return "it joins rows of several tensors, but not of packed ones"
    if any(weight.transposed and weight.scheme is not None for weight in weights):
        return f"it does not convert the Conv1D layers of {model_type}"
    dense = _schemes([weight for weight in weights if not weight.expert])
    if any(not scheme.symmetric for scheme in _schemes(weights)) and not _one_decompressor(dense):
        return "it decompresses asymmetric weights only if all have the same bits and groups"
    weight_only = any(scheme.activation_bits == 16 for scheme in dense)
    if model_type == "falcon" and weight_only and not _one_decompressor(dense):
        return "FalconLinear works only if all weights have the same bits and symmetry"
    experts = [weight for weight in weights if weight.expert]
    schemes = _schemes(experts)
    if not experts:
        return None
    if any(weight.scheme is None for weight in experts):
        return "it reads fused experts only if all of them are quantized"
    for scheme in schemes:
        if scheme.coarse_scales:
            return f"it was not tried whether it reads fused experts of {scheme.name}"
        if not scheme.symmetric or scheme.activation_bits != 16:
            return f"it reads fused experts only if symmetric and weight-only, not {scheme.name}"
    if not _one_decompressor(schemes):
        return "it decompresses all fused experts with the same bits: the weights would be wrong"
    return None


def _vllm_lacks(weights: Sequence[PlannedWeight], model_type: str) -> str | None:
    """Why vLLM cannot read packed weights of the type at all, whatever their scheme."""
    if reason := _lacks_split_experts(weights, model_type):
        return reason
    if any(weight.split for weight in weights):
        return f"it looks for the tensors that transformers makes these weights of {model_type} of"
    if model_type in _NOT_IN_VLLM:
        return f"vLLM 0.32 does not have {model_type}"
    packed = [w for w in weights if w.scheme is not None and w.scheme.activation_bits == 16]
    if model_type == "bloom" and any("query_key_value" in weight.name for weight in packed):
        return "vLLM 0.32 reorders bloom's query_key_value as if its rows were not packed"
    return None


def _vllm_stacks(weights: Sequence[PlannedWeight]) -> str | None:
    """Why vLLM cannot stack projections whose rows share scales in blocks."""
    for weight in weights:
        blocks = weight.scheme is not None and weight.scheme.share == "block"
        if blocks and weight.shape[0] % 128 and weight.module.endswith(_STACKED):
            return (
                f"{weight.name}: vLLM 0.32 stacks it with others only if its rows are a multiple "
                f"of 128, not {weight.shape[0]}"
            )
    return None


def _vllm_compressed(weights: Sequence[PlannedWeight], model_type: str) -> str | None:
    if reason := _vllm_lacks(weights, model_type):
        return reason
    if reason := _vllm_stacks(weights):
        return reason
    for scheme in _schemes(weights):
        # 8-bit integers with 8-bit activations, and all floats.
        if scheme.kind != "int" or scheme.centered:
            continue
        if scheme.float_input:
            if scheme.group_size != 128:
                group = "rows" if scheme.group_size is None else f"groups of {scheme.group_size}"
                return f"vLLM 0.32 takes e4m3 activations with groups of 128, not {group}"
            continue
        if scheme.activation_bits == 8:
            if scheme.group_size is not None and scheme.group_size % 32:
                return f"vLLM 0.32 takes groups of 32 times a number, not {scheme.group_size}"
            continue
        if scheme.bits not in _VLLM_GROUPS or (scheme.bits == 8 and not scheme.symmetric):
            kind = "" if scheme.symmetric else "asymmetric "
            return (
                f"vLLM 0.32 multiplies {kind}{scheme.bits}-bit weights only on GPUs where the "
                "package humming is installed, which was read in its source, not run"
            )
        if scheme.group_size not in _VLLM_GROUPS[scheme.bits]:
            allowed = ", ".join(str(g) for g in _VLLM_GROUPS[scheme.bits] if g)
            return (
                f"vLLM 0.32 has kernels for groups of {allowed} or a row, not {scheme.group_size}"
            )
    return None


def _vllm_modelopt(weights: Sequence[PlannedWeight]) -> str | None:
    if any(scheme.kind == "int" for scheme in _schemes(weights)):
        return "vLLM 0.32 does not have ModelOpt's W4A16_AWQ"
    fused: dict[str, Scheme | None] = {}
    for weight in weights:
        parent, _, leaf = weight.module.rpartition(".")
        kind = next((kind for kind in ("q k v", "gate up") if leaf in _projections(kind)), None)
        if kind and fused.setdefault(f"{parent} {kind}", weight.scheme) != weight.scheme:
            return f"{weight.name}: vLLM 0.32 fuses it with others, which have another scheme"
    return None


def _projections(kind: str) -> list[str]:
    return [f"{name}_proj" for name in kind.split()]


def _tensorrt_modelopt(weights: Sequence[PlannedWeight]) -> str | None:
    for scheme in _schemes(weights):
        if scheme.kind == "mxfp8" or scheme.name == "nvfp4a16":
            return f"its source has no linear layer for {scheme.name} in ModelOpt's layout"
        if scheme.kind == "int" and scheme.group_size not in (64, 128):
            return f"its int4 kernels have groups of 64 and 128, not {scheme.group_size}"
    return None


def _transformers_fp8(weights: Sequence[PlannedWeight], model_type: str) -> str | None:
    if reason := _lacks_split_experts(weights, model_type):
        return reason
    for weight in weights:
        if weight.scheme is None:
            continue
        if weight.expert:
            return "it was not tried whether it reads fused experts in blocks"
        if weight.shape[0] % 128:
            return (
                f"{weight.name}: it cuts {weight.shape[0]} rows into blocks of equal height where "
                "it decodes while loading, as on a CPU; only multiples of 128 come out right"
            )
    if model_type == "falcon":
        return "it was not tried whether it replaces FalconLinear by FP8 layers"
    return None


def _transformers_gptq(weights: Sequence[PlannedWeight], model_type: str) -> str | None:
    if len(_schemes(weights)) > 1:
        return "it reads GPTQ files with one scheme only"
    return _transformers_gptqmodel(weights, model_type)


def _transformers_gptqmodel(weights: Sequence[PlannedWeight], model_type: str) -> str | None:
    """Why transformers cannot put GPTQModel's layers, which read GPTQ and AWQ, into the model."""
    quantized = [weight for weight in weights if weight.scheme is not None]
    schemes = _schemes(weights)
    if reason := _lacks_split_experts(weights, model_type):
        return reason
    if any(weight.joined and weight.scheme is not None for weight in weights):
        return "it joins rows of several tensors, but not of packed ones"
    if any(weight.transposed for weight in quantized):
        return f"it does not convert the Conv1D layers of {model_type}"
    if model_type == "falcon":
        return "it replaces no FalconLinear by a GPTQModel layer: the weights would be random"
    if any(weight.expert for weight in quantized):
        return "it replaces no fused experts by GPTQModel layers: the weights would be random"
    if any(outside_blocks(weight) for weight in quantized):
        return "it replaces no head by a GPTQModel layer: the weights would be random"
    if schemes and schemes[0].group_size not in _GPTQMODEL_GROUPS:
        allowed = ", ".join(str(size) for size in _GPTQMODEL_GROUPS if size)
        return f"GPTQModel has kernels for groups of {allowed} or a row"
    return None


def _vllm_gptq(weights: Sequence[PlannedWeight], model_type: str) -> str | None:
    if reason := _vllm_lacks(weights, model_type):
        return reason
    schemes = _schemes(weights)
    if len(schemes) > 1:
        return "vLLM 0.32 matches the schemes of mixed GPTQ files against fused names"
    for scheme in schemes:
        if scheme.bits not in (4, 8) or not scheme.symmetric:
            return "vLLM 0.32 reads GPTQ files of symmetric 4 and 8 bit only"
        if scheme.group_size not in (None, 32, 64, 128):
            return f"vLLM 0.32 reads GPTQ groups of 32, 64, 128 or a row, not {scheme.group_size}"
    return None
