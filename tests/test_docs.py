"""The documentation says what the code does: links, options, recipes, commands, worked examples."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import itertools
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_models as tiny
import torch
import typer
import yaml
from reference import activations, output_error, stats_of, weights

import quantkit
from quantkit.cli.app import app
from quantkit.formats.registry import available_formats
from quantkit.methods.parts import PartKind, available, make_part, part_class
from quantkit.methods.ranges.minmax import Minmax
from quantkit.methods.recipe import Recipe, builtin_recipes, load_recipe
from quantkit.methods.rounding.nearest import nearest_codes
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import decode_rows
from quantkit.pipeline.options import QuantizeOptions

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "CONTRIBUTING.md"])
# The page of rotations is of parts that no recipe has.
METHOD_PAGES = sorted(set((DOCS / "methods").glob("*.md")) - {DOCS / "methods/rotations.md"})
ADDING = DOCS / "adding-a-method.md"
KINDS: tuple[PartKind, ...] = ("target", "range", "rounding", "transform")

_FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def fences(path: Path, language: str) -> list[tuple[str | None, str]]:
    """(title, content) of the fenced blocks of a language."""
    return [
        (t or None, body) for lang, t, body in _FENCE.findall(path.read_text()) if lang == language
    ]


def prose(path: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", path.read_text())


def section(path: Path, heading: str) -> str:
    """What stands under a heading, up to the next one of its level or above."""
    level = heading.split(" ")[0]
    pattern = rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)"
    found = re.search(pattern, prose(path), re.MULTILINE | re.DOTALL)
    assert found is not None, f"{page_id(path)} has no {heading!r}"
    return found[1]


def rows(text: str) -> Iterator[list[str]]:
    """Cells of the rows of all tables, without the lines of dashes."""
    for line in text.splitlines():
        if line.startswith("|") and not set(line) <= set("|- "):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def code(cell: str) -> str:
    """What a cell holds between backticks, "" if it holds something else."""
    found = re.fullmatch(r"`([^`]+)`", cell)
    return found[1] if found else ""


def anchors(path: Path) -> set[str]:
    """The names GitHub gives to a page's headings."""
    heads = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.is_file(), f"{target}: there is no {path}"
        if anchor:
            assert anchor in anchors(path), f"{target}: known are {sorted(anchors(path))}"


def test_every_page_is_reached_from_the_index() -> None:
    seen: set[Path] = set()
    waiting = [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        seen.add(page)
        for name in re.findall(r"\]\(([^)#\s]+\.md)", prose(page)):
            path = (page.parent / name).resolve()
            if path not in seen and path.is_file():
                waiting.append(path)
    assert set(DOCS.rglob("*.md")) <= seen


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_recipe_is_shown_as_it_is_shipped(name: str) -> None:
    shipped = yaml.safe_load(builtin_recipes()[name].read_text())
    shown = [yaml.safe_load(body) for page in METHOD_PAGES for _, body in fences(page, "yaml")]
    assert shipped in shown
    assert name in (DOCS / "index.md").read_text()


def part_options(recipe: Recipe) -> dict[str, object]:
    """Every option of a recipe's parts under the name `--set` gives it, with its value."""
    parts: list[tuple[str, object]] = [
        ("range", recipe.make_range()),
        ("rounding", recipe.make_rounding()),
    ]
    more = (
        ("target", recipe.make_target()),
        ("refine", recipe.make_refine()),
        ("heal", recipe.make_heal()),
    )
    parts += [(kind, part) for kind, part in more if part is not None]
    names = [spec.name for spec in recipe.transforms]
    parts += [(f"transforms.{n}", p) for n, p in zip(names, recipe.make_transforms(), strict=True)]
    return {
        f"{path}.{field.name}": getattr(part, field.name)
        for path, part in parts
        if dataclasses.is_dataclass(part)
        for field in dataclasses.fields(part)
    }


def default(cell: str) -> object:
    value = yaml.safe_load(code(cell))
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("page", METHOD_PAGES, ids=page_id)
def test_method_pages_list_exactly_the_options_there_are(page: Path) -> None:
    written = {
        code(row[0]): default(row[1])
        for row in rows(page.read_text())
        if re.match(r"(target|range|rounding|refine|heal|transforms)\.", code(row[0]))
    }
    assert written == part_options(load_recipe(page.stem))


@pytest.mark.parametrize("kind", KINDS)
def test_recipes_page_lists_exactly_the_parts_there_are(kind: PartKind) -> None:
    heading = {"refine": "## Refinements", "heal": "## Healing"}.get(
        kind, f"## {kind.capitalize()}s"
    )
    written: dict[str, dict[str, object]] = {}
    for row in itertools.islice(rows(section(DOCS / "recipes.md", heading)), 1, None):
        if row[0]:
            options = written.setdefault(code(row[0]), {})
        if row[1]:
            options[code(row[1])] = default(row[2])
    known = {}
    for name in available(kind):
        fields = dataclasses.fields(part_class(kind, name))
        known[name] = {field.name: field.default for field in fields}
    assert written == known


def test_recipes_page_lists_exactly_the_keys_there_are() -> None:
    written = {code(row[0]) for row in rows(section(DOCS / "recipes.md", "## Keys"))} - {""}
    fields = {field.name for field in dataclasses.fields(Recipe)} - {"samples", "seq_len"}
    assert written == fields | {"calibration"}


def test_the_example_of_the_recipes_page_is_one() -> None:
    (_, body), *_ = fences(DOCS / "recipes.md", "yaml")
    recipe = Recipe.from_dict(yaml.safe_load(body), "recipes.md")
    assert Recipe.from_dict(recipe.to_dict(), "again") == recipe


def commands() -> dict[str, Any]:
    # No isinstance checks: newer typer brings its own copy of click.
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def options(command: Any) -> set[str]:
    found = {name for p in command.params if p.param_type_name == "option" for name in p.opts}
    return {name for name in found if name.startswith("--")} - {"--help"}


COMMANDS = ["quantize", "plan", "inspect", "export", "verify", "generate", "demo", "eval", "bench"]


@pytest.mark.parametrize("name", COMMANDS)
def test_command_page_names_exactly_the_options_there_are(name: str) -> None:
    text = section(DOCS / "cli.md", f"## quantkit {name}")
    tables = {code(row[0]) for row in rows(text)}
    listed = set(re.findall(r"`(--[\w-]+)`", text)) if name in ("plan", "inspect") else tables
    assert {option for option in listed if option.startswith("--")} == options(commands()[name])


def test_command_page_names_every_command() -> None:
    text = (DOCS / "cli.md").read_text()
    assert all(f"quantkit {name}" in text for name in commands())


def command_lines() -> list[str]:
    return sorted(
        {
            line.removeprefix("PYTHONPATH=. ")
            for page in PAGES
            for _, body in fences(page, "bash")
            for line in body.replace("\\\n", " ").splitlines()
            if line.removeprefix("PYTHONPATH=. ").startswith("quantkit ")
        }
    )


@pytest.mark.parametrize("line", command_lines())
def test_command_lines_are_understood(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    given = commands()[name].make_context(name, arguments).params
    if name in ("quantize", "plan") and given["recipe"] is None:
        # A tournament takes methods by their names.
        method = "rtn" if given["method"] == "auto" else given["method"]
        load_recipe(
            method or QuantizeOptions(bits=given["bits"]).loaded.method,
            overrides=given["overrides"] or (),
            scheme=given["scheme"],
            skip=given["skip"] or (),
            rules=given["rules"] or (),
            head=given["lm_head"],
        )


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_examples_compile(page: Path) -> None:
    for title, body in fences(page, "python"):
        compile(body, title or page_id(page), "exec")


@pytest.mark.parametrize("name", ["quantize", "load"])
def test_python_page_lists_exactly_the_arguments_there_are(name: str) -> None:
    known = inspect.signature(getattr(quantkit, name)).parameters
    written = {
        code(row[0]): code(row[1])
        for row in rows(section(DOCS / "python.md", f"## quantkit.{name}"))
        if code(row[0])
    }
    assert set(written) == set(known)
    for argument, parameter in known.items():
        if parameter.default is not inspect.Parameter.empty:
            assert eval(written[argument]) == parameter.default, argument


def test_formats_page_has_every_format() -> None:
    table = list(rows(prose(DOCS / "formats.md").split("## ")[0]))
    assert {code(row[0]) for row in table} - {""} == set(available_formats())


def test_files_that_the_design_names_are_there() -> None:
    text = (DOCS / "design.md").read_text()
    named = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", text))
    assert len(named) > 40
    homes = (ROOT / "quantkit", ROOT)
    lost = {name for name in named if not any((home / name).is_file() for home in homes)}
    assert not lost


# The worked examples: the page's blocks as files, put through what every part has to keep.


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with the page's files, importable."""
    folder = tmp_path_factory.mktemp("examples")
    for language in ("python", "yaml"):
        for title, body in fences(ADDING, language):
            assert title is not None
            (folder / title).write_text(body)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for path in folder.glob("*.py"):
        module: ModuleType | None = sys.modules.pop(path.stem, None)
        assert module is None or module.__file__ == str(path)
    torch.set_num_threads(threads)


Case = tuple[Callable[..., None], dict[str, object]]


def contract(file: str) -> list[Any]:
    """Every question of a contract suite, as pytest would put it to one part."""
    path = ROOT / "tests" / "contract" / file
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    suite = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(suite)
    tokens = activations(400, suite.COLUMNS, 1)
    cases = []
    for name, function in vars(suite).items():
        if not name.startswith("test_"):
            continue
        wanted = inspect.signature(function).parameters
        shared = {"tokens": tokens, "stats": stats_of(tokens)}
        given: list[dict[str, object]] = [{k: v for k, v in shared.items() if k in wanted}]
        if "scheme" in wanted:
            given = [{**g, "scheme": Scheme.parse(n)} for g in given for n in suite.SCHEMES]
        for mark in getattr(function, "pytestmark", ()):
            argument, values = mark.args
            given = [{**g, argument: value} for g in given for value in values]
        for arguments in given:
            named = [getattr(v, "name", v) for v in arguments.values()]
            label = "-".join([name, *(str(v) for v in named if not hasattr(v, "gram"))])
            cases.append(pytest.param((function, arguments), id=label.partition("-tensor")[0]))
    return cases


@pytest.mark.parametrize("case", contract("test_roundings_contract.py"))
def test_example_rounding_keeps_the_contract(examples: Path, case: Case) -> None:
    question, arguments = case
    question(part=make_part("rounding", "coordinate:CoordinateDescent", {}), **arguments)


@pytest.mark.parametrize("case", contract("test_ranges_contract.py"))
def test_example_range_keeps_the_contract(examples: Path, case: Case) -> None:
    question, arguments = case
    question(part=make_part("range", "power:PowerError", {}), **arguments)


@pytest.mark.parametrize("scheme_name", ["w4a16_g32", "w2a16_row_asym", "nf4_b64"])
def test_example_rounding_makes_no_row_worse(examples: Path, scheme_name: str) -> None:
    scheme, weight, tokens = (
        Scheme.parse(scheme_name),
        weights(24, 128, 0),
        activations(400, 128, 1),
    )
    found = Minmax()("x", weight, scheme, None)
    part = make_part("rounding", "coordinate:CoordinateDescent", {})
    errors = []
    for rounding in (part, make_part("rounding", "nearest", {})):
        codes = rounding(weight, scheme, found.coding, found.zero, stats_of(tokens)).codes
        values = decode_rows(codes, found.coding, found.zero, scheme)
        errors.append([output_error(weight[[o]], values[[o]], tokens) for o in range(24)])
    for ours, nearest in zip(*errors, strict=True):
        # The Gram matrix is summed in float32.
        assert ours <= nearest * 1.0001
    assert sum(errors[0]) < 0.9 * sum(errors[1])


def test_example_rounding_says_when_blocks_straddle_rows(examples: Path) -> None:
    scheme, weight = Scheme.parse("nf4_b64"), weights(8, 40, 0)
    part = make_part("rounding", "coordinate:CoordinateDescent", {})
    found = Minmax()("x", weight, scheme, None)
    rounded = part(weight, scheme, found.coding, found.zero, stats_of(activations(50, 40, 1)))
    assert "straddle" in rounded.degraded


def test_example_range_has_least_error_to_its_power(examples: Path) -> None:
    scheme, weight = Scheme.parse("w3a16_g32"), weights(24, 128, 0)

    def error(name: str, options: dict[str, object]) -> float:
        found = make_part("range", name, options)("x", weight, scheme, None)
        codes = nearest_codes(weight, scheme, found.coding, found.zero)
        values = decode_rows(codes, found.coding, found.zero, scheme)
        return float((weight - values).abs().double().pow(2.4).sum())

    best = error("power:PowerError", {"power": 2.4})
    assert best < min(
        error("minmax", {}), error("mse", {}), error("power:PowerError", {"power": 4.0})
    )


def test_example_parts_refuse_bad_options(examples: Path) -> None:
    with pytest.raises(quantkit.QuantkitError, match="sweeps 0: must be at least 1"):
        make_part("rounding", "coordinate:CoordinateDescent", {"sweeps": 0})
    with pytest.raises(quantkit.QuantkitError, match="its options: sweeps"):
        make_part("rounding", "coordinate:CoordinateDescent", {"sweep": 1})
    with pytest.raises(quantkit.QuantkitError, match="need steps >= 1"):
        make_part("range", "power:PowerError", {"steps": 0})


def errors_of(out: Path) -> list[float]:
    report = json.loads((out / "quantkit" / "report.json").read_text())
    assert not report["degraded"]
    return [weight["error"] for weight in report["weights"]]


def test_example_recipes_quantize_a_model(examples: Path, tmp_path: Path) -> None:
    source = tiny.build("llama", tmp_path / "llama", num_hidden_layers=2, intermediate_size=64)
    ids = torch.randint(3, 259, (8, 64), generator=torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {}
    for name, changes in {
        "coordinate": (),
        "nearest": ("rounding.name=nearest",),
        "power": (),
    }.items():
        recipe = examples / f"{'coordinate' if name == 'nearest' else name}.yaml"
        out = quantkit.quantize(
            source,
            out=tmp_path / name,
            recipe=recipe,
            overrides=changes,
            scheme="w4a16_g32",
            calibration=ids,
            samples=8,
            seq_len=64,
            progress=False,
        )
        found[name] = errors_of(out)
    assert sum(found["coordinate"]) < 0.9 * sum(found["nearest"])
    assert len(found["power"]) == len(found["coordinate"]) == 2 * 7
    model = quantkit.load(tmp_path / "coordinate")
    with torch.no_grad():
        assert bool(model(input_ids=ids[:1]).logits.isfinite().all())
