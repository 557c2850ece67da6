"""Evaluation on conversations with images: the answers' tokens, through processor and towers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_images as images
import torch
from quantkit_eval import talks
from quantkit_eval.errors import EvaluationError
from quantkit_eval.evaluation import evaluate
from quantkit_eval.setting import EvaluationRequest
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

import quantkit
from quantkit.cli.app import app

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 5
# Features of images enter between blocks of the second, which has a processor of the tests'.
KINDS = ("gemma3", "qwen3_vl")
Pair = tuple[Path, Path, str]


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A model, what `rtn` makes of it at two bits, and the type."""
    kind = str(request.param)
    model = images.build(kind, tmp_path_factory.mktemp(kind))
    images.write_dataset(model / "data", COUNT)
    out = model / "out"
    quantkit.quantize(
        str(model), "rtn", scheme="w2a16_g32", out=out, towers="w8a16_row", progress=False,
        allow_unreadable=True,
    )  # fmt: skip
    return model, out, kind


@pytest.fixture
def processor(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The type's processor, which takes the place of one that needs torchvision."""
    found = images.processor(pair[2])
    if pair[2] in images.WITH_VIDEO:
        monkeypatch.setattr(talks, "load_processor", lambda *_, **__: found)
    return found


def wanted(pair: Pair, processor: Any, text: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [S, V] of both models at the answers' tokens, by transformers' forward."""
    original = AutoModelForImageTextToText.from_pretrained(pair[0], dtype=torch.float32).eval()
    quantized = quantkit.load(pair[1], dtype=torch.float32, backend="reference")
    found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for line in text.read_text().splitlines():
        row = json.loads(line)
        row["messages"][0]["content"][0]["image"] = _image(text.parent / row["image"])
        whole, asked = (
            processor.apply_chat_template(
                row["messages"][:turns], tokenize=True, return_dict=True, return_tensors="pt",
                add_generation_prompt=turns == 1,
            )
            for turns in (2, 1)
        )  # fmt: skip
        first = asked["input_ids"].shape[1]
        while not torch.equal(whole["input_ids"][0, :first], asked["input_ids"][0, :first]):
            first -= 1
        with torch.no_grad():
            for rows, model in zip(found, (original, quantized), strict=True):
                rows.append(model(**whole).logits[0, first - 1 : -1].double().log_softmax(-1))
    return torch.cat(found[0]), torch.cat(found[1])


def _image(path: Path) -> Any:
    import PIL.Image

    return PIL.Image.open(path).convert("RGB")


def request(pair: Pair, text: Path, **options: Any) -> EvaluationRequest:
    settings = {"text": str(text), "seq_len": 256, "noise_floor": False, **options}
    return EvaluationRequest(model=str(pair[0]), quantized=(str(pair[1]),), **settings)


def test_figures_are_those_of_whole_models_with_their_pixels(
    pair: Pair, processor: Any, tmp_path: Path
) -> None:
    text = pair[0] / "data/talks.jsonl"
    report = evaluate(request(pair, text, sensitivity=True), tmp_path, progress=False)
    one, other = wanted(pair, processor, text)
    (found,) = report.candidates
    kl = (one.exp() * (one - other)).sum(-1)
    # Blocks and weights are those of whole models up to sums in another order.
    assert found.divergence.mean == pytest.approx(kl.mean().item(), rel=1e-3)
    assert found.divergence.maximum == pytest.approx(kl.max().item(), rel=1e-3)
    same = (one.argmax(-1) == other.argmax(-1)).double().mean().item()
    assert found.divergence.top1_agreement == pytest.approx(same)
    protocol = report.text.protocol
    assert (protocol.kind, protocol.windows) == ("conversations", COUNT)
    assert protocol.scored_tokens == len(one)
    assert {fact.name: fact.value for fact in report.text.facts}["images"] == str(COUNT)
    assert len(found.completions) == 3 and all(c.original for c in found.completions)
    assert len(found.sensitivity) == len(found.blocks) > 0
    assert sum(block.kl for block in found.sensitivity) > 0.1 * found.divergence.mean


def test_other_pictures_are_other_figures(pair: Pair, processor: Any, tmp_path: Path) -> None:
    text = images.write_dataset(tmp_path / "same", COUNT)
    images.write_dataset(tmp_path / "other", COUNT)
    for number in range(COUNT):
        images.picture(number + 40).resize(
            images.picture(number).size
        ).save(tmp_path / f"other/{number}.png")  # fmt: skip
    first, again, changed = (
        evaluate(request(pair, path, prompts=0), tmp_path / str(number), progress=False)
        for number, path in enumerate((text, text, tmp_path / "other/talks.jsonl"))
    )
    assert first.candidates[0].divergence == again.candidates[0].divergence
    assert first.candidates[0].divergence.mean != changed.candidates[0].divergence.mean
    assert first.text.sha256 == again.text.sha256 != changed.text.sha256


def test_every_answer_of_a_conversation_counts(
    pair: Pair, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images.picture(1).save(tmp_path / "1.png")
    turns = [("user", "What is it?"), ("assistant", "A shape."), ("user", "Sure?")]
    turns += [("assistant", "Yes, it is.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps({"image": "1.png", "messages": messages}))
    found = _talks(pair, path)
    decode = images.tokenizer().decode
    (sequence,) = found.sequences
    said = [decode(sequence.ids[start:stop]) for start, stop in sequence.spans]
    assert [text.strip() for text in said] == ["A shape.", "Yes, it is."]
    assert sequence.positions.tolist() == [k for span in sequence.spans for k in range(*span)]
    asked = found.prompt(0)["input_ids"][0].tolist()
    assert decode(asked).strip().endswith("assistant:") and len(asked) < sequence.spans[1][0]


def _talks(pair: Pair, path: Path) -> talks.Talks:
    from quantkit.formats.open import open_source

    found = talks.read_talks(
        str(path), open_source(pair[0]), images.tokenizer(), most=4, seq_len=256
    )
    assert found is not None
    return found


WRONG: dict[str, tuple[Callable[[Any], Any], dict[str, Any], str]] = {
    "no answer": (lambda row: {**row, "messages": row["messages"][:1]}, {}, "has no answer with"),
    "no file": (lambda row: {**row, "image": "nowhere.png"}, {}, "there is no such file"),
    "too long": (lambda row: row, {"seq_len": 8}, "no conversation of up to 8 tokens, 1 are"),
    "strided": (lambda row: row, {"protocol": "strided"}, "are never cut; leave them out"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_measured_is_told(
    wrong: str, pair: Pair, processor: Any, tmp_path: Path
) -> None:
    change, options, told = WRONG[wrong]
    path = images.write_dataset(tmp_path, 1)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(EvaluationError, match=told):
        evaluate(request(pair, path, **options), tmp_path / "work", progress=False)


def test_the_command_writes_what_it_was_measured_on(pair: Pair, processor: Any) -> None:
    model, out, _ = pair
    text = model / "data/talks.jsonl"
    line = ["eval", str(model), str(out), "--text", str(text), "--out", str(model / "report")]
    done = CliRunner().invoke(app, [*line, "--windows", "3", "--max-ram", "4GiB"])
    assert done.exit_code == 0, done.output
    page = (model / "report/report.md").read_text()
    assert "the answers of 3 conversations of up to" in page
    tokens = ["--prompt-tokens", "200", "--new-tokens", "2", "--repeats", "1"]
    done = CliRunner().invoke(app, ["bench", str(out), "--batches", "2", *tokens])
    assert done.exit_code == 0, done.output
