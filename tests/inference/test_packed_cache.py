"""The packed cache beside slow rounding, number by number, and beside transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_jobs as jobs
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from quantkit.errors import ModelError
from quantkit.inference import packed_cache as packed
from quantkit.inference.generate import generate_text
from quantkit.inference.packed_attention import PackedAttention
from quantkit.inference.packed_cache import Chunk, PackedLayer
from quantkit.model.attention import attending

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(numbers: list[float], bits: int) -> list[float]:
    """Each number as the nearest of 2^bits between the least and the largest."""
    low, high = min(numbers), max(numbers)
    steps = [low + (high - low) * k / (2**bits - 1) for k in range(2**bits)]
    return [min(steps, key=lambda step: abs(step - x)) for x in numbers]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("axis", [-2, -1])
def test_a_chunk_holds_the_nearest_numbers(bits: int, axis: int) -> None:
    # An odd head size leaves half a byte over.
    x = drawn(2, 3, 6, 5)
    chunk = Chunk.of(x, bits, axis)
    assert chunk.codes.shape[-1] == (5 if bits == 8 else 3)
    rows = x.movedim(axis, -1).reshape(-1, x.shape[axis])
    wanted = torch.tensor([rounded(row.tolist(), bits) for row in rows])
    found = chunk.decoded(torch.float32).movedim(axis, -1).reshape(rows.shape)
    assert torch.allclose(found, wanted, atol=1e-5)
    flat = Chunk.of(torch.full((1, 1, 2, 2), 3.5), bits, axis)
    assert torch.equal(flat.decoded(torch.float32), torch.full((1, 1, 2, 2), 3.5))


def test_old_tokens_are_packed_once_and_recent_ones_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "CHUNK", 4)
    monkeypatch.setattr(packed, "WINDOW", 3)
    keys, values = drawn(1, 2, 19, 8), drawn(1, 2, 19, 8, seed=1)
    layer = PackedLayer(4)
    # A prompt of 6 tokens, then one after the other.
    for start, stop in [(0, 6), *((k, k + 1) for k in range(6, 19))]:
        found = layer.update(keys[..., start:stop, :], values[..., start:stop, :])
        assert layer.get_seq_length() == stop
        # What was there when the step began: chunks of four, beyond the last three to six tokens.
        old = 4 * max(0, (start - 3) // 4)
        for given, whole, axis in ((keys, found[0], -2), (values, found[1], -1)):
            parts = [
                Chunk.of(given[..., k : k + 4, :], 4, axis).decoded(torch.float32)
                for k in range(0, old, 4)
            ]
            assert torch.equal(whole, torch.cat([*parts, given[..., old:stop, :]], dim=-2))


def test_sequences_can_be_chosen_and_tokens_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "CHUNK", 4)
    monkeypatch.setattr(packed, "WINDOW", 3)
    keys = drawn(3, 2, 16, 8)
    layer = PackedLayer(8)
    layer.update(keys, keys)
    whole, _ = layer._whole()
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(layer._whole()[0], whole[[2, 0, 0]])
    layer.batch_select_indices(torch.tensor([0, 1]))
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer._whole()[0], whole[[2, 2, 0, 0]])
    layer.crop(-9)
    assert layer.get_seq_length() == 7
    assert torch.equal(layer._whole()[0], whole[[2, 2, 0, 0], :, :7])
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.num_bytes == 0


def test_memory_is_what_the_bits_say(llama: Path) -> None:
    keys = drawn(1, 2, 4096, 64).bfloat16()
    plain = 2 * keys.nbytes
    for name, least in (("int8", 1.6), ("int4", 2.5)):
        layer = PackedLayer(packed.PACKED[name])
        layer.update(keys, keys)
        assert plain / layer.num_bytes > least


def test_a_model_goes_on_nearly_as_with_its_own_cache(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (2, 200), generator=draw)

    def logits(cache: DynamicCache) -> torch.Tensor:
        with torch.no_grad():
            first = model(ids[:, :150], past_key_values=cache, use_cache=True).logits
            rest = [
                model(ids[:, k : k + 1], past_key_values=cache, use_cache=True).logits
                for k in range(150, 200)
            ]
        return torch.cat([first, *rest], dim=1)

    exact = logits(DynamicCache(config=model.config))
    errors = {}
    for name in packed.PACKED:
        found = logits(packed.packed_cache(model.config, name))
        # The prompt is seen as it is.
        assert torch.allclose(found[:, :150], exact[:, :150], atol=1e-5)
        errors[name] = float((found - exact).norm() / exact.norm())
    assert 0 < errors["int8"] < errors["int4"] / 8 < 0.02


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_whole_sequences_are_attended_to_as_token_by_token(kind: str, tmp_path: Path) -> None:
    folder = jobs.build(kind, tmp_path / kind, max_position_embeddings=512)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (2, 300), generator=draw)
    cache = packed.packed_cache(model.config, "int4")
    with torch.no_grad():
        steps = [
            model(ids[:, k : k + 1], past_key_values=cache, use_cache=True).logits
            for k in range(ids.shape[1])
        ]
        plain = model(ids, use_cache=False).logits
        with attending(PackedAttention(model.config, "int4")):
            found = model(ids, use_cache=False).logits
    assert torch.allclose(found, torch.cat(steps, dim=1), atol=1e-4)
    assert float((found - plain).abs().max()) > 1e-3


def test_layers_with_a_window_keep_their_own(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(jobs.build("gemma3_text", tmp_path / "gemma"))
    kinds = [type(layer) for layer in packed.packed_cache(model.config, "int4").layers]
    assert kinds == [DynamicSlidingWindowLayer, PackedLayer]


def test_generate_takes_it_and_says_what_it_cannot(llama: Path) -> None:
    text = generate_text(llama, "all work", 110, dtype="float32", kv="int8")
    assert text.startswith("all work")
    for options, said in (
        ({"kv": "int2"}, "int8 or int4"),
        ({"kv": "int4", "compiled": True}, "grows"),
    ):
        with pytest.raises(ModelError, match=said):
            generate_text(llama, "all", 2, **options)
