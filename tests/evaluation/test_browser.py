"""The report in a real browser: it renders, logs no error, and fits a narrow window."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tiny_eval
import tiny_jobs as jobs
from quantkit_eval.evaluation import evaluate
from quantkit_eval.report.pages import render_html
from quantkit_eval.setting import EvaluationRequest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is here")

# Writes what was laid out into the document, from where --dump-dom prints it.
PROBE = """<script>
const root = document.documentElement;
root.dataset.overflow = root.scrollWidth - root.clientWidth;
root.dataset.charts = [...document.querySelectorAll("svg")].filter(
  s => s.getBoundingClientRect().width > 50 || s.closest("details:not([open])")).length;
root.dataset.ink = getComputedStyle(document.body).color;
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    with jobs.one_thread():
        model = tiny_eval.loud("llama", folder / "model")
        tiny_eval.write_heldout(model)
        outs = [tiny_eval.quantized(model, folder / n, "rtn", s) for n, s in SCHEMES.items()]
        request = EvaluationRequest(
            model=str(model),
            quantized=tuple(map(str, outs)),
            text=str(model / "heldout.txt"),
            seq_len=48,
            windows=30,
            prompts=1,
        )
        return render_html(evaluate(request, folder / "scratch", progress=False))


SCHEMES = {"four": "w4a16_g32", "eight": "w8a16_row"}


def rendered(page: str, folder: Path, width: int, *, dark: bool) -> tuple[str, str]:
    """The document after layout, and what the browser logged."""
    assert BROWSER is not None
    file = folder / "page.html"
    file.write_text(page + PROBE)
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
        *("--disable-sync", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"),
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        *(f"--window-size={width},900", "--dump-dom", file.as_uri()),
    ]
    return run_group(command, seconds=120)


def run_group(command: list[str], *, seconds: float) -> tuple[str, str]:
    """What a command printed; all its processes are killed if it takes longer."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            # A browser's children hold its pipes: killing it alone would leave us waiting.
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, err
    return out, err


def test_hanging_browser_is_killed_with_its_children() -> None:
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        run_group(["sh", "-c", "sleep 300 & sleep 300"], seconds=0.2)
    assert time.monotonic() - began < 60


@needs_browser
@pytest.mark.parametrize(
    ("width", "dark"), [(1200, False), (500, True)], ids=["desktop light", "phone dark"]
)
def test_page_renders_without_errors(page: str, tmp_path: Path, width: int, dark: bool) -> None:
    document, log = rendered(page, tmp_path, width, dark=dark)
    assert "CONSOLE" not in log, log
    found = dict(re.findall(r'data-(\w+)="([^"]*)"', document[:2000]))
    assert int(found["overflow"]) <= 0, "the page itself must not scroll sideways"
    assert int(found["charts"]) == page.count("<svg")
    levels = [int(part) for part in re.findall(r"\d+", found["ink"])[:3]]
    assert (min(levels) > 180) if dark else (max(levels) < 80), found["ink"]


@needs_browser
def test_probe_notices_a_page_that_is_too_wide(page: str, tmp_path: Path) -> None:
    wide = page.replace("<h1>", '<div style="width: 3000px">wide</div><h1>', 1)
    document, _ = rendered(wide, tmp_path, 500, dark=False)
    found = dict(re.findall(r'data-(\w+)="([^"]*)"', document[:2000]))
    assert int(found["overflow"]) > 1000
