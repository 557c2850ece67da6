"""Quantizes a model with llm-compressor on a CPU, as the peer that quantkit is measured against.

Run with a Python that has llmcompressor 0.14:
    llmcompressor_quantize.py MODEL OUT --method gptq --calib-text FILE [--preset NVFP4A16]
Calibration is the first ``samples * seq_len`` tokens of the text, tokenized at once, so that every
tool under comparison sees the same tokens.  Prints one JSON line with the seconds of each part.
"""

from __future__ import annotations

import argparse
import json
import time

START = time.perf_counter()

import torch  # noqa: E402
from compressed_tensors.quantization import preset_name_to_scheme  # noqa: E402
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers import Modifier  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: E402
from llmcompressor.modifiers.transform.awq import AWQModifier  # noqa: E402
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def main() -> None:
    args = parse_arguments()
    if not torch.cuda.is_available():
        # llm-compressor's AWQ pins its cache unconditionally, which raises where there is no GPU.
        torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
    imported = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    loaded = time.perf_counter()
    settings = {}
    if args.method != "rtn" or args.calibrated:
        rows = calibration_rows(tokenizer, args)
        settings = {
            "dataset": Dataset.from_dict(
                {"input_ids": rows, "attention_mask": [[1] * args.seq_len for _ in rows]}
            ),
            "num_calibration_samples": args.samples,
            "max_seq_length": args.seq_len,
            "shuffle_calibration_samples": False,
            "batch_size": args.batch_size,
        }
    modifiers = recipe(args.method, args.group_size, args.preset, cached=args.cache)
    oneshot(model=model, tokenizer=tokenizer, recipe=modifiers, **settings)
    quantized = time.perf_counter()
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)
    done = time.perf_counter()
    seconds = {
        "import": imported - START,
        "load": loaded - imported,
        "quantize": quantized - loaded,
        "save": done - quantized,
        "total": done - START,
    }
    print(
        json.dumps({"method": args.method, "threads": torch.get_num_threads(), "seconds": seconds})
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument(
        "--method", required=True, choices=["rtn", "gptq", "awq", "smoothquant", "smoothquant-gptq"]
    )
    parser.add_argument(
        "--preset", help="llm-compressor's name of a scheme, for rtn and gptq (default: W4A16)"
    )
    parser.add_argument("--cache", action="store_true", help="float8 keys and values too")
    parser.add_argument("--calibrated", action="store_true", help="rtn reads the text too")
    parser.add_argument("--calib-text", help="text file; not read by rtn")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument(
        "--group-size", type=int, default=128, help="of 4-bit weights, where 128 does not divide"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="to compute in and to save; float32 is far faster on CPUs without AVX512-BF16",
    )
    args = parser.parse_args()
    if (args.method != "rtn" or args.calibrated) and args.calib_text is None:
        parser.error(f"--method {args.method} needs --calib-text")
    return args


def calibration_rows(tokenizer: object, args: argparse.Namespace) -> list[list[int]]:
    """The first samples * seq_len token ids of the text, as rows of seq_len."""
    with open(args.calib_text, encoding="utf-8") as file:
        ids = tokenizer(file.read())["input_ids"]  # type: ignore[operator]
    wanted = args.samples * args.seq_len
    if len(ids) < wanted:
        raise SystemExit(f"{args.calib_text} holds {len(ids)} tokens; {wanted} are needed")
    return [ids[start : start + args.seq_len] for start in range(0, wanted, args.seq_len)]


def recipe(
    method: str, group_size: int, preset: str | None = None, *, cached: bool = False
) -> list[Modifier]:
    """llm-compressor's own presets: 4 bit in groups of 128 or so, or int8 rows with int8 tokens."""
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True,
             "dynamic": False}  # fmt: skip

    def quantized_by(modifier: type[Modifier], name: str) -> Modifier:
        scheme = preset_name_to_scheme(preset or name, targets=["Linear"])
        if scheme.weights is not None and scheme.weights.group_size == 128:
            scheme.weights.group_size = group_size
        more = {"kv_cache_scheme": cache} if cached else {}
        return modifier(config_groups={"group_0": scheme}, ignore=["lm_head"], **more)

    recipes = {
        "rtn": lambda: [quantized_by(QuantizationModifier, "W4A16")],
        "gptq": lambda: [quantized_by(GPTQModifier, "W4A16")],
        "awq": lambda: [
            AWQModifier(duo_scaling="both"),
            quantized_by(QuantizationModifier, "W4A16_ASYM"),
        ],
        "smoothquant": lambda: [
            SmoothQuantModifier(smoothing_strength=0.8),
            quantized_by(QuantizationModifier, "W8A8"),
        ],
        "smoothquant-gptq": lambda: [
            SmoothQuantModifier(smoothing_strength=0.8),
            quantized_by(GPTQModifier, "W8A8"),
        ],
    }
    return recipes[method]()


if __name__ == "__main__":
    main()
