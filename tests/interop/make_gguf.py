"""Writes the GGUF files that test_llama_cpp.py reads, with what quantkit itself makes of them.

    make_gguf.py ROOT [SOURCE]

runs in quantkit's own environment with the `gguf` package.  SOURCE replaces the demo model.

    ROOT/gguf/NAME/model.gguf            the file
    ROOT/gguf/NAME/expected.safetensors  input_ids [P, T] and float32 logits [P, T, V] by
                                         `quantkit.load` of the checkpoint the file is made of
    ROOT/gguf/NAME/prompts.json          prompts and their tokens

Quantized cases are of the demo model; one random model for each other family.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import quantkit
from quantkit.demo import demo_path
from quantkit.gguf_export import export_gguf

sys.path.insert(0, str(Path(__file__).parent))
from cases import MAX_NEW_TOKENS, PROMPTS
from gguf_cases import EXPORTED, FAMILIES, PERPLEXITY_TOKENS, QUANTIZED


def main() -> None:
    root = Path(sys.argv[1]) / "gguf"
    demo = Path(sys.argv[2]) if len(sys.argv) > 2 else demo_path()
    root.mkdir(parents=True, exist_ok=True)
    for name, options in EXPORTED.items():
        checkpoint = demo
        if options:
            checkpoint = root / f"{name}-checkpoint"
            _run("quantize", str(demo), "--out", str(checkpoint), *options)
        _export(checkpoint, root / name, demo)
    for name, options in QUANTIZED.items():
        _quantize(demo, root / name, options)
    for name, sizes in FAMILIES.items():
        # llama.cpp guesses tokens from names that contain "phi3".
        short = name.replace("phi3", "phi")
        _random_model(root / f"{short}-source", name, sizes, demo)
        _export(root / f"{short}-source", root / f"tiny-{short}", demo)


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "quantkit", *arguments], check=True)


def _export(checkpoint: Path, out: Path, demo: Path) -> None:
    # By its own directory transformers would give qwen2 another tokenizer than tokenizer.json's.
    shutil.rmtree(out, ignore_errors=True)
    done = export_gguf(checkpoint, out, allow_rounding=True)
    print(f"{out.name}: {dict(done.types)}", flush=True)
    _expect(quantkit.load(checkpoint, dtype=torch.float32), demo, out)


def _quantize(source: Path, out: Path, options: tuple[str, ...]) -> None:
    shutil.rmtree(out, ignore_errors=True)
    _run("quantize", str(source), "--out", str(out), *options)
    _expect(quantkit.load(out / "model.gguf", dtype=torch.float32), source, out)


def _expect(model: PreTrainedModel, tokenizer_dir: Path, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    text = tokenizer("\n".join(PROMPTS) * 40)["input_ids"][:PERPLEXITY_TOKENS]
    prompts: list[dict[str, Any]] = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_NEW_TOKENS,
            min_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )[0, ids.shape[1] :].tolist()
        prompts.append({"text": prompt, "ids": ids[0].tolist(), "tokens": tokens})
    (out / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    ids = torch.tensor([text])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float()
    save_file({"input_ids": ids, "logits": logits.contiguous()}, out / "expected.safetensors")


def _random_model(directory: Path, model_type: str, sizes: dict[str, Any], demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes, vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    main()
