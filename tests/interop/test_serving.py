"""transformers' own ways of serving, over quantkit.load's layers: docs/serving.md."""

from __future__ import annotations

import pytest
import torch
from cases import PROMPTS
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

import quantkit
from quantkit.demo import demo_path

NEW_TOKENS = 8


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The demo model in 8 bits, and in 4, which drafts for it."""
    found = []
    for scheme in ("w8a16_g32", "w4a16_g32"):
        out = tmp_path_factory.mktemp("serving") / scheme
        quantkit.quantize(str(demo_path()), "rtn", scheme=scheme, out=out, progress=False)
        found.append(quantkit.load(out, device="cpu", dtype=torch.float32))
    return found[0], found[1]


def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    return [tokenizer(text)["input_ids"] for text in PROMPTS[:2]]


def alone(model: PreTrainedModel, ids: list[int]) -> list[int]:
    """The greedy answer to one prompt."""
    given = torch.tensor([ids])
    out = model.generate(given, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    answer: list[int] = out[0, len(ids) :].tolist()
    return answer


def test_continuous_batching_answers_as_one_by_one(
    pair: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    model = pair[0]
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    found = model.generate_batch(inputs=prompts(), generation_config=settings)
    answers = {tuple(out.prompt_ids): list(out.generated_tokens) for out in found.values()}
    assert answers == {tuple(ids): alone(model, ids) for ids in prompts()}


def test_a_draft_changes_no_answer(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    model, draft = pair
    for ids in prompts():
        out = model.generate(
            torch.tensor([ids]), assistant_model=draft, max_new_tokens=NEW_TOKENS,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        assert out[0, len(ids) :].tolist() == alone(model, ids)
