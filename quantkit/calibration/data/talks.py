"""Conversations with images, from rows of a dataset or Python objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.checkpoint.processor import Talk
from quantkit.errors import CalibrationError

IMAGE_COLUMNS = ("images", "image")
# How texts of a dataset mark the place of an image that lies in a column beside them.
_IMAGE_MARK = "<image>"
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool"}


def holds_images(value: Any) -> bool:
    """Whether messages have a part that is an image."""
    messages = rows_of_structs(value)
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return False
    contents = [m.get("content") for m in messages if isinstance(m, Mapping)]
    parts = [
        part for c in contents if isinstance(c, Sequence) and not isinstance(c, str) for part in c
    ]
    return any(isinstance(part, Mapping) and part.get("type") == "image" for part in parts)


def to_talk(value: Any, beside: Any, where: str, folder: Path | None) -> Talk | None:
    """The conversation of messages, or of a text that a user says, and of the images `beside` them.

    These fill the parts that name no image of their own, or the places that texts mark with
    <image>; where neither is there, they come first.  None if there is nothing in it.  Raises
    CalibrationError where images and places differ in number.
    """
    value = rows_of_structs(value)
    if isinstance(value, str):
        value = [{"role": "user", "content": value}] if value.strip() else None
    if value is None or not isinstance(value, Sequence) or not value:
        return None
    images = _listed(beside)
    messages = [_parted(renamed(message, where), where) for message in value]
    marks = sum(
        part["text"].count(_IMAGE_MARK)
        for message in messages
        for part in message["content"]
        if part["type"] == "text"
    )
    empty = [
        part
        for message in messages
        for part in message["content"]
        if part["type"] == "image" and part["image"] is None
    ]
    if images and not empty and marks == len(images):
        for message in messages:
            message["content"] = _split_marks(message["content"])
        empty = [p for m in messages for p in m["content"] if p.get("image", "") is None]
    elif images and not empty:
        user = next((m for m in messages if m["role"] == "user"), messages[0])
        empty = [{"type": "image", "image": None} for _ in images]
        user["content"][:0] = empty
    if len(images) != len(empty):
        raise CalibrationError(
            f"calibration {where}: a conversation has places for {len(empty)} images, and "
            f"{len(images)} lie beside it"
        )
    for part, image in zip(empty, images, strict=True):
        part["image"] = image
    for message in messages:
        for part in message["content"]:
            if part["type"] == "image":
                part["image"] = _reference(part["image"], where, folder)
    return Talk(messages=messages)


def renamed(message: Any, where: str) -> dict[str, Any]:
    """The message with role and content."""
    if not isinstance(message, Mapping):
        raise CalibrationError(
            f"calibration {where}: holds {type(message).__name__}; messages with role and content "
            "are needed"
        )
    if "from" in message and "value" in message:
        role = str(message["from"])
        return {"role": _SHAREGPT_ROLES.get(role, role), "content": message["value"]}
    if "role" not in message or "content" not in message:
        raise CalibrationError(
            f"calibration {where}: a message has keys {', '.join(map(str, message))}; "
            "role and content are needed"
        )
    # Arrow fills keys that only other rows have with None.
    return {k: v for k, v in message.items() if v is not None or k == "content"}


def rows_of_structs(value: Any) -> Any:
    """A list of mappings, which older versions of datasets store as a mapping of lists."""
    if isinstance(value, Mapping) and all(isinstance(part, list) for part in value.values()):
        return [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]
    return value


def _parted(message: dict[str, Any], where: str) -> dict[str, Any]:
    """The message with its content as a list of parts, {type: text, text} or {type: image, image}.

    CalibrationError for other parts.
    """
    content = message["content"]
    if content is None or isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content or ""}]}
    parts = []
    for part in content if isinstance(content, Sequence) else [content]:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image":
            given = (part.get(key) for key in ("image", "path", "url", "base64"))
            parts.append(
                {"type": "image", "image": next((g for g in given if g is not None), None)}
            )
        else:
            raise CalibrationError(
                f"calibration {where}: a message holds a part of type {kind!r}; parts of text and "
                "images can be calibrated on"
            )
    return {**message, "content": parts}


def _split_marks(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts, with an image part that is to be filled in the place of each mark."""
    found: list[dict[str, Any]] = []
    for part in parts:
        texts = part["text"].split(_IMAGE_MARK) if part["type"] == "text" else []
        if len(texts) < 2:
            found.append(part)
            continue
        for number, text in enumerate(texts):
            if number:
                found.append({"type": "image", "image": None})
            if text:
                found.append({"type": "text", "text": text})
    return found


def _listed(beside: Any) -> list[Any]:
    """The images of a row's column: one, several or none."""
    if beside is None:
        return []
    several = isinstance(beside, Sequence) and not isinstance(beside, str | bytes)
    return [image for image in beside if image is not None] if several else [beside]


def _reference(image: Any, where: str, folder: Path | None) -> Any:
    """Bytes of an image file, the path of one, or an image object.  Nothing is downloaded."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes) or hasattr(image, "convert"):
        return image
    if not isinstance(image, str | Path) or not str(image):
        raise CalibrationError(
            f"calibration {where}: an image is {type(image).__name__}; give the path of a file, "
            "its bytes or an image of PIL"
        )
    if "://" in str(image) or str(image).startswith("data:"):
        raise CalibrationError(
            f"calibration {where}: the image {str(image)[:60]!r} is an address, and quantkit "
            "downloads no images; give paths of files"
        )
    path = Path(image)
    return path if folder is None or path.is_absolute() else folder / path


def undecoded(rows: Any) -> tuple[Any, str | None]:
    """The rows with images as their files' bytes, and the name of the column that holds them."""
    features = getattr(rows, "features", None)
    if not isinstance(features, Mapping):
        return rows, None
    for name, feature in features.items():
        inner = getattr(feature, "feature", None)
        kind = feature if inner is None else inner
        if type(kind).__name__ != "Image":
            continue
        plain = type(kind)(decode=False)
        return rows.cast_column(name, plain if inner is None else type(feature)(plain)), name
    return rows, None
