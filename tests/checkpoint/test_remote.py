"""A repository whose weights are read over the network, from a Hub on loopback."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import tiny_jobs as jobs
import torch
from fake_hub import COMMIT, FakeHub, fake_hub
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quantkit.checkpoint import hub as hub_module
from quantkit.checkpoint.files import FileSource
from quantkit.checkpoint.hub import HubSource
from quantkit.errors import CheckpointError
from quantkit.formats.open import open_source

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "someone/model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several shards, of odd sizes."""
    folder = tmp_path_factory.mktemp("model")
    jobs.build("qwen3", folder)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(NAME, model) as made:
        template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        huggingface_hub.HfFileSystem.clear_instance_cache()
        yield made
        huggingface_hub.HfFileSystem.clear_instance_cache()


def test_every_tensor_is_that_of_the_files_and_no_weight_is_stored(
    hub: FakeHub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "_WINDOW", 4000)
    monkeypatch.setattr(hub_module, "_PIECE", 9000)
    source, own = open_source(f"hub://{NAME}"), FileSource(model)
    assert isinstance(source, HubSource)
    assert source.address == f"hub://{NAME}@{COMMIT}"
    assert source.names() == own.names()
    for name in own.names():
        assert source.info(name) == own.info(name)
        assert torch.equal(source.read(name), own.read(name))
    # Backwards too, and a part in the middle.
    for name in reversed(own.names()):
        numel = own.info(name).numel
        assert torch.equal(
            source.read_flat(name, numel // 3, numel), own.read_flat(name, numel // 3, numel)
        )
    assert max(last - first + 1 for _, first, last in hub.asked) <= 9000
    assert source.side_files().keys() == own.side_files().keys()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    # What its address names is the same again.
    assert open_source(source.address).fingerprint() == source.fingerprint()


def test_small_tensors_side_by_side_come_in_one_request(hub: FakeHub, model: Path) -> None:
    source = open_source(f"hub://{NAME}")
    for name in sorted(source.names(), key=str):
        source.read(name)
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert sum(hub.sent.values()) < 8 * weights
    assert len(hub.asked) < len(source.names())


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_a_run_over_the_network_writes_what_a_run_from_files_does(
    hub: FakeHub, model: Path, tmp_path: Path, method: str
) -> None:
    line = ("--method", method, "--scheme", "w4a16_g32", "--calib", model / "calibration.txt")
    sizes = ("--samples", "4", "--seq-len", "32")
    assert jobs.command("quantize", model, *line, *sizes, "--out", tmp_path / "files") == 0
    over = tmp_path / "over"
    assert jobs.command("quantize", f"hub://{NAME}", *line, *sizes, "--out", over) == 0
    wanted = load_file(tmp_path / "files" / "model.safetensors")
    found = load_file(over / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert jobs.command("verify", over, "--against", f"hub://{NAME}@{COMMIT}") == 0
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_lost_answer_is_asked_for_again(
    hub: FakeHub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(f"hub://{NAME}")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.failures = 2
    name = max(source.names(), key=lambda name: source.info(name).numel)
    assert torch.equal(source.read(name), FileSource(model).read(name))
    assert hub.failures == 0


def test_what_the_hub_does_not_give_is_an_error_that_names_it(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(hub_module, "_WINDOW", 1000)
    source = open_source(f"hub://{NAME}")
    hub.failures = 10_000
    with pytest.raises(CheckpointError, match=r"model-.*safetensors: the Hub does not give it: "):
        source.read("model.norm.weight")
    with pytest.raises(CheckpointError, match="the Hub does not give it"):
        open_source("hub://someone/else")


@pytest.mark.parametrize(
    "address", ["hub://", "hub://a/b/c", "hub://../x", "hub://a/b@", "hub://a b"]
)
def test_addresses_of_another_form_are_refused(address: str) -> None:
    with pytest.raises(CheckpointError, match="give hub://organisation/model"):
        open_source(address)


def test_everything_that_takes_a_model_takes_one_over_the_network(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, out = f"hub://{NAME}", tmp_path / "out"
    line = ("--method", "rtn", "--scheme", "w4a16_g32", "--out", out)
    assert jobs.command("quantize", address, *line) == 0
    assert "No files matched" not in capsys.readouterr().err
    text = tmp_path / "text.txt"
    text.write_text("any text that is long enough to fill two short windows " * 4)
    measured = ("--text", text, "--seq-len", 32, "--prompts", 0, "--windows", 2)
    assert jobs.command("eval", address, out, *measured, "--out", tmp_path / "report") == 0
    told = json.loads((tmp_path / "report" / "report.json").read_text())["original"]
    assert told["weight_bytes"] == sum(e["size"] for e in hub.entries() if "lfs" in e) - headers(
        hub
    )
    assert told["bits_per_weight"] == 32
    capsys.readouterr()
    assert jobs.command("inspect", address) == 0
    assert "unquantized safetensors" in capsys.readouterr().out
    assert jobs.command("generate", address, "--prompt", "a", "--max-new-tokens", 1) == 0


def headers(hub: FakeHub) -> int:
    """Bytes of all shards that are no tensors'."""
    files = [path.read_bytes() for path in hub.folder.glob("*.safetensors")]
    return sum(8 + int.from_bytes(content[:8], "little") for content in files)


def test_a_connection_lost_while_a_model_is_downloaded_is_said(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.cut = True
    # The client waits seconds between its own attempts.
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(CheckpointError, match=r"someone/model: .*the same command goes on"):
        open_source(NAME)
    hub.cut = False
    assert open_source(NAME).names()
