"""The tokenizer of a checkpoint as GGUF metadata: tokens, kinds, merges or scores, special ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quantkit.checkpoint.source import Source
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.errors import FormatError
from quantkit.formats.gguf.metadata import Entry

# The owner's numbers of token kinds (llama_token_type).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HEAD = r"[^\r\n\p{L}\p{N}]?"
_SLASHED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# How a byte-level tokenizer cuts text -> the name by which llama.cpp (llama-vocab.cpp) knows it.
_PRE_TOKENIZERS: Mapping[tuple[str, ...], str] = {
    ("gpt2",): "gpt-2",
    ("digits", "gpt2"): "smollm",
    (rf"{_CONTRACTIONS}|{_HEAD}\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}",): "llama-bpe",
    (rf"{_CONTRACTIONS}|{_HEAD}\p{{L}}+|\p{{N}}|{_TAIL}",): "qwen2",
    (rf"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASHED_TAIL}",): "tekken",
    (
        rf"{_HEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_HEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        rf"|\p{{N}}{{1,3}}|{_SLASHED_TAIL}",
    ): "gpt-4o",
}
# llama.cpp looks a whole word up before it merges with these; the same cut without that.
_WHOLE_WORDS = {"llama-bpe": "smaug-bpe", "tekken": None}


def describe_tokenizer(source: Source, vocab_size: int) -> tuple[Entry, ...]:
    """The tokenizer's metadata; tokens are padded to `vocab_size` rows of the embedding.

    Raises CalibrationError if there is no tokenizer, FormatError if llama.cpp has none like it.
    """
    tokenizer = load_tokenizer(source)
    data = _read(tokenizer)
    model = data["model"]
    if model.get("type") != "BPE":
        raise FormatError(
            f"tokenizer.json: the model is {model.get('type')!r}; gguf is written for BPE"
        )
    added = {int(entry["id"]): entry for entry in data.get("added_tokens") or ()}
    vocabulary = {**model["vocab"], **{entry["content"]: i for i, entry in added.items()}}
    byte_level = any(step["type"] == "ByteLevel" for step in _steps(data.get("pre_tokenizer")))
    if max(vocabulary.values(), default=-1) >= vocab_size:
        raise FormatError(
            f"tokenizer.json: token {max(vocabulary.values())} is outside the embedding's "
            f"{vocab_size} rows"
        )
    texts = [f"[PAD{index}]" for index in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for text, index in vocabulary.items():
        texts[index] = text
        kinds[index] = _kind(text, added.get(index), model, byte_level)
    entries = [Entry(key="tokenizer.ggml.tokens", kind="strings", value=tuple(texts))]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    if byte_level:
        if not merges:
            raise FormatError(
                "tokenizer.json: there are no merges, and llama.cpp loads no tokenizer of bytes "
                "without; write another --format"
            )
        name = _pre_tokenizer(data)
        entries.insert(0, Entry(key="tokenizer.ggml.model", kind="str", value="gpt2"))
        entries.append(Entry(key="tokenizer.ggml.pre", kind="str", value=name))
        # A merge is one text with a space in the middle; spaces inside tokens are Ġ already.
        joined = tuple(f"{left} {right}" for left, right in merges)
        entries.append(Entry(key="tokenizer.ggml.merges", kind="strings", value=joined))
    else:
        entries.insert(0, Entry(key="tokenizer.ggml.model", kind="str", value="llama"))
        entries.append(Entry(key="tokenizer.ggml.pre", kind="str", value="default"))
        scores = _scores(texts, kinds, merges)
        entries.append(Entry(key="tokenizer.ggml.scores", kind="f32s", value=scores))
        prefix = _adds_space(data)
        entries.append(Entry(key="tokenizer.ggml.add_space_prefix", kind="bool", value=prefix))
    entries.append(Entry(key="tokenizer.ggml.token_type", kind="i32s", value=tuple(kinds)))
    return (*entries, *_special(source, tokenizer, vocab_size))


def _read(tokenizer: Any) -> dict[str, Any]:
    """tokenizer.json as transformers uses it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise FormatError(
            f"the tokenizer is a {type(tokenizer).__name__}, of which there is no tokenizer.json; "
            "gguf is written from one"
        )
    data: dict[str, Any] = json.loads(backend.to_str())
    return data


def _kind(
    text: str, added: Mapping[str, Any] | None, model: Mapping[str, Any], bytes_: bool
) -> int:
    if added is not None:
        return CONTROL if added.get("special") else USER_DEFINED
    if text == model.get("unk_token"):
        return UNKNOWN
    if not bytes_ and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return BYTE
    return NORMAL


def _steps(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a pre-tokenizer or normalizer, sequences unrolled."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part.get("pretokenizers") or part.get("normalizers") or ():
            yield from _steps(inner)
    else:
        yield part


def _pre_tokenizer(data: Mapping[str, Any]) -> str:
    """llama.cpp's name for how the text is cut before merging."""
    cuts: list[str] = []
    for step in _steps(data.get("pre_tokenizer")):
        if step["type"] == "Split" and step.get("behavior") == "Isolated":
            cuts.append(str(step["pattern"].get("Regex")))
        elif step["type"] == "Digits" and step.get("individual_digits"):
            cuts.append("digits")
        elif step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            cuts += ["gpt2"] if step.get("use_regex", True) else []
        else:
            cuts.append(json.dumps(step))
    name = _PRE_TOKENIZERS.get(tuple(cuts))
    if name in _WHOLE_WORDS and not data["model"].get("ignore_merges"):
        name = _WHOLE_WORDS[name]
    if name is None:
        raise FormatError(
            f"tokenizer.json: pre_tokenizer {' then '.join(cuts)[:300]}: llama.cpp has no such one "
            f"that quantkit knows; known: {', '.join(_PRE_TOKENIZERS.values())}"
        )
    return name


def _adds_space(data: Mapping[str, Any]) -> bool:
    """True if a space is put before the text, as Llama 2 does and Gemma does not."""
    for step in (*_steps(data.get("normalizer")), *_steps(data.get("pre_tokenizer"))):
        if step["type"] == "Prepend" and step.get("prepend") == _SPACE:
            return True
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return True
    return False


def _scores(
    texts: Sequence[str], kinds: Sequence[int], merges: Sequence[Sequence[str]]
) -> tuple[float, ...]:
    """A token's score is minus the rank of the first merge that makes it: llama.cpp joins the pair
    with the highest score first, which is then the order of the merges."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    unmade = -float(len(merges) + 1)
    return tuple(
        -float(ranks[text]) if text in ranks else (unmade if kind == NORMAL else 0.0)
        for text, kind in zip(texts, kinds, strict=True)
    )


def _special(source: Source, tokenizer: Any, vocab_size: int) -> list[Entry]:
    """Ids of special tokens, what is added around a text, the chat template."""
    entries = []
    config_ends = source.config.get("eos_token_id")
    ends = config_ends if isinstance(config_ends, list) else [config_ends]
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id if tokenizer.eos_token_id is not None else ends[0],
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    for name, index in ids.items():
        if isinstance(index, int) and 0 <= index < vocab_size:
            entries.append(Entry(key=f"tokenizer.ggml.{name}_token_id", kind="u32", value=index))
    sample = tokenizer("a")["input_ids"]
    for name, found in (("bos", sample[:1]), ("eos", sample[-1:])):
        adds = ids[name] is not None and found == [ids[name]]
        entries.append(Entry(key=f"tokenizer.ggml.add_{name}_token", kind="bool", value=adds))
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        entries.append(Entry(key="tokenizer.chat_template", kind="str", value=template))
    return entries
