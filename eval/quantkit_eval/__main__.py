"""`python -m quantkit_eval MODEL QUANTIZED`: two live models compared, in any interpreter.

For checkpoints of other tools, read by the transformers that they pin.  `quantkit eval` does more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import QuantkitError
from quantkit_eval.errors import EvaluationError
from quantkit_eval.figures.live import compare_tasks, measure_divergence
from quantkit_eval.tasks.accuracy import TaskComparison
from quantkit_eval.windows import text_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEMA = "quantkit.pair/1"
_TASK_SEED = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for input that cannot be evaluated."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except QuantkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(options: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    original = _load(options.model, "transformers", options.device)
    quantized = _load(options.quantized, options.reader, options.device)
    positions = getattr(original.config, "max_position_embeddings", None) or options.seq_len
    windows = text_windows(
        _text(options.text),
        tokenizer,
        seq_len=min(options.seq_len, positions),
        max_tokens=options.tokens,
        source=options.text if options.text == "demo" else Path(options.text).name,
    )
    measured = measure_divergence(original, quantized, windows)
    tasks: tuple[TaskComparison, ...] = ()
    if options.tasks:
        from quantkit.demo.tasks import TASKS
        from quantkit.demo.tasks import examples as draw

        examples = [e for task in TASKS for e in draw(task, "heldout", options.tasks, _TASK_SEED)]
        tasks = compare_tasks(original, quantized, tokenizer, examples)
    print(
        f"KL {measured.mean:.5f} [{measured.mean_interval.low:.5f}, "
        f"{measured.mean_interval.high:.5f}], perplexity x {measured.perplexity_ratio:.4f}, "
        f"same top token {100 * measured.top1_agreement:.2f} %"
    )
    for task in tasks:
        print(f"{task.task}: {task.accuracy_original:.4f} to {task.accuracy_quantized:.4f}")
    if options.json is not None:
        found = {
            "schema": SCHEMA,
            "divergence": {
                **dataclasses.asdict(measured),
                "median": measured.quantile(0.5),
                "p99": measured.quantile(0.99),
            },
            "protocol": windows.protocol.to_dict(),
            "tasks": [dataclasses.asdict(task) for task in tasks],
            "bytes_original": _weight_bytes(options.model),
            "bytes_quantized": _weight_bytes(options.quantized),
        }
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _load(path: str, reader: str, device: str) -> PreTrainedModel:
    """A model in float32: a quantized one through quantkit's layers or through transformers."""
    import torch

    if reader == "quantkit":
        from quantkit.inference.load import load

        return load(path, dtype=torch.float32, device=device)
    from transformers import AutoModelForCausalLM

    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} cannot be loaded by transformers: {error}") from error
    return model.to(device).eval()


def _weight_bytes(path: str) -> int | None:
    """Bytes of a local checkpoint's safetensors files, None for a Hub name."""
    files = list(Path(path).glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) if files else None


def _text(source: str) -> str | list[str]:
    if source == "demo":
        from quantkit.demo.corpus import heldout_text

        return heldout_text()
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"--text {source} cannot be read: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="quantkit_eval", description=__doc__)
    parser.add_argument("model", help="the original: a directory or Hub name")
    parser.add_argument("quantized", help="what quantkit (or another tool) made of it")
    parser.add_argument("--text", default="demo", help="a UTF-8 file, or demo (default)")
    parser.add_argument(
        "--tasks",
        nargs="?",
        type=int,
        const=200,
        default=0,
        metavar="N",
        help="also N held-out examples of each demo task (default 200)",
    )
    parser.add_argument("--tokens", type=int, default=40_960, help="at most so many tokens")
    parser.add_argument("--seq-len", type=int, default=512, help="cut to the model's positions")
    parser.add_argument("--reader", choices=["quantkit", "transformers"], default="quantkit")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
