"""The whole book as one PDF, from the built pages.

1. The pages follow each other by their own links to the next; their articles are put into one document, ids that two
   pages share are told apart, links between pages become links within.
2. Chromium prints it, without network: bookmarks and tags for screen readers come from the headings.
3. What differs from run to run, dates and generated names, is replaced, so that the same book gives the same bytes. On
   a busy machine Chromium now and then sets a line a quarter of a pixel higher: it prints until two prints agree.
"""

import io
import logging
import posixpath
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bs4 import BeautifulSoup, Tag

from lib.errors import ChapterError
from lib.files import write_atomically
from lib.press.browser import built_pages, chromium
from lib.press.texts import fill

with suppress(ImportError):  # one of the developer's packages, as the browser's driver, whose absence is explained
    from pypdf import PdfReader, PdfWriter
    from pypdf.generic import ArrayObject, DictionaryObject, FloatObject, NameObject, NumberObject, TextStringObject

DROPPED = ".headerlink, button, script[src], #definitions, noscript, a:has(> img[alt='Open in Colab'])"
DROPPED += ", details.hide:not(.folded), details.folded > summary"  # code; figures and tables are printed unfolded
DROPPED += ", .scroll:has(+ details.whole), details.whole > summary"  # of a table that is folded, the whole is printed
NAMED = "[id]:not(.cell_output [id])"  # what links may lead to; ids in outputs belong to their own scripts and styles
PAPER: dict[str, Any] = {"format": "A4", "margin": {"top": "18mm", "bottom": "20mm", "left": "17mm", "right": "17mm"}}
PRINTS = 5  # at most
WIDTH = 660  # CSS pixels between the margins of this paper
FOOT = '<div style="font: 8px sans-serif; width: 100%; text-align: center"><span class="pageNumber"></span></div>'
SHOWN: dict[str, Any] = {"outline": True, "tagged": True, "print_background": True, "display_header_footer": True}
logging.getLogger("pypdf").setLevel(logging.ERROR)  # Chromium counts its objects in another way


def make(html: Path, path: Path, *, title: str, author: str, about: str, date: str) -> Path:
    """Print the built book in html to path, in one step. about: a line on the title page that says of which run it is;
    date: ISO, of that run. Raises ChapterError without a built book or without Chromium."""
    built_pages(html)
    document = assemble(html, title=title, author=author, about=about)
    marks, seen = headings(document), list[bytes]()
    while len(seen) == len(set(seen)) < PRINTS:
        seen.append(tidy(_print(document, html / "book"), marks, title=title, author=author, date=date))
    return write_atomically(path, seen[-1])


def reading_order(html: Path) -> dict[Path, BeautifulSoup]:
    """The pages as the book's own links to the next lead through them, from its first page on."""
    pages: dict[Path, BeautifulSoup] = {}
    page = html / "book" / "index.html"
    while page not in pages:
        if not page.is_file():
            raise ChapterError(f"{html} is no whole book: there is no {page}. Run `python -m lib build --force`.")
        pages[page] = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
        following = pages[page].select_one("link[rel~=next]")
        if following is None:
            break
        page = Path(posixpath.normpath((page.parent / str(following["href"])).as_posix()))
    return pages


def assemble(html: Path, *, title: str, author: str, about: str) -> str:
    """One HTML document of all pages, to be put beside them."""
    pages = reading_order(html)
    articles = {page.stem: _article(soup, page) for page, soup in pages.items()}
    ids = Counter(name for article in articles.values() for name in {str(tag["id"]) for tag in article.select(NAMED)})
    shared = {name for name, n in ids.items() if n > 1}
    for stem, article in articles.items():
        _relink(article, stem, shared, {p.name: p.stem for p in pages})
    styles = next(iter(pages.values())).select("link[rel~=stylesheet]")
    return fill("print.html", title=title, author=author, about=about, styles=styles, articles=articles)


def headings(document: str) -> list[str]:
    """The texts of all headings, in order."""
    tags = BeautifulSoup(document, "html.parser").select("h1, h2, h3, h4, h5, h6")
    return [" ".join(tag.get_text().split()) for tag in tags]


def tidy(printed: bytes, bookmarks: list[str], *, title: str, author: str, date: str) -> bytes:
    """The same PDF with the book's own metadata and nothing of the moment in it. bookmarks: their texts, because
    Chromium drops the space where a heading breaks into lines. Raises ChapterError if there are more or fewer."""
    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(printed)))
    marks = list(_outline(writer.root_object["/Outlines"]))
    if len(marks) != len(bookmarks):
        raise ChapterError(f"the PDF has {len(marks)} bookmarks for {len(bookmarks)} headings; report this as a bug.")
    for mark, text in zip(marks, bookmarks, strict=True):
        mark[NameObject("/Title")] = TextStringObject(text)
    tree: Any = writer.root_object["/StructTreeRoot"]
    _rename_elements(tree)
    _join_links(writer, tree)
    day = "D:" + "".join(c for c in date if c.isdigit())[:14] + "Z"
    about = {"/Title": title, "/Author": author, "/CreationDate": day, "/ModDate": day}
    writer.metadata = about | {"/Producer": "Chromium, pypdf"}
    once, twice = io.BytesIO(), io.BytesIO()
    writer.write(once)
    PdfWriter(clone_from=PdfReader(once)).write(twice)  # leaves out, and does not number, what nothing leads to
    return twice.getvalue()


def _outline(parent: Any) -> Iterator[Any]:
    """Bookmarks below one, then those after it, in the order of the pages."""
    for key in ("/First", "/Next"):
        if key in parent:
            yield parent[key]
            yield from _outline(parent[key])


def _rename_elements(tree: Any) -> None:
    """Number the elements that screen readers follow in the order of reading: Chromium numbers them as they came to
    be, which differs from run to run. The names stand at the elements, in the headers of table cells, and in a tree."""
    elements = list(_elements(tree))
    named = [element for element in elements if "/ID" in element]
    names = {str(e["/ID"]): TextStringObject(f"node{i:08d}") for i, e in enumerate(named)}
    for element in named:
        element[NameObject("/ID")] = names[str(element["/ID"])]
    lists = (element["/A"] for element in elements if isinstance(element.get("/A"), list))
    for attributes in (entry for entries in lists for entry in entries if "/Headers" in entry):
        attributes[NameObject("/Headers")] = ArrayObject(names[str(name)] for name in attributes["/Headers"])
    if named:
        pairs = ArrayObject(part for e in named for part in (e["/ID"], e.indirect_reference))
        tree[NameObject("/IDTree")] = DictionaryObject({NameObject("/Names"): pairs})


def _join_links(writer: Any, tree: Any) -> None:
    """One area a link and line: where a link changes its type, Chromium makes one area or several, as it happens. Then
    number pages and areas anew in the tree that leads from them to their elements."""
    elements = dict(_numbered(tree.get("/ParentTree", DictionaryObject())))
    numbers: list[Any] = []
    for page in writer.pages:
        areas = _joined(page.get("/Annots", []), elements)
        if areas:
            page[NameObject("/Annots")] = ArrayObject(areas)
        places = [(page, "/StructParents"), *((area.get_object(), "/StructParent") for area in areas)]
        for place, key in ((place, key) for place, key in places if key in place):
            element, place[NameObject(key)] = elements[place[key]], NumberObject(len(numbers) // 2)
            numbers += [place[key], element]
    entries = {NameObject("/Type"): NameObject("/ParentTree"), NameObject("/Nums"): ArrayObject(numbers)}
    tree[NameObject("/ParentTree")] = writer._add_object(DictionaryObject(entries))
    tree[NameObject("/ParentTreeNextKey")] = NumberObject(len(numbers) // 2)


def _joined(areas: Any, elements: dict[int, Any]) -> list[Any]:
    """References to the areas of a page, those that touch and belong to one link made one."""
    joined: list[Any] = []
    for area in areas:
        left, right = joined[-1].get_object() if joined else {}, area.get_object()
        if not _touch(left, right) or elements[left["/StructParent"]] != elements[right["/StructParent"]]:
            joined.append(area)
            continue
        left[NameObject("/Rect")] = ArrayObject(map(FloatObject, [*left["/Rect"][:2], *right["/Rect"][2:]]))
        link = elements[right["/StructParent"]].get_object()
        parts = ((kid, kid.get_object()) for kid in link["/K"])
        others = (kid for kid, part in parts if not (isinstance(part, dict) and part.get("/Obj") == area))
        link[NameObject("/K")] = ArrayObject(others)
    return joined


def _numbered(node: Any) -> Iterator[tuple[int, Any]]:
    """Entries of a tree of numbers."""
    numbers = node.get_object().get("/Nums", [])
    yield from zip(numbers[::2], numbers[1::2], strict=True)
    for kid in node.get_object().get("/Kids", []):
        yield from _numbered(kid)


def _touch(left: Any, right: Any) -> bool:
    """Whether an area begins where one before it ends, on the same line and as high."""
    if "/StructParent" not in left or "/StructParent" not in right:
        return False
    before, after = ([float(x) for x in area["/Rect"]] for area in (left, right))
    return before[1::2] == after[1::2] and abs(before[2] - after[0]) < 0.01  # points


def _elements(parent: Any) -> Iterator[Any]:
    """Elements of the tree of tags below one, in the order of reading."""
    below = parent.get("/K", [])
    for kid in (kid.get_object() for kid in (below if isinstance(below, list) else [below])):
        if isinstance(kid, dict) and "/S" in kid:
            yield kid
            yield from _elements(kid)


def _article(soup: BeautifulSoup, page: Path) -> Tag:
    """What a page says, without what only a screen can use."""
    article = soup.select_one("article.bd-article")
    if article is None:
        raise ChapterError(f"{page} has no article: it is not a page of this book. Run `python -m lib build --force`.")
    article["id"] = f"{page.stem}--page"
    for gone in article.select(DROPPED):
        gone.decompose()
    for frame in article.find_all("iframe"):
        sentence = soup.new_tag("p", attrs={"class": "on-screen"})
        name = frame.get("title") or "An interactive page"
        sentence.string = f"{name}: on screen only, in the book's own pages ({posixpath.basename(str(frame['src']))})."
        frame.replace_with(sentence)
    for folded in article.find_all("details"):
        folded["open"] = ""
    return article


def _relink(article: Tag, page: str, shared: set[str], stems: dict[str, str]) -> None:
    """Ids that several pages share get the page's name before them, and links follow."""

    def anchor(stem: str, name: str) -> str:
        return f"{stem}--{name}" if name in shared else name

    for named in article.select(NAMED):
        named["id"] = anchor(page, str(named["id"]))
    for link in article.find_all("a", href=True):
        parts = urlsplit(str(link["href"]))
        stem = stems.get(posixpath.basename(parts.path)) if parts.path else page
        if not parts.scheme and stem:
            link["href"] = "#" + (anchor(stem, parts.fragment) if parts.fragment else f"{stem}--page")
        elif not parts.scheme:  # a file beside the pages is not beside the PDF
            link.unwrap()


def _print(document: str, folder: Path) -> bytes:
    """Chromium's PDF of a document whose links are relative to a folder."""
    with (
        tempfile.NamedTemporaryFile("w", suffix=".html", prefix=".print-", dir=folder, encoding="utf-8") as file,
        chromium("A PDF") as browser,
    ):
        file.write(document)
        file.flush()
        page = browser.new_context(offline=True, viewport={"width": WIDTH, "height": 900}).new_page()
        page.emulate_media(media="print", color_scheme="light")
        page.goto(Path(file.name).as_uri(), wait_until="load", timeout=120_000)
        page.wait_for_function(fill("print_ready.js"), timeout=120_000)
        page.evaluate(fill("print_shrink.js"))
        return page.pdf(header_template="<span></span>", footer_template=FOOT, **PAPER, **SHOWN)
