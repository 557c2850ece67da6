"""Tokenizers built as transformers builds those of sentencepiece models: Llama 2's and Gemma's."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_SPECIAL = ("<unk>", "<s>", "</s>")
_SPACE = "\u2581"
_PIECES = 700
# What tokens of both must be equal on: spaces, newlines, letters seen and never seen.
TEXTS = (
    "The function returns a list of",
    " leading and  double   spaces ",
    "a\nb\n\n  c\td\r\n",
    "naïve café: 10 € für 3 Stück",
    "Ελληνικά, русский, 日本語, हिन्दी, עברית",
    "\U0001f600 \U0001f469\u200d\U0001f4bb e\u0301",
    "def f(x):\n    return x ** 2  # square",
    "\u2581already escaped\u2581",
    "tab\tnul\x00bell\x07",
)


def sentencepiece_tokenizer(
    texts: Iterable[str], *, adds_space: bool, starts: bool
) -> PreTrainedTokenizerFast:
    """A BPE with byte fallback; `adds_space` before the text (Llama 2 does), `starts` with <s>."""
    pieces = _learn(texts)
    vocabulary = {
        text: index
        for index, text in enumerate(
            (*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces)
        )
    }
    single = [text for text in pieces if len(text) == 1]
    made = [text for text in pieces if len(text) > 1]
    assert single and made
    # Sentencepiece joins any two neighbours that make a piece, the piece learnt first before all.
    merges = [
        (text[:cut], text[cut:])
        for text in made
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    core = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    steps = [normalizers.Prepend(_SPACE)] if adds_space else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    tail = [decoders.Strip(content=" ", left=1)] if adds_space else []
    core.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
    )
    if starts:
        from tokenizers.processors import TemplateProcessing

        core.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def _learn(texts: Iterable[str]) -> list[str]:
    """Pieces in the order they were learnt, their letters first."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", _SPACE)
    learner.pre_tokenizer = pre_tokenizers.Split(_SPACE, "merged_with_next")
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=_PIECES, special_tokens=[], show_progress=False)
    )
    return [text for text, _ in sorted(learner.get_vocab().items(), key=lambda item: item[1])]
