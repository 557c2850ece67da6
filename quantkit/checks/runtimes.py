"""A checkpoint in the program that will serve it: does it compute what quantkit computes?

Each runtime is asked for greedy continuations of a few tokens, and quantkit's own model judges
them, given the same tokens before: a runtime that misreads a file chooses tokens that are far from
the best.  Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.checks import runtime_script
from quantkit.errors import CheckpointError
from quantkit.formats.open import container_of, is_onnx
from quantkit.inference.load import load
from quantkit.inference.room import check_continues
from quantkit.model.towers.loaded import placeholders_of, without_placeholders

# Prompts are token ids: whatever the tokenizer, they are the same for everyone.
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 4, 16, 32
# Runtimes compute in 16 bits, which moves logits of this size by about 0.06 each.
_TIE = 0.30
_LEAST_AGREEMENT = 0.9
# Characters of a runtime's own words: transformers lists all that it knows.
_MOST_SHOWN = 300


@dataclass(frozen=True, kw_only=True)
class _Runtime:
    """Its Python module, the package that brings it, and which kind of checkpoint it reads."""

    module: str
    package: str
    reads: str


_RUNTIMES: Mapping[str, _Runtime] = {
    "transformers": _Runtime(
        module="transformers", package="transformers", reads="directory of safetensors"
    ),
    "vllm": _Runtime(module="vllm", package="vllm", reads="directory of safetensors"),
    "llama.cpp": _Runtime(module="llama_cpp", package="llama-cpp-python", reads="GGUF file"),
    "onnxruntime": _Runtime(module="onnxruntime", package="onnxruntime", reads="ONNX model"),
}
_EXPORTS = {"GGUF file": "gguf", "ONNX model": "onnx"}
RUNTIMES = tuple(_RUNTIMES)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How a runtime's choices look to quantkit: `agreed` of `tokens` are its own first choice.

    worst_gap    largest difference between the logits of the best token and of the one chosen
    """

    runtime: str
    version: str
    tokens: int
    agreed: int
    worst_gap: float

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong; nothing if the runtime reads the checkpoint right."""
        if self.agreed >= _LEAST_AGREEMENT * self.tokens and self.worst_gap < _TIE:
            return ()
        others = self.tokens - self.agreed
        return (
            f"{self.runtime} chose {others} of {self.tokens} tokens that are not the best, by up "
            f"to {self.worst_gap:.2f} in the logits: it misreads the checkpoint, or its kernels do "
            "not compute what the format says",
        )


def compare_runtime(
    path: Path, runtime: str, *, python: Path | None = None, trust_remote_code: bool = False
) -> Agreement:
    """The agreement of a runtime's greedy tokens with quantkit's own model of the checkpoint.

    Runs the runtime in a process of its own, of the interpreter `python` if the runtime is not
    installed beside quantkit.  Raises CheckpointError if the runtime is unknown, does not read
    this kind of checkpoint, is not installed, or cannot load the checkpoint, with its own words.
    """
    given = _checked(path, runtime)
    if python is None:
        _check_installed(runtime)
    elif shutil.which(python) is None:
        raise CheckpointError(f"--runtime-python {python}: there is no such program")
    model = load(path, dtype=torch.float32, trust_remote_code=trust_remote_code)
    check_continues(model)
    pictures = placeholders_of(model.config)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompts = without_placeholders(_prompts(vocabulary), model.config).tolist()
    version, continuations = _ask(
        given, runtime, prompts, python or Path(sys.executable), trust_remote_code
    )
    if len(continuations) != len(prompts) or not all(continuations):
        raise CheckpointError(
            f"{path}: {runtime} {version} continued {sum(map(bool, continuations))} of "
            f"{len(prompts)} prompts, so there is nothing to judge; run it by itself to see why"
        )
    judged, agreed, worst = 0, 0, 0.0
    for prompt, told in zip(prompts, continuations, strict=True):
        # What would follow an image that is not there cannot be asked for.
        tokens = list(itertools.takewhile(lambda token: token not in pictures, told))
        if not tokens:
            continue
        ids = torch.tensor([[*prompt, *tokens]])
        with torch.no_grad():
            logits_TV = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        chosen = logits_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        judged += len(tokens)
        gap = logits_TV.amax(-1) - chosen
        agreed += int((gap == 0).sum())
        worst = max(worst, float(gap.max()))
    if not judged:
        raise CheckpointError(
            f"{path}: {runtime} begins every answer with a token that stands for an image, so "
            "nothing can be compared; verify it without --runtime"
        )
    return Agreement(
        runtime=runtime,
        version=version,
        tokens=judged,
        agreed=agreed,
        worst_gap=worst,
    )


def _checked(path: Path, runtime: str) -> Path:
    """What the runtime is given: the directory, or the file in it."""
    if runtime not in _RUNTIMES:
        raise CheckpointError(f"--runtime {runtime!r}: known are {', '.join(_RUNTIMES)}")
    wanted = _RUNTIMES[runtime].reads
    file = container_of(path)
    kind = "directory of safetensors"
    if file is not None:
        kind = "ONNX model" if is_onnx(file) else "GGUF file"
    if kind == wanted:
        return file or path
    if wanted in _EXPORTS and file is None:
        advice = f"export it: quantkit export {path} --format {_EXPORTS[wanted]} --out DIR"
    else:
        able = [name for name, other in _RUNTIMES.items() if other.reads == kind]
        advice = f"this is for --runtime {' or '.join(able)}"
    raise CheckpointError(f"{path}: a {kind}, and {runtime} is given a {wanted}; {advice}")


def _check_installed(runtime: str) -> None:
    if importlib.util.find_spec(_RUNTIMES[runtime].module) is None:
        raise CheckpointError(
            f"--runtime {runtime}: the package {_RUNTIMES[runtime].package} is not installed here; "
            "install it, or name an interpreter that has it with --runtime-python"
        )


def _prompts(vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (_PROMPTS, _PROMPT_TOKENS), generator=generator)


def _ask(
    path: Path, runtime: str, prompts: Sequence[Sequence[int]], python: Path, trust: bool
) -> tuple[str, list[list[int]]]:
    """The runtime's version and its continuations, from a process that may crash."""
    asked = {"path": str(path.resolve()), "prompts": prompts, "count": _NEW_TOKENS, "trust": trust}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        # -P: the script's directory has modules named like others' packages.
        [python, "-P", runtime_script.__file__, runtime],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        told = [line for line in done.stderr.strip().splitlines() if line.strip()]
        last = told[-1][:_MOST_SHOWN] if told else "it ended without a word"
        raise CheckpointError(f"{path}: {runtime} cannot load it: {last}")
    answer = json.loads(lines[-1])
    return str(answer["version"]), [list(map(int, tokens)) for tokens in answer["tokens"]]
