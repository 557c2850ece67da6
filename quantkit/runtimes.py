"""A checkpoint in the program that will serve it: does it compute what quantkit computes?

Each runtime is asked for greedy continuations of a few tokens, and quantkit's own model judges
them, given the same tokens before: a runtime that misreads a file chooses tokens that are far from
the best.  Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.errors import CheckpointError
from quantkit.loading import load

# Prompts are token ids: whatever the tokenizer, they are the same for everyone.
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 4, 16, 32
# Runtimes compute in 16 bits, which moves logits of this size by about 0.06 each.
_TIE = 0.30
_LEAST_AGREEMENT = 0.9
_PACKAGES = {"transformers": "transformers", "vllm": "vllm"}
RUNTIMES = tuple(_PACKAGES)


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


def compare_runtime(path: Path, runtime: str) -> Agreement:
    """The agreement of a runtime's greedy tokens with quantkit's own model of the checkpoint.

    Runs the runtime in a process of its own.  Raises CheckpointError if the runtime is unknown, is
    not installed or cannot load the checkpoint, with its own words.
    """
    if runtime not in _PACKAGES:
        raise CheckpointError(f"--runtime {runtime!r}: known are {', '.join(_PACKAGES)}")
    if importlib.util.find_spec(_PACKAGES[runtime]) is None:
        raise CheckpointError(
            f"--runtime {runtime}: the package {_PACKAGES[runtime]} is not installed here; install "
            "it, or verify where it is"
        )
    model = load(path, dtype=torch.float32)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompts = _prompts(vocabulary)
    version, continuations = _ask(path, runtime, prompts)
    agreed, worst = 0, 0.0
    for prompt, tokens in zip(prompts, continuations, strict=True):
        ids = torch.tensor([[*prompt, *tokens]])
        with torch.no_grad():
            logits_TV = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        chosen = logits_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        gap = logits_TV.amax(-1) - chosen
        agreed += int((gap == 0).sum())
        worst = max(worst, float(gap.max()))
    return Agreement(
        runtime=runtime,
        version=version,
        tokens=sum(len(tokens) for tokens in continuations),
        agreed=agreed,
        worst_gap=worst,
    )


def _prompts(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (_PROMPTS, _PROMPT_TOKENS), generator=generator)
    return [row.tolist() for row in ids]


def _ask(path: Path, runtime: str, prompts: Sequence[Sequence[int]]) -> tuple[str, list[list[int]]]:
    """The runtime's version and its continuations, from a process that may crash."""
    request = json.dumps({"path": str(path.resolve()), "prompts": prompts, "count": _NEW_TOKENS})
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "quantkit.runtimes", runtime],
        input=request,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        told = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise CheckpointError(
            f"{path}: {runtime} cannot load it: {told[-1] if told else 'it ended without a word'}"
        )
    answer = json.loads(lines[-1])
    return str(answer["version"]), [list(map(int, tokens)) for tokens in answer["tokens"]]


def _transformers(path: str, prompts: list[list[int]], count: int) -> tuple[str, list[list[int]]]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        found.append(out[0, len(prompt) :].tolist())
    return transformers.__version__, found


def _vllm(path: str, prompts: list[list[int]], count: int) -> tuple[str, list[list[int]]]:
    import vllm  # type: ignore[import-not-found]

    engine = vllm.LLM(path, enforce_eager=True, max_model_len=len(prompts[0]) + count + 1)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = engine.generate(asked, sampling, use_tqdm=False)
    return str(vllm.__version__), [list(out.outputs[0].token_ids) for out in outputs]


_READERS: dict[str, Callable[[str, list[list[int]], int], tuple[str, list[list[int]]]]] = {
    "transformers": _transformers,
    "vllm": _vllm,
}


def _main() -> None:
    request = json.load(sys.stdin)
    version, tokens = _READERS[sys.argv[1]](request["path"], request["prompts"], request["count"])
    print(json.dumps({"version": version, "tokens": tokens}))


if __name__ == "__main__":
    _main()
