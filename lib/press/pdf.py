"""The whole book as one PDF, from the built pages.

1. The pages follow each other by their own links to the next; their articles are put into one document, ids that two
   pages share are told apart, links between pages become links within.
2. Chromium prints it, without network: bookmarks and tags for screen readers come from the headings.
3. What differs from run to run, dates and generated names, is replaced, so that the same book gives the same bytes.
"""

from __future__ import annotations

import io
import logging
import posixpath
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bs4 import BeautifulSoup, Tag

from lib.errors import ChapterError
from lib.files import write_atomically
from lib.press.browser import built_pages, chromium
from lib.press.texts import fill

DROPPED = ".headerlink, button, script[src], noscript, details.hide, a:has(> img[alt='Open in Colab'])"
_WIDTH = 660  # CSS pixels between the margins of an A4 page


def make(html: Path, path: Path, *, title: str, author: str, about: str, date: str) -> Path:
    """Print the built book in html to path, in one step. about: a line on the title page that says of which run it is;
    date: ISO, of that run. Raises ChapterError without a built book or without Chromium."""
    built_pages(html)
    document = assemble(html, title=title, author=author, about=about)
    printed = _print(document, html / "book")
    finished = tidy(printed, headings(document), title=title, author=author, date=date)
    return write_atomically(path, finished)


def reading_order(html: Path) -> list[Path]:
    """The pages as the book's own links to the next lead through them, from its first page on."""
    pages, page = [], html / "book" / "index.html"
    while page not in pages:
        if not page.is_file():
            raise ChapterError(f"{html} is no whole book: there is no {page}. Run `python -m lib build --force`.")
        pages.append(page)
        following = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser").find("link", rel="next")
        if not isinstance(following, Tag):
            break
        page = Path(posixpath.normpath((page.parent / str(following["href"])).as_posix()))
    return pages


def assemble(html: Path, *, title: str, author: str, about: str) -> str:
    """One HTML document of all pages, to be put beside them."""
    pages = reading_order(html)
    soups = [BeautifulSoup(p.read_text(encoding="utf-8"), "html.parser") for p in pages]
    articles = [_article(soup, page) for soup, page in zip(soups, pages, strict=True)]
    ids = Counter(name for article in articles for name in {str(tag["id"]) for tag in _named(article)})
    shared = {name for name, n in ids.items() if n > 1}
    for article, page in zip(articles, pages, strict=True):
        _relink(article, page, shared, {p.name: p.stem for p in pages})
    return fill(
        "print.html",
        title=escape(title),
        author=escape(author),
        about=escape(about),
        styles="".join(str(link) for link in soups[0].find_all("link", rel="stylesheet")),
        contents={page.stem: _heading(article) for page, article in zip(pages, articles, strict=True)},
        articles="\n".join(map(str, articles)),
    )


def headings(document: str) -> list[str]:
    """The texts of all headings, in order."""
    tags = BeautifulSoup(document, "html.parser").find_all(re.compile(r"^h[1-6]$"))
    return [" ".join(tag.get_text().split()) for tag in tags]


def tidy(printed: bytes, bookmarks: list[str], *, title: str, author: str, date: str) -> bytes:
    """The same PDF with the book's own metadata and nothing of the moment in it. bookmarks: their texts, because
    Chromium drops the space where a heading breaks into lines. Raises ChapterError if there are more or fewer."""
    from pypdf import PdfReader, PdfWriter
    from pypdf.generic import NameObject, TextStringObject

    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(printed)))
    marks = list(_outline(writer.root_object["/Outlines"].get_object()))
    if len(marks) != len(bookmarks):
        raise ChapterError(f"the PDF has {len(marks)} bookmarks for {len(bookmarks)} headings; report this as a bug.")
    for mark, text in zip(marks, bookmarks, strict=True):
        mark[NameObject("/Title")] = TextStringObject(text)
    _rename_elements(writer.root_object)
    _join_links(writer)
    day = "D:" + "".join(c for c in date if c.isdigit())[:14] + "Z"
    about = {"/Title": title, "/Author": author, "/CreationDate": day, "/ModDate": day}
    writer.metadata = about | {"/Producer": "Chromium, pypdf"}
    once, twice = io.BytesIO(), io.BytesIO()
    writer.write(once)
    PdfWriter(clone_from=PdfReader(once)).write(twice)  # leaves out, and does not number, what nothing leads to
    return twice.getvalue()


def _outline(parent: Any) -> Iterator[Any]:
    """Bookmarks below one, in the order of the pages."""
    mark = parent.get("/First")
    while mark is not None:
        mark = mark.get_object()
        yield mark
        yield from _outline(mark)
        mark = mark.get("/Next")


def _rename_elements(root: Any) -> None:
    """Number the elements that screen readers follow in the order of reading: Chromium numbers them as they came to
    be, which differs from run to run. The names stand at the elements, in the headers of table cells, and in a tree."""
    from pypdf.generic import ArrayObject, DictionaryObject, NameObject, TextStringObject

    elements = list(_elements(root["/StructTreeRoot"])) if "/StructTreeRoot" in root else []
    named = [element for element in elements if "/ID" in element]
    names = {str(e["/ID"]): TextStringObject(f"node{i:08d}") for i, e in enumerate(named)}
    for element in named:
        element[NameObject("/ID")] = names[str(element["/ID"])]
    lists = (element["/A"] for element in elements if isinstance(element.get("/A"), list))
    for attributes in (entry for entries in lists for entry in entries if "/Headers" in entry):
        attributes[NameObject("/Headers")] = ArrayObject(names[str(name)] for name in attributes["/Headers"])
    if named:
        pairs = ArrayObject(part for e in named for part in (e["/ID"], e.indirect_reference))
        root["/StructTreeRoot"][NameObject("/IDTree")] = DictionaryObject({NameObject("/Names"): pairs})


def _join_links(writer: Any) -> None:
    """One area a link and line: where a link changes its type, Chromium makes one area or several, as it happens. Then
    number pages and areas anew in the tree that leads from them to their elements."""
    from pypdf.generic import ArrayObject, DictionaryObject, NameObject, NumberObject

    if "/ParentTree" not in writer.root_object.get("/StructTreeRoot", {}):
        return
    tree = writer.root_object["/StructTreeRoot"]
    elements = dict(_numbered(tree["/ParentTree"]))
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
    from pypdf.generic import ArrayObject, FloatObject, NameObject

    joined: list[Any] = []
    for area in areas:
        left, right = joined[-1].get_object() if joined else {}, area.get_object()
        if not _touch(left, right) or elements[left["/StructParent"]] != elements[right["/StructParent"]]:
            joined.append(area)
            continue
        left[NameObject("/Rect")] = ArrayObject(map(FloatObject, [*left["/Rect"][:2], *right["/Rect"][2:]]))
        link = elements[right["/StructParent"]].get_object()
        link[NameObject("/K")] = ArrayObject(kid for kid in link["/K"] if _area(kid) != area)
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


def _area(kid: Any) -> Any:
    """Reference to the area that an element names, or None for its other parts."""
    from pypdf.generic import DictionaryObject

    kid = kid.get_object()
    return kid.raw_get("/Obj") if isinstance(kid, DictionaryObject) and "/Obj" in kid else None


def _elements(parent: Any) -> Iterator[Any]:
    """Elements of the tree of tags below one, in the order of reading."""
    waiting = [parent]
    while waiting:
        element = waiting.pop()
        if "/S" in element:
            yield element
        below = element.get("/K", [])
        kids = [kid.get_object() for kid in (below if isinstance(below, list) else [below])]
        waiting += [kid for kid in reversed(kids) if isinstance(kid, dict) and "/S" in kid]


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


def _named(article: Tag) -> Iterator[Tag]:
    """Elements with an id that links may lead to; those inside outputs belong to their own scripts and styles."""
    return (t for t in article.find_all(id=True) if not t.find_parent(class_="cell_output"))


def _relink(article: Tag, page: Path, shared: set[str], stems: dict[str, str]) -> None:
    """Ids that several pages share get the page's name before them, and links follow."""

    def anchor(stem: str, name: str) -> str:
        return f"{stem}--{name}" if name in shared else name

    for named in list(_named(article)):
        named["id"] = anchor(page.stem, str(named["id"]))
    for link in article.find_all("a", href=True):
        parts = urlsplit(str(link["href"]))
        stem = stems.get(posixpath.basename(parts.path)) if parts.path else page.stem
        if not parts.scheme and stem:
            link["href"] = "#" + (anchor(stem, parts.fragment) if parts.fragment else f"{stem}--page")
        elif not parts.scheme:  # a file beside the pages is not beside the PDF
            link.unwrap()


def _heading(article: Tag) -> str:
    heading = article.find("h1")
    return escape(heading.get_text().strip()) if isinstance(heading, Tag) else ""


def _print(document: str, folder: Path) -> bytes:
    """Chromium's PDF of a document whose links are relative to a folder."""
    with (
        tempfile.NamedTemporaryFile("w", suffix=".html", prefix=".print-", dir=folder, encoding="utf-8") as file,
        chromium("A PDF") as browser,
    ):
        file.write(document)
        file.flush()
        page = browser.new_context(offline=True, viewport={"width": _WIDTH, "height": 900}).new_page()
        page.emulate_media(media="print", color_scheme="light")
        page.goto(Path(file.name).as_uri(), wait_until="load", timeout=120_000)
        page.wait_for_function(fill("print_ready.js"), timeout=120_000)
        page.evaluate(fill("print_shrink.js"))
        return page.pdf(
            format="A4",
            margin={"top": "18mm", "bottom": "20mm", "left": "17mm", "right": "17mm"},
            outline=True,
            tagged=True,
            print_background=True,
            display_header_footer=True,
            header_template="<span></span>",
            footer_template='<div style="font: 8px sans-serif; width: 100%; text-align: center">'
            '<span class="pageNumber"></span></div>',
        )


logging.getLogger("pypdf").setLevel(logging.ERROR)  # Chromium counts its objects in another way
