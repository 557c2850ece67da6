"""lm-eval's tasks in an evaluation: real ones, without network, where lm-eval is installed.

`make interop-tasks` runs this file in an environment that has it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_eval
import tiny_jobs as jobs
import torch
from quantkit_eval.errors import EvaluationError
from quantkit_eval.evaluation import evaluate
from quantkit_eval.figures.statistics import mcnemar, paired_drop
from quantkit_eval.records import Report
from quantkit_eval.setting import EvaluationRequest
from quantkit_eval.tasks.harness import LogLine, verdicts
from quantkit_eval.tasks.harness_tasks import HarnessTask, load_harness_tasks
from transformers import AutoModelForCausalLM

from quantkit.inference.load import load

pytestmark = pytest.mark.usefixtures("one_thread")

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed; make interop-tasks runs this where it is",
)

WORDS = ("work", "play", "text", "model", "dull", "small", "any", "all")
PICK = """
task: pick_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{before}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: " "
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 3}}
"""
SAY = """
task: say_word
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/data.jsonl, train: {folder}/data.jsonl}}
  cache_dir: {folder}/cache
test_split: test
training_split: train
fewshot_split: train
num_fewshot: 2
output_type: generate_until
doc_to_text: "{{{{before}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 4, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""


def rows() -> list[dict[str, Any]]:
    """Questions that nobody can know: random models answer some of them."""
    count = len(WORDS)
    return [
        {
            "before": f"{WORDS[n % count]} and {WORDS[(n * 3 + 1) % count]} make",
            "choices": [WORDS[(n + 2) % count], WORDS[(n * 5 + 3) % count]],
            "gold": n % 2,
        }
        for n in range(24)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    (path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows()))
    for name, text in {"pick": PICK, "say": SAY}.items():
        (path / f"{name}.yaml").write_text(text.format(folder=path))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_eval.loud("llama", tmp_path_factory.mktemp("model"), max_position_embeddings=256)
    tiny_eval.write_heldout(path)
    return path


@pytest.fixture(scope="module")
def rough(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rounded so coarsely that some answers flip."""
    return tiny_eval.quantized(model, tmp_path_factory.mktemp("out") / "rough", "rtn", "w2a16_g32")


def request(model: Path, out: Path, *tasks: str, **options: Any) -> EvaluationRequest:
    options = {"windows": 4, "prompts": 0, "noise_floor": False, **options}
    return EvaluationRequest(
        model=str(model),
        quantized=(str(out),),
        text=str(model / "heldout.txt"),
        seq_len=48,
        tasks=tasks,
        **options,
    )


@pytest.fixture(scope="module")
def report(
    model: Path, rough: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Report:
    pytest.importorskip("lm_eval")
    wanted = request(model, rough, f"lm-eval:{folder}", backend="reference")
    return evaluate(wanted, tmp_path_factory.mktemp("scratch"), progress=False)


def chosen(model: Any, tokenizer: Any) -> list[bool]:
    """The choice with the larger log-probability, question by question, the plain way."""
    right = []
    for row in rows():
        totals = []
        for choice in row["choices"]:
            before = tokenizer(row["before"])["input_ids"]
            ids = tokenizer(f"{row['before']} {choice}")["input_ids"]
            with torch.no_grad():
                found = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            places = range(len(before), len(ids))
            totals.append(sum(found[p - 1, ids[p]].item() for p in places))
        right.append(totals.index(max(totals)) == row["gold"])
    return right


@needs_lm_eval
def test_answers_are_those_of_the_plain_way(report: Report, model: Path, rough: Path) -> None:
    tokenizer = jobs.tiny.tokenizer()
    (candidate,) = report.candidates
    picked = [answer for answer in candidate.answers if answer.task == "pick_word"]
    assert [answer.label for answer in picked] == [f"pick_word {n}" for n in range(24)]
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert [answer.original for answer in picked] == chosen(plain, tokenizer)
    coarse = load(rough, dtype=torch.float32, backend="reference")
    assert [answer.quantized for answer in picked] == chosen(coarse, tokenizer)


@needs_lm_eval
def test_statistics_are_paired_as_for_own_tasks(report: Report) -> None:
    (candidate,) = report.candidates
    assert [task.task for task in candidate.tasks] == ["pick_word", "say_word", "all"]
    task = candidate.tasks[0]
    answers = [a for a in candidate.answers if a.task == "pick_word"]
    lost = sum(a.original and not a.quantized for a in answers)
    gained = sum(a.quantized and not a.original for a in answers)
    assert (task.count, task.lost, task.gained) == (24, lost, gained)
    assert lost + gained > 0, "two bits flip some answers of a random model"
    assert task.drop_interval == paired_drop(lost, gained, 24)
    assert task.mcnemar_p == mcnemar(lost, gained) and task.holm_p >= task.mcnemar_p


@needs_lm_eval
def test_report_says_how_lm_eval_asked(report: Report) -> None:
    facts = {fact.name: fact.value for fact in report.tasks}
    assert "task version 3, 0 examples in the prompt, acc of filter none, 24" in facts["pick_word"]
    assert "2 examples in the prompt, exact_match" in facts["say_word"]
    assert facts["say_word"].startswith("lm-eval ")
    computed = {fact.name: fact.value for fact in report.computed}
    assert computed["lm-eval's tasks"] == "float32, whole models, backend reference"


@needs_lm_eval
def test_own_and_lm_eval_tasks_stand_together(
    model: Path, rough: Path, folder: Path, tmp_path: Path
) -> None:
    own = folder / "own.jsonl"
    own.write_text(json.dumps({"task": "own", "prompt": "all", "answer": " work"}))
    line = ["eval", model, rough, "--text", model / "heldout.txt", "--seq-len", 48]
    line += ["--windows", 4, "--prompts", 0, "--no-noise-floor", "--questions", 5]
    line += ["--tasks", f"{own},lm-eval:{folder / 'pick.yaml'}:acc", "--out", tmp_path / "out"]
    assert jobs.command(*line, "--fail-if", "task:pick_word<-100pt") == 0
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    (candidate,) = written["candidates"]
    assert [(t["task"], t["count"]) for t in candidate["tasks"]] == [
        ("own", 1),
        ("pick_word", 5),
        ("all", 6),
    ]


@needs_lm_eval
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lm-eval:no_such_task_here", "lm-eval has no task 'no_such_task_here'"),
        ("lm-eval:{folder}/pick.yaml:bleu", "no metric 'bleu' of which more is better; it has acc"),
        ("lm-eval:{folder}/pick.yaml:acc:strict", "no filter 'strict'; it has none"),
        ("lm-eval:{folder}/missing.yaml", "there is no such file"),
        ("lm-eval:{folder}/cache", "no YAML file in it defines an lm-eval task"),
        ("lm-eval:", "write lm-eval:NAME"),
        ("lm-eval:{folder},lm-eval:{folder}/pick.yaml", "pick_word is asked for twice"),
    ],
)
def test_tasks_that_cannot_be_asked_are_refused(folder: Path, spec: str, message: str) -> None:
    (folder / "cache").mkdir(exist_ok=True)
    with pytest.raises(EvaluationError) as caught:
        load_harness_tasks(spec.format(folder=folder).split(","))
    assert message in str(caught.value)


@needs_lm_eval
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("doc_to_target: gold\n", "cannot load pick_word: TypeError"),
        ("", "question 3 of pick_word has no gold answer (-1)"),
    ],
    ids=["no target", "hidden label"],
)
def test_questions_without_gold_answers_are_refused(
    tmp_path: Path, change: str, message: str
) -> None:
    hidden = [{**row, "gold": -1 if n == 3 else row["gold"]} for n, row in enumerate(rows())]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in hidden))
    (tmp_path / "pick.yaml").write_text(PICK.format(folder=tmp_path).replace(change, ""))
    with pytest.raises(EvaluationError) as caught:
        load_harness_tasks([f"lm-eval:{tmp_path / 'pick.yaml'}"])
    assert message in str(caught.value) and "gold answer" in str(caught.value)
    # Asked for three only, the fourth is not missed.
    if not change:
        assert load_harness_tasks([f"lm-eval:{tmp_path}"], limit=3)[0].name == "pick_word"


def test_missing_lm_eval_says_what_to_install(
    model: Path, rough: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match=r'pip install "quantkit\[tasks\]"'):
        evaluate(request(model, rough, f"lm-eval:{folder}"), tmp_path, progress=False)


class Asked:
    """The part of lm-eval's task objects that pairing looks at."""

    def __init__(self, falling: str | None = None) -> None:
        self.falling = falling

    def higher_is_better(self) -> dict[str, bool]:
        return {} if self.falling is None else {self.falling: False}


def task(metric: str | None = None, filter_name: str | None = None, **options: Any) -> HarnessTask:
    return HarnessTask(name="t", members={"t": Asked(**options)}, metric=metric, filter=filter_name)


def line(number: int, prompt: str = "p", filter_name: str = "none", **scores: Any) -> LogLine:
    return LogLine(
        member="t", number=number, prompt=f"{prompt}{number}", filter=filter_name, scores=scores
    )


def test_first_metric_that_is_yes_or_no_is_taken() -> None:
    one = [line(0, f1=0.5, acc=1.0, acc_norm=0.0), line(1, f1=1.0, acc=0.0, acc_norm=1.0)]
    two = [line(0, f1=0.5, acc=0.0, acc_norm=0.0), line(1, f1=1.0, acc=0.0, acc_norm=1.0)]
    assert verdicts(task(), [one, two]).metric == "acc"
    assert verdicts(task(), [one, two]).right == ((True, False), (False, False))
    assert verdicts(task("acc_norm"), [one, two]).right == ((False, True), (False, True))
    # An error is 0 or 1 as well, and more of it is no merit.
    assert verdicts(task(falling="acc"), [one, two]).metric == "acc_norm"
    with pytest.raises(EvaluationError, match=r"its f1 is not 0 or 1 .* f1, acc, acc_norm"):
        verdicts(task("f1"), [one, two])
    with pytest.raises(EvaluationError, match="none of its metrics is 0 or 1"):
        verdicts(task(), [[line(0, f1=0.5)], [line(0, f1=0.5)]])


def test_first_filter_is_taken_unless_another_is_named() -> None:
    log = [line(0, filter_name="strict", acc=0), line(0, filter_name="flexible", acc=1)]
    assert verdicts(task(), [log, log]).filter == "strict"
    assert verdicts(task(filter_name="flexible"), [log, log]).right == ((True,), (True,))
    with pytest.raises(EvaluationError, match="no filter 'loose'; it has strict, flexible"):
        verdicts(task(filter_name="loose"), [log, log])


def test_other_prompts_for_the_second_model_are_noticed() -> None:
    with pytest.raises(EvaluationError, match="asks two models different questions"):
        verdicts(task(), [[line(0, acc=1)], [line(0, prompt="q", acc=1)]])
