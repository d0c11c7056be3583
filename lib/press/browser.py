"""A headless Chromium that reads the built book from disk: for the PDF, and for the tests that look at every page.

The browser is Debian's if it is installed, else the one that Playwright brings. It is offline: a page that asks for
anything outside its own folder is found out, because nothing answers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lib.errors import ChapterError

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SYSTEM = Path("/usr/bin/chromium")
OPTIONS = ["--no-sandbox", "--font-render-hinting=none"]  # in a container; glyphs the same at every size
NEEDED = (
    "needs Chromium, driven by Playwright. Install the developer's packages (`make .venv/developer`), and Chromium "
    "with `apt install chromium` or `.venv/bin/python -m playwright install chromium`."
)


@contextmanager
def chromium(what: str) -> Iterator["Browser"]:
    """A running browser. what: for the message where there is none, which is a ChapterError."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        raise ChapterError(f"{what} {NEEDED} ({error})") from error
    with sync_playwright() as playwright:
        try:
            path = SYSTEM if SYSTEM.is_file() else None
            browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        except Error as error:
            raise ChapterError(f"{what} {NEEDED} ({str(error).splitlines()[0]})") from error
        with browser:
            yield browser


def built_pages(html: Path) -> list[Path]:
    """Every page of a built book, in the order of their names. Raises ChapterError where there is none."""
    pages = sorted(p for p in html.rglob("*.html") if "_static" not in p.relative_to(html).parts)
    if not (html / "index.html").is_file() or not pages:
        raise ChapterError(f"there is no built book in {html}; run `make book` first, or `make book MODEL=organism`.")
    return pages
