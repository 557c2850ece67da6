from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from quantkit.calibration.data.tokens import Calibration, load_calibration
from quantkit.calibration.data.windows import first_tokens
from quantkit.errors import CalibrationError

WORDS = ["weight", "scale", "code", "group", "column", "row", "block", "token", "error", "bits"]
TEXT = " ".join(f"{WORDS[i * i % 7]} {WORDS[i % 10]} {i}\n" for i in range(3000))
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(chat=False)


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(chat=True)


def make_tokenizer(*, chat: bool) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    if chat:
        wrapped.chat_template = TEMPLATE
    return wrapped


def load(source: Any, tokenizer: Any, **options: Any) -> Calibration:
    return load_calibration(source, tokenizer=tokenizer, **{"samples": 4, "seq_len": 16} | options)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def own_dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def test_text_file_gives_the_first_tokens_of_the_text_tokenised_at_once(
    tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    got = load(str(path), tokenizer, samples=7, seq_len=33, seed=5)
    expected = torch.tensor(tokenizer(TEXT)["input_ids"][: 7 * 33]).view(7, 33)
    assert torch.equal(got.ids, expected)
    assert got.mask.all()
    assert got.record.documents == 1
    assert got.record.source == "text.txt"
    assert got.record.file_sha256 is not None


@pytest.mark.parametrize("count", [1, 100, 1000, 5000])
def test_first_tokens_of_a_long_text_need_not_tokenise_all_of_it(
    tokenizer: Any, count: int
) -> None:
    # Long runs are single pre-tokens, the worst case for cutting a text anywhere.
    text = TEXT[:9000] + "=" * 700 + TEXT
    assert first_tokens(tokenizer, text, count) == tokenizer(text)["input_ids"][:count]


def test_documents_are_shuffled_by_seed_joined_with_eos_and_cut(
    tokenizer: Any, tmp_path: Path
) -> None:
    texts = [f"{word} {i}" for i, word in enumerate(WORDS * 3)]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    first, again, other = (load(str(path), tokenizer, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.ids, again.ids)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    pieces = tokenizer.decode(first.ids.flatten()).split("</s>")
    assert set(pieces[:-1]) <= set(texts)
    assert pieces[:-1] != texts[: len(pieces) - 1]
    assert first.mask.all()
    assert first.record.column == "text"
    assert first.record.documents >= len(pieces) - 1


def test_list_of_strings_equals_the_same_rows_in_a_file_and_in_a_dataset(
    tokenizer: Any, tmp_path: Path
) -> None:
    import datasets

    texts = [f"{word} {i}" for i, word in enumerate(WORDS * 3)]
    table = datasets.Dataset.from_dict({"text": texts})
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    sources = [texts, table, tmp_path / "rows.parquet", tmp_path / "saved", tmp_path / "splits"]
    loaded = [load(source, tokenizer, seed=3) for source in sources]
    assert len({calibration.fingerprint for calibration in loaded}) == 1
    assert loaded[4].record.split == "train"
    assert loaded[3].record.revision is not None
    assert all("/" not in calibration.record.source for calibration in loaded)


def test_directory_of_files_is_read_as_a_dataset_with_configuration_and_split(
    tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    rows = [{"text": f"{word} {i}"} for i, word in enumerate(WORDS * 3)]
    write_jsonl(tmp_path / "data" / "test.jsonl", rows)
    got = load(f"{tmp_path / 'data'}:default:test", tokenizer)
    assert (got.record.config, got.record.split) == ("default", "test")
    assert got.ids.shape == (4, 16)
    with pytest.raises(CalibrationError, match=r"no split 'dev'; its splits: test"):
        load(f"{tmp_path / 'data'}:default:dev", tokenizer)


def test_hub_dataset_is_streamed_and_its_commit_recorded(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": [f"{word} {i}" for i, word in enumerate(WORDS * 4)]})

    def builder(name: str, config: str | None, revision: str | None) -> SimpleNamespace:
        assert (name, config, revision) == ("owner/words", "small", "v2")
        return SimpleNamespace(
            base_path="hf://datasets/owner/words@0123abcd/data",
            config=SimpleNamespace(name=config),
            as_streaming_dataset=lambda: {
                "train": rows.to_iterable_dataset(),
                "test": rows.select(range(30)).to_iterable_dataset(),
            },
        )

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    got = load("owner/words@v2:small#text", tokenizer)
    assert (got.record.source, got.record.config, got.record.split, got.record.revision) == (
        ("owner/words", "small", "train", "0123abcd")
    )
    again = load("owner/words@v2:small", tokenizer)
    assert again.fingerprint == got.fingerprint
    assert load("owner/words@v2:small", tokenizer, seed=9).fingerprint != got.fingerprint
    assert load("owner/words@v2:small:test", tokenizer).record.split == "test"


def test_hash_sign_names_the_column(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": "bits bits bits", "code": f"row {i} block"} for i in range(40)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    got = load(f"{path}#code", tokenizer)
    assert got.record.column == "code"
    assert "block" in tokenizer.decode(got.ids[0])
    assert "bits" not in tokenizer.decode(got.ids[0])
    assert got.fingerprint == load(path, tokenizer, text_column="code").fingerprint


def test_conversations_keep_whole_and_padding_does_not_count(
    chat_tokenizer: Any, tmp_path: Path
) -> None:
    def conversation(i: int) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": f"{WORDS[i % 10]} {i}?"},
            {"role": "assistant", "content": f"{WORDS[i % 7]}!"},
        ]

    rows = [{"messages": conversation(i), "id": i} for i in range(30)]
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    got = load(path, chat_tokenizer, seq_len=64)
    assert got.record.chat_template
    assert got.record.column == "messages"
    assert not got.mask.all()
    assert got.record.tokens == int(got.mask.sum())
    for ids, mask in zip(got.ids, got.mask, strict=True):
        text = chat_tokenizer.decode(ids[mask])
        assert text.startswith("<user>") and text.endswith("!</s>")
        assert mask[: int(mask.sum())].all()


def test_conversation_longer_than_a_window_is_cut(chat_tokenizer: Any) -> None:
    long = [{"role": "user", "content": " ".join(WORDS * 30)}]
    got = load([long], chat_tokenizer, samples=2, seq_len=16)
    expected = chat_tokenizer(f"<user>{long[0]['content']}</s>")["input_ids"][:32]
    assert got.ids.flatten().tolist() == expected


def test_sharegpt_rows_are_messages(chat_tokenizer: Any) -> None:
    chat = [[{"from": "human", "value": "row?"}, {"from": "gpt", "value": "block"}]]
    got = load(chat, chat_tokenizer, samples=1, seq_len=48)
    assert chat_tokenizer.decode(got.ids[0][got.mask[0]]) == "<user>row?</s><assistant>block</s>"


def test_token_rows_are_padded_on_the_right_and_cuts_are_noted(tokenizer: Any) -> None:
    got = load([[5, 6, 7], [8] * 40], tokenizer, samples=1, seq_len=16)
    assert got.ids.tolist() == [[5, 6, 7]]
    assert len(got.record.notes) == 2
    both = load([[5, 6, 7], [8] * 40], None, seq_len=16)
    assert both.ids.shape == (2, 16)
    assert both.mask.sum(1).tolist() == [3, 16]
    tensor = torch.arange(32).view(2, 16)
    assert torch.equal(load(tensor, None).ids, tensor)
    assert torch.equal(load([row[None] for row in tensor], None).ids, tensor)


def test_record_is_json_and_notes_the_cut_to_the_models_positions(tokenizer: Any) -> None:
    texts = [f"{word} {i % 20}" for i, word in enumerate(WORDS * 4)]
    got = load(texts, tokenizer, samples=8, max_length=12)
    assert got.ids.shape == (8, 12)
    record = json.loads(json.dumps(got.record.to_dict()))
    assert record["seq_len"] == 12
    assert record["notes"] == ["seq_len 16 cut to the model's 12 positions"]
    assert record["tokens"] == 96


def test_repeated_documents_are_counted(tokenizer: Any) -> None:
    got = load(["the same words"] * 40, tokenizer)
    assert got.record.repeated_documents == got.record.documents - 1 > 0


def test_demo_text_works_without_datasets(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit.demo import corpus

    # The real text takes seconds to collect; its own tests read it.
    monkeypatch.setattr(corpus, "calibration_text", lambda: [TEXT[:500], TEXT[500:900]])
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert load("demo", tokenizer).record.source == "demo"
    (tmp_path / "a.txt").write_text(TEXT)
    assert load(tmp_path / "a.txt", tokenizer).record.tokens == 64
    write_jsonl(tmp_path / "a.jsonl", [{"text": TEXT}])
    with pytest.raises(CalibrationError, match="pip install datasets"):
        load(tmp_path / "a.jsonl", tokenizer)


def test_too_little_text_says_how_many_tokens_there_are(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text(TEXT[:300])
    there = len(tokenizer(TEXT[:300])["input_ids"])
    with pytest.raises(CalibrationError) as caught:
        load(path, tokenizer, samples=100)
    assert f"{there} tokens" in str(caught.value)
    assert "1600 tokens" in str(caught.value)
    assert f"--samples {there // 16} or fewer" in str(caught.value)


def test_empty_column_and_missing_column_are_named(tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [{"text": " ", "n": 1}, {"text": None, "n": 2}])
    with pytest.raises(CalibrationError, match="column 'text' is empty in every row"):
        load(path, tokenizer)
    with pytest.raises(CalibrationError, match="no column 'body'; its columns: text, n"):
        load(f"{path}#body", tokenizer)
    with pytest.raises(CalibrationError, match="column 'n': holds int"):
        load(f"{path}#n", tokenizer)
    path = write_jsonl(tmp_path / "two.jsonl", [{"a": "x", "b": "y"}])
    with pytest.raises(CalibrationError, match="which column holds the text"):
        load(path, tokenizer)


def test_messages_without_a_chat_template_are_refused(tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match="no chat template"):
        load([[{"role": "user", "content": "row"}]], tokenizer)


def test_refusal_by_the_chat_template_is_reported(tokenizer: Any) -> None:
    picky = make_tokenizer(chat=True)
    picky.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalibrationError, match="roles must alternate"):
        load([[{"role": "user", "content": "row"}]], picky)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("missing.jsonl", None, "does not exist"),
        ("empty.txt", b"", "holds no text"),
        ("empty.jsonl", b"", "is empty"),
        ("binary.txt", b"\xff\xfe\x00\x01", "not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "cannot be read"),
        ("broken.parquet", b"not a parquet file", "cannot be read"),
        ("table.csv", b"a,b\n", r"\.csv extension"),
    ],
)
def test_bad_files_are_refused_by_name(
    tokenizer: Any, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        load(str(tmp_path / name), tokenizer)
    assert name in str(caught.value)


def test_unknown_dataset_is_refused_with_what_is_allowed(tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match="a saved dataset directory"):
        load("nobody/no-such-dataset:config:split", tokenizer)
    with pytest.raises(CalibrationError, match="NAME:config:split"):
        load("a:b:c:d", tokenizer)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ([], {}, "empty"),
        (["", "  "], {}, "every document is empty"),
        (7, {}, "type int"),
        ([[5, 999]], {"vocab_size": 320}, "token id 999, the model knows 0 to 319"),
        ([[5, -1]], {}, "token id -1"),
        (torch.ones(4, 4), {}, "integers needed"),
        (torch.arange(4), {}, r"\[windows, tokens\] is needed"),
        (["row"], {"samples": 0}, "at least 1"),
    ],
    ids=["no-rows", "blank", "number", "vocabulary", "negative", "floats", "flat", "samples"],
)
def test_bad_python_sources_are_refused(
    tokenizer: Any, source: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        load(source, tokenizer, **options)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(CalibrationError, match="needs a tokenizer"):
        load(["row"], None)


PARTS: dict[str, Any] = {
    "texts": [{"type": "text", "text": "weight"}, {"type": "text", "text": "scale"}],
    "plain strings": ["weight", "scale"],
    "texts with empty fields": [
        {"type": "text", "text": "weight", "image": None},
        {"type": "text", "text": "scale", "image": None},
    ],
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_message_of_text_parts_is_their_text(chat_tokenizer: Any, kind: str) -> None:
    def conversations(content: Any) -> list[list[dict[str, Any]]]:
        return [[{"role": "user", "content": content}] for _ in range(20)]

    found = load(conversations(PARTS[kind]), chat_tokenizer)
    expected = load(conversations("weight\nscale"), chat_tokenizer)
    assert found.fingerprint == expected.fingerprint
    assert "type" not in chat_tokenizer.decode(found.ids.flatten())


def test_a_template_that_takes_parts_only_gets_parts(chat_tokenizer: Any) -> None:
    parts_only = make_tokenizer(chat=True)
    parts_only.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] %}"
        "{{ part['text'] }}{% endfor %}</s>{% endfor %}"
    )
    conversations = [[{"role": "user", "content": f"weight {i}"}] for i in range(40)]
    assert load(conversations, parts_only).fingerprint == (
        load(conversations, chat_tokenizer).fingerprint
    )


def test_a_part_that_is_no_text_is_named(chat_tokenizer: Any) -> None:
    content = [{"type": "image", "image": "x.png"}, {"type": "text", "text": "weight"}]
    with pytest.raises(CalibrationError, match="part of type 'image'"):
        load([[{"role": "user", "content": content}]], chat_tokenizer)


@pytest.mark.parametrize(
    "options,named",
    [
        ({"samples": 10**20}, "--samples"),
        ({"seq_len": 10**20}, "--seq-len"),
        ({"seed": 2**64}, "--seed"),
        ({"seed": -1}, "--seed"),
    ],
    ids=["samples", "seq_len", "large seed", "negative seed"],
)
def test_more_than_any_machine_can_hold_is_refused_at_once(
    tokenizer: Any, options: dict[str, int], named: str
) -> None:
    with pytest.raises(CalibrationError, match=named):
        load([TEXT], tokenizer, **options)
