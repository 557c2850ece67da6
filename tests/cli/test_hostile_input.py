"""What a command line, a model's folder or an output's place may hold by malice or by mistake."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_jobs as jobs

from quantkit.checks.inspection import inspect
from quantkit.checks.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    jobs.finish(jobs.make_job(llama), out)
    return out


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


class Refused(NamedTuple):
    """Runs a command that must end with exit code 2, at once, and returns its one sentence."""

    capsys: pytest.CaptureFixture[str]

    def __call__(self, *line: object) -> str:
        self.capsys.readouterr()
        began = time.process_time()
        code = jobs.command(*line)
        took = time.process_time() - began
        told = self.capsys.readouterr().err.strip()
        assert code == 2, told
        # Of CPU time; a refusal takes some milliseconds, a machine may be slow.
        assert took < 5
        assert "Traceback" not in told
        message = told.splitlines()[-1]
        assert message.startswith("quantkit: ")
        return message


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    return Refused(capsys)


# Options that no machine can follow, and what the sentence names.
OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "max-ram of 400 digits": (("--max-ram", "9" * 400), "size '999"),
    "max-ram of 15 digits": (("--max-ram", "9" * 15 + "TiB"), "more than any machine"),
    "max-ram in other digits": (("--max-ram", "٣GiB"), "as in 6GiB"),
    "max-shard-size of 400 digits": (("--max-shard-size", "9" * 400), "size '999"),
    "seed beyond 64 bits": (("--seed", str(2**64)), "--seed"),
    "seed below zero": (("--seed", "-1"), "--seed"),
    "cpu:0": (("--device", "cpu:0"), "auto, cpu or cuda"),
    "cpu:foo": (("--device", "cpu:foo"), "auto, cpu or cuda"),
    "cuda:": (("--device", "cuda:"), "auto, cpu or cuda"),
    "no device": (("--device", ""), "auto, cpu or cuda"),
    "format without a module": (("--format", ":x"), "package.module:Class"),
    "relative format": (("--format", ".x:Y"), "package.module:Class"),
    "format that is a function": (("--format", "os.path:join"), "'os.path:join' cannot be made"),
    "format of no module": (("--format", "no_such_module:X"), "no_such_module"),
    "range without a module": (("--set", "range.name=:x"), "package.module:Class"),
    "range that is a function": (("--set", "range.name=os.path:join"), "os.path:join"),
    "date": (("--set", "a=2001-99-99"), "--set"),
    "tag": (("--set", "a=!!int x"), "--set"),
    "nesting": (("--set", "a=" + "[" * 5000), "nested more than"),
    "references": (("--set", "a=[&x [1], *x]"), "references"),
    "samples": (("--samples", str(10**20)), "--samples"),
    "seq-len": (("--seq-len", str(10**20)), "--seq-len"),
    "both": (("--samples", "100000", "--seq-len", "100000"), "tokens in all"),
    "recipe in no home": (("--recipe", "~nobody-of-this-name/x"), "no such home"),
    "recipe too long": (("--recipe", "x/" * 2500), "at most 4095"),
    "calibration in no home": (("--calib", "~nobody-of-this-name/x.txt"), "no such home"),
    "calibration too long": (("--calib", "y" * 300 + ".txt"), "at most 255"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_an_option_that_nothing_can_follow_is_refused(
    kind: str, llama: Path, refused: Refused
) -> None:
    options, named = OPTIONS[kind]
    method = () if "--recipe" in options else ("--method", "gptq")
    given = {"--calib": llama / "calibration.txt", "--samples": "8", "--seq-len": "32"}
    rest = [word for key, value in given.items() if key not in options for word in (key, value)]
    line = ("plan", llama, "--scheme", "w4a16_g32", *method, *rest, *options)
    assert named in refused(*line)


PLACES = {
    "no home": "~nobody-of-this-name/x",
    "too long": "x/" * 2500,
    "a name too long": "y" * 300,
    "circle": "circle",
    "below a file": "file/out",
}


COMMANDS = [
    "quantize",
    "inspect",
    "verify",
    "generate",
    "export",
    "export triton",
    "export to",
    "eval",
    "eval to",
    "compare to",
]


@pytest.mark.parametrize("prompt,named", [("", "no tokens"), ("a\udcff", "no valid text")])
def test_a_prompt_that_is_no_text_is_refused(
    prompt: str, named: str, finished: Path, refused: Refused
) -> None:
    assert named in refused("generate", finished, "--prompt", prompt)


def test_what_is_there_is_never_looked_up_on_the_hub(
    llama: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fifo(Path("pipe"))
    Path("gone").symlink_to("nothing")
    line = ("plan", llama, "--method", "gptq", "--scheme", "w4a16_g32", "--calib", "pipe")
    assert "this is a FIFO" in refused(*line)
    assert "this is a file" in refused("plan", "pipe", "--method", "rtn")
    assert "a link to nothing" in refused("plan", "gone", "--method", "rtn")


def test_a_name_without_room_for_an_ending_is_refused(
    llama: Path, finished: Path, refused: Refused, tmp_path: Path
) -> None:
    out = tmp_path / ("y" * 250)
    line = ("quantize", llama, "--method", "rtn", "--scheme", "w4a16_g32", "--out", out)
    assert "too long" in refused(*line)
    assert "too long" in refused("eval", llama, finished, "--out", out)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", PLACES)
def test_a_path_that_no_system_takes_is_refused(
    kind: str,
    command: str,
    llama: Path,
    finished: Path,
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("circle").symlink_to("circle")
    Path("file").write_text("text")
    place = PLACES[kind]
    lines: dict[str, tuple[object, ...]] = {
        "quantize": (llama, "--method", "rtn", "--scheme", "w4a16_g32", "--out", place),
        "inspect": (place,),
        "verify": (place,),
        "generate": (place, "--prompt", "x"),
        "export": (place, "--format", "gptq_v2", "--out", "out"),
        "export triton": (place, "--format", "onnx", "--triton-repository", "r"),
        "compare to": (llama, "--methods", "rtn", "--out", place),
        "export to": (finished, "--format", "gptq_v2", "--allow-rounding", "--out", place),
        "eval": (llama, place, "--out", "out"),
        "eval to": (llama, finished, "--out", place),
    }
    assert "path " in refused(command.split()[0], *lines[command])


# Fields of config.json of the wrong type, and the field that the sentence names.
FIELDS: dict[str, dict[str, Any]] = {
    "auto_map": {"auto_map": 0},
    "auto_map of numbers": {"auto_map": {"AutoModelForCausalLM": 3}},
    "model_type": {"model_type": []},
    "no model_type": {"model_type": None},
    "output_hidden_states": {"output_hidden_states": "x"},
    "return_dict": {"return_dict": 0},
    "is_encoder_decoder": {"is_encoder_decoder": 1},
    "sliding_window": {"sliding_window": "64"},
    "text_config": {"text_config": 3},
    "empty text_config": {"text_config": {}},
    "quantization_config": {"quantization_config": []},
    "architectures": {"architectures": 3},
    "dtype": {"dtype": "floaty"},
    "dtype that is none": {"dtype": "nn"},
    "head_dim": {"head_dim": 10**30},
    "rope_parameters": {"rope_parameters": {"rope_type": "yarn"}},
    "num_attention_heads": {"num_attention_heads": 0},
    "tie_word_embeddings": {"tie_word_embeddings": None},
    "num_hidden_layers": {"num_hidden_layers": 10**9},
    "num_labels": {"num_labels": 10**9},
    "half a character": {"hidden_act": "\ud800"},
    "half a character where nobody looks": {"comment": "\ud800"},
    "half a character as a name": {"\ud800": 1},
}


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("command", ["plan", "generate"])
def test_a_field_of_the_wrong_type_is_named(
    kind: str, command: str, copy: Path, refused: Refused
) -> None:
    change = FIELDS[kind]
    edit(copy / "config.json", change)
    rest = {
        "plan": ("--method", "rtn", "--scheme", "w4a16_g32"),
        "generate": ("--prompt", "all", "--max-new-tokens", "2"),
    }
    message = refused(command, copy, *rest[command])
    assert ascii(next(iter(change)))[1:-1] in message, message


def test_a_model_that_asks_for_tuples_is_planned_all_the_same(copy: Path) -> None:
    edit(copy / "config.json", {"return_dict": False, "output_hidden_states": True})
    assert jobs.command("plan", copy, "--method", "rtn", "--scheme", "w4a16_g32") == 0


def edit(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def test_half_a_character_in_the_index_is_refused(copy: Path, refused: Refused) -> None:
    (copy / "model.safetensors").rename(copy / "model-1.safetensors")
    weight_map = {"lm_head.weight": "model-1.safetensors", "\ud800": "model-1.safetensors"}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = refused("plan", copy, "--method", "rtn", "--scheme", "w4a16_g32")
    assert "model.safetensors.index.json: weight_map" in message


def fifo(path: Path) -> None:
    os.mkfifo(path)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def giant(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


MAKERS = {"fifo": fifo, "device": zeros, "giant": giant}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "model.safetensors"]
)
def test_a_file_of_a_model_that_is_no_file_is_refused(
    name: str, kind: str, copy: Path, refused: Refused
) -> None:
    for taken in (name, "model.safetensors"):
        (copy / taken).unlink(missing_ok=True)
    MAKERS[kind](copy / name)
    assert name in refused("plan", copy, "--method", "rtn", "--scheme", "w4a16_g32")
    assert name in refused("inspect", copy)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_tokenizer_that_is_no_file_is_refused(kind: str, copy: Path, refused: Refused) -> None:
    (copy / "tokenizer.json").unlink()
    MAKERS[kind](copy / "tokenizer.json")
    line = ("plan", copy, "--method", "gptq", "--scheme", "w4a16_g32", "--samples", 8)
    message = refused(*line, "--seq-len", 32, "--calib", copy / "calibration.txt")
    assert "tokenizer" in message


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", ["report.json", "manifest.json"])
def test_a_record_that_is_no_file_is_said(
    name: str, kind: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / "quantkit" / name).unlink()
    MAKERS[kind](out / "quantkit" / name)
    assert jobs.command("verify", out) == 1
    assert name in capsys.readouterr().out
    code = jobs.command("inspect", out)
    captured = capsys.readouterr()
    # A directory without a manifest that can be read is not finished.
    assert code == (0 if name == "report.json" or kind == "giant" else 2), captured
    if name == "report.json":
        assert "report.json" in captured.out


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json", "x.parquet", "x.yaml"])
def test_text_and_recipes_that_are_no_files_are_refused(
    name: str, kind: str, llama: Path, tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / name
    MAKERS[kind](path)
    option = ("--recipe", path) if name == "x.yaml" else ("--method", "gptq", "--calib", path)
    line = ("plan", llama, "--scheme", "w4a16_g32", "--samples", "8", "--seq-len", "32", *option)
    assert name in refused(*line)


@pytest.mark.parametrize(
    "name",
    [
        "out.partial.lock",
        "out.partial",
        "out.partial/.scratch",
        "out.partial/.scratch/journal.jsonl",
    ],
)
def test_a_link_where_we_write_is_refused_and_left_alone(
    name: str, llama: Path, tmp_path: Path, refused: Refused
) -> None:
    theirs = tmp_path / "theirs"
    if name.endswith((".lock", ".jsonl")):
        theirs.write_text("{}\n")
    else:
        (theirs / ".scratch").mkdir(parents=True)
        for path in (theirs / "journal.jsonl", theirs / ".scratch" / "journal.jsonl"):
            path.write_text("{}\n")
    before = sorted(
        (path, path.read_text()) for path in [theirs, *theirs.rglob("*")] if path.is_file()
    )
    link = tmp_path / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(theirs)
    line = ("quantize", llama, "--method", "rtn", "--scheme", "w4a16_g32")
    for more in ((), ("--fresh",)):
        assert "link" in refused(*line, "--out", tmp_path / "out", *more)
    after = sorted(
        (path, path.read_text()) for path in [theirs, *theirs.rglob("*")] if path.is_file()
    )
    assert after == before and link.is_symlink()


def test_a_link_to_another_output_is_not_emptied_as_the_replaced_one(
    llama: Path, finished: Path, tmp_path: Path, refused: Refused
) -> None:
    theirs = Path(shutil.copytree(finished, tmp_path / "theirs"))
    Path(shutil.copytree(finished, tmp_path / "out"))
    (tmp_path / "out.replaced").symlink_to(theirs)
    line = ("quantize", llama, "--method", "rtn", "--scheme", "w4a16_g32", "--fresh")
    assert "out.replaced" in refused(*line, "--out", tmp_path / "out")
    assert jobs.hashes(theirs) == jobs.hashes(finished)


def test_a_link_where_an_evaluation_works_is_refused_and_left_alone(
    llama: Path, finished: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs" / ".scratch").mkdir(parents=True)
    (tmp_path / "theirs" / ".scratch" / "hidden.bin").write_text("years of work")
    (tmp_path / "report.partial").symlink_to(tmp_path / "theirs")
    assert "link" in refused("eval", llama, finished, "--out", tmp_path / "report")
    assert (tmp_path / "theirs" / ".scratch" / "hidden.bin").read_text() == "years of work"
    monkeypatch.chdir(llama)
    assert "holds something else" in refused("eval", llama, finished, "--out", ".")


def test_a_damaged_report_of_a_finished_run_is_named(
    llama: Path, tmp_path: Path, refused: Refused
) -> None:
    line = ("quantize", llama, "--method", "rtn", "--scheme", "w4a16_g32", "--json")
    line = (*line, "--out", tmp_path / "out")
    assert jobs.command(*line) == 0
    edit(tmp_path / "out/quantkit/report.json", {"degraded": [1]})
    assert "degraded is [1]" in refused(*line)


def test_a_finished_output_is_one_whatever_it_is_called(finished: Path, tmp_path: Path) -> None:
    renamed = Path(shutil.copytree(finished, tmp_path / "x.partial"))
    assert verify(renamed).ok
    assert inspect(renamed).format == "compressed-tensors"
    (renamed / "quantkit/manifest.json").unlink()
    assert not verify(renamed).ok
    assert jobs.command("inspect", renamed) == 2


@pytest.mark.parametrize("here", [".", "./"])
def test_the_current_directory_is_a_checkpoint(
    here: str, finished: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    assert jobs.command("inspect", here) == 0
    assert jobs.command("verify", here) == 0
    assert jobs.command("generate", here, "--prompt", "all", "--max-new-tokens", 2) == 0
    out = tmp_path / "exported"
    line = ("export", here, "--format", "gptq_v2", "--out", out, "--allow-unreadable")
    assert jobs.command(*line, "--allow-rounding") == 0
    monkeypatch.chdir(llama)
    assert jobs.command("plan", here, "--method", "rtn", "--scheme", "w4a16_g32") == 0


@pytest.mark.parametrize("name", ["data[1].jsonl", "[DIR]/c.jsonl", "a*b.jsonl", "q?.json"])
def test_a_path_is_never_a_pattern(
    name: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    words = (llama / "calibration.txt").read_text()
    for other in ("data1.jsonl", "D/c.jsonl", "axb.jsonl", "qq.json"):
        path = tmp_path / other
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": words[::-1]}))
    named, plain = tmp_path / name, tmp_path / "plain.jsonl"
    named.parent.mkdir(exist_ok=True)
    for path in (named, plain):
        path.write_text(json.dumps({"text": words}))
    found, expected = (
        jobs.make_job(llama, "gptq", calibration=str(path)).calibration for path in (named, plain)
    )
    assert found is not None and expected is not None
    assert found.fingerprint == expected.fingerprint
    assert found.record.source == named.name
    assert found.record.file_sha256 == expected.record.file_sha256


def test_a_tokenizer_with_code_of_its_own_is_not_run_unasked(copy: Path, refused: Refused) -> None:
    (copy / "tokenization_mine.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "class MineTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    change = {
        "tokenizer_class": "MineTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_mine.MineTokenizer"]},
    }
    edit(copy / "tokenizer_config.json", change)
    line = ("plan", copy, "--method", "gptq", "--scheme", "w4a16_g32", "--samples", 8)
    line = (*line, "--seq-len", 32, "--calib", copy / "calibration.txt")
    message = refused(*line)
    assert "--trust-remote-code" in message and "tokenization_mine.MineTokenizer" in message
    assert "/tmp" not in message.replace(str(copy), "")
    assert jobs.command(*line, "--trust-remote-code") == 0


def test_a_tokenizer_that_llama_cpp_does_not_load_is_refused(
    finished: Path, tmp_path: Path, refused: Refused
) -> None:
    pytest.importorskip("gguf", reason="the extra [gguf] writes the file")
    assert "no merges" in refused("export", finished, "--format", "gguf", "--out", tmp_path / "out")


def test_a_folder_that_would_be_a_pattern_is_refused(
    llama: Path, tmp_path: Path, refused: Refused
) -> None:
    for name in ("data[1]", "data1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "c.jsonl").write_text('{"text": "x"}')
    line = ("plan", llama, "--method", "gptq", "--scheme", "w4a16_g32", "--calib")
    assert "pattern" in refused(*line, tmp_path / "data[1]")
