"""Chromium for tests and benchmarks, driven through Playwright."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from chromium import ensure_chromium

QUIET = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium; its sandbox is off only for root, where it can't run."""
    root = getattr(os, "geteuid", lambda: 1)() == 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(ensure_chromium()),
            args=[*QUIET, *(["--no-sandbox"] if root else [])],
        )
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def watched_page(
    browser: Browser, *, width: int = 1440, height: int = 900, dark: bool = False
) -> Iterator[tuple[Page, list[str]]]:
    """A page, and the list that console errors, exceptions and requests to elsewhere go to.

    A request that fails because a test has killed the server is not the page's fault; what it
    says about that in the console is left out.
    """
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
    )
    page = context.new_page()
    complaints: list[str] = []
    page.on(
        "console",
        lambda message: (
            complaints.append(f"{message.type}: {message.text}")
            if message.type in ("error", "warning") and "net::ERR_" not in message.text
            else None
        ),
    )
    page.on("pageerror", lambda error: complaints.append(f"exception: {error}"))
    page.on(
        "request",
        lambda request: (
            complaints.append(f"left this machine: {request.url}")
            if not request.url.startswith(("http://127.0.0.1", "data:", "blob:"))
            else None
        ),
    )
    try:
        yield page, complaints
    finally:
        context.close()
