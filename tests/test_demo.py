from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from quantkit_eval.figures.live import measure_accuracy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from quantkit.demo import (
    TASKS,
    calibration_text,
    corpus,
    demo_path,
    documents,
    examples,
    heldout_text,
    plant_outliers_,
    write_planted,
)
from quantkit.demo.corpus import english_documents, name_split
from quantkit.demo.tasks import task_text
from quantkit.errors import CalibrationError, ModelError, RecipeError, ShapeError


def tiny_llama(hidden_size: int = 24, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=hidden_size,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    ids = torch.arange(2 * 17).view(2, 17) % model.config.vocab_size
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return result


@pytest.fixture(scope="module")
def demo():
    path = demo_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path)


def test_demo_weights_fit_in_the_wheel():
    assert (demo_path() / "model.safetensors").stat().st_size <= 8_000_000


def test_demo_answers_at_least_three_heldout_tasks(demo):
    model, tokenizer = demo
    found = {
        task: measure_accuracy(model, tokenizer, examples(task, "heldout", 100, seed=3))
        for task in TASKS
    }
    assert sum(share > 0.9 for share in found.values()) >= 3, found


def test_teacher_forced_accuracy_is_greedy_decoding(demo):
    model, tokenizer = demo
    sample = [draw for task in TASKS for draw in examples(task, "heldout", 3, seed=5)]
    greedy = 0
    for example in sample:
        prompt = tokenizer(example.prompt, return_tensors="pt")
        target = tokenizer(f"{example.answer}\n", add_special_tokens=False)["input_ids"]
        made = model.generate(**prompt, max_new_tokens=len(target), do_sample=False)
        greedy += made[0, prompt["input_ids"].shape[1] :].tolist() == target
    assert measure_accuracy(model, tokenizer, sample) == pytest.approx(greedy / len(sample))


def test_wrong_answers_score_zero(demo):
    model, tokenizer = demo
    right = examples("reverse", "heldout", 20, seed=1)
    wrong = [
        type(right[0])(task="reverse", prompt=example.prompt, answer=" z z z z")
        for example in right
    ]
    assert measure_accuracy(model, tokenizer, wrong) == 0.0


def test_demo_model_knows_the_heldout_english(demo):
    model, tokenizer = demo
    text = english_documents("heldout")[0].text
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :512]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    # Guessing among 2048 tokens costs 7.6 nats.
    assert loss < 5.0


def test_prompt_and_answer_tokens_join_as_the_whole_line(demo):
    _, tokenizer = demo
    for task in TASKS:
        for example in examples(task, "heldout", 20, seed=2):
            parts = [example.prompt, f"{example.answer}\n"]
            joined = [
                i for part in parts for i in tokenizer(part, add_special_tokens=False)["input_ids"]
            ]
            assert tokenizer(example.line, add_special_tokens=False)["input_ids"] == joined


def test_chat_template_renders_the_roles(demo):
    _, tokenizer = demo
    rows = [{"role": "user", "content": "2+3="}, {"role": "assistant", "content": "5"}]
    text = tokenizer.apply_chat_template(rows, tokenize=False)
    assert text == "<|endoftext|>user: 2+3=\nassistant: 5\n"


@pytest.mark.parametrize("task", TASKS)
def test_train_and_heldout_examples_share_no_prompt(task):
    train = {example.prompt for example in examples(task, "train", 5000, seed=0)}
    heldout = {example.prompt for example in examples(task, "heldout", 2000, seed=0)}
    assert len(heldout) > 500
    assert not train & heldout


def test_swapped_operands_stay_in_one_split():
    prompts = {example.prompt for example in examples("addition", "train", 20000, seed=0)}
    for example in examples("addition", "heldout", 200, seed=0):
        first, second = example.prompt.rstrip("=").split("+")
        assert f"{second}+{first}=" not in prompts


def test_answers_are_right():
    for example in examples("addition", "train", 50, seed=4):
        first, second = example.prompt.rstrip("=").split("+")
        assert int(example.answer) == int(first) + int(second)
    for example in examples("sort", "heldout", 50, seed=4):
        asked = example.prompt.removeprefix("sort ").rstrip(":").split()
        assert example.answer.split() == sorted(asked)
    for example in examples("reverse", "heldout", 50, seed=4):
        asked = example.prompt.removeprefix("reverse ").rstrip(":").split()
        assert example.answer.split() == asked[::-1]
    for example in examples("recall", "heldout", 50, seed=4):
        listing, asked = example.prompt.removeprefix("given ").rstrip("=").split(" then ")
        assert dict(pair.split("=") for pair in listing.split())[asked] == example.answer
    for example in examples("larger", "heldout", 50, seed=4):
        words = example.prompt.rstrip(": ").split()
        assert int(example.answer) == max(int(words[2]), int(words[4]))


def test_examples_repeat_for_a_seed_and_differ_between_seeds():
    first = examples("sort", "heldout", 10, seed=1)
    assert first == examples("sort", "heldout", 10, seed=1)
    assert first != examples("sort", "heldout", 10, seed=2)


def test_task_documents_draw_from_their_split():
    heldout = {
        example.prompt for task in TASKS for example in examples(task, "heldout", 800, seed=9)
    }
    text = "".join(task_text("train", random.Random(seed)) for seed in range(300))
    lines = text.splitlines()
    assert len(lines) > 300
    assert not any(line.startswith(tuple(heldout)) for line in lines)


def test_unknown_task_and_split_are_named():
    with pytest.raises(CalibrationError, match=r"spelling.*addition"):
        examples("spelling", "heldout", 1, seed=0)
    with pytest.raises(CalibrationError, match="validation"):
        examples("sort", "validation", 1, seed=0)


def test_documents_are_the_same_every_time_and_split_by_name():
    first = documents("heldout")
    assert first == documents("heldout")
    names = [document.name for document in first]
    assert len(set(names)) == len(names)
    english = [name for name in names if not name.startswith("tasks/")]
    assert all(name_split(name) == "heldout" for name in english)
    assert len(english) < len(names)


def test_what_is_known_without_parsing_chooses_the_same_documents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [name for name, _ in corpus._library_documents("heldout")]
    for shortcut in ("_surely_long", "_long_from_the_start"):
        monkeypatch.setattr(corpus, shortcut, lambda source: False)
    assert found == [name for name, _ in corpus._library_documents("heldout")]


@pytest.mark.parametrize(
    ("source", "long"),
    [
        ('def f():\n    """%s"""\n    return (\n', True),
        ("text = '''\ndef f():\n    \"\"\"%s\"\"\"\n'''\n", False),
        ('try:\n    """%s"""\nexcept OSError:\n    pass\n', False),
        ('def f():\n    return """\n    """, """%s"""\n', False),
    ],
    ids=["in a function", "in a string", "in a statement", "no docstring"],
)
def test_a_docstring_counts_where_it_is_one(source: str, long: bool) -> None:
    assert corpus._long_from_the_start((source % ("a word " * 80)).encode()) is long


def test_heldout_text_is_long_enough_to_measure_on(demo):
    _, tokenizer = demo
    total = sum(len(tokenizer(text, verbose=False)["input_ids"]) for text in heldout_text())
    assert total >= 60_000


def test_calibration_text_fills_128_rows_of_512_tokens(demo):
    _, tokenizer = demo
    total = 0
    for text in calibration_text():
        total += len(tokenizer(text, verbose=False)["input_ids"])
        if total >= 128 * 512:
            return
    pytest.fail(f"{total} tokens")


@pytest.mark.parametrize(
    ("factor", "dtype", "tolerance"),
    [
        pytest.param(64.0, torch.float32, 0.0, id="power of two is exact"),
        pytest.param(64.0, torch.bfloat16, 0.0, id="exact in bfloat16 too"),
        # One float32 rounding of each touched weight.
        pytest.param(30.0, torch.float32, 1e-3, id="other factor rounds"),
    ],
)
def test_planted_outliers_keep_the_logits(factor, dtype, tolerance):
    model = tiny_llama(dtype=dtype)
    before = logits(model)
    norms = model.model.layers[1].input_layernorm.weight.detach().clone()
    chosen = plant_outliers_(model, channels=3, factor=factor, seed=1)
    assert (logits(model) - before).abs().max().item() <= tolerance
    scaled = model.model.layers[1].input_layernorm.weight != norms
    assert tuple(scaled.nonzero().flatten().tolist()) == chosen


def test_planted_channels_stand_out_in_the_activations():
    model = tiny_llama()
    seen = []
    layer = model.model.layers[1]
    layer.mlp.gate_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits(model)
    chosen = list(plant_outliers_(model, channels=2, factor=64.0, seed=0))
    logits(model)
    growth = seen[1].abs().amax((0, 1)) / seen[0].abs().amax((0, 1))
    assert torch.allclose(growth[chosen], torch.tensor(64.0))
    assert int((growth > 2).sum()) == 2


def test_planted_checkpoint_loads_with_the_same_logits(demo, tmp_path: Path):
    model, _ = demo
    write_planted(demo_path(), tmp_path, channels=4, factor=32.0, seed=0)
    planted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(planted), logits(model))
    assert AutoTokenizer.from_pretrained(tmp_path)("2+3=")["input_ids"]


def test_impossible_outliers_are_refused():
    with pytest.raises(ShapeError, match="25 outlier channels; use 1 to 24"):
        plant_outliers_(tiny_llama(), channels=25, factor=2.0, seed=0)
    with pytest.raises(RecipeError, match="factor 0"):
        plant_outliers_(tiny_llama(), channels=1, factor=0.0, seed=0)
    model = tiny_llama()
    model.config.model_type = "gemma2"
    with pytest.raises(ModelError, match=r"gemma2.*llama"):
        plant_outliers_(model, channels=1, factor=2.0, seed=0)
