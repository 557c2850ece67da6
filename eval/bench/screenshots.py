"""Takes the documentation's pictures of a report with a headless Chromium.

screenshots.py demo-out/report.html
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import common

IMAGES = common.ROOT / "docs" / "images"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_SECONDS = 120
_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
_ONLY_TRADE_OFF = (
    "<script>document.querySelector('main').replaceChildren("
    "document.querySelector('figure.panel'));</script>"
)
# The figure of the model with the largest loss alone, on the page's own background.
_ONLY_HEAT_MAP = (
    "<script>const maps = document.querySelectorAll('.heatmap');"
    "document.querySelector('main').replaceChildren(maps[maps.length - 1]);</script>"
)


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A picture: its name, the window, the colour scheme, and what is added to the page."""

    name: str
    width: int
    height: int
    dark: bool = False
    script: str = ""


SHOTS = (
    Shot(name="report-overview", width=1120, height=890),
    Shot(name="report-trade-off", width=720, height=560, script=_ONLY_TRADE_OFF),
    Shot(name="report-layers", width=620, height=370, script=_ONLY_HEAT_MAP),
    Shot(name="report-phone", width=500, height=1250, dark=True),
)


def main() -> None:
    page = Path(sys.argv[1]).read_text(encoding="utf-8")
    IMAGES.mkdir(parents=True, exist_ok=True)
    for shot in SHOTS:
        target = IMAGES / f"{shot.name}.png"
        take(page + shot.script, shot, target)
        print(f"{target.relative_to(common.ROOT)}: {target.stat().st_size} bytes")


def take(page: str, shot: Shot, target: Path) -> None:
    """Writes one picture.  Exits if there is no browser or it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page, encoding="utf-8")
        command = [
            browser(),
            *_ARGUMENTS,
            f"--user-data-dir={folder}/profile",
            f"--blink-settings=preferredColorScheme={0 if shot.dark else 1}",
            f"--window-size={shot.width},{shot.height}",
            f"--screenshot={target}",
            file.as_uri(),
        ]
        _run(command)


def _run(command: list[str]) -> None:
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            code = process.wait(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise SystemExit(f"{command[0]} took longer than {_SECONDS} s") from None
    if code != 0:
        raise SystemExit(f"{common.shown(command)} exited with {code}")


def browser() -> str:
    """The path of a Chromium."""
    found = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        raise SystemExit(f"no browser found; looked for {', '.join(_BROWSERS)}")
    return found


if __name__ == "__main__":
    main()
