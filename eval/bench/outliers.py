"""What planted outlier channels do to 8-bit activations: SmoothQuant against plain int8.

    outliers.py MODEL --calib FILE --eval-text FILE [--channels 4] [--factor 64]
The planted model computes what MODEL does.  Wanted: SmoothQuant's KL within 1.5 times that of W8A8
on the model without outliers; per-tensor int8, the negative control, at least 10 times worse.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import common
import torch
from judging import Judge, Quality
from quantkit_eval import measure_divergence
from quantkit_eval.windows import text_windows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quantkit.demo.outliers import write_planted


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """All measured against the float32 model; ratios are to `w8a8_without_outliers`."""

    channels: tuple[int, ...]
    factor: float
    w8a8_without_outliers: Quality
    w8a8_with_outliers: Quality
    smoothquant_with_outliers: Quality
    per_tensor_without_outliers: Quality
    per_tensor_with_outliers: Quality
    smoothquant_ratio: float
    per_tensor_ratio: float


class PerTensorInt8(nn.Module):
    """A linear layer with one scale for the weight and one for all tokens: the naive way."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(_per_tensor(linear.weight.detach()), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output on rounded input."""
        return nn.functional.linear(_per_tensor(x), self.weight, self.bias)


def _per_tensor(x: Tensor) -> Tensor:
    scale = x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny) / 127
    return (x / scale).round().clamp(-127, 127) * scale


def main() -> None:
    options = _options()
    judge = Judge.of(options)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        planted = Path(folder) / "planted"
        channels = write_planted(
            options.model,
            planted,
            channels=options.channels,
            factor=options.factor,
            seed=options.seed,
        )

        def quantized(model: str | Path, method: str) -> Quality:
            out = Path(folder) / f"{Path(model).name}-{method}"
            command = common.quantkit_command(
                model,
                out,
                *("--method", method, "--scheme", "w8a8_row", *common.calibrated(options)),
            )
            common.run(command, threads=options.threads).check(command)
            found = judge(out)
            print(f"{out.name}: KL {found.kl_mean:.6f}", file=sys.stderr)
            return found

        plain = quantized(options.model, "int8")
        smooth = quantized(planted, "smoothquant")
        naive = _naive(planted, options)
        experiment = Experiment(
            channels=channels,
            factor=options.factor,
            w8a8_without_outliers=plain,
            w8a8_with_outliers=quantized(planted, "int8"),
            smoothquant_with_outliers=smooth,
            per_tensor_without_outliers=_naive(Path(options.model), options),
            per_tensor_with_outliers=naive,
            smoothquant_ratio=smooth.kl_mean / plain.kl_mean,
            per_tensor_ratio=naive.kl_mean / plain.kl_mean,
        )
    common.write_result(options.name, experiment)


def _naive(model: Path, options: argparse.Namespace) -> Quality:
    torch.set_num_threads(options.threads)
    damaged = _load(str(model))
    layers = damaged.get_decoder().layers
    for path, module in list(layers.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = path.rpartition(".")
            setattr(layers.get_submodule(parent), leaf, PerTensorInt8(module))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if options.eval_text == "demo":
        from quantkit.demo.corpus import heldout_text

        text: str | list[str] = heldout_text()
    else:
        text = Path(options.eval_text).read_text(encoding="utf-8")
    windows = text_windows(
        text, tokenizer, seq_len=options.eval_seq_len, max_tokens=options.eval_tokens
    )
    measured = measure_divergence(_load(options.model), damaged, windows)
    return Quality(
        kl_mean=measured.mean,
        kl_low=measured.mean_interval.low,
        kl_high=measured.mean_interval.high,
        kl_p99=measured.quantile(0.99),
        kl_maximum=measured.maximum,
        top1_agreement=measured.top1_agreement,
        perplexity_ratio=measured.perplexity_ratio,
        weight_bytes=None,
    )


def _load(path: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _options() -> argparse.Namespace:
    parser = common.arguments(__doc__, name="outliers")
    parser.add_argument("model")
    common.calibration_arguments(parser, samples=128, seq_len=256)
    common.evaluation_arguments(parser)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--factor", type=float, default=64.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
