"""`bench --draft`: what is counted is what a slow loop counts, and what cannot be is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_eval
import tiny_jobs as jobs
import torch
from quantkit_eval.errors import EvaluationError
from quantkit_eval.timing.draft import measure_draft
from quantkit_eval.windows import text_windows
from transformers import PreTrainedModel

import quantkit
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.formats.open import open_source

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, DRAFT_TOKENS = 3, 12, 21, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_eval.loud("llama", tmp_path_factory.mktemp("model"))
    tiny_eval.write_heldout(path)
    return path


@pytest.fixture(scope="module")
def coarse(model: Path) -> Path:
    """The same in few bits: it agrees sometimes."""
    out: Path = quantkit.quantize(
        str(model), "rtn", scheme="w3a16_g32", out=model.parent / "coarse",
        allow_unreadable=True, progress=False,
    )  # fmt: skip
    return out


def slow(model: PreTrainedModel, draft: PreTrainedModel, ids: list[int]) -> tuple[int, int, int]:
    """(proposed, accepted, passes) by the plain algorithm, without caches."""

    def best(which: PreTrainedModel, given: list[int]) -> int:
        with torch.no_grad():
            return int(which(torch.tensor([given]), use_cache=False).logits[0, -1].argmax())

    end = len(ids) + NEW_TOKENS
    proposed = accepted = passes = 0
    while len(ids) < end:
        tried = list(ids)
        # The model's own token is one of those that are left.
        for _ in range(min(DRAFT_TOKENS, end - len(ids) - 1)):
            tried.append(best(draft, tried))
        proposed += len(tried) - len(ids)
        passes += 1
        for token in tried[len(ids) :]:
            if best(model, ids) != token:
                break
            accepted += 1
            ids = [*ids, token]
        ids = [*ids, best(model, ids)]
    return proposed, accepted, passes


def test_counts_are_those_of_the_plain_algorithm(model: Path, coarse: Path) -> None:
    found = measure_draft(
        model, coarse, text=str(model / "heldout.txt"), prompts=PROMPTS,
        prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS, draft_tokens=DRAFT_TOKENS, device="cpu",
    )  # fmt: skip
    large = quantkit.load(model, dtype=torch.float32, device="cpu")
    small = quantkit.load(coarse, dtype=torch.float32, device="cpu")
    tokenizer = load_tokenizer(open_source(model))
    text = (model / "heldout.txt").read_text()
    rows = text_windows(text, tokenizer, seq_len=PROMPT_TOKENS, max_windows=PROMPTS).ids.tolist()
    counted = [slow(large, small, row) for row in rows]
    proposed, accepted, passes = (sum(column) for column in zip(*counted, strict=True))
    assert (found.proposed, found.accepted) == (proposed, accepted)
    assert 0 < accepted < proposed
    assert found.acceptance == accepted / proposed
    assert found.tokens_per_pass == pytest.approx(PROMPTS * NEW_TOKENS / passes)
    assert found.same_text == PROMPTS
    assert found.speed_up_low <= found.speed_up <= found.speed_up_high
    wanted = "pays" if found.speed_up_low > 1 else "does not pay"
    assert found.verdict in (wanted, "undecided")


def test_a_model_takes_all_that_it_drafts_itself(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["bench", model, "--draft", model, "--text", model / "heldout.txt", "--prompts", 2]
    sizes = ["--prompt-tokens", 12, "--new-tokens", 16, "--draft-tokens", 3, "--device", "cpu"]
    assert jobs.command(*line, *sizes, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "quantkit.draft/1"
    assert found["acceptance"] == 1 and found["tokens_per_pass"] == 4
    assert jobs.command(*line, *sizes) == 0
    assert "acceptance  100.0 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": 1}, "two at least"),
        ({"draft_tokens": 0}, "--draft-tokens 0: from 1 to 64"),
        ({"new_tokens": 500}, "do not fit the 128 positions"),
        ({"prompts": 4000}, "prompts of 12 tokens, 4000 are asked for"),
    ],
)
def test_what_cannot_be_measured_is_said(
    model: Path, options: dict[str, int], message: str
) -> None:
    asked = {"prompts": 2, "prompt_tokens": 12, "new_tokens": 8, "draft_tokens": 3, **options}
    with pytest.raises(EvaluationError, match=message):
        measure_draft(model, model, text=str(model / "heldout.txt"), device="cpu", **asked)


def test_a_draft_of_another_family_is_refused(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    jobs.build("llama", other)
    told = json.loads((other / "tokenizer.json").read_text())
    vocabulary = told["model"]["vocab"]
    first, second = sorted(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(EvaluationError, match="its tokenizer is not that of"):
        measure_draft(
            model, other, text=str(model / "heldout.txt"), prompts=2, prompt_tokens=12,
            new_tokens=8, draft_tokens=3, device="cpu",
        )  # fmt: skip
