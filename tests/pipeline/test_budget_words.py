"""A budget as the size of files, or as the memory of a GPU with a cache beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_jobs as jobs

from quantkit.checkpoint.files import FileSource
from quantkit.errors import BudgetError, FormatError, QuantkitError, RecipeError
from quantkit.model.causal import CausalModel
from quantkit.pipeline.asked import open_asked
from quantkit.pipeline.budget import choose as choosing
from quantkit.pipeline.budget.choose import Choice
from quantkit.pipeline.budget.wish import parse_context, wish_of
from quantkit.pipeline.job import prepare
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.session import Job

pytestmark = pytest.mark.usefixtures("one_thread")
# Hidden size 64, 2 layers, 2 heads of keys and values of 16, feed-forward 96.
VOCABULARY = 333


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.build("llama", tmp_path_factory.mktemp("llama"), vocab_size=VOCABULARY)


def options(model: Path, **given: Any) -> QuantizeOptions:
    return QuantizeOptions(
        method="rtn",
        calibration=str(model / "calibration.txt"),
        samples=jobs.SAMPLES,
        seq_len=jobs.SEQ_LEN,
        device="cpu",
        progress=False,
        **given,
    )


def job(model: Path, **given: Any) -> Job:
    return prepare(str(model), options(model, **given))


def test_files_are_no_larger_than_the_size_and_nearly_as_large(llama: Path, tmp_path: Path) -> None:
    whole = job(llama, bits=5.0).plan.layout.num_bytes
    size = whole + 900
    made = job(llama, size=size)
    jobs.finish(made, tmp_path / "out")
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    # What is left is less than the smallest step of a group and the reserve for headers.
    assert size - 2 * 2**10 - 14 * 256 < written <= size
    report = json.loads((tmp_path / "out/quantkit/report.json").read_text())
    budget = report["budget"]
    assert budget["bits_of"] == "files" and budget["bits_chosen"] <= budget["bits"]
    assert budget["turned"].startswith(f"--size {size}: ")
    assert made.budget is not None
    assert Choice.from_dict(json.loads(json.dumps(made.budget.to_dict()))) == made.budget


def test_memory_holds_weights_cache_and_activations(llama: Path) -> None:
    model = CausalModel.open(FileSource(llama))
    config = model.text_config
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    for kv, item in ((None, 2), ("fp8", 1)):
        asked = options(llama, fit_vram=10_000_000, context=48, kv=kv)
        room = wish_of(asked, model).room
        assert room is not None
        assert room.cache == 48 * config.num_hidden_layers * 2 * heads * size * item
        feed = config.hidden_size + 2 * config.intermediate_size
        assert room.activations == 48 * 2 * (2 * config.hidden_size + feed) + 4 * VOCABULARY
        assert room.weights == 10_000_000 - room.cache - room.activations


def test_a_window_bounds_what_its_layers_keep(tmp_path: Path) -> None:
    folder = jobs.build("gemma3_text", tmp_path)
    model = CausalModel.open(FileSource(folder))
    config = model.text_config
    windows = [
        min(64, config.sliding_window) if kind == "sliding_attention" else 64
        for kind in config.layer_types
    ]
    room = wish_of(options(folder, fit_vram="1GiB", context=64), model).room
    assert room is not None
    numbers = 2 * config.num_key_value_heads * config.head_dim
    assert room.cache == sum(windows) * numbers * 2
    assert len(set(windows)) > 1, "one layer has a window shorter than the context"


def test_what_memory_was_turned_into_is_told(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = CausalModel.open(FileSource(llama))
    plain = wish_of(options(llama, fit_vram=10_000_000, context="64"), model).room
    assert plain is not None
    memory = job(llama, bits=6.0).plan.layout.num_bytes + plain.cache + plain.activations
    made = job(llama, fit_vram=memory, context="64")
    assert made.budget is not None and made.budget.room is not None
    assert made.plan.layout.num_bytes <= made.budget.room.weights
    asked = ["--fit-vram", memory, "--context", "64", "--method", "rtn", "--samples", 8]
    calib = ["--calib", llama / "calibration.txt", "--seq-len", 32]
    assert jobs.command("plan", llama, *asked, *calib) == 0
    told = capsys.readouterr().out
    assert f"budget     --fit-vram {memory} --context 64: " in told
    assert "of keys and values (64 tokens in 16 bits)" in told


def test_more_memory_than_a_mix_can_use_takes_the_largest(llama: Path) -> None:
    source = sum(fate.source_bytes for fate in job(llama, bits=6.0).plan.fates)
    model = CausalModel.open(FileSource(llama))
    room = wish_of(options(llama, fit_vram=10_000_000, context=64), model).room
    assert room is not None
    made = job(llama, fit_vram=source - 1 + room.cache + room.activations, context=64)
    assert made.budget is not None
    assert {group.scheme[:2] for group in made.budget.groups} == {"w8"}


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"size": 1000}, BudgetError, r"--size 1000: .* reach [\d,]+ to [\d,]+ bytes of files"),
        ({"size": "3GiB"}, BudgetError, "choose a size between them"),
        ({"size": "many"}, BudgetError, "write a number with a unit"),
        ({"size": 0}, BudgetError, "above nothing"),
        ({"size": "1MiB", "bits": 4.0}, RecipeError, "--bits and --size are the same wish"),
        ({"size": "1MiB", "bits_of": "model"}, RecipeError, "--size counts whole files"),
        ({"size": "1MiB", "format": "onnx"}, FormatError, "give --bits"),
        ({"size": "1MiB", "scheme": "w4a16_g32"}, RecipeError, "give one of the two"),
        ({"fit_vram": "1GiB"}, RecipeError, "go together"),
        ({"context": 64}, RecipeError, "go together"),
        ({"fit_vram": "1GiB", "context": "64k"}, BudgetError, "the model has 128 positions"),
        ({"fit_vram": "1GiB", "context": "all"}, BudgetError, "write tokens, as in 32k"),
        ({"fit_vram": "1GiB", "context": 64}, BudgetError, "the model fits as it is"),
        ({"fit_vram": "9KiB", "context": 64}, BudgetError, "no room is left for weights"),
        ({"fit_vram": "90KiB", "context": 64}, BudgetError, "give more memory, less --context"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_in_a_sentence(
    given: dict[str, Any],
    error: type[QuantkitError],
    told: str,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choosing, "measure", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(error, match=told):
        job(llama, **given)


def test_contradictions_show_before_the_model_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="go together"):
        open_asked(str(tmp_path / "none"), [QuantizeOptions(fit_vram="1GiB")])


def test_contexts() -> None:
    assert [parse_context(text) for text in ("32k", "8192", 7, "1 K")] == [32768, 8192, 7, 1024]
