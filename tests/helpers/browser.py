"""Debian's chromium without a window, driven by playwright; what a page says and asks for is kept."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
# As root chromium has no sandbox; nothing that it starts by itself may ask the network for anything.
OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
    "--autoplay-policy=no-user-gesture-required",
]  # fmt: skip
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium here; Debian: apt-get install chromium"
)


@dataclass
class Seen:
    """A page, the lines of its console and its errors, and what it asked for other than files of this machine."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@contextmanager
def opened(path: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> Iterator[Seen]:
    """A file in a browser of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type, unused-ignore]
        seen = Seen(context.new_page())
        seen.page.on("console", lambda message: seen.said.append(message.text))
        seen.page.on("pageerror", lambda error: seen.said.append(str(error)))
        seen.page.on("dialog", lambda dialog: seen.said.append(f"dialog {dialog.message}"))

        def asked(request: Any) -> None:
            if not request.url.startswith(("file:", "data:")):
                seen.asked.append(request.url)

        seen.page.on("request", asked)
        seen.page.goto(path.absolute().as_uri())
        yield seen
        browser.close()


def until(page: Any, expression: str, seconds: float = 20.0) -> None:
    """Wait until a JavaScript expression holds; playwright's own way is not allowed by the page's policy."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)
