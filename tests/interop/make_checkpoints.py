"""Writes the checkpoints that the interop suite reads, with what quantkit itself makes of them.

    make_checkpoints.py ROOT [SOURCE]

runs in quantkit's own environment; the suite then runs in those of the readers.  SOURCE replaces
the embedded demo model.  For each case and export of cases.py:

    ROOT/source/MODEL            the full-precision model
    ROOT/NAME                    what `quantkit quantize` or `quantkit export` writes
    ROOT/NAME-dense              the same weights dequantized to float32, a plain checkpoint
    ROOT/NAME-dense/names.json   which of them are quantized in ROOT/NAME
    ROOT/NAME-logits.safetensors input_ids and float32 logits of `quantkit.load(ROOT/NAME)`
    ROOT/KIND-kept, -mtp         models with an extra layer, see tiny_extra.py
    ROOT/KIND-pictures, -towers  models calibrated on images, whose logits are of an image too
    ROOT/idefics3-served...      one that vLLM serves, and -0.png, -1.png to ask it about
    ROOT/samples                 single weights, see make_samples.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from quantkit_eval.vectors.pooling import read_pooling
from quantkit_eval.vectors.running import vectors
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import quantkit
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.demo import demo_path
from quantkit.formats.format import fused_name
from quantkit.formats.open import open_source
from quantkit.model.decoded import Decoded

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
import tiny_embeddings
import tiny_extra
import tiny_images
import tiny_models
from cases import (
    CASES,
    EXPORTS,
    IMAGES,
    PICTURES,
    PROMPTS,
    SERVED_PICTURES,
    SERVED_TEXT,
    TEXTS,
    TOWERS,
    VECTORS,
)
from make_samples import write_samples

_MOE_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts_per_tok": 2,
}


def main() -> None:
    root = Path(sys.argv[1])
    demo = Path(sys.argv[2]) if len(sys.argv) > 2 else demo_path()
    write_samples(root)
    write_sources(root / "source", demo)
    for case in CASES:
        write(root, case.name, "quantize", root / "source" / case.source, case.options)
    for export in EXPORTS:
        write(root, export.name, "export", root / export.source, ("--format", export.format))
    for kind in tiny_extra.LAYOUTS:
        write_extra(root, tiny_extra.build(kind, root / "source" / kind), kind)
    for kind in PICTURES:
        write_pictured(root, tiny_images.build(kind, root / "source" / f"{kind}-pictures"), kind)
    write_served_pictures(root)
    for kind in VECTORS:
        write_vectors(root, tiny_embeddings.sentence_model(kind, root / f"source/{kind}-vectors"))


def write_vectors(root: Path, source: Path) -> None:
    """An embedding model, the hidden states that quantkit gives for some tokens, and vectors."""
    out = root / source.name
    quantkit.quantize(
        str(source), "gptq", scheme="w4a16_g32", out=out, calibration="demo", samples=8,
        seq_len=64, progress=False,
    )  # fmt: skip
    ids = torch.arange(3, 67)[None] * 7 % tiny_embeddings.VOCABULARY
    checkpoint = open_source(out)
    pooling = read_pooling(checkpoint, causal=False)
    with torch.no_grad():
        model = quantkit.load(out, dtype=torch.float32, backend="reference")
        states = model(input_ids=ids).last_hidden_state
        found = vectors(model, load_tokenizer(checkpoint), TEXTS, pooling)
    asked = {"input_ids": ids, "states": states.contiguous(), "vectors": found}
    save_file(asked, root / f"{out.name}-states.safetensors")
    print(f"{out.name}: written", flush=True)


def write_served_pictures(root: Path) -> None:
    """A model that vLLM serves with images, its towers as they are and rounded; two pictures."""
    source = tiny_images.build(
        "idefics3", root / "source/idefics3-served", dtype=torch.bfloat16, **SERVED_TEXT
    )
    for name, towers in zip(SERVED_PICTURES, (None, "w8a8_row"), strict=True):
        quantkit.quantize(
            str(source), "rtn", scheme="w4a16_g32", out=root / name, towers=towers, progress=False
        )
        for number in range(2):
            tiny_images.picture(number + 7).save(root / f"{name}-{number}.png")
        print(f"{name}: written", flush=True)


def write_pictured(root: Path, source: Path, kind: str) -> None:
    """A model that was calibrated on images, with its tower as it is, or rounded too."""
    count = 4
    given = [tiny_images.inputs(kind, number) for number in range(count)]
    for name, towers in (("pictures", None), ("towers", TOWERS.get(kind))):
        out = root / f"{kind}-{name}"
        if name == "towers" and towers is None:
            continue
        quantkit.quantize(
            str(source), "gptq", scheme="w4a16_g32", out=out, calibration=given, samples=count,
            seq_len=256, towers=towers, progress=False,
        )  # fmt: skip
        asked = tiny_images.inputs(kind, count)
        with torch.no_grad():
            values = quantkit.load(out, dtype=torch.float32)(**asked).logits
        save_file({**asked, "logits": values.contiguous()}, root / f"{out.name}-logits.safetensors")
        print(f"{out.name}: written", flush=True)


def write_extra(root: Path, source: Path, kind: str) -> None:
    """A model with a layer that predicts further tokens, which stays and which is quantized."""
    for name, options in ((f"{kind}-kept", {}), (f"{kind}-mtp", {"mtp": "w8a16_g32"})):
        quantkit.quantize(
            str(source), "rtn", out=root / name, allow_unreadable=True, progress=False, **options
        )


def write(root: Path, name: str, command: str, source: Path, options: Sequence[str]) -> None:
    """Runs a command of quantkit and writes what quantkit itself makes of the result."""
    out = root / name
    line = [sys.executable, "-m", "quantkit", command, str(source), "--out", str(out), *options]
    subprocess.run(line, check=True)
    write_dense(out, root / f"{name}-dense")
    save_file(logits(out), root / f"{name}-logits.safetensors")
    print(f"{name}: written", flush=True)


def write_sources(root: Path, demo: Path) -> None:
    """Copies the demo model; makes random mixtures of experts and image-text models."""
    shutil.copytree(demo, root / "demo", dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(demo)
    torch.manual_seed(0)
    sizes = _MOE_SIZES | {"vocab_size": len(tokenizer)}
    experts: dict[str, PreTrainedModel] = {
        "mixtral": MixtralForCausalLM(MixtralConfig(num_local_experts=4, **sizes)),
        "qwen3_moe": Qwen3MoeForCausalLM(
            Qwen3MoeConfig(num_experts=4, moe_intermediate_size=256, **sizes)
        ),
        "gpt_oss": GptOssForCausalLM(GptOssConfig(num_local_experts=4, **sizes)),
    }
    for name, model in experts.items():
        model.bfloat16().save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for name in IMAGES:
        tiny_models.build_multimodal(root / name, name)


def write_dense(out: Path, dense: Path) -> None:
    """Writes the checkpoint with every weight decoded by quantkit, in float32."""
    view = Decoded.open(open_source(out))
    tensors = {name: view.read(name).float().contiguous() for name in view.names()}
    if view.config["model_type"] == "gpt_oss":
        stack_experts_(tensors)
    shutil.rmtree(dense, ignore_errors=True)
    dense.mkdir()
    for file in out.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, dense / file.name)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    config["dtype"] = "float32"
    (dense / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (dense / "names.json").write_text(json.dumps(sorted(view.stored)), encoding="utf-8")
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})


def stack_experts_(tensors: dict[str, torch.Tensor]) -> None:
    """Puts all experts of a projection into one tensor [E, I, O], as gpt_oss has them."""
    apart: dict[str, dict[int, torch.Tensor]] = {}
    for name in list(tensors):
        if (found := fused_name(name)) is not None and ".experts." in name:
            apart.setdefault(found[0], {})[found[1]] = tensors.pop(name).t()
    for name, experts in apart.items():
        tensors[name] = torch.stack([experts[number] for number in range(len(experts))])


def logits(out: Path) -> dict[str, torch.Tensor]:
    """Token ids [1, T] of all prompts in a row, and float32 logits [1, T, vocabulary]."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    input_ids = tokenizer("\n".join(PROMPTS), return_tensors="pt")["input_ids"]
    model = quantkit.load(out, dtype=torch.float32)
    with torch.no_grad():
        values = model(input_ids=input_ids, use_cache=False).logits
    return {"input_ids": input_ids, "logits": values.contiguous()}


if __name__ == "__main__":
    main()
