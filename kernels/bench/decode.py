"""Decoding with a random Llama: bfloat16 and each scheme, and llama.cpp beside them.

    PYTHONPATH=.:kernels python kernels/bench/decode.py --json FILE [--quick] [--peer PYTHON]

On a CPU half a billion parameters, the weights of the head in 8 bits; llama.cpp reads random
numbers of the same shapes from GGUF files.  `gpu.py` runs `rows` with eight billion.  Decoding is
transformers' own `generate`, greedily at batch 1: tokens per second count those after the first.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cpu import command, processor
from quantkit_kernels.cpu import isa
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from quantkit.inference.backend import Backend
from quantkit.inference.fused import fuse_
from quantkit.inference.generate import decoding_options
from quantkit.inference.layers import QuantLinear
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

SCHEMES = (None, "w4a16_g128", "w8a16_row", "w8a8_row", "fp8a16_row", "fp8a8_row", "nf4_b64")
EIGHT_BILLION = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=4096,
)
HALF_BILLION = LlamaConfig(
    hidden_size=1024,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=16,
    vocab_size=32000,
    max_position_embeddings=2048,
)
TINY = LlamaConfig(
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=2048,
    max_position_embeddings=512,
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a model is run.

    `head` is the scheme of the output head (None: bfloat16); `static` a cache of fixed size, with
    which `generate` compiles its step on a GPU and, with `compiled`, on a CPU too; with `float32`
    activations and what is not quantized are that instead of bfloat16.
    """

    scheme: str | None
    head: str | None = None
    backend: Backend = "auto"
    fuse: bool = False
    static: bool = False
    compiled: bool = False
    float32: bool = False


@dataclass(frozen=True, kw_only=True)
class Length:
    """Tokens of the prompt and new ones, and how often it is timed after the warm-up."""

    prompt: int = 128
    new: int = 128
    repeats: int = 2


_rounded = functools.partial(Run, head="w8a16_row", backend="cpu-int8", fuse=True)
ON_CPU = (
    Run(scheme=None),
    Run(scheme="w4a16_g32", head="w8a16_row"),
    Run(scheme="w4a16_g32", head="w8a16_row", fuse=True),
    Run(scheme="w4a16_g32", head="w8a16_row", fuse=True, static=True, compiled=True),
    Run(scheme="w8a16_row", head="w8a16_row", fuse=True),
    _rounded(scheme="w4a16_g32"),
    _rounded(scheme="w4a16_g32", static=True, compiled=True),
    _rounded(scheme="w4a16_g32", static=True, compiled=True, float32=True),
    _rounded(scheme="w8a16_row"),
    _rounded(scheme="w8a16_row", static=True, compiled=True),
)


@torch.no_grad()
def main() -> None:
    """Times, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="two small layers, few tokens")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", type=Path, help="the Python that has llama-cpp-python")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    config = TINY if chosen.quick else HALF_BILLION
    length = Length(prompt=16, new=8 if chosen.quick else chosen.new, repeats=chosen.repeats)
    report: dict[str, Any] = {
        "machine": {
            "processor": processor(),
            "level": isa.level(),
            "bfloat16_instructions": isa.fast_bfloat16(),
            "threads": chosen.threads,
            "torch": torch.__version__,
        },
        "command": command(),
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "prompt": length.prompt,
        "new": length.new,
        "rows": [],
    }
    for row in _rows(config, length, chosen.threads, chosen.peer):
        report["rows"].append(row)
        print(row, flush=True)
        chosen.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _rows(
    config: LlamaConfig, length: Length, threads: int, peer: Path | None
) -> Iterator[dict[str, Any]]:
    for run in ON_CPU:
        model = random_model(config, run, torch.device("cpu"))
        yield {"program": "quantkit", **vars(run), **timed(model, run, length)}
        del model
        torch._dynamo.reset()
    if peer is None:
        return
    # Only here: it needs the package gguf.
    import random_gguf

    for kind in random_gguf.KINDS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "random.gguf"
            random_gguf.write(path, config, kind)
            yield {"program": "llama.cpp", "scheme": kind, **_peer(peer, path, length, threads)}


def _peer(python: Path, path: Path, length: Length, threads: int) -> dict[str, Any]:
    script = Path(__file__).with_name("llama_cpp_decode.py")
    numbers = (length.prompt, length.new, threads, length.repeats)
    done = subprocess.run(
        [str(python), str(script), str(path), *map(str, numbers)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{python}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(
    device: torch.device,
    config: LlamaConfig,
    length: Length,
    schemes: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """bfloat16, then those of `schemes` that are compared: tokens and seconds, peak memory."""
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)
    for name in SCHEMES:
        if (old and name == "fp8a8_row") or (name is not None and name not in schemes):
            continue
        run = Run(scheme=name, fuse=True, static=True)
        model = random_model(config, run, device)
        if device.type == "cuda":
            # Random codes took more memory than what is left of them.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        yield {"scheme": name or "bf16", **timed(model, run, length)}
        del model
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def random_model(config: LlamaConfig, run: Run, device: torch.device) -> nn.Module:
    """A Llama of random codes, built a layer at a time; the embedding stays bfloat16."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for path, module in list(model.named_modules()):
        scheme = run.head if "lm_head" in path else run.scheme
        if isinstance(module, nn.Linear) and scheme is not None:
            parent, _, leaf = path.rpartition(".")
            shape = (module.out_features, module.in_features)
            layer = QuantLinear(random_tensor(scheme, shape, device), backend=run.backend)
            if layer.fallback is not None:
                raise RuntimeError(f"{path}: {layer.fallback}")
            setattr(model.get_submodule(parent), leaf, layer)
    if run.fuse:
        fuse_(model)
    for path, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, leaf = path.rpartition(".")
            value = torch.randn(parameter.shape, device=device).bfloat16() * 0.02
            owner = model.get_submodule(parent)
            setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            # A buffer that no checkpoint holds: computed again on the device.
            with torch.device(device):
                fresh = type(module)(config=config)
            module.inv_freq = fresh.inv_freq
            module.original_inv_freq = fresh.inv_freq
    return (model.float() if run.float32 else model).eval()


def random_tensor(name: str, shape: tuple[int, int], device: torch.device) -> QuantizedTensor:
    """Random codes and scales of a symmetric scheme."""
    scheme = Scheme.parse(name)
    groups = shape[1] // (scheme.group_size or shape[1])
    codes = torch.randint(1, 2**scheme.bits, shape, dtype=torch.uint8, device=device)
    if scheme.kind == "fp8":
        # The two codes that are no numbers.
        codes[(codes & 0x7F) == 0x7F] = 0
    return QuantizedTensor(
        codes=codes,
        scale=PlainScale(
            tensor=(torch.rand(shape[0], groups, device=device) * 1e-3).bfloat16().float()
        ),
        zero=None,
        scheme=scheme,
        dtype=torch.bfloat16,
    )


def timed(model: Any, run: Run, length: Length) -> dict[str, float]:
    """Tokens per second after the first, seconds to the first token, on a GPU peak bytes."""
    device = model.device
    draw = torch.Generator(device=device).manual_seed(0)
    size = (1, length.prompt)
    ids = torch.randint(3, model.config.vocab_size, size, generator=draw, device=device)
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    if run.static:
        options["cache_implementation"] = "static"
    options.update(decoding_options(compiled=run.compiled))
    seconds: dict[int, list[float]] = {1: [], length.new + 1: []}
    # The first two runs compile and capture.
    for number in range(length.repeats + 2):
        for count, found in seconds.items():
            _synchronize(device)
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
            _synchronize(device)
            if number >= 2:
                found.append(time.perf_counter() - start)
    first, whole = (statistics.median(found) for found in seconds.values())
    row = {
        "tokens_per_second": round(length.new / (whole - first), 1),
        "first_token_seconds": round(first, 4),
    }
    if device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return row


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
