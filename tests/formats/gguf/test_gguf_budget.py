"""A budget for a GGUF file: block types chosen tensor by tensor, embedding and head among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_jobs as jobs
import torch
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.files import FileSource
from quantkit.demo.files import demo_path
from quantkit.errors import BudgetError, FormatError
from quantkit.formats.gguf.container import MODEL_FILE
from quantkit.formats.gguf.file import read_gguf
from quantkit.formats.registry import make_format
from quantkit.methods.recipe import load_recipe
from quantkit.model.causal import CausalModel
from quantkit.numbers.scheme import Scheme
from quantkit.pipeline.budget import sensitivity
from quantkit.pipeline.budget.candidates import budget_groups, mixes
from quantkit.pipeline.job import prepare
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.plan import open_container
from quantkit.pipeline.session import Job
from quantkit.pipeline.solve import quantize_weights

pytest.importorskip("gguf")
from formats.gguf.test_export import save_model
from formats.gguf.test_quantize import token_rows

pytestmark = pytest.mark.usefixtures("one_thread")


def job(model: Path, **given: Any) -> Job:
    asked: dict[str, Any] = {"method": "rtn", "samples": 8, "seq_len": 64, "progress": False}
    rows: Any = token_rows(8, 64)
    return prepare(str(model), QuantizeOptions(calibration=rows, **{**asked, **given}))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 576 are no whole K-quant blocks."""
    return save_model(
        tmp_path_factory.mktemp("untied"),
        "llama",
        hidden_size=576,
        intermediate_size=768,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=1,
        tie_word_embeddings=False,
    )


def test_a_file_has_the_types_that_were_chosen(tmp_path: Path) -> None:
    named = job(demo_path(), scheme="q4_k_m", format="gguf").plan.layout.file_bytes
    made = job(demo_path(), size=named, reader="llama.cpp")
    assert made.plan.format.name == "gguf" and made.plan.readers["llama.cpp"] is None
    assert made.budget is not None and made.budget.reader == "llama.cpp"
    jobs.finish(made, tmp_path / "out")
    file = tmp_path / "out" / MODEL_FILE
    assert made.plan.layout.file_bytes == file.stat().st_size
    assert named - 40_000 < file.stat().st_size <= named
    chosen = {name: g.scheme for g in made.budget.groups for name in g.weights}
    types = {name: tensor.type for name, tensor in read_gguf(file).tensors.items()}
    assert types["token_embd.weight"].lower() == chosen["model.embed_tokens.weight"]
    for part, own in (("attn_q", "self_attn.q_proj"), ("ffn_down", "mlp.down_proj")):
        for block in range(4):
            name = f"model.layers.{block}.{own}.weight"
            assert types[f"blk.{block}.{part}.weight"].lower() == chosen[name]
    assert len(set(chosen.values())) > 1
    report = json.loads((tmp_path / "out/quantkit/report.json").read_text())
    assert report["budget"]["bits_chosen"] <= report["budget"]["bits"]
    assert not any("does not divide" in note for note in report["notes"])


def test_each_tensor_chooses_and_so_do_embedding_and_head(untied: Path) -> None:
    model, fmt = CausalModel.open(FileSource(untied)), make_format("gguf")
    groups = budget_groups(model, load_recipe("rtn"), open_container(model, fmt))
    assert [len(group.refs) for group in groups] == [1] * 9
    assert [group.block for group in groups] == [None, *[0] * 7, None]
    assert groups[0].name == "model.embed_tokens.weight" and groups[-1].name == "lm_head.weight"
    headed = load_recipe("rtn", head="q8_0")
    assert len(budget_groups(model, headed, open_container(model, fmt))) == 8
    found = mixes(model, load_recipe("rtn"), fmt, groups, reader=None, unreadable=False)
    assert len(found["llama.cpp"]) == 10
    made = job(untied, bits=5.0, format="gguf")
    for name, weight in made.plan.weight_of.items():
        assert weight.scheme is not None and weight.scheme.block is not None
        if weight.shape[1] == 576:
            assert not weight.scheme.block.endswith("_k"), name
    assert 4.5 < made.plan.bits_per_quantized_weight <= 5.0


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_loss_of_embedding_or_head_is_that_of_the_model_with_it_alone_quantized(
    tied: bool, untied: Path, tmp_path: Path
) -> None:
    folder = untied
    if tied:
        folder = save_model(
            tmp_path / "tied", "llama", num_hidden_layers=1, tie_word_embeddings=True
        )
    model, fmt = CausalModel.open(FileSource(folder)), make_format("gguf")
    recipe = load_recipe("rtn")
    groups = [
        group
        for group in budget_groups(model, recipe, open_container(model, fmt))
        if group.block is None
    ]
    assert len(groups) == (1 if tied else 2)
    calibration = job(folder, method="gptq", scheme="q8_0").calibration
    assert calibration is not None
    probed = Scheme.parse("q4_0")
    losses = sensitivity.measure(
        model, recipe, groups, [{probed: 1, Scheme.parse("q8_0"): 2}] * len(groups), calibration,
        scratch=tmp_path, gram_budget=None, device="cpu", progress=False,
    )  # fmt: skip
    ids = sensitivity.split_calibration(calibration)[0].ids
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        base = plain(ids).logits.double().log_softmax(-1)
        for group, loss in zip(groups, losses, strict=True):
            dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            (ref,) = group.refs
            weight = dense.get_parameter(ref.parameter if ref.role == "head" else ref.name)
            (solved,) = quantize_weights(
                [ref], [weight], probed, None,
                target=None, range_part=recipe.make_range(), rounding=recipe.make_rounding(),
                dtype=torch.float32,
            )  # fmt: skip
            weight.copy_(solved.tensor.dequantize())
            other = dense(ids).logits.double().log_softmax(-1)
            expected = float((base.exp() * (base - other)).sum(-1).mean())
            # Divergences of a random model are near the noise of its float32 logits.
            assert loss[probed] == pytest.approx(expected, rel=0.02, abs=2e-9)


def test_what_block_types_cannot_reach_is_refused(untied: Path) -> None:
    with pytest.raises(BudgetError, match=r"as llama.cpp or ollama reads them reach 4\.\d+ to 8\."):
        job(untied, bits=2.0, format="gguf")
    with pytest.raises(FormatError, match=r"gguf is read by llama\.cpp and ollama"):
        job(untied, bits=5.0, format="gguf", reader="vllm")
