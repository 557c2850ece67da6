"""The checkpoints that the interop suite reads, as command lines of quantkit."""

from __future__ import annotations

from dataclasses import dataclass

PROMPTS = (
    "The function returns a list of",
    "If the argument is not a string,",
    "class Node:\n    def __init__(self, value):",
    "The quick answer is that every object",
)
MAX_NEW_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Case:
    """One checkpoint: directory name, the model it is made of, and the options that make it."""

    name: str
    source: str
    options: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Export:
    """A checkpoint that `quantkit export` makes of another one."""

    name: str
    source: str
    format: str


# Image-text models whose vision tower holds layers of torch's own.
IMAGES = ("gemma3", "paligemma", "llava_onevision", "aya_vision")

# Models without a head, in directories of sentence-transformers.
VECTORS = ("bert", "qwen3")
# Of several lengths, so that some are padded where they run together.
TEXTS = (
    "A heap keeps the smallest item at its front.",
    "Sort it.",
    "The other way round, a queue hands items out in the order in which they came in.",
)

# 16 x 128 tokens: the suite reads what was written; how good it is, is measured elsewhere.
_CALIBRATION = ("--calib", "demo", "--samples", "16", "--seq-len", "128")

# compressed-tensors' packs of widths that leave codes across words.
DENSE = {
    "dense2": "w2a16_g32",
    "dense5": "w5a16_row",
    "dense6": "w6a16_g32",
    "dense3_asym": "w3a16_g64_asym",
}

# Floats whose scales are coarse, and what calibrates their inputs.
FLOATS = {
    "fp8_blocks": ("fp8a8_b128", ()),
    "fp8_tensor": ("fp8a8_tensor", _CALIBRATION),
    "mxfp8": ("mxfp8a8", ()),
    "mxfp4": ("mxfp4a4", ()),
    "nvfp4": ("nvfp4a4", _CALIBRATION),
    "mxfp8_weights": ("mxfp8a16", ()),
    "mxfp4_weights": ("mxfp4a16", ()),
    "nvfp4_weights": ("nvfp4a16", ()),
}

# Attention in other numbers than the rest, and what their names end in.
MIXED = {"mix": "", "mix_asym": "_asym"}

# ModelOpt's layout: scheme, and what else makes the checkpoint.
MODELOPT = {
    "modelopt_fp8": ("fp8a8_tensor", ("--kv", "fp8", *_CALIBRATION)),
    "modelopt_rows": ("fp8a8_row", ()),
    "modelopt_blocks": ("fp8a8_b128", ()),
    "modelopt_mxfp8": ("mxfp8a8", ()),
    "modelopt_nvfp4": ("nvfp4a4", ("--kv", "fp8", *_CALIBRATION)),
    "modelopt_nvfp4_weights": ("nvfp4a16", ()),
}

# Keys and values that a server is to cache in 8 bits, with a scale for each layer or head.
CACHED = {"kv": "fp8", "kv_head": "fp8_head"}

CASES = (
    Case(name="rtn", source="demo", options=("--method", "rtn")),
    Case(name="gptq", source="demo", options=("--method", "gptq", *_CALIBRATION)),
    Case(name="awq", source="demo", options=("--method", "awq", *_CALIBRATION)),
    *(
        Case(name=name, source="demo", options=("--method", "gptq", "--kv", kv, *_CALIBRATION))
        for name, kv in CACHED.items()
    ),
    Case(name="w8a16", source="demo", options=("--method", "int8")),
    Case(name="w8a8", source="demo", options=("--method", "int8", "--scheme", "w8a8_row")),
    Case(name="w4a8", source="demo", options=("--method", "rtn", "--scheme", "w4a8_g32")),
    Case(name="w4afp8", source="demo", options=("--method", "rtn", "--scheme", "w4afp8_g128")),
    Case(name="w4a8_row", source="demo", options=("--method", "rtn", "--scheme", "w4a8_row")),
    Case(name="smoothquant", source="demo", options=("--method", "smoothquant", *_CALIBRATION)),
    *(
        Case(
            name=name,
            source="demo",
            options=(
                *("--method", "rtn", "--scheme", f"w4a16_g32{zeros}", "--allow-unreadable"),
                *("--rule", f"attention=w8a16_g64{zeros}"),
            ),
        )
        for name, zeros in MIXED.items()
    ),
    Case(name="nf4_dq", source="demo", options=("--method", "nf4")),
    Case(name="nf4", source="demo", options=("--method", "nf4", "--scheme", "nf4_b64")),
    Case(name="fp8", source="demo", options=("--method", "fp8")),
    Case(name="fp8_weights", source="demo", options=("--method", "fp8", "--scheme", "fp8a16_row")),
    *(
        Case(name=name, source="demo", options=("--method", "rtn", "--scheme", scheme))
        for name, scheme in DENSE.items()
    ),
    *(
        Case(name=name, source="demo", options=("--method", "fp8", "--scheme", scheme, *options))
        for name, (scheme, options) in FLOATS.items()
    ),
    *(
        Case(
            name=name,
            source="demo",
            options=("--method", "fp8", "--scheme", scheme, "--format", "modelopt", *options),
        )
        for name, (scheme, options) in MODELOPT.items()
    ),
    Case(
        name="w3",
        source="demo",
        options=("--method", "rtn", "--scheme", "w3a16_g64_asym", "--format", "gptq_v2"),
    ),
    Case(
        name="w2",
        source="demo",
        options=("--method", "rtn", "--scheme", "w2a16_g32", "--format", "gptq_v2"),
    ),
    Case(name="mixtral", source="mixtral", options=("--method", "rtn")),
    Case(name="qwen3_moe", source="qwen3_moe", options=("--method", "rtn")),
    *(
        Case(
            name=f"gpt_oss_{method}",
            source="gpt_oss",
            options=("--method", method, "--scheme", "mxfp4a16", "--format", "mxfp4", *options),
        )
        for method, options in (("rtn", ()), ("gptq", _CALIBRATION))
    ),
    *(
        Case(name=name, source=name, options=("--method", "rtn", "--scheme", "w4a16_g32"))
        for name in IMAGES
    ),
)

EXPORTS = (
    Export(name="gptq_v1", source="gptq", format="gptq"),
    Export(name="gptq_v2", source="gptq", format="gptq_v2"),
    Export(name="gptq_v1_asym", source="awq", format="gptq"),
    Export(name="awq_gemm", source="awq", format="awq"),
    Export(name="awq_gemm_sym", source="gptq", format="awq"),
    Export(name="fp8_native", source="fp8_blocks", format="fp8"),
    Export(name="int8_rows", source="w8a8", format="bitsandbytes"),
)

# Image-text types that are calibrated on images.
PICTURES = (
    "gemma3", "llava_onevision", "paligemma", "aya_vision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
    "idefics3", "smolvlm", "mistral3", "internvl", "llava",
)  # fmt: skip
# Those of them whose quantized towers transformers reads, and in which scheme.
TOWERS = dict.fromkeys(
    ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "mistral3", "internvl"),
    "w8a16_row",
)

# An image-text type that vLLM's class reads without torchvision, its heads as large as attention on
# a CPU wants them, its weights so large that logits differ; what it is asked about two pictures.
SERVED_PICTURES = ("idefics3-served", "idefics3-served-towers")
SERVED_TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "initializer_range": 0.2,
}
PICTURE_PROMPT = "user: <image>What is on picture 7?\nassistant: "
