"""A model on the Hub: downloaded, or its weights read in ranges over the network and never stored.

The second is for models larger than the disk: what is around the weights lies in the Hub's cache,
the shards stay where they are.  Requests, retries and redirects are huggingface_hub's.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.door import CONFIG_BYTES, read_plain
from quantkit.checkpoint.files import FileSource, weight_files
from quantkit.checkpoint.safetensors import WEIGHTS, StoredTensor, header_of
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
_OWN = ("quantkit/report.json", "quantkit/*folds.safetensors", "quantkit/rotation.json")

REMOTE = "hub://"
# Small tensors lie side by side: what is asked for is read with what follows, up to so much.
_WINDOW = 16 * 2**20
# And never more at once: the answer is in memory beside what it is for.
_PIECE = 64 * 2**20
_ADDRESS = re.compile(r"hub://([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@([\w./-]+))?", re.ASCII)


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
        more = [f"{path}/*" for path in module_paths(folder)]
        config = folder / "config.json"
        # Only what is quantized may be ours; for nothing found the client warns.
        if config.is_file() and b"quantization_config" in read_plain(config, largest=CONFIG_BYTES):
            more += _OWN
        if more:
            snapshot_download(name, revision=folder.name, allow_patterns=more)
        return folder
    except CheckpointError:
        raise
    # Whatever the client raises; of a lost connection that is no OSError.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name}: there is no such directory, and the Hub does not give it "
            f"(revision {revision or 'main'}): {reason}; where a connection was lost, the same "
            "command goes on with what has come"
        ) from error


class HubSource(FileSource):
    """The safetensors of one commit of a repository, `hub://NAME` or `hub://NAME@REVISION`.

    Opening reads all headers.  Weights are asked for when they are read, each time anew.  Raises
    CheckpointError for an address of another form, and for what the Hub does not give.
    """

    def __init__(self, address: str, revision: str | None = None) -> None:
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise CheckpointError(
                f"{address[:200]!a}: give hub://organisation/model or hub://organisation/model"
                "@revision"
            )
        self.name = match[1]
        folder = download(self.name, match[2] or revision, weights=False)
        self.commit = folder.name
        self._lock = threading.Lock()
        self._open: dict[str, Any] = {}
        self._window: tuple[str, int, bytes] = ("", 0, b"")
        super().__init__(folder)

    @property
    def address(self) -> str:
        """The repository at this commit."""
        return f"{REMOTE}{self.name}@{self.commit}"

    def fingerprint(self) -> str:
        """Hex sha256 over config, side files, headers, and the Hub's own digests of the shards.

        Not that of a downloaded copy, whose content is hashed itself.
        """
        total = hashlib.sha256(self._config_bytes())
        total.update(self.fingerprint_beside().encode())
        for name in self.names():
            info = self.info(name)
            total.update(json.dumps([info.name, str(info.dtype), info.shape]).encode())
        for path in sorted(set(self._files.values())):
            told = self._file(self._within(path)).details
            lfs = told.get("lfs") or {}
            digest = lfs.get("sha256") or told.get("blob_id")
            total.update(json.dumps([self._within(path), digest]).encode())
        return total.hexdigest()

    def _weight_files(self) -> Mapping[str, list[str]]:
        try:
            single = bool(_system().exists(f"{self.name}@{self.commit}/{WEIGHTS}"))
        # Whatever the client raises: a lost connection, a refusal, an answer it does not read.
        except Exception as error:
            raise self._refused(WEIGHTS, error) from error
        return weight_files(self.path, single=single)

    def _header(self, file: str) -> tuple[StoredTensor, ...]:
        remote = self._file(file)

        def read(start: int, stop: int) -> bytes:
            return self._bytes(file, start, min(stop, remote.size))

        return header_of(read, remote.size, Path(f"{self.address}/{file}"))

    def _fill(self, name: str, view: memoryview, offset: int) -> None:
        """Reads a tensor's bytes from its file's `offset` on."""
        file = self._within(self._files[name])
        for start in range(0, len(view), _PIECE):
            stop = min(start + _PIECE, len(view))
            view[start:stop] = self._bytes(file, offset + start, offset + stop)

    def _bytes(self, file: str, start: int, stop: int) -> bytes:
        """Bytes start..stop of a file in the repository."""
        with self._lock:
            held, first, window = self._window
            if held != file or not first <= start <= stop <= first + len(window):
                remote = self._file(file)
                end = min(max(stop, start + _WINDOW), remote.size)
                try:
                    remote.seek(start)
                    window = remote.read(end - start)
                except Exception as error:
                    raise self._refused(file, error) from error
                if len(window) != end - start:
                    raise CheckpointError(
                        f"{self.address}/{file}: {len(window)} bytes came where {end - start} were "
                        "asked for; the same command goes on where this one stopped"
                    )
                self._window, first = (file, start, window), start
            return window[start - first : stop - first]

    def _file(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = _system().open(
                    f"{self.name}@{self.commit}/{file}", "rb", cache_type="none"
                )
            except Exception as error:
                raise self._refused(file, error) from error
        return self._open[file]

    def _within(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def _refused(self, file: str, error: Exception) -> CheckpointError:
        lines = str(error).strip().splitlines()
        return CheckpointError(
            f"{self.address}/{file}: the Hub does not give it: "
            f"{lines[0] if lines else type(error).__name__}; the same command goes on where this "
            "one stopped"
        )


def _system() -> Any:
    from huggingface_hub import HfFileSystem

    return HfFileSystem()
