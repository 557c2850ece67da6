"""What calibration on images is worth: one tiny image-text model, calibrated with and without.

    python -m tools.vision --work DIR

Trains a model that names coloured shapes on a picture (five minutes of a core; it stays in DIR),
quantizes it with statistics of conversations with images, and of the same conversations without
them, and compares both with the original on new pictures: eval/results/images.json, and the table
of docs/vision.md.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from quantkit_eval.figures.statistics import clustered_mean
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

import quantkit

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "eval/results/images.json"
PAGE = ROOT / "docs/vision.md"
_BEGIN, _END = "<!-- images.json -->\n", "\n<!-- end -->"
COLOURS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 220), "yellow": (230, 210, 40),
    "white": (240, 240, 240), "black": (20, 20, 20), "orange": (240, 140, 30),
    "pink": (240, 130, 190),
}  # fmt: skip
SHAPES = ("square", "disc", "bar", "cross")
PLACES = ("left", "right")
_FRAME = ("<pad>", "<s>", "</s>", "<image>", "<unk>", "user", "assistant", ":", "\n")
_WORDS = ("what", "is", "on", "the", "picture", "?", "a", "and", "of", "it", ".", "one", "shows")
SIZE, PATCH, HIDDEN, BLOCKS = 48, 8, 128, 4
SAMPLES, SEQ_LEN, TESTS = 128, 64, 256
METHODS = (
    ("gptq", "w4a16_g32"),
    ("gptq", "w3a16_g32"),
    ("awq", "w3a16_g32"),
    ("best", "w3a16_g32"),
)
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {% for p in m.content %}"
    "{% if p.type == 'image' %}<image> {% else %}{{ p.text }}{% endif %}{% endfor %} </s> "
    "{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300, help="of the processor, for training")
    options = parser.parse_args()
    torch.manual_seed(0)
    source = options.work / "model"
    trained = options.work / "trained.json"
    if not trained.exists():
        shutil.rmtree(source, ignore_errors=True)
        told = train(source, options.seconds)
        trained.write_text(json.dumps(told))
    result = {
        "command": "python -m tools.vision --work DIR",
        "versions": {name: version(name) for name in ("quantkit", "torch", "transformers")},
        "model": json.loads(trained.read_bytes()),
        "samples": SAMPLES,
        "tests": TESTS,
        "runs": list(compare(source, options.work)),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(_BEGIN)
    _, after = rest.split(_END)
    PAGE.write_text(f"{before}{_BEGIN}{table(result)}{_END}{after}", encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    lines = [
        "",
        "| method | calibrated on | KL | cosine | same next token |",
        "|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        kl, cosine, same = (run[name] for name in ("kl", "cosine", "same_token"))
        lines.append(
            f"| `{run['method']}` `{run['scheme']}` | {run['calibrated_on']} | {kl['mean']:.1e} "
            f"[{kl['low']:.1e}, {kl['high']:.1e}] | {cosine['mean']:.5f} "
            f"[{cosine['low']:.5f}, {cosine['high']:.5f}] | {same['mean']:.2%} |"
        )
    return "\n".join([*lines, ""])


def make_processor() -> Any:
    """A processor whose words are those of the pictures."""
    words = [*_FRAME, *_WORDS, *COLOURS, *SHAPES, *PLACES]
    core = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", additional_special_tokens=["<image>"],
    )  # fmt: skip
    images = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )


def make_model(vocabulary: int) -> Any:
    """The untrained model: a SigLIP tower and a llama."""
    text = LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=256, num_hidden_layers=BLOCKS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        image_size=SIZE, patch_size=PATCH, vision_use_head=False,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=3,
        vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def scene(draw: random.Random) -> tuple[Image.Image, str]:
    """A picture of two shapes on a ground, and what is on it."""
    ground, *colours = draw.sample(list(COLOURS), 3)
    image = Image.new("RGB", (SIZE, SIZE), _shade(draw, ground))
    pen, parts = ImageDraw.Draw(image), []
    for place, colour in zip(PLACES, colours, strict=True):
        shape = draw.choice(SHAPES)
        x, y = draw.randrange(2, 6) + (24 if place == "right" else 0), draw.randrange(4, 26)
        _paint(pen, shape, x, y, _shade(draw, colour))
        parts.append(f"a {colour} {shape} {place}")
    return image, f"it shows {parts[0]} and {parts[1]} on {ground} ."


def _shade(draw: random.Random, colour: str) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, c + draw.randrange(-15, 16))) for c in COLOURS[colour])
    return red, green, blue


def _paint(
    pen: ImageDraw.ImageDraw, shape: str, x: int, y: int, fill: tuple[int, int, int]
) -> None:
    if shape == "square":
        pen.rectangle((x, y, x + 15, y + 15), fill=fill)
    elif shape == "disc":
        pen.ellipse((x, y, x + 16, y + 16), fill=fill)
    elif shape == "bar":
        pen.rectangle((x, y + 5, x + 17, y + 10), fill=fill)
    else:
        pen.rectangle((x + 6, y, x + 10, y + 16), fill=fill)
        pen.rectangle((x, y + 6, x + 16, y + 10), fill=fill)


def talk(image: Image.Image | None, said: str) -> list[dict[str, Any]]:
    """A question and its answer, with the picture or without."""
    asked: list[dict[str, Any]] = [{"type": "text", "text": "what is on the picture ?"}]
    if image is not None:
        asked.insert(0, {"type": "image", "image": image})
    answer = [{"type": "text", "text": said}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def batches(processor: Any, seed: int, size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Inputs [size, T], and which tokens [size, T] are of answers.

    Scenes without a place's name for a colour have all the same length.
    """
    draw = random.Random(seed)
    while True:
        talks = [talk(*scene(draw)) for _ in range(size)]
        given = processor.apply_chat_template(
            talks, tokenize=True, return_dict=True, return_tensors="pt", padding=True
        )
        ids = given["input_ids"]
        first = int((ids[0] == processor.tokenizer.convert_tokens_to_ids("assistant")).nonzero()[0])
        answers = torch.zeros_like(ids, dtype=torch.bool)
        answers[:, first + 2 :] = True
        yield {"input_ids": ids, "pixel_values": given["pixel_values"]}, answers


def train(directory: Path, seconds: float) -> dict[str, Any]:
    """Writes a trained model and its processor; how well it names what it sees."""
    processor = make_processor()
    model = make_model(len(processor.tokenizer))
    rate = 2e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    began, step = time.process_time(), 0
    for given, answers in batches(processor, 1, 32):
        share = (time.process_time() - began) / seconds
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (1 - share)
        logits = model(**given).logits
        wanted = given["input_ids"][:, 1:][answers[:, 1:]]
        loss = functional.cross_entropy(logits[:, :-1][answers[:, 1:]], wanted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f"step {step} ({share:.0%}): {loss.item():.4f}", flush=True)
    model.eval()
    given, answers = next(batches(processor, 2, TESTS))
    with torch.no_grad():
        best = model(**given).logits.argmax(-1)
    right = (best[:, :-1] == given["input_ids"][:, 1:])[answers[:, 1:]].float().mean().item()
    model.bfloat16().save_pretrained(directory)
    processor.save_pretrained(directory)
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "steps": step, "right_tokens": round(right, 4)}


def compare(source: Path, work: Path) -> Iterator[dict[str, Any]]:
    """What each method loses with statistics of either kind, on new pictures."""
    processor = LlavaProcessor.from_pretrained(source)
    draw = random.Random(3)
    scenes = [scene(draw) for _ in range(SAMPLES)]
    kinds = {
        "images": [talk(*one) for one in scenes],
        "text": [talk(None, said) for _, said in scenes],
    }
    given, answers = next(batches(processor, 4, TESTS))
    wanted = logits(source, given)
    for method, scheme in METHODS:
        for kind, talks in kinds.items():
            out = work / f"{method}-{scheme}-{kind}"
            quantkit.quantize(
                str(source), method, scheme=scheme, out=out, calibration=talks, samples=SAMPLES
                if kind == "images" else 16, seq_len=SEQ_LEN if kind == "images" else 128,
                fresh=True, progress=False, allow_unreadable=True,
            )  # fmt: skip
            found = logits(out, given)
            yield {
                "method": method,
                "scheme": scheme,
                "calibrated_on": kind,
                **{name: figure(values) for name, values in distances(found, wanted, answers)},
            }
            print(method, scheme, kind, flush=True)


def logits(path: Path, given: dict[str, Tensor]) -> Tensor:
    """Logits [N, T, V] in float32."""
    model: Any = quantkit.load(path, dtype=torch.float32, backend="reference")
    with torch.no_grad():
        return torch.cat(
            [
                model(**{name: value[k : k + 32] for name, value in given.items()}).logits
                for k in range(0, TESTS, 32)
            ]
        )


def distances(found: Tensor, wanted: Tensor, answers: Tensor) -> Sequence[tuple[str, Tensor]]:
    """Name and values [N, A] of what is measured at the answers' tokens."""
    at = answers[:, 1:]
    rows = [x[:, :-1][at].unflatten(0, (len(found), -1)).double() for x in (found, wanted)]
    new, old = (row.log_softmax(-1) for row in rows)
    kl = (old.exp() * (old - new)).sum(-1)
    same = (rows[0].argmax(-1) == rows[1].argmax(-1)).double()
    return (
        ("kl", kl),
        ("cosine", functional.cosine_similarity(rows[0], rows[1], dim=-1)),
        ("same_token", same),
    )


def figure(values_NA: Tensor) -> dict[str, float]:
    """Mean over tokens, with the interval of pictures."""
    counts = torch.full((len(values_NA),), values_NA.shape[1])
    mean, interval = clustered_mean(values_NA.sum(1), counts)
    return {"mean": mean, "low": interval.low, "high": interval.high}


if __name__ == "__main__":
    main()
