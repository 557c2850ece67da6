"""The texts that get vectors, and the pairs that get scores, from one evaluation text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from quantkit_eval.errors import EvaluationError
from quantkit_eval.vectors.figures import NEIGHBOURS

MOST_TEXTS, MOST_QUERIES, CANDIDATES = 1000, 100, 10
# A passage is a paragraph, or as many of its sentences as stay below this.
_LONGEST, _SHORTEST, _FEWEST_WORDS = 400, 24, 6
_PARAGRAPHS, _SENTENCES = re.compile(r"\n\s*\n"), re.compile(r"(?<=[.!?])\s+")
# Steps between a query's own passage and the others: prime, so that they differ.
_STRIDE = 97


@dataclass(frozen=True, kw_only=True)
class Query:
    """The first half of a passage, and halves that may follow it: `candidates[0]` is its own."""

    text: str
    candidates: tuple[str, ...]


def passages(content: str) -> list[str]:
    """All passages of a text, each once, in their order."""
    found: dict[str, None] = {}
    for paragraph in _PARAGRAPHS.split(content):
        held = ""
        for sentence in _SENTENCES.split(" ".join(paragraph.split())):
            if held and len(held) + len(sentence) >= _LONGEST:
                found[held] = None
                held = ""
            held = f"{held} {sentence}".strip()[:_LONGEST]
        found[held] = None
    fit = [p for p in found if len(p) >= _SHORTEST and len(p.split()) >= _FEWEST_WORDS]
    return fit


def choose_texts(content: str, source: str, most: int | None) -> list[str]:
    """At most `most` passages, spread over the text.  Raises EvaluationError if they are few."""
    return _chosen(content, source, most or MOST_TEXTS, NEIGHBOURS + 2)


def choose_queries(content: str, source: str, most: int | None) -> list[Query]:
    """At most `most` queries with CANDIDATES each: a passage cut in the middle, and other ends."""
    found = _chosen(content, source, None, CANDIDATES + 1)
    halves = [_halves(passage) for passage in found]
    queries = []
    for number in _spread(len(halves), most or MOST_QUERIES):
        others = ((number + 1 + _STRIDE * k) % len(halves) for k in range(len(halves) - 1))
        ends = dict.fromkeys([halves[number][1], *(halves[other][1] for other in others)])
        queries.append(Query(text=halves[number][0], candidates=tuple(ends)[:CANDIDATES]))
    if any(len(query.candidates) < CANDIDATES for query in queries):
        raise EvaluationError(
            f"--text {source}: its passages end alike, so there are fewer than {CANDIDATES} to "
            "choose from; give more text"
        )
    return queries


def _chosen(content: str, source: str, most: int | None, fewest: int) -> list[str]:
    found = passages(content)
    if len(found) < fewest or (most is not None and most < fewest):
        raise EvaluationError(
            f"--text {source}: {len(found)} passages of {_FEWEST_WORDS} words and more"
            f"{'' if most is None else f', of which --windows takes {most}'}; at least {fewest} "
            "are needed"
        )
    return found if most is None else [found[number] for number in _spread(len(found), most)]


def _spread(count: int, most: int) -> Sequence[int]:
    taken = min(count, most)
    return [number * count // taken for number in range(taken)]


def _halves(passage: str) -> tuple[str, str]:
    words = passage.split()
    middle = len(words) // 2
    return " ".join(words[:middle]), " ".join(words[middle:])
