"""--kv: scales of keys and values, beside what transformers' own cache holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_jobs as jobs
import torch
from quantkit_eval.figures.stream import ModelStream
from quantkit_eval.sequences import Scored, make_workload
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

import quantkit
from quantkit.checkpoint.files import FileSource
from quantkit.checks.verify import verify
from quantkit.errors import CheckpointError, FormatError, RecipeError
from quantkit.model.attention import keys_and_values
from quantkit.model.decoded import open_decoded
from quantkit.numbers.cache import CacheScheme
from quantkit.pipeline.export import export
from quantkit.pipeline.session import Job
from tools.sweep.one import _build

pytestmark = pytest.mark.usefixtures("one_thread")

# Grouped heads; keys that are normalised; a head size of its own; experts.
KINDS = ["llama", "qwen3", "gemma3_text", "mixtral"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("cache")
    return {kind: jobs.build(kind, folder / kind) for kind in KINDS}


def job_of(model: Path, method: str, kv: str, **options: object) -> Job:
    recipe = jobs.load_recipe(
        method, scheme="w8a16_row", samples=jobs.SAMPLES, seq_len=jobs.SEQ_LEN, kv=kv
    )
    return jobs.make_job(model, recipe=recipe, **options)


def written(out: Path) -> dict[str, torch.Tensor]:
    found = load_file(out / "model.safetensors")
    return {name: t for name, t in found.items() if name.endswith((".k_scale", ".v_scale"))}


def held(job: Job, out: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [B, H, T, D] of each layer in the cache of the quantized model."""
    assert job.calibration is not None
    model = quantkit.load(out, backend="reference", dtype=torch.float32)
    cache = DynamicCache()
    with torch.no_grad():
        model(job.calibration.ids, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "kv"), [("rtn", "fp8_head"), ("gptq", "fp8")])
def test_scales_are_those_of_what_the_cache_holds(
    kind: str, method: str, kv: str, models: dict[str, Path], tmp_path: Path
) -> None:
    job = job_of(models[kind], method, kv)
    out = jobs.finish(job, tmp_path / "out").out
    found, scheme = written(out), CacheScheme.parse(kv)
    layers = held(job, out)
    assert len(found) == 2 * len(layers)
    for number, layer in enumerate(layers):
        for leaf, x in zip(("k", "v"), layer, strict=True):
            wanted = scheme.scale(x.abs().amax(dim=(0, 2, 3)))
            scale = found[f"model.layers.{number}.self_attn.{leaf}_scale"]
            # The model in memory sums in another order.
            assert torch.allclose(scale, wanted, rtol=2**-7)
    told = json.loads((out / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert told["strategy"] == ("attn_head" if kv == "fp8_head" else "tensor")
    checked = verify(out, against=str(models[kind]))
    assert checked.ok, checked
    # What is loaded and saved again has them still.
    quantkit.load(out).save_pretrained(tmp_path / "again")
    again = written(tmp_path / "again")
    assert again.keys() == found.keys()
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_a_model_in_memory_is_saved_with_the_scales(
    models: dict[str, Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32)
    quantkit.quantize(
        model,
        "rtn",
        scheme="w8a16_row",
        kv="fp8",
        calibration=jobs.ids(),
        samples=2,
        seq_len=16,
        progress=False,
    )
    model.save_pretrained(tmp_path / "out")
    assert len(written(tmp_path / "out")) == 2 * model.config.num_hidden_layers


def test_an_export_says_that_it_leaves_the_scales(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = jobs.load_recipe("rtn", scheme="w4a16_g32", kv="fp8", samples=4, seq_len=16)
    out = jobs.finish(jobs.make_job(models["llama"], recipe=recipe), tmp_path / "out").out
    exported = export(out, tmp_path / "gptq", format_name="gptq", progress=False)
    assert any("scales of the cache" in note for note in exported.notes)
    assert not written(tmp_path / "gptq")
    assert verify(tmp_path / "gptq", against=str(out)).ok


def test_evaluation_rounds_keys_and_values_as_the_cache_does(
    models: dict[str, Path], tmp_path: Path
) -> None:
    out = jobs.finish(job_of(models["llama"], "rtn", "fp8"), tmp_path / "out").out
    ids = jobs.ids()[:1]
    workload = make_workload(
        [Scored(ids=tuple(ids[0].tolist()), spans=((1, ids.shape[1]),), label="one")]
    )
    found = {}
    for kv in ("stored", "none", "int8"):
        source = open_decoded(FileSource(out))
        with ModelStream("x", source, workload, tmp_path / kv, kv=kv) as stream:
            stream.embed()
            for index in range(stream.num_blocks):
                stream.advance(index, stream.load(index), lambda: None)
            found[kv] = stream.model.logits(stream.read(0))[:, : ids.shape[1]]
    model = jobs.dequantized(models["llama"], out)
    scales, scheme = written(out), CacheScheme.parse("fp8")

    def rounded(
        name: str, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pair = (key, scales[f"{name}.k_scale"]), (value, scales[f"{name}.v_scale"])
        return scheme.rounded(*pair[0]), scheme.rounded(*pair[1])

    with torch.no_grad():
        plain = model(ids).logits
        with keys_and_values(model, rounded):
            wanted = model(ids).logits
    assert torch.allclose(found["none"], plain, atol=1e-4)
    # No token is old enough to be packed.
    assert torch.allclose(found["int8"], plain, atol=1e-4)
    assert torch.allclose(found["stored"], wanted, atol=1e-4)
    assert not torch.allclose(plain, wanted, atol=1e-3)


def test_a_checkpoint_without_scales_is_rounded_with_ones_as_servers_do(
    models: dict[str, Path], tmp_path: Path
) -> None:
    out = jobs.finish(jobs.make_job(models["llama"], "rtn"), tmp_path / "out").out
    source = open_decoded(FileSource(out))
    assert source.cache_scheme() is None
    key, value = source.cache_scales("model.layers.0.self_attn", CacheScheme(name="fp8"), 2)
    assert key.tolist() == value.tolist() == [1.0]


def test_damaged_scales_are_named(models: dict[str, Path], tmp_path: Path) -> None:
    out = jobs.finish(job_of(models["llama"], "rtn", "fp8"), tmp_path / "out").out
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.self_attn.v_scale"].zero_()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    problems = [problem for check in verify(out).checks for problem in check.problems]
    assert any("layers.1.self_attn.v_scale: a scale is not above zero" in one for one in problems)
    source = open_decoded(FileSource(out))
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.v_scale"):
        source.cache_scales("model.layers.1.self_attn", CacheScheme(name="fp8"), 2)


def test_padding_does_not_count(models: dict[str, Path]) -> None:
    from quantkit.calibration.rounded_cache import counting

    seen: list[torch.Tensor] = []
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    key = torch.arange(2 * 2 * 3.0).reshape(2, 2, 3, 1)
    see = counting(lambda _, k, v: seen.extend((k, v)), mask)
    same, _ = see("self_attn", key, key)
    assert same is key
    assert seen[0].shape == (1, 2, 3, 1)
    assert seen[0][0, :, :, 0].tolist() == [[0, 1, 6], [3, 4, 9]]


def test_what_cannot_have_scales_is_refused_before_work(
    models: dict[str, Path], tmp_path: Path
) -> None:
    for scheme, fmt in (("nf4_b64", None), ("w4a16_g32", "gptq_v2")):
        recipe = jobs.load_recipe("rtn", scheme=scheme, kv="fp8")
        with pytest.raises(FormatError, match="no place for scales of the cache"):
            jobs.make_job(models["llama"], recipe=recipe, format=fmt)
    text = models["llama"] / "calibration.txt"
    for kind, reason in (("deepseek_v3", "latent attention"), ("mamba", "no block hands keys")):
        (tmp_path / kind).mkdir()
        with torch.no_grad():
            _build("causal", kind, tmp_path / kind, torch.arange(3, 51).view(2, 24))
        with pytest.raises(RecipeError, match=reason):
            job_of(tmp_path / kind, "rtn", "fp8", text=text)
    asked = ("quantize", models["llama"], "--method", "rtn", "--kv", "int3", "--calib", text)
    assert jobs.command(*asked, "--out", tmp_path / "out") == 2
