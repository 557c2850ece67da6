"""The text to evaluate on: the demo's held-out part, or any source that calibration takes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from quantkit.calibration.data.corpora import open_corpus
from quantkit.calibration.data.documents import Corpus, Document, Origin
from quantkit.errors import CalibrationError
from quantkit_eval.errors import EvaluationError
from quantkit_eval.windows import DOCUMENT_SEPARATOR

# Bounds what is read of a dataset that has no end: about 60 million tokens.
MAX_CHARACTERS = 250_000_000


@dataclass(frozen=True, kw_only=True)
class Text:
    """One text, and where it came from.

    content     the documents in their stored order, joined by blank lines
    source      `demo (held out)`, a file's name or a dataset's
    details     config, split, column, revision: what there is of them
    sha256      of the UTF-8 content
    """

    content: str
    source: str
    details: dict[str, str]
    sha256: str


def read_text(spec: str) -> Text:
    """The text of a source: `demo`, a file, a saved or Hub dataset, as `--calib` takes them.

    A dataset's rows are joined by blank lines in the order they have, empty rows included: for
    wikitext-2-raw-v1 this is what the papers do.  Raises EvaluationError.
    """
    if spec == "demo":
        from quantkit.demo.corpus import heldout_text

        return _text(DOCUMENT_SEPARATOR.join(heldout_text()), "demo (held out)", {})
    try:
        corpus = open_corpus(
            spec, column=None, seed=None, prefer_messages=False, max_characters=MAX_CHARACTERS
        )
        parts = list(_parts(corpus, spec))
    except CalibrationError as error:
        raise EvaluationError(f"--text: {str(error).removeprefix('calibration ')}") from error
    origin = corpus.origin
    return _text(DOCUMENT_SEPARATOR.join(parts), origin.source, details_of(origin))


def details_of(origin: Origin) -> dict[str, str]:
    """Config, split, column, revision and hash of where documents came from, what there is."""
    fields = {
        "config": origin.config,
        "split": origin.split,
        "column": origin.column,
        "revision": origin.revision,
        "file sha256": origin.file_sha256,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _parts(corpus: Corpus, spec: str) -> Iterator[str]:
    left = MAX_CHARACTERS
    for number, document in enumerate(corpus.documents):
        part = _plain(document, spec, number)
        yield part
        left -= len(part)
        if left <= 0:
            return


def _text(content: str, source: str, details: dict[str, str]) -> Text:
    if not content.strip():
        raise EvaluationError(f"{source}: there is no text to evaluate on")
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
    return Text(content=content, source=source, details=details, sha256=digest)


def _plain(document: Document, spec: str, number: int) -> str:
    if isinstance(document, str):
        return document
    assert isinstance(document, list), "images are read only where they are asked for"
    turns = [str(message.get("content") or "") for message in document]
    if not any(turns):
        raise EvaluationError(f"--text {spec}: row {number} has neither text nor messages")
    return DOCUMENT_SEPARATOR.join(turns)
