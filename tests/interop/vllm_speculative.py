"""Writes what vLLM appends to the prompts of cases.py with a quantized draft, and what it counted.

    vllm_speculative.py ROOT TARGET DRAFT

writes ROOT/TARGET-speculative.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cases import MAX_NEW_TOKENS, PROMPTS

# Sets vLLM's environment, too, and has to come first.
from vllm_continue import LLM, SamplingParams
from wna16_torch import kernel_in_use


def main() -> None:
    root, target, draft = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    kernel_in_use()
    engine = LLM(
        str(root / target),
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=4,
        speculative_config={
            "method": "draft_model",
            "model": str(root / draft),
            "num_speculative_tokens": 3,
        },
        disable_log_stats=False,
    )
    sampling = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS, ignore_eos=True)
    outputs = engine.generate(list(PROMPTS), sampling, use_tqdm=False)
    counted = {
        metric.name.removeprefix("vllm:spec_decode_num_"): metric.value
        for metric in engine.get_metrics()
        if metric.name.startswith("vllm:spec_decode_num_") and hasattr(metric, "value")
    }
    found = [
        {"prompt": list(out.prompt_token_ids), "tokens": list(out.outputs[0].token_ids)}
        for out in outputs
    ]
    record = {"continuations": found, **counted}
    (root / f"{target}-speculative.json").write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()
