"""Where weights come from: tensors by name, read in byte ranges from the files of a checkpoint.

`Source` is what the rest of quantkit reads; `FileSource` is a directory of safetensors,
`live.LiveSource` a Hugging Face model in memory, and GGUF and ONNX files have their own.
Nothing is memory-mapped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.config import check_config
from quantkit.checkpoint.door import (
    CONFIG_BYTES,
    INDEX_BYTES,
    given_path,
    parse_json,
    read_json,
    read_plain,
    read_start,
)
from quantkit.checkpoint.safetensors import (
    INDEX,
    WEIGHTS,
    StoredTensor,
    TensorInfo,
    read_header,
    read_into,
    refuse_git_lfs,
    tensor_bytes,
)
from quantkit.checkpoint.sidefiles import SideFiles, find_side_files, leads_out
from quantkit.checkpoint.source import Reader, Source
from quantkit.errors import CheckpointError

__all__ = ["FileSource", "Source", "TensorInfo", "refuse_quantized"]

# Where older ModelOpt says how it quantized a model, and config.json says nothing.
_BESIDE = "hf_quant_config.json"


class FileSource(Reader):
    """A directory of config.json and safetensors, as `save_pretrained` or the Hub's cache has it.

    Opening reads and checks all headers, no weights.  Raises CheckpointError for anything that is
    missing, damaged, pickled, a Git-LFS pointer, or reaches outside the directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = given_path(path)
        if not os.path.lexists(self.path / "config.json"):
            if (self.path / "adapter_config.json").is_file():
                raise CheckpointError(
                    f"{self.path}: this is a PEFT adapter; merge it into its model "
                    "(merge_and_unload), save that, and give its directory"
                )
            raise CheckpointError(
                f"{self.path}: this is no model: there is no config.json; give the directory that "
                "save_pretrained wrote or a repository name on the Hub"
            )
        config = _contained(self.path, "config.json")
        self._config_content = read_plain(config, largest=CONFIG_BYTES)
        found = parse_json(self._config_content, str(config), wide=True)
        beside = self.path / _BESIDE
        if "quantization_config" not in found and os.path.lexists(beside):
            content = read_plain(_contained(self.path, _BESIDE), largest=CONFIG_BYTES)
            told = parse_json(content, str(beside))
            says = told.get("quantization") if isinstance(told, dict) else None
            if isinstance(says, dict) and says.get("quant_algo") is not None:
                found["quantization_config"] = {"quant_method": "modelopt", **told}
                self._config_content = json.dumps(found).encode()
        check_config(found, str(config))
        self._tensors: dict[str, StoredTensor] = {}
        self._files: dict[str, Path] = {}
        for file, wanted in self._weight_files().items():
            self._add(file, wanted)

    @property
    def config(self) -> dict[str, Any]:
        """config.json, parsed anew at each call: the caller may change it."""
        found: dict[str, Any] = json.loads(self._config_content)
        return found

    @property
    def home(self) -> Path:
        """The directory itself."""
        return self.path

    @property
    def address(self) -> str:
        """The directory."""
        return str(self.path)

    def names(self) -> tuple[str, ...]:
        """Names of all tensors in the checkpoint, sorted."""
        return tuple(sorted(self._tensors))

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor; CheckpointError if there is none of this name."""
        return self._stored(name).info

    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of the flattened tensor [stop - start], fresh memory."""
        stored = self._stored(name)
        if not 0 <= start <= stop <= stored.info.numel:
            raise IndexError(f"{name}: elements {start}..{stop} of {stored.info.numel}")
        buffer = torch.empty(stop - start, dtype=stored.info.dtype)
        self._fill(name, tensor_bytes(buffer), stored.offset + start * stored.info.dtype.itemsize)
        return buffer

    def read_bytes(self, name: str) -> bytes:
        """The tensor's bytes, without torch."""
        stored = self._stored(name)
        buffer = bytearray(stored.info.nbytes)
        self._fill(name, memoryview(buffer), stored.offset)
        return bytes(buffer)

    def side_files(self) -> dict[str, Path | bytes]:
        """Relative name -> path of everything in the directory that is not weights.

        Without config.json and README.md: the output has its own.
        """
        return dict(self._beside().carried)

    def left_files(self) -> dict[str, str]:
        """Relative name -> why the file, or the folder, is not among the side files."""
        return dict(self._beside().left)

    def _fill(self, name: str, view: memoryview, offset: int) -> None:
        """Reads a tensor's bytes from its file's `offset` on."""
        path = self._files[name]
        try:
            with path.open("rb", buffering=0) as file:
                done = read_into(file.fileno(), view, offset)
        except OSError as error:
            raise CheckpointError(f"{path}: {name}: cannot be read: {error.strerror}") from error
        if done < len(view):
            raise CheckpointError(f"{path}: {name}: the file was truncated while in use")

    def _weight_files(self) -> Mapping[str, list[str]]:
        """File name -> tensors the index wants from it; [] without an index."""
        return weight_files(self.path, single=(self.path / WEIGHTS).exists())

    def _header(self, file: str) -> tuple[StoredTensor, ...]:
        """The tensors of a file of weights."""
        return read_header(_contained(self.path, file))

    def _beside(self) -> SideFiles:
        own = {path.relative_to(self.path).as_posix() for path in self._files.values()}
        return find_side_files(self.path, {*own, INDEX})

    def _config_bytes(self) -> bytes:
        return self._config_content

    def _stored(self, name: str) -> StoredTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: there is no tensor {name}") from None

    def _add(self, file: str, wanted: list[str]) -> None:
        path = self.path / file
        for stored in self._header(file):
            name = stored.info.name
            if name in self._tensors:
                raise CheckpointError(
                    f"{path}: {name}: the tensor is in {self._files[name].name} too; "
                    "one of the two shards belongs to another checkpoint"
                )
            self._tensors[name] = stored
            self._files[name] = path
        for name in wanted:
            if self._files.get(name) != path:
                raise CheckpointError(
                    f"{path}: {name}: the index says that this shard holds the tensor, but it "
                    "does not; download the shards and the index together again"
                )


def refuse_quantized(source: Source) -> None:
    """Raises CheckpointError if the checkpoint is quantized already: its weights are no originals.

    Reading such a checkpoint is fine (load, inspect, verify); quantizing it again is not.
    """
    config = source.config
    for part in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            found = part.get(key) if isinstance(part, dict) else None
            if found:
                method = found.get("quant_method") if isinstance(found, dict) else None
                raise CheckpointError(
                    f"the model is already quantized (config.json: {key}, method "
                    f"{method or 'unknown'}); give the original full-precision model, or pass "
                    "--requantize to quantize the decoded weights again, at a loss"
                )
    packed = (".qweight", ".weight_packed", ".weight.absmax")
    for name in source.names():
        if name.endswith(packed):
            raise CheckpointError(
                f"{name}: the model is already quantized, though its config.json does not say so; "
                "give the original full-precision model"
            )


def weight_files(root: Path, *, single: bool) -> Mapping[str, list[str]]:
    """File name -> tensors the index wants from it, as transformers picks.

    `single`: all are in one file, whatever an index says.
    """
    if single:
        return {WEIGHTS: []}
    if not (root / INDEX).exists():
        raise CheckpointError(_no_weights(root))
    index = _contained(root, INDEX)
    weight_map = read_json(index, largest=INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: the index has no weight_map; download it again")
    files: dict[str, list[str]] = {}
    for name, file in sorted(weight_map.items()):
        if not isinstance(file, str) or not _is_inside(file):
            raise CheckpointError(
                f"{index}: {name}: the shard {ascii(file)[:100]} is not allowed: it must be a "
                "*.safetensors file inside the model's directory"
            )
        files.setdefault(file, []).append(name)
    return files


def _no_weights(root: Path) -> str:
    """Why a directory without model.safetensors and without an index has no usable weights."""
    endings = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    pickles = sorted(path.name for path in root.iterdir() if path.suffix in endings)
    others = sorted(path.name for path in root.glob("*.safetensors"))
    if others:
        return f"{root}: {INDEX} is missing: {', '.join(others[:3])} cannot be put together; add it"
    if pickles:
        return (
            f"{root}: the weights are pickle files ({', '.join(pickles[:3])}), which can run code "
            "when opened and are refused; load them where you trust them and call "
            "model.save_pretrained(directory), which writes safetensors"
        )
    return f"{root}: there are no weights: neither {WEIGHTS} nor {INDEX}; safetensors are needed"


def _is_inside(file: str) -> bool:
    """True for a plain relative path to a *.safetensors file that stays below its directory."""
    path = PurePosixPath(file)
    return (
        file.endswith(".safetensors")
        and file.isprintable()
        and len(file) < 200
        and not any(character in file for character in "\\:")
        and not path.is_absolute()
        and ".." not in path.parts
        and str(path) == file
    )


def _contained(root: Path, file: str) -> Path:
    """The path of a file of the checkpoint; links may lead only inside it or to the Hub's blobs."""
    path = root / file
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: the file is missing; download or copy the model again")
    refuse_git_lfs(path, read_start(path, 100))
    if leads_out(root, path):
        raise CheckpointError(
            f"{path}: the link leads out of the model's directory, to {path.resolve()}; copy the "
            "file"
        )
    return path
