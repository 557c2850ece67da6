"""Quantizes a model with AutoRound on a CPU, as the peer that quantkit is measured against.

Run with a Python that has auto-round 0.15:
    autoround_quantize.py MODEL OUT --calib-text FILE
Symmetric in groups of 128, 4 bits unless --bits says otherwise.  Calibration is the first
``samples * seq_len`` tokens of the text, tokenized at once, so that every tool under comparison
sees the same tokens.  Prints one JSON line with the seconds taken by each part.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

START = time.perf_counter()

import torch  # noqa: E402
from auto_round import AutoRound  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def main() -> None:
    args = parse_arguments()
    imported = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    batches = calibration_batches(tokenizer, args)
    loaded = time.perf_counter()
    rounder = AutoRound(
        model,
        tokenizer=tokenizer,
        scheme=f"W{args.bits}A16",
        dataset=batches,
        nsamples=args.samples,
        seqlen=args.seq_len,
        batch_size=args.batch_size,
        iters=args.iters,
        device_map="cpu",
        enable_torch_compile=False,
    )
    work = Path(args.out + ".work")
    rounder.quantize_and_save(str(work), format=args.format)
    done = time.perf_counter()
    # AutoRound writes into a folder of its own naming.
    (written,) = work.iterdir()
    written.rename(args.out)
    work.rmdir()
    seconds = {
        "import": imported - START,
        "load": loaded - imported,
        "quantize_and_save": done - loaded,
        "total": done - START,
    }
    print(json.dumps({"iters": args.iters, "threads": torch.get_num_threads(), "seconds": seconds}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--calib-text", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--iters", type=int, default=200, help="0 is round-to-nearest")
    parser.add_argument("--bits", type=int, default=4, choices=[2, 3, 4])
    parser.add_argument(
        "--format", default="auto_gptq", help="auto_gptq, llm_compressor, auto_round"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="to compute in and to save; float32 is far faster on CPUs without AVX512-BF16",
    )
    return parser.parse_args()


def calibration_batches(tokenizer: object, args: argparse.Namespace) -> list[torch.Tensor]:
    """The first samples * seq_len token ids of the text, as tensors [batch, seq_len]."""
    ids = tokenizer(Path(args.calib_text).read_text(encoding="utf-8"))["input_ids"]  # type: ignore[operator]
    wanted = args.samples * args.seq_len
    if len(ids) < wanted:
        raise SystemExit(f"{args.calib_text} holds {len(ids)} tokens; {wanted} are needed")
    rows = torch.tensor(ids[:wanted]).view(args.samples, args.seq_len)
    return list(rows.split(args.batch_size))


if __name__ == "__main__":
    main()
