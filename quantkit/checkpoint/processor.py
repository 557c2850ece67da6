"""The processor that belongs to a checkpoint: conversations with images to a model's inputs."""

from __future__ import annotations

import io
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.door import read_plain
from quantkit.checkpoint.source import Source
from quantkit.checkpoint.tokenizer import folder_of, tokenizer_files
from quantkit.errors import CalibrationError

# Larger than any photograph.
IMAGE_BYTES = 256 * 2**20
MASK = "attention_mask"
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_MOST_SHOWN = 300


@dataclass(frozen=True, kw_only=True)
class Talk:
    """A conversation whose messages are lists of parts, of text and of images.

    An image part holds in "image" what `open_image` takes.
    """

    messages: list[dict[str, Any]]

    @property
    def images(self) -> list[Any]:
        """The images in their order."""
        parts = (part for message in self.messages for part in message["content"])
        return [part["image"] for part in parts if part["type"] == "image"]


class Processor(Protocol):
    """A processor of transformers: text and images to a model's inputs."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """The inputs of a conversation."""
        ...

    def __call__(self, **given: Any) -> Any:
        """The inputs of texts and images."""
        ...


def has_processor(source: Source) -> bool:
    """Whether files of a processor lie beside a checkpoint; reads small files only."""
    contents = tokenizer_files(source)
    return any(name in contents for name in _PROCESSORS)


def load_processor(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The transformers processor of a checkpoint, which makes a model's inputs of text and images.

    Raises CalibrationError if there is none that works, a package that it needs is missing, or it
    has code of its own that is not trusted.
    """
    from transformers import AutoProcessor

    contents = tokenizer_files(source)
    if not any(name in contents for name in _PROCESSORS):
        raise CalibrationError(
            f"{source.home or 'the model'} has no processor for images ({' or '.join(_PROCESSORS)})"
            "; put its files beside config.json, or give text alone"
        )
    # Of which class it is, the model's configuration may have to say.
    contents["config.json"] = json.dumps(source.config).encode()
    with folder_of(contents) as folder:
        try:
            found = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        # Files from outside bring out any error; one for a missing package has many lines.
        except Exception as error:
            reason = " ".join(str(error).split()).replace(folder, str(source.home or "the model"))
            raise CalibrationError(
                f"the model's processor for images cannot be loaded ({reason[:_MOST_SHOWN]}); "
                "install what it asks for (pip install pillow torchvision), put its files beside "
                "config.json, or give text alone"
            ) from error
    if not hasattr(found, "image_processor"):
        raise CalibrationError(
            f"the model's processor is a {type(found).__name__}, which reads no images; give text "
            "alone"
        )
    return found


def open_image(given: Any, where: str) -> Any:
    """The image in RGB of a file's path, its bytes or an image of PIL.  Raises CalibrationError."""
    try:
        import PIL.Image
    except ImportError as error:
        raise CalibrationError(
            f"{where}: images need the package pillow (pip install pillow)"
        ) from error
    if isinstance(given, Path):
        shown = str(given)
        given = read_plain(given, largest=IMAGE_BYTES, error=CalibrationError)
    else:
        shown = "an image"
    try:
        image = PIL.Image.open(io.BytesIO(given)) if isinstance(given, bytes) else given
        return image.convert("RGB")
    # Decoders of many kinds of files fail in as many ways.
    except Exception as error:
        raise CalibrationError(
            f"{where}: {shown} cannot be read as an image: {_reason(error)}"
        ) from error


def processed(
    processor: Processor, talk: Talk, takes: Collection[str], where: str, *, reply: bool = False
) -> dict[str, torch.Tensor]:
    """The model's inputs [1, T] and further ones for a conversation, by its processor and template.

    takes   what the model's forward takes by name: else is left out, and so is the mask, as there
            is no padding
    reply   the text ends where an answer would begin
    Raises CalibrationError for images that cannot be read and whatever the processor refuses.
    """
    talk = Talk(
        messages=[
            {
                **message,
                "content": [
                    part
                    if part["type"] == "text"
                    else {"type": "image", "image": open_image(part["image"], where)}
                    for part in message["content"]
                ],
            }
            for message in talk.messages
        ]
    )
    try:
        if processor.chat_template:
            given = processor.apply_chat_template(
                talk.messages,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=reply,
            )
        else:
            text, images = _plain(processor, talk), talk.images
            given = processor(text=[text], images=[images] if images else None, return_tensors="pt")
    # Processors and templates are programs that come with the model.
    except Exception as error:
        raise CalibrationError(
            f"{where}: the model's processor refuses a conversation with {len(talk.images)} "
            f"images: {_reason(error)}"
        ) from error
    found = {
        name: value
        for name, value in given.items()
        if isinstance(value, torch.Tensor) and name in takes and name not in (MASK, "labels")
    }
    if talk.images and not any(value.is_floating_point() for value in found.values()):
        raise CalibrationError(
            f"{where}: the model's processor makes {', '.join(given)} of images, and its forward "
            "takes no pixels of that; calibrate on text alone"
        )
    return found


def _plain(processor: Any, talk: Talk) -> str:
    """The text of a conversation for a processor without a chat template, with its image tokens."""
    mark = getattr(processor, "image_token", "<image>")
    parts = (
        "".join(part["text"] if part["type"] == "text" else mark for part in message["content"])
        for message in talk.messages
    )
    return "\n".join(parts)


def _reason(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
