"""`quantkit eval` on checkpoints: numbers, verdicts, pages, and input that cannot be evaluated."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny_eval
import tiny_jobs as jobs
import torch
from quantkit_eval.budget import check_budget
from quantkit_eval.command import run_evaluation
from quantkit_eval.errors import EvaluationError
from quantkit_eval.evaluation import evaluate
from quantkit_eval.figures.statistics import Interval
from quantkit_eval.gate import judge
from quantkit_eval.limits import parse_limit
from quantkit_eval.records import Report, json_schema, to_json
from quantkit_eval.report.pages import render_html, render_markdown
from quantkit_eval.report.words import sentence
from quantkit_eval.setting import EvaluationRequest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantkit.errors import BudgetError, OutputError
from quantkit.inference.load import load

pytestmark = pytest.mark.usefixtures("one_thread")

Capture = pytest.CaptureFixture[str]
SCHEMA = Path(__file__).parents[2] / "eval" / "quantkit_eval" / "report" / "report.schema.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_eval.loud("llama", tmp_path_factory.mktemp("model"))
    tiny_eval.write_heldout(path)
    return path


@pytest.fixture(scope="module")
def outs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("outs")
    return {
        "awq": tiny_eval.quantized(model, folder / "awq", "awq", "w4a16_g32_asym"),
        "w8a8": tiny_eval.quantized(model, folder / "w8a8", "int8", "w8a8_row"),
    }


def questions(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def request(model: Path, *quantized: Path, **options: Any) -> EvaluationRequest:
    options.setdefault("text", str(model / "heldout.txt"))
    options.setdefault("seq_len", 48)
    return EvaluationRequest(
        model=str(model), quantized=tuple(map(str, quantized)), **{"prompts": 0, **options}
    )


@pytest.fixture(scope="module")
def report(model: Path, outs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("work")
    tasks = questions(
        folder,
        {"task": "pick", "prompt": "all work and", "choices": [" no play", " a dull"], "answer": 0},
        {"task": "pick", "prompt": "makes a", "choices": [" dull", " zzz"], "answer": " dull"},
        {"task": "exact", "prompt": "all", "answer": " work"},
    )
    wanted = request(model, *outs.values(), tasks=(str(tasks),), prompts=2)
    return evaluate(wanted, folder / "scratch", progress=False)


def log_probs(model: Any, ids_NT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids_NT).logits[:, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("name", ["awq", "w8a8"])
def test_streamed_numbers_equal_a_ten_line_script(
    report: Report, model: Path, outs: dict[str, Path], name: str
) -> None:
    tokenizer = jobs.tiny.tokenizer()
    ids = tokenizer((model / "heldout.txt").read_text())["input_ids"]
    count = len(ids) // 48
    windows = torch.tensor(ids[: count * 48]).view(count, 48)
    p = log_probs(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), windows)
    q = log_probs(load(outs[name], dtype=torch.float32), windows)
    kl = (p.exp() * (p - q)).sum(-1)
    nll_p, nll_q = (-x.gather(2, windows[:, 1:, None]).mean().item() for x in (p, q))
    found = next(c for c in report.candidates if c.identity.name == name).divergence
    assert found.mean == pytest.approx(kl.mean().item(), abs=1e-6, rel=1e-4)
    assert found.maximum == pytest.approx(kl.max().item(), abs=1e-6, rel=1e-3)
    assert report.perplexity.value == pytest.approx(math.exp(nll_p), rel=1e-5)
    # Integer products and their float32 stand-ins round activations apart once in a while.
    assert found.perplexity.value == pytest.approx(math.exp(nll_q), rel=1e-4)
    agreed = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert found.top1_agreement == pytest.approx(agreed, abs=1e-3)


def test_noise_floor_lies_below_quantization(report: Report) -> None:
    assert report.noise is not None
    floor = report.noise.divergence.mean
    assert 0 < floor < min(c.divergence.mean for c in report.candidates)


def test_vocabulary_in_parts_changes_nothing(
    report: Report, model: Path, outs: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # 320 tokens of 64 channels in three models: parts of 21 rows.
    monkeypatch.setattr("quantkit_eval.evaluation.check_budget", lambda *_: 16_384)
    parts = evaluate(request(model, *outs.values()), tmp_path, progress=False)
    for one, other in zip(report.candidates, parts.candidates, strict=True):
        assert other.divergence.mean == pytest.approx(one.divergence.mean, rel=1e-5)
        assert other.divergence.top1_agreement == one.divergence.top1_agreement


def test_every_weight_is_held_against_its_original(report: Report) -> None:
    awq = report.candidates[0]
    assert len(awq.weights) == 14 and awq.weights_note is None and not awq.defects
    for weight in awq.weights:
        # Measured on other text than at quantization, so not equal.
        assert weight.recorded_error is not None
        assert weight.recorded_error / 3 < weight.error < weight.recorded_error * 3
        assert weight.gain == pytest.approx(1, abs=0.02)
    assert [block.index for block in awq.blocks] == [0, 1]
    assert all(0 < block.error < 0.1 for block in awq.blocks)


def test_tasks_are_paired_question_by_question(report: Report) -> None:
    candidate = report.candidates[0]
    assert [(a.task, a.label) for a in candidate.answers] == [
        ("pick", "questions.jsonl line 1"),
        ("pick", "questions.jsonl line 2"),
        ("exact", "questions.jsonl line 3"),
    ]
    assert [task.task for task in candidate.tasks] == ["pick", "exact", "all"]
    assert candidate.tasks[-1].count == 3


def test_multiple_choice_takes_the_likeliest_continuation(report: Report, model: Path) -> None:
    tokenizer = jobs.tiny.tokenizer()
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    totals = []
    for choice in (" no play", " a dull"):
        before = tokenizer("all work and")["input_ids"]
        after = tokenizer(choice, add_special_tokens=False)["input_ids"]
        found = log_probs(dense, torch.tensor([before + after]))[0]
        places = range(len(before) - 1, len(before) + len(after) - 1)
        totals.append(sum(found[p, t].item() for p, t in zip(places, after, strict=True)))
    assert report.candidates[0].answers[0].original == (totals[0] > totals[1])


def test_sensitivity_is_that_of_one_block_replaced(
    model: Path, outs: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    line = ["eval", model, outs["awq"], "--text", model / "heldout.txt", "--seq-len", 48]
    line += ["--prompts", 0, "--no-noise-floor", "--windows", 12, "--sensitivity", "--json"]
    assert jobs.command(*line, "--out", tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert "sensitivity: 7 block passes over 576 tokens" in captured.err
    (candidate,) = json.loads(captured.out)["candidates"]
    ids = jobs.tiny.tokenizer()((model / "heldout.txt").read_text())["input_ids"]
    windows = torch.tensor(ids[: 12 * 48]).view(12, 48)
    p = log_probs(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), windows)
    for index, block in enumerate(candidate["sensitivity"]):
        mixed = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        other = load(outs["awq"], dtype=torch.float32)
        mixed.model.layers[index] = other.model.layers[index]
        q = log_probs(mixed, windows)
        kl = (p.exp() * (p - q)).sum(-1).mean().item()
        assert block["index"] == index and block["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-7)


def test_completions_stand_side_by_side(report: Report) -> None:
    for candidate in report.candidates:
        assert len(candidate.completions) == 2 and candidate.completions_note is None
        assert all(c.original and c.quantized for c in candidate.completions)


def check_schema(value: Any, schema: dict[str, Any], top: dict[str, Any], at: str = "$") -> None:
    """Raises AssertionError unless the value fits the part of JSON Schema that ours uses."""
    if "$ref" in schema:
        schema = top["$defs"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        for option in schema["anyOf"]:
            try:
                return check_schema(value, option, top, at)
            except AssertionError:
                continue
        raise AssertionError(f"{at}: {value!r} fits none of {schema['anyOf']}")
    if "enum" in schema:
        assert value in schema["enum"], at
        return None
    kinds = schema.get("type", [])
    python = {
        "string": str, "number": (int, float), "integer": int, "boolean": bool,
        "null": type(None), "array": list, "object": dict,
    }  # fmt: skip
    allowed = [kinds] if isinstance(kinds, str) else kinds
    assert not allowed or any(isinstance(value, python[kind]) for kind in allowed), f"{at}: {value}"
    assert not (isinstance(value, bool) and "boolean" not in allowed), at
    for index, item in enumerate(value if isinstance(value, list) else ()):
        check_schema(item, schema.get("items", {}), top, f"{at}[{index}]")
    if isinstance(value, dict) and "properties" in schema:
        assert set(value) == set(schema["properties"]) == set(schema["required"]), at
        for key, part in value.items():
            check_schema(part, schema["properties"][key], top, f"{at}.{key}")
    return None


def test_json_fits_its_published_schema(report: Report) -> None:
    published = json.loads(SCHEMA.read_text())
    assert published == json_schema(), "run eval/bench/report_schema.py"
    value = json.loads(json.dumps(to_json(report), allow_nan=False))
    check_schema(value, published, published)
    with pytest.raises(AssertionError):
        check_schema({**value, "seed": "0"}, published, published)
    assert value["schema"] == "quantkit.evaluation/3"


class Balanced(HTMLParser):
    """Fails on tags that do not nest, and collects what would be loaded from elsewhere."""

    VOID = frozenset({"meta", "link", "br", "wbr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [v or "" for k, v in attrs if k in ("src", "href") and v[:1] not in "#d"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [v or "" for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_loads_nothing(report: Report) -> None:
    page = render_html(report)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == [] and parser.loads == []
    assert "url(" not in page and "@import" not in page and "<script" not in page
    for part in ("At a glance", "What each bit buys", "Layer by layer", "Side by side", "noise"):
        assert part in page
    assert page.count("<svg") >= 5
    assert report.original.files[0].sha256 in page
    # Nothing was left for a person to read as code.
    assert not re.search(r"\{\{|\}\}|\{%|Undefined|nan\b", page)


def test_markdown_holds_the_same_numbers(report: Report) -> None:
    text = render_markdown(report)
    found = f"{report.candidates[0].divergence.mean:.3g}"
    assert found in text and found in render_html(report)
    assert "| pick " in text and "sha256" in text


@pytest.mark.parametrize(
    ("limit", "outcome"),
    [
        ("kl>10", "within"),
        ("kl>0.000001", "drop"),
        ("ppl>+900%", "within"),
        ("top1<1%", "within"),
        ("top1<100%", "drop"),
        ("dp>90%", "within"),
        ("defects>0", "within"),
        ("task:pick<-99pt", "within"),
        ("task:pick<-1pt", "unsure"),
    ],
)
def test_limits_are_decided_on_intervals(report: Report, limit: str, outcome: str) -> None:
    candidate = report.candidates[0]
    got = judge(parse_limit(limit), candidate.divergence, candidate.tasks, 0, 1000)
    assert got.outcome == outcome
    assert (got.more is None) or outcome == "unsure"


def test_all_tasks_are_the_only_one_there_is(report: Report) -> None:
    candidate = report.candidates[0]
    one, limit = candidate.tasks[:1], parse_limit("task:all<-99pt")
    assert judge(limit, candidate.divergence, one, 0, 1000).measured_on == one[0].count


def test_too_little_data_is_said_plainly_with_how_much_more(report: Report) -> None:
    divergence = report.candidates[0].divergence
    half = divergence.mean_interval.high - divergence.mean
    got = judge(parse_limit(f"kl>{divergence.mean + half / 2}"), divergence, (), 0, 1000)
    text = sentence(got)
    assert "Not enough data to tell" in text
    # 3000 or 3001 tokens are two digits of an estimate.
    assert re.search(r"about 3,[01]00 more tokens than these 1,000", text), text


def test_more_data_is_what_makes_the_interval_short_enough(report: Report) -> None:
    divergence = report.candidates[0].divergence
    half = divergence.mean_interval.high - divergence.mean
    got = judge(parse_limit(f"kl>{divergence.mean + half / 2}"), divergence, (), 0, 1000)
    # Half the width takes four times the tokens: 3000 more.
    assert got.outcome == "unsure" and got.more == pytest.approx(3000, abs=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bleu<3", "write METRIC>VALUE .* kl, ppl, top1"),
        ("kl<0.1", 'for this metric write "kl>0.05"'),
        ("task:sort<-2%", "for this metric write"),
        ("kl", "write METRIC>VALUE"),
    ],
)
def test_limits_that_mean_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        parse_limit(text)


def test_command_writes_the_report_and_judges(
    model: Path, outs: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "report"
    line = ["eval", model, outs["awq"], "--text", model / "heldout.txt", "--seq-len", 48]
    line += ["--prompts", 0, "--no-noise-floor", "--windows", 30]
    assert jobs.command(*line, "--out", out, "--fail-if", "kl>10") == 0
    text = capsys.readouterr().out
    assert "KL divergence" in text and str(out / "report.html") in text
    assert sorted(p.name for p in out.iterdir()) == ["report.html", "report.json", "report.md"]
    # An earlier report is replaced, and the exit code tells of the broken limit.
    assert jobs.command(*line, "--out", out, "--fail-if", "kl>1e-6", "--json") == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "report.json").read_text())
    assert printed["candidates"][0]["outcome"] == "drop"
    assert not list(tmp_path.glob("*.partial"))


def test_unknown_outcome_is_no_failure(
    model: Path, outs: dict[str, Path], report: Report, tmp_path: Path
) -> None:
    mean = report.candidates[0].divergence.mean
    out = tmp_path / "report"
    found = run_evaluation(
        request(model, outs["awq"], limits=(f"kl>{mean:.12f}",)), out, progress=False
    )
    assert found.outcome == "unsure" and not found.violated
    assert "verdict    not enough data to tell (exit code 0" in found.text()
    for name in ("report.html", "report.md"):
        page = (out / name).read_text()
        assert "Not enough data to tell" in page
        assert "more tokens" in page or "cannot be said" in page


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("short text", {"seq_len": 128, "windows": None, "text": "SHORT"}, "one window needs 128"),
    ("no text", {"text": "missing.txt"}, "--text: file missing.txt does not exist"),
    ("unknown task", {"tasks": ("mmlu",)}, "--tasks 'mmlu': write demo"),
    ("unknown demo task", {"tasks": ("demo:nothing",)}, "the demo's tasks are addition"),
    ("limit on no task", {"limits": ("task:sort<-2pt",)}, "there is no task 'sort'"),
    ("unknown metric", {"limits": ("rouge>1",)}, "write METRIC>VALUE"),
]


@pytest.mark.parametrize(("options", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_leaves_no_report(
    model: Path, outs: dict[str, Path], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    if options.get("text") == "SHORT":
        (tmp_path / "short.txt").write_text("too short")
        options = {**options, "text": str(tmp_path / "short.txt")}
    with pytest.raises(EvaluationError, match=re.escape(message)):
        run_evaluation(request(model, outs["awq"], **options), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "1+1="}, "line 1: there is no gold answer"),
        ({"prompt": "1+1=", "choices": ["1", "2"], "answer": "3"}, "'3' is neither one of"),
        ({"prompt": "1+1=", "choices": ["1"], "answer": 0}, "two or more texts"),
        ({"question": "1+1=", "answer": "2"}, 'write {"prompt": ..., "answer": ...}'),
        ({"prompt": "1", "answer": "2", "hint": "3"}, "unknown key 'hint'"),
    ],
)
def test_questions_without_answers_are_refused(
    model: Path, outs: dict[str, Path], tmp_path: Path, line: dict[str, Any], message: str
) -> None:
    tasks = (str(questions(tmp_path, line)),)
    with pytest.raises(EvaluationError, match=re.escape(message)):
        run_evaluation(request(model, outs["awq"], tasks=tasks), tmp_path / "out", progress=False)


def test_other_original_is_refused_unless_asked_for(outs: dict[str, Path], tmp_path: Path) -> None:
    other = tiny_eval.loud("llama", tmp_path / "other", rms_norm_eps=1e-5)
    tiny_eval.write_heldout(other)
    with pytest.raises(EvaluationError, match="was made from another model than other"):
        run_evaluation(request(other, outs["awq"]), tmp_path / "out", progress=False)
    wanted = request(other, outs["awq"], any_base=True, noise_floor=False)
    assert run_evaluation(wanted, tmp_path / "out", progress=False).report.candidates


def test_other_tokenizer_is_refused(model: Path, outs: dict[str, Path], tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(outs["awq"], changed)
    text = (changed / "tokenizer.json").read_text()
    data = json.loads(text)
    vocab = data["model"]["vocab"]
    first, second = list(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (changed / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(EvaluationError, match="its tokenizer differs"):
        run_evaluation(request(model, changed), tmp_path / "out", progress=False)


def test_nan_logits_name_model_position_and_window(
    model: Path, outs: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(outs["awq"], broken)
    tensors = load_file(broken / "model.safetensors")
    # Finite, but its product overflows float32.
    tensors["model.norm.weight"][:] = 3e38
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(EvaluationError, match="broken: the logits at position 0 of window 0"):
        run_evaluation(request(model, broken), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_directory_of_someone_else_is_left_alone(
    model: Path, outs: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(OutputError, match="holds something else"):
        run_evaluation(request(model, outs["awq"]), tmp_path, progress=False)
    assert (tmp_path / "thesis.tex").read_text() == "important"


def test_budget_too_small_names_the_smallest_that_works(
    model: Path, outs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match=r"the smallest that works is --max-ram \d+MiB"):
        run_evaluation(request(model, outs["awq"], max_ram=2**20), tmp_path / "o", progress=False)


def test_original_must_not_be_quantized(outs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="is quantized itself"):
        run_evaluation(
            EvaluationRequest(model=str(outs["awq"]), quantized=(str(outs["awq"]),)),
            tmp_path / "out",
            progress=False,
        )


def test_interval_is_a_plain_value() -> None:
    assert to_json(Interval(low=-math.inf, high=1.0)) == {"low": None, "high": 1.0}
    assert check_budget([], None) is None
