"""Live models on windows: divergence, perplexity, protocols, tasks."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from quantkit_eval import (
    Divergence,
    EvaluationError,
    compare_tasks,
    measure_divergence,
    measure_perplexity,
    text_windows,
    token_windows,
)
from quantkit_eval.__main__ import main
from quantkit_eval.tasks.accuracy import compare_answers
from tiny_eval import VOCAB, perturbed, reference_log_probs, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from quantkit.demo.tasks import Example


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    characters = [*map(chr, range(32, 32 + VOCAB - 2)), "\n", "<unk>"]
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.fixture(scope="module")
def pair() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    original = tiny_llama()
    return original, perturbed(original, 0.05)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(VOCAB, (7, 19), generator=torch.Generator().manual_seed(2))


def test_divergence_equals_a_plain_float64_reference(pair: Any, ids: torch.Tensor) -> None:
    got = measure_divergence(*pair, token_windows(ids))
    log_p, log_q = (reference_log_probs(model, ids) for model in pair)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).ravel()
    # Float32 softmaxes of 71 logits err by a few 1e-7 against float64.
    near = pytest.approx
    assert got.mean == near(kl.mean(), abs=1e-6)
    assert got.maximum == near(kl.max(), abs=1e-5)
    for quantile in got.quantiles:
        expected = np.quantile(kl, quantile.share, method="inverted_cdf")
        assert quantile.value == near(expected, abs=1e-5)
    assert got.top1_agreement == (log_p.argmax(-1) == log_q.argmax(-1)).mean()
    targets = ids[:, 1:, None].numpy()
    nll_p, nll_q = (-np.take_along_axis(x, targets, -1)[..., 0] for x in (log_p, log_q))
    assert got.perplexity.value == near(math.exp(nll_q.mean()), rel=1e-6)
    assert got.perplexity_ratio == near(math.exp(nll_q.mean() - nll_p.mean()), rel=1e-6)
    change = (np.exp(-nll_q) - np.exp(-nll_p)).ravel()
    assert got.right_token.mean == near(change.mean(), abs=1e-6)
    assert got.right_token.rms == near(math.sqrt((change**2).mean()), rel=1e-5)
    assert got.right_token.lowest == near(change.min(), abs=1e-6)
    interval = got.perplexity_ratio_interval
    assert interval.low < got.perplexity_ratio < interval.high
    assert got.mean_interval.low < got.mean < got.mean_interval.high
    assert sum(found.share for found in got.histogram) == near(1.0)
    worst = got.worst[0]
    assert worst.kl == got.maximum
    place = np.unravel_index(kl.argmax(), (7, 18))
    assert (worst.window, worst.position) == (place[0], place[1] + 1)
    assert worst.best_original == log_p[place].argmax()


def test_divergence_of_a_model_from_itself_is_zero(pair: Any, ids: torch.Tensor) -> None:
    got = measure_divergence(pair[0], pair[0], token_windows(ids))
    assert (got.top1_agreement, got.perplexity_ratio) == (1, 1)
    # Sums in double precision of float32 logits leave nothing but rounding.
    assert got.mean == pytest.approx(0, abs=1e-12) and got.maximum < 1e-12


def test_divergence_grows_with_the_damage(pair: Any, ids: torch.Tensor) -> None:
    def measured(noise: float) -> Divergence:
        return measure_divergence(pair[0], perturbed(pair[0], noise), token_windows(ids))

    assert measured(0.01).mean < measured(0.05).mean < measured(0.2).mean


def test_chunked_softmax_equals_whole(
    pair: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure_divergence(*pair, token_windows(ids))
    monkeypatch.setattr("quantkit_eval.figures.live._CHUNK_ELEMENTS", 5 * VOCAB)
    assert measure_divergence(*pair, token_windows(ids)) == whole


def test_perplexity_equals_the_models_own_loss(pair: Any, ids: torch.Tensor) -> None:
    got = measure_perplexity(pair[0], token_windows(ids))
    with torch.no_grad():
        loss = pair[0](input_ids=ids, labels=ids).loss.item()
    assert got.value == pytest.approx(math.exp(loss), rel=1e-5)
    assert len(got.window_nll) == 7


def independent_perplexity(model: Any, ids: list[int], seq_len: int, stride: int) -> float:
    """Token by token: each is scored once, with all the context its first window gives."""
    scored: dict[int, float] = {}
    for start in range(0, len(ids) - seq_len + 1, stride):
        window = torch.tensor([ids[start : start + seq_len]])
        with torch.no_grad():
            log_probs = model(input_ids=window).logits[0].double().log_softmax(-1)
        for place in range(1, seq_len):
            scored.setdefault(start + place, -log_probs[place - 1, window[0, place]].item())
    return math.exp(sum(scored.values()) / len(scored))


@pytest.mark.parametrize("stride", [3, 8, 12])
def test_strided_perplexity_equals_scoring_every_token_once(pair: Any, stride: int) -> None:
    tokenizer = tiny_tokenizer()
    text = "THE QUICK BROWN FOX JUMPS OVER A LAZY DOG 0123456789 TIMES"
    windows = text_windows(text, tokenizer, seq_len=12, kind="strided", stride=stride)
    got = measure_perplexity(pair[0], windows)
    expected = independent_perplexity(pair[0], tokenizer(text)["input_ids"], 12, stride)
    assert got.value == pytest.approx(expected, rel=1e-5)
    assert (windows.protocol.kind, windows.protocol.stride) == ("strided", stride)


def test_llama_cpp_protocol_scores_the_second_half_after_its_bos(pair: Any) -> None:
    tokenizer = tiny.tokenizer()
    text = "all work and no play makes a dull text " * 40
    ids = tokenizer(text)["input_ids"]
    windows = text_windows(text, tokenizer, seq_len=99, kind="llama.cpp")
    assert windows.ids.shape == (len(ids) // 512, 512)
    # perplexity.cpp: logits of positions 256..510 predict tokens 257..511, 255 of each chunk.
    assert windows.first == (257,) * len(windows.ids)
    assert windows.protocol.scored_tokens == 255 * len(windows.ids)
    bos = tokenizer.bos_token_id
    adds = tokenizer("a")["input_ids"][0] == bos
    assert windows.protocol.adds_bos == adds
    assert windows.ids[1, 1:].tolist() == ids[513:1024]
    assert windows.ids[1, 0] == (bos if adds else ids[512])


def test_broken_or_foreign_models_are_refused(pair: Any, ids: torch.Tensor) -> None:
    broken = copy.deepcopy(pair[0])
    with torch.no_grad():
        broken.model.norm.weight[3] = math.nan
    with pytest.raises(EvaluationError, match="quantized: the logits at position 0 of window 0"):
        measure_divergence(pair[0], broken, token_windows(ids))
    with pytest.raises(EvaluationError, match="hold NaN or infinity"):
        measure_perplexity(broken, token_windows(ids))
    with pytest.raises(EvaluationError, match="71 logits per token and quantized 80"):
        measure_divergence(pair[0], tiny_llama(80), token_windows(ids))


def test_text_windows_join_documents_and_drop_the_tail() -> None:
    tokenizer = tiny_tokenizer()
    windows = text_windows(["ABC", "DEFGH"], tokenizer, seq_len=4)
    assert tokenizer.decode(windows.ids.flatten()).replace(" ", "") == "ABC\n\nDEF"
    assert (windows.protocol.windows, windows.protocol.dropped_tokens) == (2, 2)
    assert windows.protocol.separator == "\n\n"
    assert text_windows("ABCDEFGH", tokenizer, seq_len=2, max_tokens=5).ids.shape == (2, 2)
    assert text_windows("ABCDEFGH", tokenizer, seq_len=2, max_windows=3).ids.shape == (3, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 4}, "3 tokens, one window needs 4"),
        ({"seq_len": 2, "max_windows": 0}, "at least 1 window"),
        ({"seq_len": 2, "stride": 1}, "--stride belongs to --protocol strided"),
        ({"seq_len": 2, "stride": 3, "kind": "strided"}, "from 1 to the window's 2"),
        ({"seq_len": 1}, "at least 2 tokens"),
    ],
)
def test_windows_that_cannot_be_cut_say_why(options: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        text_windows("ABC", tiny_tokenizer(), **options)


def test_answers_are_right_when_greedy_decoding_gives_them(pair: Any) -> None:
    tokenizer = tiny_tokenizer()
    prompts = [f"{a}+{b}=" for a in range(2) for b in range(4)]
    examples, expected = [], []
    for index, prompt in enumerate(prompts):
        encoded = tokenizer(prompt, return_tensors="pt")
        out = pair[0].generate(**encoded, max_new_tokens=3, do_sample=False, eos_token_id=None)
        greedy = out[0, encoded["input_ids"].shape[1] :].tolist()
        # The answer ends where the newline stands, so only some can be made right.
        answer = tokenizer.decode(greedy[:1]) if index % 2 else "Z"
        examples.append(Example(task="t", prompt=prompt, answer=answer))
        wanted = tokenizer(f"{answer}\n")["input_ids"]
        expected.append(greedy[: len(wanted)] == wanted)
    (comparison,) = compare_tasks(pair[0], pair[0], tokenizer, examples)
    assert comparison.right_original == comparison.right_quantized == sum(expected)
    assert (comparison.lost, comparison.gained, comparison.mcnemar_p) == (0, 0, 1.0)


def test_task_comparison_counts_flips_each_way() -> None:
    before = [True, True, True, False, False, True]
    after = [True, False, False, True, False, True]
    a, b, total = compare_answers("aaabbb", before, after)
    assert (a.lost, a.gained, b.lost, b.gained) == (2, 0, 0, 1)
    assert (total.task, total.lost, total.gained, total.mcnemar_p) == ("all", 2, 1, 1.0)
    assert (total.accuracy_original, total.accuracy_quantized) == (4 / 6, 3 / 6)
    assert total.drop == pytest.approx(1 / 6)
    assert total.drop_interval.low < total.drop < total.drop_interval.high
    assert a.holm_p >= a.mcnemar_p


def test_module_compares_two_live_checkpoints(
    pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model, name in zip(pair, ("original", "damaged"), strict=True):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("THE QUICK BROWN FOX 0123456789\n" * 20)
    paths = [str(tmp_path / "original"), str(tmp_path / "damaged")]
    options = ["--reader", "transformers", "--text", str(tmp_path / "text.txt")]
    result = tmp_path / "result.json"
    assert main([*paths, *options, "--tasks", "2", "--json", str(result)]) == 0
    written = json.loads(result.read_text())
    # Asked for 512, the model has 64 positions.
    assert written["protocol"]["seq_len"] == 64
    assert written["divergence"]["mean"] > 0 and written["divergence"]["p99"] > 0
    assert written["bytes_original"] == written["bytes_quantized"]
    assert "KL 0." in capsys.readouterr().out
    assert main([*paths, "--reader", "transformers", "--text", "no-such.txt"]) == 2
    assert "no-such.txt cannot be read" in capsys.readouterr().err
    assert main([paths[0], "/no/model", *options]) == 2
