"""The programs that serve checkpoints, asked for greedy continuations: a script, run as a file.

    python -P runtime_script.py RUNTIME < request > answer

The request is JSON with "path", "prompts", "count" and "trust" (code that comes with the model),
the answer's last line has "version" and "tokens".

The interpreter may be any that has the runtime; quantkit need not be installed in it, so nothing
of quantkit is imported here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Continuations = tuple[str, list[list[int]]]


def _transformers(path: str, prompts: list[list[int]], count: int, trust: bool) -> Continuations:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust)
    kind, other = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    if type(config) in other._model_mapping and type(config) not in kind._model_mapping:
        kind = other
    model = kind.from_pretrained(path, dtype="auto", trust_remote_code=trust).eval()
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


def _vllm(path: str, prompts: list[list[int]], count: int, trust: bool) -> Continuations:
    import vllm  # type: ignore[import-not-found]

    length = len(prompts[0]) + count + 1
    engine = vllm.LLM(path, enforce_eager=True, max_model_len=length, trust_remote_code=trust)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = engine.generate(asked, sampling, use_tqdm=False)
    return str(vllm.__version__), [list(out.outputs[0].token_ids) for out in outputs]


def _llama_cpp(path: str, prompts: list[list[int]], count: int, trust: bool) -> Continuations:
    import llama_cpp  # type: ignore[import-not-found]

    length = len(prompts[0]) + count
    model = llama_cpp.Llama(path, n_ctx=length, n_batch=length, logits_all=True, verbose=False)
    found = []
    for prompt in prompts:
        model.reset()
        model.eval(prompt)
        tokens: list[int] = []
        while len(tokens) < count:
            tokens.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(tokens[-1:])
        found.append(tokens)
    return str(llama_cpp.__version__), found


def _onnxruntime(path: str, prompts: list[list[int]], count: int, trust: bool) -> Continuations:
    import numpy as np
    import onnxruntime  # type: ignore[import-not-found]

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()
    names = [value.name for value in session.get_outputs()]
    past = [value for value in inputs if value.name.startswith("past_key_values.")]
    known = {"input_ids", "attention_mask", "position_ids", *(value.name for value in past)}
    if unknown := [value.name for value in inputs if value.name not in known]:
        raise ValueError(f"the graph has an input {unknown[0]} that is not known")
    floats = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    head_size = past[0].shape[3] if past else 0
    if not isinstance(head_size, int):
        # The model builder leaves it free in the graph.
        config = json.loads((Path(path).parent / "genai_config.json").read_bytes())
        head_size = int(config["model"]["decoder"]["head_size"])
    found = []
    for prompt in prompts:
        cache: dict[str, Any] = {
            value.name: np.zeros((1, value.shape[1], 0, head_size), floats[value.type])
            for value in past
        }
        step = prompt
        tokens: list[int] = []
        while len(tokens) < count:
            length = len(prompt) + len(tokens)
            given = {
                "input_ids": np.array([step], np.int64),
                "attention_mask": np.ones((1, length), np.int64),
                "position_ids": np.arange(length - len(step), length, dtype=np.int64)[None],
            }
            wanted = {value.name: given[value.name] for value in inputs if value.name in given}
            values = dict(zip(names, session.run(names, {**wanted, **cache}), strict=True))
            tokens.append(int(values.pop("logits")[0, -1].argmax()))
            step = tokens[-1:]
            cache = {
                key.replace("present.", "past_key_values."): value for key, value in values.items()
            }
        found.append(tokens)
    return str(onnxruntime.__version__), found


READERS: dict[str, Callable[[str, list[list[int]], int, bool], Continuations]] = {
    "transformers": _transformers,
    "vllm": _vllm,
    "llama.cpp": _llama_cpp,
    "onnxruntime": _onnxruntime,
}


def main() -> None:
    """Reads the request and prints the answer in the last line."""
    request = json.load(sys.stdin)
    asked = (request[field] for field in ("path", "prompts", "count", "trust"))
    version, tokens = READERS[sys.argv[1]](*asked)
    print(json.dumps({"version": version, "tokens": tokens}))


if __name__ == "__main__":
    main()
