"""Quantizes a model with ModelOpt on a CPU, as the peer that quantkit is measured against.

Run with a Python that has nvidia-modelopt 0.47:
    modelopt_quantize.py MODEL OUT --preset NVFP4_DEFAULT_CFG --calib-text FILE
Calibration is the first ``samples * seq_len`` tokens of the text, as of the other peers.
"""

from __future__ import annotations

import argparse
import copy

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    args = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    with open(args.calib_text, encoding="utf-8") as file:
        ids = tokenizer(file.read(), return_tensors="pt")["input_ids"]
    wanted = args.samples * args.seq_len
    if ids.shape[1] < wanted:
        raise SystemExit(f"{args.calib_text} holds {ids.shape[1]} tokens; {wanted} are needed")
    rows = ids[0, :wanted].view(args.samples, args.seq_len)

    def calibrate(prepared: torch.nn.Module) -> None:
        with torch.no_grad():
            for row in rows:
                prepared(row[None])

    mtq.quantize(model, copy.deepcopy(getattr(mtq, args.preset)), calibrate)
    export_hf_checkpoint(model, export_dir=args.out)
    tokenizer.save_pretrained(args.out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--preset", required=True, help="of modelopt.torch.quantization")
    parser.add_argument("--calib-text", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    return parser.parse_args()


if __name__ == "__main__":
    main()
