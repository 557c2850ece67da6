"""Options of `quantize`: declared once, the same on the command line, in Python and on the page."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer

import quantkit
from quantkit.cli.app import app
from quantkit.cli.options import takes_options
from quantkit.pipeline.options import QuantizeOptions, option_rows, options_told

ROOT = Path(__file__).parent.parent.parent
FIELDS = {field.name: field for field in dataclasses.fields(QuantizeOptions)}


@pytest.mark.parametrize(("name", "left_out"), [("quantize", ()), ("plan", ("until", "profile"))])
def test_commands_take_every_option_with_its_default(name: str, left_out: Sequence[str]) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    taken = {parameter.name: parameter for parameter in command.params}
    for field, told in options_told().items():
        if told["flag"] is None or field in left_out:
            assert field not in taken
            continue
        assert told["flag"] in taken[field].opts
        default = FIELDS[field].default
        if field != "out":
            assert taken[field].default in (default, None if default == () else default)


def test_the_python_function_takes_the_fields() -> None:
    parameters = dict(inspect.signature(quantkit.quantize).parameters)
    assert next(iter(parameters)) == "model"
    del parameters["model"]
    assert {name: p.default for name, p in parameters.items()} == {
        name: field.default for name, field in FIELDS.items()
    }


def test_an_unknown_argument_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="groupsize"):
        quantkit.quantize("nowhere", "rtn", groupsize=128)  # type: ignore[call-overload]


def test_the_page_is_what_is_declared() -> None:
    spec = importlib.util.spec_from_file_location("options_tool", ROOT / "tools" / "options.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    text = tool.PAGE.read_text(encoding="utf-8")
    assert tool.updated(text) == text, "run python -m tools.options"
    assert len(option_rows()) == sum(told["flag"] is not None for told in options_told().values())


def test_a_command_may_take_some_of_them() -> None:
    seen: list[QuantizeOptions] = []

    @takes_options(only=("samples", "skip"))
    def command(model: str, options: QuantizeOptions, loud: bool = False) -> None:
        seen.append(options)

    assert list(inspect.signature(command).parameters) == ["model", "loud", "samples", "skip"]
    command(model="m", loud=True, samples=3, skip=None)
    assert seen == [QuantizeOptions(samples=3)]


def test_no_method_means_awq_and_a_recipe_needs_none() -> None:
    assert QuantizeOptions().loaded.method == "awq"
    assert QuantizeOptions(format="gguf").loaded.scheme.name == "q4_k_m"
    for options in (QuantizeOptions(format="gguf"), QuantizeOptions(scheme="q6_k")):
        assert options.loaded.method == "gptq"
    recipe = QuantizeOptions("gptq").loaded
    assert QuantizeOptions(recipe=recipe).loaded is recipe
