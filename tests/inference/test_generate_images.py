"""`generate --image`: what is printed is what transformers answers to the same picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_images as images
import tiny_jobs as jobs
import torch

import quantkit

pytestmark = pytest.mark.usefixtures("one_thread")


KINDS = ("gemma3", "paligemma", "idefics3")


@pytest.fixture(scope="module", params=KINDS)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model with its processor, and a picture beside it."""
    root = tmp_path_factory.mktemp(request.param)
    model = images.build(request.param, root / "model")
    out = jobs.finish(jobs.make_job(model, "rtn", "w4a16_g32"), root / "out").out
    images.picture(3).save(root / "picture.png")
    return out


def test_the_answer_is_the_models_own(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = next(k for k in KINDS if quantized.parent.name.startswith(k))
    picture, said = quantized.parent / "picture.png", "What is on it?"
    line = ["generate", quantized, "--image", picture, "--prompt", said, "--dtype", "float32"]
    assert jobs.command(*line, "--max-new-tokens", 6) == 0
    told = capsys.readouterr().out
    processor = images.processor(kind)
    content = [{"type": "image", "image": images.picture(3)}, {"type": "text", "text": said}]
    given = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    given.pop("labels", None)
    model = quantkit.load(quantized, dtype=torch.float32)
    with torch.no_grad():
        ids = model.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=0)
    answer = ids[0][given["input_ids"].shape[1] :]
    assert told == processor.tokenizer.decode(answer, skip_special_tokens=True) + "\n"


def test_bad_images_and_models_without_eyes_are_refused(
    quantized: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(path: Path, image: Path) -> str:
        line = ["generate", path, "--image", image, "--prompt", "What?", "--max-new-tokens", 2]
        assert jobs.command(*line) == 2
        error = capsys.readouterr().err.strip()
        assert len([row for row in error.splitlines() if row.startswith("quantkit:")]) == 1
        return error

    assert "there is no such file" in told(quantized, tmp_path / "none.png")
    (tmp_path / "words.png").write_text("no image")
    assert "cannot be read as an image" in told(quantized, tmp_path / "words.png")
    images.picture(1).save(tmp_path / "one.png")
    assert "has no processor for images" in told(llama, tmp_path / "one.png")
