"""The model builder of onnxruntime-genai, run as a program: a checkpoint in, a graph out.

It brings the attention operator, the rotary tables, the cache's inputs and outputs, dynamic batch
and sequence, and the files that onnxruntime-genai reads.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from quantkit.errors import FormatError
from quantkit.formats.onnx.file import MODEL, require_onnx

_SHOWN = 400


def require_builder() -> dict[str, str]:
    """Versions of the packages that make the graph.  FormatError naming the extra if one lacks."""
    require_onnx()
    packages = {"onnxruntime_genai": "onnxruntime-genai", "onnx_ir": "onnx-ir"}
    for module, package in packages.items():
        if importlib.util.find_spec(module) is None:
            raise FormatError(
                f"format onnx needs the package {package}: pip install 'quantkit[onnx]'"
            )
    return {name: version(name) for name in ("onnx", "onnxruntime", *packages.values())}


def build_graph(
    checkpoint: Path,
    out: Path,
    *,
    precision: str,
    options: Mapping[str, str],
    trust_remote_code: bool = False,
) -> None:
    """Writes the graph of a checkpoint and the files around it to `out`, for the CPU.

    `precision`: int4, int8 or fp32.  Raises FormatError with the builder's own words if it cannot.
    """
    extra = {"hf_token": "false", "hf_remote": str(trust_remote_code).lower(), **options}
    command = [sys.executable, "-P", "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(checkpoint), "-o", str(out), "-p", precision, "-e", "cpu"]
    command += ["-c", str(out / "cache"), "--extra_options"]
    command += [f"{key}={value}" for key, value in extra.items()]
    # It would stamp the commit of whatever repository its environment lies in into the graph.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GIT_DIR": os.devnull}
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment, check=False
    )
    if done.returncode or not (out / MODEL).is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = lines[-1].strip()[-_SHOWN:] if lines else f"exit code {done.returncode}"
        # It names models by their path, which is a temporary one here.
        said = said.replace(f"The {checkpoint} model", "this type of model")
        raise FormatError(
            f"format onnx: the model builder of onnxruntime-genai {version('onnxruntime-genai')} "
            f"cannot build this model: {said}; it builds dense models of the llama, qwen3 and phi3 "
            "types, among others; use another --format"
        )
