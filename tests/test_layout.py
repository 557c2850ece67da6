"""The repository's shape: layers, file sizes, and the guards around the name `kernels`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for folder in ("quantkit", "kernels/quantkit_kernels", "eval/quantkit_eval")
    for path in (ROOT / folder).rglob("*.py")
)


def _house() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house", ROOT / "tools" / "house.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _imports(path: Path) -> set[str]:
    return set(_house().imports(path))


def test_the_house_keeps_its_rules() -> None:
    assert _house().faults() == []


def _tiny_house(tmp_path: Path, files: dict[str, str]) -> ModuleType:
    house = _house()
    for name, text in {"quantkit/__init__.py": "", **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    house.ROOT = tmp_path
    house.PACKAGES = {"quantkit": tmp_path / "quantkit"}
    return house


@pytest.mark.parametrize(
    "files, told",
    [
        (
            {
                "quantkit/numbers/grid.py": "from quantkit.cli.app import main",
                "quantkit/cli/app.py": "",
            },
            "higher room",
        ),
        (
            {
                "quantkit/cli/a.py": "def f():\n    from quantkit.cli import b",
                "quantkit/cli/b.py": "import quantkit.cli.a",
            },
            "a cycle: quantkit.cli.a -> quantkit.cli.b -> quantkit.cli.a",
        ),
        ({"quantkit/cli/app.py": "from quantkit import load"}, "face for users"),
        ({"quantkit/attic/old.py": ""}, "attic is no room"),
        ({"quantkit/cli/long.py": "\n" * 501}, "501 lines"),
        ({f"quantkit/cli/c{n}.py": "" for n in range(21)}, "22 files"),
        (
            {
                "quantkit/methods/ranges/a.py": "from quantkit.methods.rounding import b",
                "quantkit/methods/rounding/b.py": "",
            },
            "parts of one kind",
        ),
    ],
    ids=["order", "cycle", "face", "room", "lines", "folder", "parts"],
)
def test_a_broken_rule_is_told(tmp_path: Path, files: dict[str, str], told: str) -> None:
    rooms = {f"quantkit/{room}/__init__.py": "" for room in ("numbers", "cli")}
    house = _tiny_house(tmp_path, {**rooms, **files})
    assert any(told in fault for fault in house.faults()), house.faults()


def test_only_commands_reach_up_to_quantkit_eval() -> None:
    users = {_module(p) for p in SOURCES if any("quantkit_eval" in n for n in _imports(p))}
    allowed = {"quantkit.cli.auto", "quantkit.cli.compare", "quantkit.cli.evaluate"}
    assert {u for u in users if u.startswith("quantkit.")} <= allowed


def test_kernels_is_a_leaf() -> None:
    for path in (ROOT / "kernels" / "quantkit_kernels").rglob("*.py"):
        outside = {name.split(".")[0] for name in _imports(path)} - set(sys.stdlib_module_names)
        assert outside <= {"torch", "triton", "quantkit_kernels"}, path


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
    # Folders of files only are packages too, or the wheel would lack them one day.
    data = {"quantkit.recipes", "quantkit.demo.model", "quantkit_eval.templates"}
    assert set(settings["packages"]) == folders | data


def test_transformers_imports_with_the_root_on_the_path() -> None:
    code = "from transformers import AutoModelForCausalLM; print(AutoModelForCausalLM.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "AutoModelForCausalLM", done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel; setuptools warns of nothing while it is made."""
    folder = tmp_path_factory.mktemp("wheel")
    found: Path = importlib.import_module("tools.wheel").pure_wheel(folder)
    return found


def test_wheel_holds_exactly_our_three_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"quantkit", "quantkit_kernels", "quantkit_eval"}
    assert "quantkit/recipes/awq.yaml" in names
    assert "quantkit/demo/model/model.safetensors" in names


def test_an_unpacked_wheel_works_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    script = (
        "import importlib, json, sys\n"
        "from pathlib import Path\n"
        "site = Path(sys.argv[1])\n"
        "for name in json.loads(sys.argv[2]):\n"
        "    module = importlib.import_module(name)\n"
        "    (place,) = set(map(str, module.__path__))\n"
        "    assert Path(place) == site.joinpath(*name.split('.')), (name, place)\n"
        "import quantkit\n"
        "from quantkit.demo.files import demo_path\n"
        "from quantkit.methods.recipe import builtin_recipes\n"
        "assert site in builtin_recipes()['awq'].parents and site in demo_path().parents\n"
        "out = quantkit.quantize(demo_path(), 'rtn', out='out', progress=False)\n"
        "quantkit.load(out)\n"
        "print('works')\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, str(site), json.dumps(packages["packages"])],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "works", done.stderr
