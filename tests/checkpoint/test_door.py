"""Files from outside: plain ones of a sensible size are read, all else is refused at once."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.checkpoint.disk import open_own, write_file
from quantkit.checkpoint.door import (
    MAX_DEPTH,
    file_sha256,
    given_path,
    open_plain,
    parse_json,
    read_json,
    read_plain,
)
from quantkit.errors import CheckpointError, OutputError, RecipeError
from quantkit.methods.plain_yaml import parse_yaml


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def directory(path: Path) -> None:
    path.mkdir()


def listener(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


def giant(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def circle(path: Path) -> None:
    path.symlink_to(path.name)


def nowhere(path: Path) -> None:
    path.symlink_to("nothing")


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "fifo": (fifo, "this is a FIFO"),
    "device": (device, "this is a device"),
    "directory": (directory, "this is a directory"),
    "socket": (listener, "this is a socket"),
    "giant": (giant, "1099511627776 bytes"),
    "links in a circle": (circle, "cannot be read"),
    "a link to nothing": (nowhere, "a link to nothing"),
    "nothing": (lambda path: None, "no such file"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_plain_file_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, named = KINDS[kind]
    # A socket's path has a limit of its own.
    monkeypatch.chdir(tmp_path)
    make(Path("x.json"))
    for read in (
        lambda: read_plain(Path("x.json"), largest=1000),
        lambda: read_json(Path("x.json"), largest=1000),
        lambda: open_plain(Path("x.json"), largest=1000),
    ):
        with pytest.raises(CheckpointError, match=named):
            read()


def test_a_link_to_a_plain_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b'{"a": 1}')
    (tmp_path / "link").symlink_to("real")
    assert read_json(tmp_path / "link", largest=8) == {"a": 1}
    assert file_sha256(tmp_path / "link") == hashlib.sha256(b'{"a": 1}').hexdigest()


JSON: dict[str, tuple[bytes, str]] = {
    "damaged": (b'{"a": ', "no valid JSON"),
    "no object": (b"[1]", "no JSON object"),
    "not UTF-8": (b'{"a": "\xff"}', "no valid JSON"),
    "half a character": (b'{"a": {"b": "\\ud800"}}', r"a\.b: .* is no valid text"),
    "half a character as a name": (b'{"\\udfff": 1}', "is no valid text"),
    "a large integer": (b'{"a": [1, ' + b"9" * 30 + b"]}", r"a\.1: an integer beyond 64 bits"),
    "a larger one": (b'{"a": ' + b"9" * 5000 + b"}", "no valid JSON"),
    "deep": (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested more than"),
    "deeper": (b'{"a": ' + b"[" * 10**6 + b"]" * 10**6 + b"}", "no valid JSON"),
}


@pytest.mark.parametrize("kind", JSON)
def test_json_that_nothing_could_work_with_is_refused(kind: str) -> None:
    content, named = JSON[kind]
    with pytest.raises(CheckpointError, match=named):
        parse_json(content, "x.json")


def test_json_as_deep_as_allowed_is_read() -> None:
    value: object = 1
    for _ in range(MAX_DEPTH):
        value = {"a": value}
    assert parse_json(json.dumps(value).encode(), "x.json") == value


PATHS: dict[str, tuple[str, str]] = {
    "an unknown home": ("~nobody-of-this-name/x", "no such home"),
    "too long": ("x/" * 2500, "at most 4095"),
    "a name too long": ("y" * 300, "at most 255"),
    "a zero byte": ("a\0b", "zero byte"),
    "half a character": ("a\ud800", "no file name"),
}


@pytest.mark.parametrize("kind", PATHS)
def test_a_path_that_no_system_takes_is_refused(kind: str) -> None:
    text, named = PATHS[kind]
    with pytest.raises(RecipeError, match=named):
        given_path(text, error=RecipeError)


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    circle(tmp_path / "x")
    with pytest.raises(OutputError, match="cannot be reached"):
        given_path(tmp_path / "x", error=OutputError)


def test_a_home_is_expanded_and_nothing_need_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert given_path("~/a[1]*/b") == tmp_path / "a[1]*/b"
    assert given_path("organisation/model") == Path("organisation/model")


def to_a_file(path: Path, other: Path) -> None:
    path.symlink_to(other)


def to_nothing(path: Path, other: Path) -> None:
    path.symlink_to(other.with_name("elsewhere"))


def second_name(path: Path, other: Path) -> None:
    path.hardlink_to(other)


@pytest.mark.parametrize("link", [to_a_file, to_nothing, second_name], ids=lambda f: f.__name__)
def test_our_own_files_follow_no_link(link: Callable[[Path, Path], None], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("years of work")
    link(tmp_path / "mine", other)
    link(tmp_path / "whole.tmp", other)
    with pytest.raises(OutputError, match="a link that it did not make"):
        open_own(tmp_path / "mine", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    with pytest.raises(OutputError, match="a link that it did not make"):
        write_file(tmp_path / "whole", b"content")
    assert other.read_text() == "years of work"
    assert not (tmp_path / "elsewhere").exists()


def test_our_own_files_are_no_fifos(tmp_path: Path) -> None:
    fifo(tmp_path / "x")
    with pytest.raises(OutputError, match="no plain file"):
        open_own(tmp_path / "x", os.O_WRONLY | os.O_CREAT)


YAML: dict[str, tuple[str, str]] = {
    "a date that is none": ("2001-99-99", "no YAML value"),
    "a date": ("2001-09-09", "is a date"),
    "a tag": ("!!int x", "no YAML value"),
    "a foreign tag": ("!!python/object/apply:os.system [ls]", "not YAML"),
    "nested": ("[" * 5000, "nested more than"),
    "references": ("[&a [x, x], *a]", "references"),
    "itself": ("&a [*a]", "references"),
    "a set": ("!!set {a, b}", "is a set"),
    "bytes": ("!!binary aGVsbG8=", "is a bytes"),
    "no number": (".nan", "no number"),
    "infinity": ("[.inf]", "no number"),
    "a large number": ("0x" + "f" * 6000, "beyond 64 bits"),
    "a larger one": ("9" * 5000, "no YAML value"),
    "a key that is no text": ("{1: 2}", "the key '1'"),
    "a key that is a list": ("{[a]: 2}", "YAML"),
    "a zero byte": ("a\0", "not YAML"),
    "broken": ("a: [", "not YAML"),
}


@pytest.mark.parametrize("kind", YAML)
def test_yaml_beyond_the_values_of_json_is_refused(kind: str) -> None:
    text, named = YAML[kind]
    with pytest.raises(RecipeError, match=named):
        parse_yaml(text, "--set")


def test_yaml_of_json_values_is_read() -> None:
    text = "{a: [1, -2, 0.5, true, null], 'b c': {d: text, e: 1e-3}}"
    assert parse_yaml(text, "x") == {
        "a": [1, -2, 0.5, True, None],
        "b c": {"d": "text", "e": "1e-3"},
    }
