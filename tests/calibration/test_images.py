"""Calibration on images: what blocks see is what they see in transformers' own forward."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny_images as images
import torch
from transformers import AutoModelForImageTextToText

from quantkit.calibration.data.tokens import Calibration, ImageReader, load_calibration
from quantkit.calibration.kept_calls import KeptCalls
from quantkit.calibration.stream import CalibrationStream
from quantkit.checkpoint.files import FileSource
from quantkit.checkpoint.processor import load_processor
from quantkit.errors import CalibrationError, ModelError, NumericsError
from quantkit.methods.stats import Needs
from quantkit.model.causal import CausalModel
from quantkit.model.refs import BlockCall

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 3
KINDS = images.kinds()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kind -> the directory of its tiny model, built once."""
    found: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in found:
            found[kind] = images.build(kind, tmp_path_factory.mktemp(kind))
        return found[kind]

    return get


def reader(model: CausalModel, processor: Any) -> ImageReader:
    return ImageReader(
        processor=lambda: processor,
        takes=tuple(model.towers.takes),
        placeholders=model.towers.placeholders(),
    )


def calibrate(model: CausalModel, spec: Any, processor: Any = None, **more: Any) -> Calibration:
    options = {"samples": COUNT, "seq_len": 256, **more}
    vocabulary = model.text_config.vocab_size
    return load_calibration(
        spec,
        tokenizer=images.tokenizer(),
        vocab_size=vocabulary,
        images=reader(model, processor),
        **options,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_one_by_one_give_what_transformers_gives(
    kind: str, built: Any, tmp_path: Path
) -> None:
    given = [images.inputs(kind, number) for number in range(COUNT)]
    dense = AutoModelForImageTextToText.from_pretrained(built(kind), dtype=torch.float32).eval()
    seen: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        wanted = [dense(**one).logits for one in given]
    model = CausalModel.open(FileSource(built(kind)))
    calibration = calibrate(model, given)
    with contextlib.ExitStack() as stack:
        stream = CalibrationStream(
            model, calibration, device="cpu", scratch=tmp_path, gram_budget=None, stack=stack
        )
        stream.embed()
        # What comes after finds all that it needs on the disk, and no tower.
        assert all(p.is_meta for path, m in model.towers.modules() for p in m.parameters(False))
        stream.sync(0)
        again = CalibrationStream(
            model, calibration, device="cpu", scratch=tmp_path, gram_budget=None, stack=stack
        )
        for index in range(model.num_blocks):
            block = model.load_block(index)
            ref = model.weights(index)[-1]
            book = again.gather(
                index,
                block,
                {ref.input: Needs(moments=True)},
                {ref.input: ref.shape[1]},
                stream="original",
                write=True,
            )
            seen[f"{model.block_path(index)}.{ref.parameter}"] = book.get(ref.input).sum_sq
            assert book.count(ref.input) == sum(one["input_ids"].shape[1] for one in given)
        for number, one in enumerate(given):
            length = one["input_ids"].shape[1]
            last = again.hidden.read(model.num_blocks, number, number + 1)[:, :length]
            assert torch.equal(model.logits(last), wanted[number])
    # The statistics are those of hooks on transformers' own forward, added up in another order.
    for path, found in seen.items():
        layer = dense.get_submodule(path.removesuffix(".weight"))
        assert torch.allclose(found.float(), _squares(dense, layer, given), rtol=1e-5)


def _squares(dense: Any, layer: Any, given: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    total: list[torch.Tensor] = []

    def keep(module: Any, args: Any) -> None:
        total.append(args[0].flatten(0, -2).double().square().sum(0))

    handle = layer.register_forward_pre_hook(keep)
    with torch.no_grad():
        for one in given:
            dense(**one)
    handle.remove()
    return torch.stack(total).sum(0).float()


def test_features_of_images_that_enter_between_blocks_are_carried(built: Any) -> None:
    model = CausalModel.open(FileSource(built("qwen3_vl")))
    given = images.inputs("qwen3_vl")
    ids = given.pop("input_ids")
    with model.towers.loaded():
        _, calls = model.calls(ids, inputs=given)
        model.check_replay(ids, given)
    assert [call.added is not None for call in calls] == [False, True, True]
    marks = torch.isin(ids[0], torch.tensor(sorted(model.towers.placeholders())))
    assert calls[1].added is not None
    assert bool(calls[1].added[0][marks].any(-1).all()) and not bool(
        calls[1].added[0][~marks].any()
    )


def test_a_model_that_multiplies_between_blocks_is_refused(
    built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CausalModel.open(FileSource(built("qwen3_vl")))
    given = images.inputs("qwen3_vl")
    ids = given.pop("input_ids")
    owner = model._model.model.language_model
    own = type(owner)._deepstack_process
    monkeypatch.setattr(
        type(owner), "_deepstack_process", lambda self, h, m, e: own(self, 1.5 * h, m, e)
    )
    with model.towers.loaded(), pytest.raises(ModelError, match="calibrate it on text alone"):
        model.check_replay(ids, given)


def test_a_tower_that_holds_nan_is_named(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CausalModel.open(FileSource(built("gemma3")))
    read = FileSource.read
    path = next(path for path in model.towers.paths if path.endswith("fc1.weight"))
    monkeypatch.setattr(
        FileSource, "read", lambda self, name: read(self, name) * (torch.nan if name in path else 1)
    )
    with pytest.raises(NumericsError, match=r"fc1\.weight"), model.towers.loaded():
        pass
    assert all(p.is_meta for path, m in model.towers.modules() for p in m.parameters(False))


def test_calls_come_back_as_they_were(tmp_path: Path) -> None:
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    table = torch.randn(1, 5, 16)[:, ::2]
    call = BlockCall(
        args=(mask, None),
        kwargs={"position_embeddings": (table, table), "use_cache": False, "more": {"x": [1, 2.5]}},
        hidden_name="hidden_states",
        added=torch.randn(1, 5, 8).bfloat16(),
    )
    other = BlockCall(args=(mask,), kwargs={})
    kept = KeptCalls(tmp_path)
    kept.write(7, (call, other))
    found = KeptCalls(tmp_path).read(7, 0, "cpu")
    assert torch.equal(found.args[0], mask) and found.args[1] is None
    assert torch.equal(found.kwargs["position_embeddings"][1], table)
    assert isinstance(found.kwargs["position_embeddings"], tuple)
    assert found.kwargs["use_cache"] is False and found.kwargs["more"] == {"x": [1, 2.5]}
    assert found.added is not None and call.added is not None
    assert torch.equal(found.added, call.added) and found.hidden_name == "hidden_states"
    assert torch.equal(kept.read(7, 1, "cpu").args[0], mask)
    with pytest.raises(ModelError, match=r"block 0 .* with a object, which calibration on images"):
        kept.write(8, (BlockCall(args=(object(),), kwargs={}),))


@pytest.fixture(scope="module")
def gemma(built: Any) -> tuple[CausalModel, Any]:
    """A model, and its processor as the checkpoint holds it."""
    source = FileSource(built("gemma3"))
    return CausalModel.open(source), load_processor(source)


def talks() -> list[list[dict[str, Any]]]:
    return [images.talk(number) for number in range(COUNT)]


def rows(folder: Path) -> list[dict[str, Any]]:
    """The conversations of `talks` as rows whose images are files of a folder."""
    found = []
    for number in range(COUNT):
        images.picture(number).save(folder / f"{number}.png")
        user, assistant = images.talk(number)
        found.append(
            {
                "user": user["content"][1]["text"],
                "assistant": assistant["content"],
                "image": f"{number}.png",
            }
        )
    return found


def _parts(row: dict[str, Any], **image: Any) -> list[dict[str, Any]]:
    content = [{"type": "image", **image}, {"type": "text", "text": row["user"]}]
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": row["assistant"]},
    ]


def _plain(row: dict[str, Any], mark: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": mark + row["user"]},
        {"role": "assistant", "content": row["assistant"]},
    ]


FORMS: dict[str, Any] = {
    "column and places": lambda row: {"image": row["image"], "messages": _parts(row)},
    "list column": lambda row: {"images": [row["image"]], "messages": _parts(row)},
    "paths in parts": lambda row: {"messages": _parts(row, path=row["image"])},
    "marks in texts": lambda row: {
        "image": row["image"],
        "conversations": [
            {"from": "human", "value": "<image>" + row["user"]},
            {"from": "gpt", "value": row["assistant"]},
        ],
    },
    "no places": lambda row: {"image": row["image"], "messages": _plain(row, "")},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_dataset_gives_the_same_inputs(
    form: str, gemma: tuple[CausalModel, Any], tmp_path: Path
) -> None:
    model, processor = gemma
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(FORMS[form](row)) + "\n" for row in rows(tmp_path)))
    found = calibrate(model, str(path), processor)
    direct = calibrate(model, talks(), processor)
    assert found.pictured is not None and direct.pictured is not None
    assert sorted(found.pictured.hashes) == sorted(direct.pictured.hashes)
    assert sorted(map(tuple, found.ids.tolist())) == sorted(map(tuple, direct.ids.tolist()))
    assert found.record.images == COUNT and found.record.to_dict()["images"] == COUNT
    assert found.record.tokens == sum(found.pictured.lengths) == int(found.mask.sum())


def test_a_dataset_of_images_is_read_without_decoding_rows(
    gemma: tuple[CausalModel, Any], tmp_path: Path
) -> None:
    model, processor = gemma
    made = [
        {"messages": _plain(row, ""), "images": [images.picture(number)]}
        for number, row in enumerate(rows(tmp_path))
    ]
    features = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "images": datasets.List(datasets.Image()),
        }
    )
    table = datasets.Dataset.from_list(made, features=features)
    table.save_to_disk(str(tmp_path / "saved"))
    table.to_parquet(str(tmp_path / "rows.parquet"))
    direct = calibrate(model, talks(), processor)
    for spec in (table, str(tmp_path / "saved"), str(tmp_path / "rows.parquet")):
        found = calibrate(model, spec, processor)
        assert found.pictured is not None and direct.pictured is not None
        assert sorted(found.pictured.hashes) == sorted(direct.pictured.hashes)


def test_another_image_is_another_calibration(gemma: tuple[CausalModel, Any]) -> None:
    model, processor = gemma
    one, same, other = talks(), talks(), talks()
    other[1][0]["content"][0]["image"] = images.picture(9)
    first, again, changed = (calibrate(model, t, processor) for t in (one, same, other))
    assert torch.equal(first.ids, changed.ids)
    assert first.fingerprint == again.fingerprint != changed.fingerprint


def test_images_that_change_while_a_run_goes_on_are_noticed(
    gemma: tuple[CausalModel, Any], tmp_path: Path
) -> None:
    model, processor = gemma
    found = calibrate(model, str(images.write_dataset(tmp_path, COUNT)), processor)
    assert found.pictured is not None
    for number in range(COUNT):
        images.picture(number + 20).save(tmp_path / f"{number}.png")
    with pytest.raises(CalibrationError, match="sequence 0: its images are not what they were"):
        found.pictured.inputs(0)


def test_text_without_images_goes_the_way_of_text(tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    path.write_text("words without pictures " * 40)

    def never() -> Any:
        raise AssertionError("text needs no processor")

    found = load_calibration(
        str(path),
        tokenizer=images.tokenizer(),
        samples=2,
        seq_len=32,
        images=ImageReader(processor=never, takes=()),
    )
    assert found.pictured is None and "images" not in found.record.to_dict()


def _message(image: Any) -> list[list[dict[str, Any]]]:
    return [[{"role": "user", "content": [{"type": "image", "image": image}]}]]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (_message("https://example.org/a.png"), "is an address, and quantkit downloads no images"),
        (_message("nowhere.png"), r"nowhere\.png: there is no such file"),
        (_message(b"no image"), "an image cannot be read as an image"),
        (_message(7), "an image is int"),
        (_message(None), "has places for 1 images, and 0 lie beside it"),
        ([[{"role": "user", "content": [{"type": "image"}, {"type": "audio"}]}]], "type 'audio'"),
        ([[{"role": "user", "content": [{"type": "image"}]}, "hello"]], "holds str; messages"),
        ([{"input_ids": torch.zeros(2, 4, dtype=torch.int64)}], r"shape \[2, 4\]"),
        ([{"input_ids": torch.zeros(1, 300, dtype=torch.int64)}], "300 tokens are more than"),
    ],
)
def test_bad_images_are_told_in_a_sentence(
    spec: Any, told: str, gemma: tuple[CausalModel, Any]
) -> None:
    model, processor = gemma
    with pytest.raises(CalibrationError, match=told):
        calibrate(model, spec, processor, samples=1)


def test_conversations_are_never_cut(gemma: tuple[CausalModel, Any]) -> None:
    model, processor = gemma
    lengths = calibrate(model, talks(), processor).pictured.lengths  # type: ignore[union-attr]
    longest = max(lengths)
    kept = calibrate(model, talks(), processor, seq_len=longest - 1, samples=1)
    assert kept.record.seq_len < longest
    with pytest.raises(CalibrationError, match="1 are longer, and 3 were asked for; use --samples"):
        calibrate(model, talks(), processor, seq_len=longest - 1)


def test_what_is_missing_is_named(
    gemma: tuple[CausalModel, Any], built: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, processor = gemma
    path = images.write_dataset(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "PIL", None)
        patch.setitem(sys.modules, "PIL.Image", None)
        with pytest.raises(CalibrationError, match=r"images need the package pillow \(pip install"):
            calibrate(model, str(path), processor, samples=1)
    with pytest.raises(CalibrationError, match="has no processor for images"):
        load_processor(FileSource(built("mistral3")))
    with pytest.raises(CalibrationError, match=r"install what it asks for .*pillow torchvision"):
        load_processor(FileSource(built("qwen2_vl")))
    with pytest.raises(CalibrationError, match="this model's class reads no images"):
        load_calibration(
            [images.inputs("gemma3")], tokenizer=images.tokenizer(), samples=1, seq_len=256
        )


def test_a_model_of_text_alone_still_refuses_images() -> None:
    with pytest.raises(CalibrationError, match="only parts of text can be calibrated on"):
        load_calibration(talks(), tokenizer=images.tokenizer(), samples=1, seq_len=256)
