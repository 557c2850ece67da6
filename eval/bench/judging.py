"""KL divergence of many quantized checkpoints to one float32 original, on the same windows."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What a checkpoint lost, and the file size its weights take."""

    kl_mean: float
    kl_low: float
    kl_high: float
    kl_p99: float
    kl_maximum: float
    top1_agreement: float
    perplexity_ratio: float
    weight_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Evaluates by `python -m quantkit_eval`, in the reader's own interpreter."""

    original: str
    text: str
    tokens: int
    seq_len: int
    threads: int

    @classmethod
    def of(cls, options: argparse.Namespace) -> Judge:
        """By the options of `common.evaluation_arguments`."""
        return cls(
            original=options.model,
            text=options.eval_text,
            tokens=options.eval_tokens,
            seq_len=options.eval_seq_len,
            threads=options.threads,
        )

    def __call__(
        self, quantized: Path | str, *, python: str | None = None, reader: str = "quantkit"
    ) -> Quality:
        """The quality of one checkpoint."""
        with tempfile.NamedTemporaryFile(suffix=".json") as result:
            command = [
                *(python or sys.executable, "-m", "quantkit_eval", self.original, str(quantized)),
                *("--text", self.text, "--tokens", str(self.tokens)),
                *("--seq-len", str(self.seq_len), "--reader", reader, "--json", result.name),
            ]
            common.run(command, threads=self.threads).check(command)
            return quality(json.loads(Path(result.name).read_text(encoding="utf-8")))


def quality(evaluation: dict[str, Any]) -> Quality:
    """The part of an evaluation's JSON that benchmarks compare."""
    measured = evaluation["divergence"]
    return Quality(
        kl_mean=measured["mean"],
        kl_low=measured["mean_interval"]["low"],
        kl_high=measured["mean_interval"]["high"],
        kl_p99=measured["p99"],
        kl_maximum=measured["maximum"],
        top1_agreement=measured["top1_agreement"],
        perplexity_ratio=measured["perplexity_ratio"],
        weight_bytes=evaluation["bytes_quantized"],
    )
