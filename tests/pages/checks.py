"""What every page of the book must be: whole without network, readable by eye, by ear and on a phone."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

PHONE, DESK = 390, 1400
SERIOUS = ("serious", "critical")

_PICTURES = """() => [...document.images].flatMap(i => [
    ...(i.complete && i.naturalWidth ? [] : [`missing image: ${i.getAttribute('src')}`]),
    ...(i.alt.trim() || (i.hasAttribute('alt') && !i.closest('figure')) ? []
        : [`no alt text: ${i.getAttribute('src')}`])
])"""
_FORMULAS = r"""() => {
    const walk = document.createTreeWalker(document.querySelector('article, main, body'), NodeFilter.SHOW_TEXT);
    const found = [];
    for (let node; (node = walk.nextNode()); ) {
        const unset = node.data.match(/\\[([]|\$[^$\n]+\$/);
        if (unset && !node.parentElement.closest('code, pre, script, style, .cell_output'))
            found.push(`mathematics that is not set: ${unset[0]} in ${node.data.trim().slice(0, 60)}`);
    }
    for (const math of document.querySelectorAll('math')) {
        const box = math.getBoundingClientRect();
        const hidden = !math.checkVisibility() || math.closest('details:not([open])');
        if (math.querySelector('merror') || (!hidden && !(box.width && box.height)))
            found.push(`mathematics that is not set: ${math.textContent.trim()}`);
    }
    return found;
}"""
_WIDTH = """() => {
    const view = document.documentElement.clientWidth, found = [];
    if (document.documentElement.scrollWidth <= view) return found;
    for (const e of document.querySelectorAll('body *'))
        if (e.getBoundingClientRect().right > view + 1 && !found.length)
            found.push(`the page scrolls sideways: ${document.documentElement.scrollWidth} of ${view} pixels, `
                + `first by ${e.outerHTML.slice(0, 80)}`);
    return found.length ? found : ['the page scrolls sideways'];
}"""
_STILL = "*, *::before, *::after { transition: none !important; animation: none !important }"  # colours on their way
_LINKS = "() => [...document.querySelectorAll('a[href], iframe[src]')].map(a => a.href || a.src)"


def look(browser: Browser, path: Path, html: Path, *, scheme: str = "light", width: int = DESK) -> list[str]:
    """Everything that is wrong with one page of the book in html, at a width in pixels, by light or in the dark."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    try:
        page, found = context.new_page(), []
        page.on("console", lambda said: found.append(f"console: {said.text}") if said.type == "error" else None)
        page.on("pageerror", lambda error: found.append(f"script: {error}"))
        page.on("request", lambda r: found.append(f"asks outside: {r.url}") if is_outside(r.url, html) else None)
        page.goto(path.as_uri(), wait_until="load")
        page.wait_for_timeout(300)  # scripts that set tables; the first page leads on to another
        page.wait_for_load_state("networkidle")
        page.add_style_tag(content=_STILL)
        found += [text for script in (_PICTURES, _FORMULAS, _WIDTH) for text in page.evaluate(script)]
        return found + dead_links(page, html) + accessibility(page)
    finally:
        context.close()


def is_outside(url: str, html: Path) -> bool:
    """Whether an address leads out of the folder of the book, which may be moved anywhere, or read without network."""
    scheme = urlsplit(url).scheme
    if scheme in ("data", "blob", "about"):
        return False
    return scheme != "file" or not _path(url).resolve().is_relative_to(html.resolve())


def dead_links(page: Page, html: Path) -> list[str]:
    """Links to files of the book that are not there, or that leave its folder."""
    files = {url.split("#")[0] for url in page.evaluate(_LINKS) if url.startswith("file:")}
    gone = {url for url in files if is_outside(url, html) or not _path(url).is_file()}
    return [f"dead link: {url}" for url in sorted(gone)]


def accessibility(page: Page) -> list[str]:
    """Findings of axe that keep people from reading, with the first element of each."""
    violations = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    return [
        f"axe, {v['impact']}: {v['id']} ({len(v['nodes'])}): {v['help']}: {v['nodes'][0]['html'][:150]}"
        f" {' '.join(v['nodes'][0].get('failureSummary', '').split())[:150]}"
        for v in violations
        if v["impact"] in SERIOUS
    ]


def _path(url: str) -> Path:
    return Path(unquote(urlsplit(url).path))
