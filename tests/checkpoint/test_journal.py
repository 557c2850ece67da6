"""The journal: what was appended is there after a kill, a torn line is not."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from quantkit.checkpoint.journal import Journal, compare_fingerprints
from quantkit.errors import OutputError, ResumeError

FINGERPRINT = {"recipe": "awq", "torch": "2.13.0"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal with a fingerprint and three records."""
    journal = Journal(tmp_path / "journal.jsonl")
    journal.check(FINGERPRINT)
    for block in range(3):
        journal.append({"block": block, "names": ["a", "zwölf\n"]})
    journal.close()
    return tmp_path / "journal.jsonl"


def test_records_are_there_when_opened_again(path: Path) -> None:
    journal = Journal(path)
    journal.check(dict(reversed(FINGERPRINT.items())))
    assert [record["block"] for record in journal.records()] == [0, 1, 2]
    assert journal.records()[1]["names"] == ["a", "zwölf\n"]
    assert journal.fingerprint == FINGERPRINT
    journal.close()


def test_cut_at_any_byte_it_keeps_the_whole_lines_and_goes_on(path: Path) -> None:
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        whole = content[:length].count(b"\n")
        journal = Journal(path)
        assert len(journal.records()) == max(whole - 1, 0)
        assert (journal.fingerprint is None) == (whole == 0)
        journal.check(FINGERPRINT)
        journal.append({"block": 9})
        journal.close()
        journal = Journal(path)
        assert len(journal.records()) == max(whole - 1, 0) + 1
        assert journal.records()[-1] == {"block": 9}
        journal.close()


def test_zeros_after_a_power_cut_are_dropped(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(100))
    journal = Journal(path)
    assert len(journal.records()) == 3
    journal.close()


def test_damage_in_the_middle_is_refused(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = b"garbage\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(ResumeError, match="line 2 is damaged; use --fresh"):
        Journal(path)


@pytest.mark.parametrize(
    "change",
    [{"recipe": "gptq"}, {"seed": "1"}],
    ids=["differs", "added"],
)
def test_another_fingerprint_is_refused(change: dict[str, str], path: Path) -> None:
    journal = Journal(path)
    [field] = change
    with pytest.raises(ResumeError, match=f"{field} was .*--fresh"):
        journal.check(FINGERPRINT | change)
    journal.close()


def test_another_number_of_threads_says_how_to_go_on(path: Path) -> None:
    was, now = {"threads": "2"}, {"threads": "4"}
    with pytest.raises(ResumeError, match="threads was 2, is 4; set OMP_NUM_THREADS=2 to go on"):
        compare_fingerprints(path, was, now)


def test_full_disk_leaves_whole_lines(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path)
    journal.check(FINGERPRINT)
    write = os.write

    def half(descriptor: int, content: bytes) -> int:
        if len(content) < 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content[: len(content) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OutputError, match="disk full"):
        journal.append({"block": 3})
    monkeypatch.undo()
    journal.append({"block": 4})
    journal.close()
    journal = Journal(path)
    assert [record["block"] for record in journal.records()] == [0, 1, 2, 4]
    journal.close()
