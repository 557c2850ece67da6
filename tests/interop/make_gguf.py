"""Writes the GGUF files that test_llama_cpp.py reads, with what quantkit itself makes of them.

    make_gguf.py ROOT [SOURCE]

runs in quantkit's own environment with the `gguf` package.  SOURCE (or the directory that the
environment variable QUANTKIT_INTEROP_MODEL names) replaces the demo model.

    ROOT/gguf/NAME/model.gguf            the file
    ROOT/gguf/NAME/expected.safetensors  input_ids [P, T] and float32 logits [P, T, V] by
                                         `quantkit.load` of the checkpoint the file is made of
    ROOT/gguf/NAME/prompts.json          prompts and their tokens
    ROOT/gguf/spm-NAME/texts.json        texts and their tokens, by sentencepiece-like tokenizers

    ROOT/gguf/judge.safetensors          windows [N, T] of text and their original logits [N, T, V]
    ROOT/gguf/importance.json            GGUF name -> mean square of each input channel

Quantized cases are of the demo model; one random model for each other family.  The importance is
what llama.cpp's imatrix tool gathers, from the text that the quantized cases are calibrated on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import quantkit
from quantkit.calibration.data.tokens import load_calibration
from quantkit.demo import demo_path
from quantkit.demo.corpus import heldout_text
from quantkit.formats.gguf.families import family_of
from quantkit.formats.gguf.names import place_of
from quantkit.pipeline.export import export

sys.path.insert(0, str(Path(__file__).parent))
from cases import MAX_NEW_TOKENS, PROMPTS
from gguf_cases import EXPORTED, FAMILIES, FLOATS, PERPLEXITY_TOKENS, QUANTIZED, SENTENCEPIECE
from spm import TEXTS, sentencepiece_tokenizer


def main() -> None:
    root = Path(sys.argv[1]) / "gguf"
    named = sys.argv[2] if len(sys.argv) > 2 else os.environ.get("QUANTKIT_INTEROP_MODEL")
    demo = Path(named) if named else demo_path()
    root.mkdir(parents=True, exist_ok=True)
    for name, options in EXPORTED.items():
        checkpoint = demo
        if options:
            checkpoint = root / f"{name}-checkpoint"
            _run("quantize", str(demo), "--out", str(checkpoint), *options)
        _export(checkpoint, root / name, demo)
    for name, options in {**QUANTIZED, **FLOATS}.items():
        _quantize(demo, root / name, options)
    _write_nvfp4(root / "mxfp4" / "model.gguf", root / "nvfp4")
    _expect(quantkit.load(root / "nvfp4" / "model.gguf", dtype=torch.float32), demo, root / "nvfp4")
    _judge(demo, root)
    for name, sizes in FAMILIES.items():
        # llama.cpp guesses tokens from names that contain "phi3".
        short = name.replace("phi3", "phi")
        _random_model(root / f"{short}-source", name, sizes, AutoTokenizer.from_pretrained(demo))
        _export(root / f"{short}-source", root / f"tiny-{short}", demo)
    for name, options in SENTENCEPIECE.items():
        _sentencepiece(root / f"spm-{name}-source", root / f"spm-{name}", options)


def _sentencepiece(source: Path, out: Path, options: dict[str, bool]) -> None:
    """A tiny model with a tokenizer of its own, and the tokens that transformers gives."""
    tokenizer = sentencepiece_tokenizer(heldout_text(), **options)
    _random_model(source, "llama", FAMILIES["llama"], tokenizer)
    shutil.rmtree(out, ignore_errors=True)
    export(source, out, format_name="gguf", progress=False)
    read = AutoTokenizer.from_pretrained(source)
    told = [{"text": text, "ids": read(text)["input_ids"]} for text in TEXTS]
    (out / "texts.json").write_text(json.dumps(told), encoding="utf-8")


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "quantkit", *arguments], check=True)


def _export(checkpoint: Path, out: Path, demo: Path) -> None:
    # By its own directory transformers would give qwen2 another tokenizer than tokenizer.json's.
    shutil.rmtree(out, ignore_errors=True)
    done = export(checkpoint, out, allow_rounding=True, format_name="gguf", progress=False)
    print(f"{out.name}: {done.text()}", flush=True)
    _expect(quantkit.load(checkpoint, dtype=torch.float32), demo, out)


def _quantize(source: Path, out: Path, options: tuple[str, ...]) -> None:
    shutil.rmtree(out, ignore_errors=True)
    _run("quantize", str(source), "--out", str(out), *options)
    _expect(quantkit.load(out / "model.gguf", dtype=torch.float32), source, out)


def _write_nvfp4(source: Path, out: Path) -> None:
    """A file with the values of another's MXFP4 tensors as NVFP4, which quantkit reads only."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    reader = gguf.GGUFReader(source)
    architecture = "general.architecture"
    writer = gguf.GGUFWriter(out / "model.gguf", reader.fields[architecture].contents())
    for field in reader.fields.values():
        if field.name != architecture and not field.name.startswith("GGUF."):
            kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    types, owner = gguf.GGMLQuantizationType, gguf.quants.NVFP4
    for tensor in reader.tensors:
        if tensor.tensor_type != types.MXFP4:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        values = gguf.quants.dequantize(tensor.data, types.MXFP4).reshape(-1, 16)
        scales = owner.fp32_to_ue4m3(np.maximum(np.abs(values).max(1) / 6, 2**-9))
        units = values / (2 * owner.ue4m3_to_fp32(scales))[:, None]
        codes = np.abs(np.abs(units)[..., None] - numbers).argmin(-1) + 8 * (units < 0)
        packed = codes[:, :8] | (codes[:, 8:] << 4)
        blocks = np.concatenate([scales.reshape(-1, 4), packed.reshape(-1, 32)], 1)
        rows = blocks.astype(np.uint8).reshape(len(tensor.data), -1)
        writer.add_tensor(tensor.name, rows, raw_dtype=types.NVFP4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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


def _judge(demo: Path, root: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo)
    model = quantkit.load(demo, dtype=torch.float32)
    # The calibration is the first 16 windows; the last 40 judge.
    windows = load_calibration(
        "demo", tokenizer=tokenizer, samples=64, seq_len=128, seed=0, max_length=512,
        vocab_size=len(tokenizer),
    ).ids  # fmt: skip
    sums: dict[str, torch.Tensor] = {}
    family = family_of("llama")

    def observe(name: str) -> Any:
        def hook(_module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0].flatten(0, -2)
            sums[name] = sums.get(name, torch.zeros(x.shape[1])) + x.square().sum(0)

        return hook

    handles = []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            place = place_of(family, f"{path}.weight")
            assert place is not None
            # A tied head, such as the demo's, is the embedding, whose name llama.cpp knows it by.
            tied = place.stem == "output" and model.config.tie_word_embeddings
            target = "token_embd.weight" if tied else place.name
            handles.append(module.register_forward_pre_hook(observe(target)))
    with torch.no_grad():
        model(input_ids=windows[:16], use_cache=False)
        for handle in handles:
            handle.remove()
        judged = windows[-40:].contiguous()
        logits = model(input_ids=judged, use_cache=False).logits.float().contiguous()
    tokens = 16 * windows.shape[1]
    importance = {name: (total / tokens).tolist() for name, total in sums.items()}
    (root / "importance.json").write_text(json.dumps(importance), encoding="utf-8")
    save_file({"input_ids": judged, "logits": logits}, root / "judge.safetensors")


def _random_model(directory: Path, model_type: str, sizes: dict[str, Any], tokenizer: Any) -> None:
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
