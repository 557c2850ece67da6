"""Writes the options of `quantize` into docs/cli.md, from where they are declared.

python -m tools.options [--check]      --check: exit code 1 if the page is not up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

from quantkit.pipeline.options import option_rows

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
_HEADER = "| option | default | what it does |\n|---|---|---|\n"
# The first row that the command adds of its own ends what is declared there.
_SECTION, _OWN = "## quantkit quantize\n", "| `--eval` |"


def updated(text: str) -> str:
    """The page with the rows as they are declared."""
    start = text.index(_HEADER, text.index(_SECTION)) + len(_HEADER)
    stop = text.index(_OWN, start)
    rows = "".join(f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in option_rows())
    return text[:start] + rows + text[stop:]


def main() -> int:
    """Writes the page, or says whether it would change."""
    text = PAGE.read_text(encoding="utf-8")
    new = updated(text)
    if "--check" in sys.argv[1:]:
        return int(new != text)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
