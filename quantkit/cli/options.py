"""Options of `quantize` as parameters of a command, read by typer from its signature."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Collection
from typing import Annotated, Any, get_type_hints

import typer

from quantkit.pipeline.options import QuantizeOptions


def takes_options(
    *, only: Collection[str] | None = None, leave_out: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The command with the fields of QuantizeOptions as options; it gets them as `options`.

    `only` names the fields that it takes (default: all), `leave_out` those that it does not.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        own = [
            parameter.replace(annotation=hints[name])
            for name, parameter in inspect.signature(command).parameters.items()
            if name != "options"
        ]
        fields = [
            field
            for field in dataclasses.fields(QuantizeOptions)
            if field.metadata["flag"] is not None
            and (only is None or field.name in only)
            and field.name not in leave_out
        ]
        parameters = [*own, *(_parameter(field) for field in fields)]
        parameters.sort(key=lambda p: p.default is not inspect.Parameter.empty)

        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = {field.name: values.pop(field.name) for field in fields}
            # typer has None for an option that may be repeated and was not given.
            told = {name: value for name, value in given.items() if value is not None}
            command(**values, options=QuantizeOptions(**told))

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _parameter(field: dataclasses.Field[Any]) -> inspect.Parameter:
    told = field.metadata
    option = typer.Option(told["flag"], help=_plain(told["says"]))
    return inspect.Parameter(
        field.name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=None if field.default == () else field.default,
        annotation=Annotated[told["type"], option],
    )


def _plain(markdown: str) -> str:
    """The sentence without Markdown: links to where they lead, code and escapes bare."""
    text = re.sub(r"\[[^\]]*\]\((https?:[^)]*)\)", r"\1", markdown)
    text = re.sub(r"\[[^\]]*\]\(([^)#]*)[^)]*\)", r"docs/\1", text)
    text = text.replace("`", "").replace("\\|", "|")
    # What starts with a name that is typed keeps its spelling.
    return (text[0] if markdown[0] == "`" else text[0].upper()) + text[1:] + "."
