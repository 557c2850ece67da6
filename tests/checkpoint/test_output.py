"""The output directory: absent, resumable or complete, wherever the run was killed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantkit.checkpoint.manifest import verify_manifest
from quantkit.checkpoint.output import OutputDirectory, OutputState
from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.shards import ShardWriter, plan_shards
from quantkit.errors import OutputError, ResumeError

INFOS = [TensorInfo(name=f"t{n}", dtype=torch.float32, shape=(3, n)) for n in range(1, 5)]
FINGERPRINT = {"recipe": "awq", "model": "0123"}
# File system calls that Python announces before it makes them: the places of a simulated kill.
CALLS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "fcntl.flock"}

# All of them hold; each takes a quarter of a second.
STRIDE = 5


def run(out: Path, fingerprint: dict[str, str] = FINGERPRINT, fresh: bool = False) -> None:
    """A whole run in small: resumes, writes what is missing, finishes; nothing if complete."""
    with OutputDirectory(out) as directory:
        if directory.state is OutputState.COMPLETE and not fresh:
            directory.check_complete(fingerprint)
            return
        journal = directory.begin(fingerprint, fresh=fresh)
        committed = [record["name"] for record in journal.records()]
        with ShardWriter(directory.partial, plan_shards(INFOS, 50), committed=committed) as writer:
            for number, info in enumerate(INFOS):
                if info.name not in committed:
                    (directory.scratch / "hidden").write_bytes(b"state")
                    value = float(number + len(fingerprint["recipe"]))
                    writer.put(info.name, torch.full(info.shape, value))
                    writer.sync()
                    journal.append({"name": info.name})
            writer.close()
        (directory.partial / "config.json").write_text("{}")
        directory.finish(lambda partial: None)


def tree(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def killed(work: Callable[[], None], after: int) -> bool:
    """True if a child process doing `work` was killed at its file system call `after`."""
    child = os.fork()
    if child == 0:
        calls = 0

        def hook(event: str, arguments: object) -> None:
            nonlocal calls
            if event in CALLS:
                calls += 1
                if calls > after:
                    os._exit(9)

        try:
            sys.addaudithook(hook)
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9), "the work failed"
    return code == 9


def test_killed_anywhere_it_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    expected = tmp_path / "expected"
    run(expected)
    after, points = 0, 0
    while True:
        out = tmp_path / f"out{after}"
        if not killed(lambda out=out: run(out), after):  # type: ignore[misc]
            break
        points += 1
        if out.exists():
            assert verify_manifest(out) == []
        # Killed once more while it resumes.
        killed(lambda out=out: run(out), after // 2 + 5)  # type: ignore[misc]
        run(out)
        assert tree(out) == tree(expected)
        assert sorted(path.name for path in tmp_path.glob(f"out{after}*")) == [out.name]
        after += STRIDE
    # Every open, rename and removal of a run is one point.
    assert points * STRIDE > 50


def test_replacing_a_complete_output_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    new = {"recipe": "gptq8", "model": "0123"}
    old_expected, expected = tmp_path / "old", tmp_path / "expected"
    run(old_expected)
    run(expected, new)
    after = 0
    while True:
        out = tmp_path / f"out{after}"
        run(out)
        if not killed(lambda out=out: run(out, new, fresh=True), after):  # type: ignore[misc]
            break
        if out.exists():
            assert tree(out) in (tree(old_expected), tree(expected))
        run(out, new, fresh=True)
        assert tree(out) == tree(expected)
        assert sorted(path.name for path in tmp_path.glob(f"out{after}*")) == [out.name]
        after += STRIDE
    assert after > 50


def test_finished_output_holds_what_was_written_and_a_valid_manifest(tmp_path: Path) -> None:
    run(tmp_path / "out")
    names = set(tree(tmp_path / "out"))
    assert {"config.json", "quantkit/fingerprint.json", "quantkit/manifest.json"} <= names
    assert not any(name.startswith(".scratch") for name in names)
    assert verify_manifest(tmp_path / "out") == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_fingerprint_does_not_resume_and_the_field_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with OutputDirectory(out) as directory:
        assert directory.state is OutputState.ABSENT
        directory.begin(FINGERPRINT)
    with OutputDirectory(out) as directory:
        assert directory.state is OutputState.PARTIAL
        with pytest.raises(ResumeError, match=r"recipe was awq, is gptq; .*--fresh"):
            directory.begin(FINGERPRINT | {"recipe": "gptq"})
    with OutputDirectory(out) as directory, pytest.raises(ResumeError, match="was not recorded"):
        directory.begin(FINGERPRINT | {"extra": "1"})
    run(out, FINGERPRINT | {"recipe": "gptq"}, fresh=True)
    with OutputDirectory(out) as directory:
        assert directory.state is OutputState.COMPLETE
        directory.check_complete(FINGERPRINT | {"recipe": "gptq"})
        with pytest.raises(ResumeError, match="recipe was gptq, is awq"):
            directory.check_complete(FINGERPRINT)
        with pytest.raises(OutputError, match="already complete"):
            directory.begin(FINGERPRINT)


@pytest.mark.parametrize("name", ["out", "out.partial"])
def test_directories_that_hold_something_else_are_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match=f"{name}: exists and .*another --out"):
        OutputDirectory(tmp_path / "out")
    assert tree(tmp_path / name) == {"precious.txt": b"mine"}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_in_the_place_of_the_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="exists and holds something else"):
        OutputDirectory(tmp_path / "out")
    with pytest.raises(OutputError, match="cannot be an output directory"):
        OutputDirectory("/")


def test_a_stranger_under_the_name_needed_to_replace_is_left_alone(tmp_path: Path) -> None:
    run(tmp_path / "out")
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"out\.replaced: exists"):
        run(tmp_path / "out", fresh=True)
    assert tree(tmp_path / "out.replaced") == {"precious.txt": b"mine"}
    assert verify_manifest(tmp_path / "out") == []


def test_an_empty_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run(tmp_path / "out")
    assert verify_manifest(tmp_path / "out") == []


def test_two_runs_cannot_share_an_output(tmp_path: Path) -> None:
    with (
        OutputDirectory(tmp_path / "out"),
        pytest.raises(OutputError, match=f"another run .process {os.getpid()}. is writing it"),
    ):
        OutputDirectory(tmp_path / "out")
    OutputDirectory(tmp_path / "out").close()
    assert list(tmp_path.iterdir()) == []


def test_manifest_problems_are_told_apart(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out)
    run_json = out / "quantkit" / "run.json"
    run_json.write_text("times, outside the manifest")
    assert verify_manifest(out) == []
    first, second, third = sorted(out.glob("*.safetensors"))[:3]
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    second.unlink()
    third.write_bytes(third.read_bytes() + b"x")
    (out / "more.txt").write_text("x")
    assert verify_manifest(out) == [
        "more.txt: not in the manifest",
        f"{first.name}: the content differs from the manifest's sha256",
        f"{second.name}: missing",
        f"{third.name}: {third.stat().st_size} bytes, the manifest says {third.stat().st_size - 1}",
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b'{"version": 2, "files": {}}',
        b'{"version": 1}',
        b'{"version": 1, "files": {"../x": {"sha256": "", "size": 0}}}',
        b'{"version": 1, "files": {"x": {"sha256": 1, "size": 0}}}',
    ],
)
def test_damaged_manifest_is_a_problem_not_a_crash(content: bytes, tmp_path: Path) -> None:
    run(tmp_path / "out")
    (tmp_path / "out" / "quantkit" / "manifest.json").write_bytes(content)
    [problem] = verify_manifest(tmp_path / "out")
    assert problem.startswith("quantkit/manifest.json: cannot be read")
    assert "missing" in verify_manifest(tmp_path)[0]


def test_links_are_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "out") as directory:
        directory.begin(FINGERPRINT)
        (directory.partial / "link").symlink_to(tmp_path)
        with pytest.raises(OutputError, match="link: not a plain file"):
            directory.finish(lambda partial: None)


def test_manifest_lists_files_sorted_and_without_times(tmp_path: Path) -> None:
    run(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "quantkit" / "manifest.json").read_bytes())
    assert list(manifest["files"]) == sorted(manifest["files"])
    assert set(manifest["files"]["config.json"]) == {"sha256", "size"}
