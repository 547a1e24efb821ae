"""The report in a real browser, headless: at two widths and in both schemes, loading nothing but itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from loracli.report.report import write_report
from tests.report.conftest import Story

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr"
).split()
DARK = "--blink-settings=preferredColorScheme=0"
PROBE = """<!doctype html><title>waiting</title>
<iframe src="report.html" style="width:%dpx;height:900px;border:0"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement;
  const texts = [...page.querySelectorAll("p, th, td, h1, h2, h3, summary")];
  const labels = [...page.querySelectorAll("svg text")].map(e => e.getBoundingClientRect().height).filter(h => h > 0);
  document.title = JSON.stringify({
    width: root.scrollWidth, asked: frame.clientWidth, scripts: page.scripts.length,
    headings: [...page.querySelectorAll("h2")].map(e => e.textContent),
    verdict: page.querySelector(".verdict").textContent,
    first: page.querySelector("main").firstElementChild.textContent,
    interval: page.querySelector("tbody tr td:nth-of-type(2)").getBoundingClientRect().right,
    maps: page.querySelectorAll(".panels svg").length,
    smallest: Math.min(...texts.map(e => parseFloat(getComputedStyle(e).fontSize))), label: Math.min(...labels),
    background: getComputedStyle(page.body).backgroundColor, ink: getComputedStyle(page.body).color,
  });
};
</script>"""


@dataclass(frozen=True)
class Seen:
    """What the browser measured, what it asked the server for, and what it said."""

    page: Any
    requests: tuple[str, ...]
    console: str


class Look:
    """A folder with a report, served on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests = folder, list[str]()

    def at(self, width: int, *flags: str) -> Seen:
        (self.folder / "probe.html").write_text(PROBE % width)
        self.requests.clear()
        command = [str(BROWSER), *FLAGS, *flags, f"--user-data-dir={self.folder / 'profile'}", "--dump-dom"]
        url = f"http://127.0.0.1:{self.port}/probe.html"
        done = subprocess.run([*command, url], capture_output=True, text=True, timeout=120)
        title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
        assert title is not None and title[1] != "waiting", done.stderr[-2000:]
        console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
        return Seen(json.loads(unescape(title[1])), tuple(self.requests), console)

    port = 0


@pytest.fixture
def look(tmp_path: Path) -> Iterator[Look]:
    if BROWSER is None:
        if os.environ.get("LORACAT_BROWSER") == "required":
            pytest.fail("no Chromium on the path")
        pytest.skip("no Chromium on the path; LORACAT_BROWSER=required makes this a failure")
    found = Look(tmp_path)

    class Handler(SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            self.send_header("Cache-Control", "no-store")  # a page changed within a second has the same date
            super().end_headers()

        def log_message(self, *arguments: Any) -> None:
            found.requests.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    found.port = server.server_port
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


def test_the_page_fits_a_phone_and_a_desk_in_light_and_dark(look: Look, story: Story) -> None:
    write_report(story.recipe, look.folder / "report.html", comparison=story.comparison)
    backgrounds = set()
    for width in (390, 1280):
        for flags in ((), (DARK,)):
            seen = look.at(width, *flags)
            page = seen.page
            assert page["asked"] == width and page["width"] <= width  # nothing sticks out to the side
            assert page["smallest"] >= 13 and page["label"] >= 9  # pixels
            assert page["first"] == page["verdict"]
            assert page["interval"] <= width  # the difference and its interval are seen without scrolling
            assert page["maps"] == 2 and page["scripts"] == 0
            assert page["headings"][:2] == ["Every way to compose", "On held-out records"]
            assert page["ink"] != page["background"]
            backgrounds.add((bool(flags), page["background"]))
            assert set(seen.requests) <= {"/probe.html", "/report.html", "/favicon.ico"}
            assert not seen.console
    assert len(backgrounds) == 2  # one in light, another in dark


def test_a_page_with_long_and_hostile_names_still_fits(look: Look, story: Story) -> None:
    from dataclasses import replace

    from loracli.recipe.recipe import load_recipe

    recipe = load_recipe(story.recipe)
    long = "org/" + "x" * 120 + "<script>document.title='gone'</script>"
    write_report(replace(recipe, base=replace(recipe.base, id=long)), look.folder / "report.html")
    page = look.at(390).page
    assert page["width"] <= 390 and page["scripts"] == 0
