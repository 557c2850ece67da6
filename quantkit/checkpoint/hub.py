"""Fetching a model from the Hub, and which files of a model are more than weights."""

from __future__ import annotations

from pathlib import Path

from quantkit.errors import CheckpointError

# Without config.json (the output has its own) and README.md (the model card replaces it).
SIDE_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)
_HUB_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", *SIDE_FILES)
# Copies in other layouts that many repositories carry beside the Transformers checkpoint.
_HUB_IGNORED = ("*/*.safetensors", "*/*.json", "*/*.model", "consolidated*.safetensors")
# How a checkpoint of quantkit's was made, and what was folded into its weights.
_HUB_OWN = ("quantkit/report.json", "quantkit/*folds.safetensors")


def download(name: str, revision: str | None, trust_remote_code: bool) -> Path:
    """The folder in the Hub's cache with the safetensors, configs and tokenizer of a repository."""
    from huggingface_hub import snapshot_download

    patterns = [*_HUB_PATTERNS, *(("*.py",) if trust_remote_code else ())]
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=list(_HUB_IGNORED),
            )
        )
        # The patterns know no exceptions from what is ignored.
        snapshot_download(name, revision=folder.name, allow_patterns=list(_HUB_OWN))
        return folder
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name}: there is no such directory, and the Hub does not give it "
            f"(revision {revision or 'main'}): {reason}"
        ) from error
