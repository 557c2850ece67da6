r"""Writes a random bf16 Llama of any size, one block at a time, for benchmarks of speed and memory.

    random_llama.py OUT --tokenizer DIR
makes the 100 M-parameter one (hidden 1024, intermediate 2816, 8 layers);
    random_llama.py OUT --tokenizer DIR --hidden 2560 --intermediate 6912 --layers 29 --heads 20 \
        --kv-heads 4
makes one of 4 GB.  Only one shard is ever in memory.  The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig


def main() -> None:
    args = parse_arguments()
    out = Path(args.out)
    out.mkdir(parents=True)
    vocab_size = max(copy_tokenizer(Path(args.tokenizer), out), args.vocab)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.max_positions,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(out)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    num_parameters = write_shards(out, config, generator)
    print(json.dumps({"parameters": num_parameters, "bytes": 2 * num_parameters}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="a directory that does not exist yet")
    parser.add_argument("--tokenizer", required=True, help="a directory with tokenizer.json")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--max-positions", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=0, help="at least so many tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where numbers are drawn; others there")
    args = parser.parse_args()
    if args.hidden % args.heads or args.heads % args.kv_heads:
        parser.error("--heads must divide --hidden and be a multiple of --kv-heads")
    return args


def copy_tokenizer(source: Path, out: Path) -> int:
    """The tokenizer's vocabulary size; its files are copied to out."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    tokenizer = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    ids = list(tokenizer["model"]["vocab"].values())
    ids += [token["id"] for token in tokenizer["added_tokens"]]
    return max(ids) + 1


def write_shards(out: Path, config: LlamaConfig, generator: torch.Generator) -> int:
    """Number of parameters written; the embeddings, every block and the head have a shard each."""
    num_shards = config.num_hidden_layers + 2
    weight_map: dict[str, str] = {}
    num_parameters = 0
    for index in range(num_shards):
        tensors = dict(shard_tensors(index - 1, config, generator))
        file_name = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file(tensors, out / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file_name))
        num_parameters += sum(tensor.numel() for tensor in tensors.values())
    index_json = {"metadata": {"total_size": 2 * num_parameters}, "weight_map": weight_map}
    text = json.dumps(index_json, indent=2, sort_keys=True) + "\n"
    (out / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return num_parameters


def shard_tensors(
    layer: int, config: LlamaConfig, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of block `layer`; -1 means the embeddings, num_hidden_layers the head."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    kv_size = hidden // config.num_attention_heads * config.num_key_value_heads

    def normal(rows: int, columns: int) -> torch.Tensor:
        # Keeps outputs at their inputs' scale, whatever the width.
        values = torch.randn(rows, columns, generator=generator, device=generator.device)
        return values.mul_(columns**-0.5).bfloat16()

    def norm() -> torch.Tensor:
        drawn = torch.randn(hidden, generator=generator, device=generator.device)
        return (1 + 0.2 * drawn).bfloat16()

    if layer < 0:
        yield "model.embed_tokens.weight", normal(config.vocab_size, hidden)
    elif layer == config.num_hidden_layers:
        yield "model.norm.weight", norm()
        yield "lm_head.weight", normal(config.vocab_size, hidden)
    else:
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", norm()
        yield f"{prefix}.post_attention_layernorm.weight", norm()
        yield f"{prefix}.self_attn.q_proj.weight", normal(hidden, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", normal(kv_size, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", normal(kv_size, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", normal(hidden, hidden)
        yield f"{prefix}.mlp.gate_proj.weight", normal(intermediate, hidden)
        yield f"{prefix}.mlp.up_proj.weight", normal(intermediate, hidden)
        yield f"{prefix}.mlp.down_proj.weight", normal(hidden, intermediate)


if __name__ == "__main__":
    main()
