"""The face for packages that extend quantkit, and the old names of modules that have moved."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit import extend

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", extend.__all__)
def test_every_promised_name_is_there(name: str) -> None:
    assert getattr(extend, name).__name__ == name


def test_a_name_that_is_not_promised_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        extend.Nothing  # noqa: B018


@pytest.mark.parametrize("old", extend.MOVED)
def test_an_old_name_is_the_module_of_the_new_one(old: str) -> None:
    sys.modules.pop(f"quantkit.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"quantkit.{old} has moved to quantkit"):
        found = importlib.import_module(f"quantkit.{old}")
    assert found is importlib.import_module(f"quantkit.{extend.MOVED[old]}")


def test_a_part_below_a_folder_that_moved_is_the_same_class() -> None:
    for name in ("quantkit.ranges", "quantkit.ranges.minmax"):
        sys.modules.pop(name, None)
    with pytest.warns(DeprecationWarning):
        from quantkit.ranges.minmax import Minmax as Old
    from quantkit.methods.ranges.minmax import Minmax

    assert Old is Minmax


def test_a_module_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("quantkit.nothing")


def test_parts_of_an_earlier_release_still_import() -> None:
    """tests/third_party.py is as a package of the last release would have it, and stays so."""
    code = "import third_party; print(third_party.Tighter().factor)"
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code],
        cwd=ROOT / "tests", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "0.9", done.stderr


def test_importing_quantkit_is_cheap() -> None:
    code = "import sys, quantkit; print('torch' in sys.modules, 'quantkit.pipeline' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
