"""YAML as recipes and --set use it: the values of JSON, without references, tags and surprises."""

from __future__ import annotations

import math
from typing import Any

import yaml

from quantkit.checkpoint.door import MAX_DEPTH, unfit
from quantkit.errors import RecipeError


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML document: null, booleans, numbers, texts, lists, mappings by text.

    Raises RecipeError that names `where` for anything else: a reference can stand for more than
    memory holds, a date or a set can be written into no report.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        told = " ".join(str(error).split())
        raise RecipeError(f"{where}: is not YAML: {told[:300]}") from error
    # Numbers and dates that look right and are not, such as 2001-99-99.
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise RecipeError(f"{where}: is no YAML value: {str(error)[:300]}") from error
    problem = unfit(value) or _not_plain(value)
    if problem is not None:
        raise RecipeError(f"{where}: {problem}")
    return value


class _Loader(yaml.SafeLoader):
    """Refuses what is nested too deep, and references, before anything is built of them."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node.  Raises ComposerError for references and below MAX_DEPTH."""
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "references (*name) are not taken", mark)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(
                None, None, f"nested more than {MAX_DEPTH} deep", mark
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _not_plain(value: Any) -> str | None:
    """Which value has no counterpart in JSON; None if all have."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            odd = [key for key in each if not isinstance(key, str)]
            if odd:
                return f"the key {str(odd[0])[:40]!r} is no text"
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
        elif isinstance(each, float) and not math.isfinite(each):
            return f"{each} is no number to work with"
        elif each is not None and not isinstance(each, bool | int | float | str):
            return f"{str(each)[:40]!r} is a {type(each).__name__}; write a number or a text"
    return None
