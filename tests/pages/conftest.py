"""Tests that need a built book and Chromium: `make pages`, after `make book`. Nothing here is skipped; without a book
or a browser it fails, and says what to run."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from lib.files import BUILD
from lib.press.browser import built_pages, chromium


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--html-dir", type=Path, default=BUILD / "html", help="the built book to look at")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a page; without a book one that fails."""
    if "page_name" in metafunc.fixturenames:
        html = metafunc.config.getoption("--html-dir")
        names = [str(p.relative_to(html)) for p in html.rglob("*.html") if "_static" not in p.parts]
        metafunc.parametrize("page_name", sorted(names) or ["index.html"])


@pytest.fixture(scope="session")
def html(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--html-dir").resolve()
    built_pages(folder)
    return folder


@pytest.fixture(scope="session")
def browser() -> Browser:
    with chromium("Looking at pages") as running:
        yield running
