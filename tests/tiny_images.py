"""Tiny random image-text checkpoints with the processors of their types, and pictures for them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tiny_models as tiny
import torch
import transformers
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HIDDEN = 64
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
}
_SIGLIP = {**_VISION, "model_type": "siglip_vision_model", "image_size": 56}
_SPECIAL = (
    "<image>", "<video>", "<boi>", "<eoi>", "<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>",
    "TILE", "TILE_GLOBAL", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "[IMG]", "[IMG_BREAK]",
    "[IMG_END]", "<IMG_CONTEXT>", "<img>", "</img>",
)  # fmt: skip
# Writes what every type's own template does: roles, texts, and the image's token in its place.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% for p in m.content %}"
    "{% if p.type == 'image' %}@IMAGE@{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def _text(kind: str, **more: Any) -> dict[str, Any]:
    known = {**tiny.CONFIGS, "llama": tiny.CONFIGS["llama"]}.get(kind, tiny.CONFIGS["llama"])
    return {**known, "max_position_embeddings": 512, "model_type": kind, **more}


def _mrope(kind: str, sections: list[int], **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    return _text(kind, rope_parameters=rope, **more)


def _ids(tokenizer: Any, **names: str) -> dict[str, int]:
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def _kinds(tok: Any) -> dict[str, tuple[dict[str, Any], str, str, dict[str, Any], dict[str, Any]]]:
    """Type -> configuration, processor, image processor, settings of both."""
    qwen_ids = _ids(
        tok,
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
    )
    patches = {"patch_size": 14, "min_pixels": 28 * 28, "max_pixels": 56 * 56}
    square = {"size": {"height": 56, "width": 56}}
    return {
        "gemma3": (
            {
                "text_config": _text("gemma3_text"),
                "vision_config": _SIGLIP,
                "mm_tokens_per_image": 4,
                **_ids(tok, image_token_index="<image>", boi_token_index="<boi>"),
                **_ids(tok, eoi_token_index="<eoi>"),
            },
            "Gemma3Processor",
            "Gemma3ImageProcessorPil",
            {"image_seq_length": 4},
            square,
        ),
        "paligemma": (
            {
                "text_config": _text("gemma2"),
                "vision_config": {**_SIGLIP, "num_image_tokens": 16},
                "projection_dim": HIDDEN,
                **_ids(tok, image_token_index="<image>"),
            },
            "PaliGemmaProcessor",
            "SiglipImageProcessorPil",
            {},
            {**square, "image_seq_length": 16},
        ),
        "aya_vision": (
            {
                "text_config": _text("cohere2"),
                "vision_config": _SIGLIP,
                "downsample_factor": 2,
                **_ids(tok, image_token_index="<|IMG_PATCH|>"),
            },
            "AyaVisionProcessor",
            "GotOcr2ImageProcessorPil",
            {"patch_size": 14, "img_size": 56, "downsample_factor": 2},
            {**square, "crop_to_patches": True, "max_patches": 2},
        ),
        "llava": (
            {
                "text_config": _text("llama"),
                "vision_config": {**_SIGLIP, "model_type": "siglip_vision_model"},
                "vision_feature_select_strategy": "full",
                **_ids(tok, image_token_index="<image>"),
            },
            "LlavaProcessor",
            "SiglipImageProcessorPil",
            {"patch_size": 14, "vision_feature_select_strategy": "full"},
            square,
        ),
        "llava_onevision": (
            {
                "text_config": _text("qwen2"),
                "vision_config": _SIGLIP,
                "image_grid_pinpoints": [[56, 56], [56, 112]],
                **_ids(tok, image_token_index="<image>", video_token_index="<video>"),
            },
            "LlavaOnevisionProcessor",
            "LlavaOnevisionImageProcessorPil",
            {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
            {**square, "image_grid_pinpoints": [[56, 56], [56, 112]]},
        ),
        "idefics3": (
            {
                "text_config": _text("llama", pad_token_id=0),
                "vision_config": {**_VISION, "image_size": 56},
                "scale_factor": 2,
                **_ids(tok, image_token_id="<image>"),
            },
            "Idefics3Processor",
            "Idefics3ImageProcessorPil",
            {"image_seq_len": 4},
            {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}},
        ),
        "smolvlm": (
            {
                "text_config": _text("llama", pad_token_id=0),
                "vision_config": {**_VISION, "image_size": 56},
                "scale_factor": 2,
                **_ids(tok, image_token_id="<image>"),
            },
            "SmolVLMProcessor",
            "SmolVLMImageProcessorPil",
            {"image_seq_len": 4},
            {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}},
        ),
        "qwen2_vl": (
            {
                "text_config": _mrope("qwen2_vl_text", [4, 2, 2]),
                "vision_config": {
                    "embed_dim": 32, "hidden_size": HIDDEN, "depth": 2, "num_heads": 2,
                },
                **qwen_ids,
            },
            "Qwen2VLProcessor",
            "Qwen2VLImageProcessorPil",
            {},
            patches,
        ),
        "qwen2_5_vl": (
            {
                "text_config": _mrope("qwen2_5_vl_text", [4, 2, 2]),
                "vision_config": {
                    "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": HIDDEN,
                    "depth": 2, "num_heads": 2, "fullatt_block_indexes": [1],
                },
                **qwen_ids,
            },
            "Qwen2_5_VLProcessor",
            "Qwen2VLImageProcessorPil",
            {},
            patches,
        ),
        "qwen3_vl": (
            {
                "text_config": _mrope("qwen3_vl_text", [4, 2, 2], head_dim=16),
                "vision_config": {
                    "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": HIDDEN,
                    "depth": 3, "num_heads": 2, "patch_size": 14, "num_position_embeddings": 16,
                    "deepstack_visual_indexes": [0, 1],
                },
                **qwen_ids,
            },
            "Qwen3VLProcessor",
            "Qwen2VLImageProcessorPil",
            {},
            patches,
        ),
        "mistral3": (
            {
                "text_config": _text("mistral"),
                "vision_config": {
                    **_VISION, "model_type": "pixtral", "image_size": 56, "head_dim": 16,
                },
                "spatial_merge_size": 2,
                **_ids(tok, image_token_index="[IMG]"),
            },
            "PixtralProcessor",
            "PixtralImageProcessorPil",
            {"patch_size": 14, "spatial_merge_size": 2},
            {},
        ),
        "internvl": (
            {
                "text_config": _text("qwen2"),
                "vision_config": {**_VISION, "image_size": [56, 56], "patch_size": [14, 14]},
                "downsample_ratio": 0.5,
                **_ids(tok, image_token_id="<IMG_CONTEXT>"),
            },
            "InternVLProcessor",
            "GotOcr2ImageProcessorPil",
            {"image_seq_length": 4},
            {**square, "crop_to_patches": True, "max_patches": 2},
        ),
    }  # fmt: skip


# Types whose processors need torchvision (for videos), which the tests do without.
WITH_VIDEO = ("llava_onevision", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
# Of these the class itself asks for torchvision or num2words.
WITHOUT_PROCESSOR = ("mistral3", "smolvlm")


# Tokens that a type's processor asks its tokenizer for by name.
_OWN_TOKENS = {
    "gemma3": {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
}


def tokenizer() -> Any:
    """The byte-level tokenizer with every token that stands for images in one of the types."""
    found = tiny.tokenizer()
    found.add_special_tokens({"additional_special_tokens": list(_SPECIAL)})
    return found


def kinds() -> list[str]:
    """All types."""
    return list(_kinds(tokenizer()))


def processor(kind: str) -> Any:
    """A type's own processor, with the template; None where its class cannot be used here."""
    _, name, image_name, settings, image_settings = _kinds(tokenizer())[kind]
    if kind in WITHOUT_PROCESSOR:
        return None
    found = tokenizer()
    if kind in _OWN_TOKENS:
        found = PreTrainedTokenizerFast(
            tokenizer_object=found._tokenizer,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            **_OWN_TOKENS[kind],
        )
    images = getattr(transformers, image_name)(**image_settings)
    made_by = getattr(transformers, name)
    if kind in WITH_VIDEO:
        made_by = _without_video(made_by)
        settings = {**settings, "video_processor": None}
    made = made_by(image_processor=images, tokenizer=found, **settings)
    made.chat_template = TEMPLATE.replace("@IMAGE@", _mark(kind, made))
    return made


def _without_video(processor_class: Any) -> Any:
    """The class without the check of what it gets for videos."""

    def check(self: Any, name: str, argument: Any) -> Any:
        if name == "video_processor":
            return None
        return super(made, self).check_argument_for_proper_class(name, argument)

    made = type(processor_class.__name__, (processor_class,), {})
    made.check_argument_for_proper_class = check
    return made


def _mark(kind: str, made: Any) -> str:
    if kind.startswith("qwen"):
        return f"<|vision_start|>{made.image_token}<|vision_end|>"
    return str(made.image_token)


def build(kind: str, directory: Path, *, dtype: torch.dtype = torch.float32, **text: Any) -> Path:
    """The directory, which now holds a tiny random model of a type and its processor's files.

    text: changes of the text model's configuration.
    """
    config = dict(_kinds(tokenizer())[kind][0])
    config["text_config"] = {**config["text_config"], **text}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(
        CONFIG_MAPPING[kind](**config), dtype=torch.float32
    )
    tiny.save(model, directory, dtype=dtype)
    made = processor(kind)
    if made is None:
        tokenizer().save_pretrained(directory)
    elif kind in WITH_VIDEO:
        # Saved whole it would name a processor for videos that is not there.
        made.tokenizer.save_pretrained(directory)
        made.image_processor.save_pretrained(directory)
    else:
        made.save_pretrained(directory)
    return directory


def picture(number: int) -> Image.Image:
    """A coloured shape on a plain ground."""
    draw = random.Random(number)
    image = Image.new("RGB", (draw.choice((40, 56, 70)), 48), _colour(draw))
    shape = (8, 8, 30, 34)
    if number % 2:
        ImageDraw.Draw(image).rectangle(shape, fill=_colour(draw))
    else:
        ImageDraw.Draw(image).ellipse(shape, fill=_colour(draw))
    return image


def _colour(draw: random.Random) -> tuple[int, int, int]:
    return draw.randrange(256), draw.randrange(256), draw.randrange(256)


def write_dataset(directory: Path, count: int = 8) -> Path:
    """A .jsonl of conversations about pictures that lie beside it, one to three each."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        picture(number).save(directory / f"{number}.png")
        said = "a shape " * (number % 3)
        lines.append(
            {
                "image": f"{number}.png",
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image"},
                            {"type": "text", "text": f"What is on picture {number}?"},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": f"It is {said}."}]},
                ],
            }
        )
    path = directory / "talks.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def talk(number: int) -> list[dict[str, Any]]:
    """A conversation about a picture, as Python objects."""
    return [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": picture(number)},
                {"type": "text", "text": f"What is on picture {number}?"},
            ],
        },
        {"role": "assistant", "content": "It is a shape" + " indeed" * (number % 3)},
    ]


def inputs(kind: str, number: int = 0) -> dict[str, torch.Tensor]:
    """What a model of the type reads for a conversation about a picture, made by transformers."""
    made = processor(kind)
    if made is not None:
        messages = [
            {**m, "content": [{"type": "text", "text": m["content"]}]}
            if isinstance(m["content"], str)
            else m
            for m in talk(number)
        ]
        found = made.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt"
        )
    else:
        found = _inputs_by_hand(kind, number)
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, torch.Tensor) and name not in ("labels", "attention_mask")
    }


def _inputs_by_hand(kind: str, number: int) -> dict[str, torch.Tensor]:
    """What the processors do that need a package the tests do without."""
    mark = tokenizer().convert_tokens_to_ids("[IMG]" if kind == "mistral3" else "<image>")
    settings = _kinds(tokenizer())[kind][4]
    if kind == "mistral3":
        images = transformers.PixtralImageProcessorPil(
            size={"longest_edge": 56}, patch_size={"height": 28, "width": 28}
        )
        found = dict(images(images=[picture(number)], return_tensors="pt"))
        height, width = found["image_sizes"][0].tolist()
        count = (height // 28) * (width // 28)
    else:
        assert kind == "smolvlm"
        images = transformers.SmolVLMImageProcessorPil(**settings)
        found = dict(images(images=[[picture(number)]], return_tensors="pt"))
        count = 4 * found["pixel_values"].shape[1]
    text = [20, 21, *[mark] * count, 30, 31, 32, number + 40, *range(50, 50 + number)]
    return {**found, "input_ids": torch.tensor([text])}
