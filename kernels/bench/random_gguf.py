"""GGUF files of random numbers: what llama.cpp decodes with when it is timed.

Only the shapes matter for speed.  Needs the package gguf (the extra `[gguf]`).
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type
from transformers import LlamaConfig

KINDS = ("Q4_0", "Q8_0", "F16")
# Bytes of a block of 32 numbers: a float16 scale, then the codes.
_BLOCK = {"Q4_0": 18, "Q8_0": 34}


def write(path: Path, config: LlamaConfig, kind: str) -> None:
    """Writes a Llama whose matrices are of `kind`; the head of a Q4_0 model is Q8_0."""
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    hidden, inner = config.hidden_size, config.intermediate_size
    head = hidden // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    keys = config.num_key_value_heads * head
    _matrix(writer, draw, "token_embd.weight", (config.vocab_size, hidden), "F16")
    for layer in range(config.num_hidden_layers):
        name = f"blk.{layer}"
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{name}.{norm}.weight", np.ones(hidden, np.float32))
        _matrix(writer, draw, f"{name}.attn_q.weight", (hidden, hidden), kind)
        _matrix(writer, draw, f"{name}.attn_k.weight", (keys, hidden), kind)
        _matrix(writer, draw, f"{name}.attn_v.weight", (keys, hidden), kind)
        _matrix(writer, draw, f"{name}.attn_output.weight", (hidden, hidden), kind)
        _matrix(writer, draw, f"{name}.ffn_gate.weight", (inner, hidden), kind)
        _matrix(writer, draw, f"{name}.ffn_up.weight", (inner, hidden), kind)
        _matrix(writer, draw, f"{name}.ffn_down.weight", (hidden, inner), kind)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    shape = (config.vocab_size, hidden)
    _matrix(writer, draw, "output.weight", shape, "Q8_0" if kind == "Q4_0" else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _matrix(
    writer: gguf.GGUFWriter,
    draw: np.random.Generator,
    name: str,
    shape: tuple[int, int],
    kind: str,
) -> None:
    if kind == "F16":
        writer.add_tensor(name, (draw.standard_normal(shape, np.float32) * 0.02).astype(np.float16))
        return
    rows, columns = shape
    blocks: npt.NDArray[np.uint8] = draw.integers(
        0, 256, (rows, columns // 32, _BLOCK[kind]), dtype=np.uint8
    )
    scale = draw.random((rows, columns // 32), np.float32) * 1e-3
    blocks[..., :2] = scale.astype(np.float16)[..., None].view(np.uint8)
    writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=Type[kind])
