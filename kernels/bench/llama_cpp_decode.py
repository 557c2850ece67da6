"""Decoding speed of a GGUF file under llama.cpp, as JSON; run by the interpreter that has it.

    python kernels/bench/llama_cpp_decode.py FILE PROMPT NEW THREADS REPEATS

Imports nothing of quantkit: `decode.py --peer PYTHON` starts it.
"""

from __future__ import annotations

import json
import sys
import time

import llama_cpp
import numpy as np


def main() -> None:
    """Prints {"tokens_per_second", "first_token_seconds", "version"}: medians of the repeats."""
    path, *numbers = sys.argv[1:]
    prompt, new, threads, repeats = (int(number) for number in numbers)
    model = llama_cpp.Llama(
        path, n_ctx=prompt + new + 8, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    ids = [int(token) for token in np.random.default_rng(0).integers(3, model.n_vocab(), prompt)]
    firsts, rates = [], []
    for _ in range(repeats + 1):
        model.reset()
        start = time.perf_counter()
        model.eval(ids)
        token = _greedy(model)
        first = time.perf_counter()
        for _ in range(new):
            model.eval([token])
            token = _greedy(model)
        stop = time.perf_counter()
        firsts.append(first - start)
        rates.append(new / (stop - first))
    print(
        json.dumps(
            {
                # The first run warms up.
                "tokens_per_second": round(float(np.median(rates[1:])), 1),
                "first_token_seconds": round(float(np.median(firsts[1:])), 4),
                "version": llama_cpp.__version__,
            }
        )
    )


def _greedy(model: llama_cpp.Llama) -> int:
    logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return int(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).argmax())


if __name__ == "__main__":
    main()
