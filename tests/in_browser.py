"""Pages in a real browser, where there is one."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium here; install the Debian package of that name"
)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium, whose profile is in a new folder."""
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


def luminance(page: Page, what: str) -> float:
    """How bright a colour is, from 0 to 1.

    Args:
        page: the page.
        what: a selector and a property of its first element, with a space between them.
    """
    colour = page.evaluate(
        "([selector, property]) => getComputedStyle(document.querySelector(selector))[property]",
        what.split(),
    )
    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255
