"""Fetching a model from the Hub."""

from __future__ import annotations

from pathlib import Path

from quantkit.checkpoint.sidefiles import module_paths
from quantkit.errors import CheckpointError

# What loaders read, but for weights in other forms; a `*` crosses folders.
_WANTED = (
    "*.safetensors",
    *(f"*.{ending}" for ending in ("json", "jinja", "txt", "py", "yaml", "yml", "toml")),
    *(f"*.{ending}" for ending in ("model", "tiktoken", "vocab", "spm", "bpe")),
    *("tokenizer*", "vocab.*", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*"),
)
_OTHER_FORMS = ("*.bin", "*.pt", "*.onnx", "*.onnx_data", "consolidated*")
_UNWANTED = (
    "*/*.safetensors",
    *_OTHER_FORMS,
    *(f"{folder}/*" for folder in (".*", "original", "onnx", "openvino", "coreml", "quantkit")),
    "checkpoint-*/*",
)
# How a checkpoint of quantkit's was made, and what was folded into its weights.
_OWN = ("quantkit/report.json", "quantkit/*folds.safetensors")


def download(name: str, revision: str | None, *, weights: bool = True) -> Path:
    """The folder in the Hub's cache with the safetensors of a repository and what loaders read.

    Weights in folders are fetched of the modules that modules.json names.  No code is run.
    `weights`: without them only what lies around them is fetched.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(_WANTED),
                ignore_patterns=[*_UNWANTED, *(() if weights else ("*.safetensors",))],
            )
        )
        # The patterns know no exceptions from what is ignored.
        modules = [f"{path}/*" for path in module_paths(folder)]
        snapshot_download(name, revision=folder.name, allow_patterns=[*_OWN, *modules])
        return folder
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name}: there is no such directory, and the Hub does not give it "
            f"(revision {revision or 'main'}): {reason}"
        ) from error
