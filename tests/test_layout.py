"""The repository's shape: layers, file sizes, and the guards around the name `kernels`."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for folder in ("quantkit", "kernels/quantkit_kernels", "eval/quantkit_eval")
    for path in (ROOT / folder).rglob("*.py")
)
PARTS = ("methods.ranges", "methods.rounding", "methods.transforms", "formats")


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _imports(path: Path) -> set[str]:
    """Modules that are imported anywhere in a file, type checking blocks included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def _graph() -> dict[str, set[str]]:
    """Module of quantkit -> modules of quantkit that it imports."""
    known = {_module(path) for path in SOURCES}
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        if _module(path).startswith("quantkit.") and path.name != "__init__.py":
            graph[_module(path)] = _imports(path) & known
    return graph


def _reachable(graph: dict[str, set[str]], name: str) -> set[str]:
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        for imported in graph.get(waiting.pop(), set()) - seen:
            seen.add(imported)
            waiting.append(imported)
    return seen


def test_imports_form_no_cycle() -> None:
    graph = _graph()
    assert not [name for name in graph if name in _reachable(graph, name)]


@pytest.mark.parametrize("package", PARTS)
def test_parts_of_one_kind_never_import_another_kind(package: str) -> None:
    for path in (ROOT / "quantkit" / package.replace(".", "/")).glob("*.py"):
        others = [f"quantkit.{other}" for other in PARTS if other != package]
        assert not [name for name in _imports(path) if name.startswith(tuple(others))], path


def test_only_commands_reach_up_to_quantkit_eval() -> None:
    users = {_module(p) for p in SOURCES if any("quantkit_eval" in n for n in _imports(p))}
    allowed = {"quantkit.cli.compare", "quantkit.cli.evaluate"}
    assert {u for u in users if u.startswith("quantkit.")} <= allowed


def test_kernels_is_a_leaf() -> None:
    for path in (ROOT / "kernels" / "quantkit_kernels").rglob("*.py"):
        outside = {name.split(".")[0] for name in _imports(path)} - set(sys.stdlib_module_names)
        assert outside <= {"torch", "triton", "quantkit_kernels"}, path


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_files_have_at_most_500_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("folder", ["kernels", "eval", "recipes"])
def test_outer_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()


def test_package_list_equals_the_folders() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        ".".join(path.parent.relative_to(base).parts)
        for base in (ROOT, ROOT / "kernels", ROOT / "eval")
        for top in ("quantkit", "quantkit_kernels", "quantkit_eval")
        for path in (base / top).rglob("__init__.py")
    }
    assert set(settings["packages"]) == folders | {"quantkit.recipes"}


def test_transformers_imports_with_the_root_on_the_path() -> None:
    code = "from transformers import AutoModelForCausalLM; print(AutoModelForCausalLM.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "AutoModelForCausalLM", done.stderr


def test_wheel_holds_exactly_our_three_packages(tmp_path: Path) -> None:
    project = tmp_path / "project"
    for name in ("quantkit", "kernels", "eval", "recipes"):
        shutil.copytree(ROOT / name, project / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project / name)
    # setuptools alone, without isolation: no network.
    code = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=project, capture_output=True, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"quantkit", "quantkit_kernels", "quantkit_eval"}
    assert "quantkit/recipes/awq.yaml" in names
    assert "quantkit/demo/model/model.safetensors" in names
