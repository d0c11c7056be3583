"""The PDF's document from hand-made pages; the printing itself is tested with a browser in tests/pages."""

import io
from itertools import pairwise

import pytest
from bs4 import BeautifulSoup
from pypdf import PdfReader, PdfWriter
from pypdf.generic import ArrayObject, FloatObject, NameObject, PdfObject, read_object

from lib.errors import ChapterError
from lib.press import pdf

ABOUT = {"title": "T", "author": "A", "date": "2026-01-02T03:04:05+00:00"}
PAGE = """<html><head><link rel="stylesheet" href="../s.css">{next}</head><body><nav>menu</nav>
<article class="bd-article">{body}</article></body></html>"""


@pytest.fixture
def html(tmp_path):
    (tmp_path / "book").mkdir()
    (tmp_path / "index.html").touch()
    pages = {
        "index": '<section id="top"><h1>Book<a class="headerlink" href="#top">#</a></h1>'
        '<a href="two.html#why">why</a></section>',
        "two": '<section id="why"><h1>Two</h1><h2 id="sum">Sum</h2>'
        '<a href="#sum">sum</a><a href="three.html">three</a></section>',
        "three": '<h1>Three &amp; last</h1><h2 id="sum">Sum</h2>'
        '<a href="two.html#sum">back</a><a href="https://x.org">x</a>'
        '<a href="../_downloads/n.json">numbers</a><iframe title="Heads" src="../dashboard.html"></iframe>'
        '<details class="hide"><pre>code</pre></details><details><p>rule</p></details>'
        '<details class="hide folded"><summary>Fig. 2</summary><details class="hide"><pre>its code</pre></details>'
        "<figure>drawn</figure></details>"
        '<div class="cell_output"><i id="sum">own</i></div><button>Close</button>',
    }
    order = [*pages, None]
    for (name, body), following in zip(pages.items(), order[1:], strict=True):
        link = f'<link rel="next" href="{following}.html">' if following else ""
        (tmp_path / "book" / f"{name}.html").write_text(PAGE.format(next=link, body=body), encoding="utf-8")
    return tmp_path


def test_pages_follow_each_other_and_links_stay_inside(html):
    document = pdf.assemble(html, title="T <b>", author="A", about="made on x")
    soup = BeautifulSoup(document, "html.parser")
    assert [a["id"] for a in soup.find_all("article")] == ["index--page", "two--page", "three--page"]
    links = [a["href"] for a in soup.select("article a")]
    assert links == ["#why", "#two--sum", "#three--page", "#two--sum", "https://x.org"]
    ids = [t["id"] for t in soup.find_all(id=True) if not t.find_parent(class_="cell_output")]
    assert len(ids) == len(set(ids)) and {link[1:] for link in links if link[0] == "#"} <= set(ids)
    assert [a.get_text() for a in soup.select(".title-page nav a")] == ["Book", "Two", "Three & last"]
    assert "T &lt;b&gt;" in document and "made on x" in document


def test_what_only_a_screen_can_use_is_left_out_or_said(html):
    soup = BeautifulSoup(pdf.assemble(html, title="T", author="A", about=""), "html.parser")
    assert soup.find("iframe") is None and soup.find("button") is None and "menu" not in soup.get_text()
    assert "Heads: on screen only" in soup.get_text() and "dashboard.html" in soup.get_text()
    assert soup.find("pre") is None and soup.find("summary") is None
    assert [d.get_text() for d in soup.find_all("details", open=True)] == ["rule", "drawn"]
    assert pdf.headings(str(soup)) == ["Book", "Two", "Sum", "Three & last", "Sum"]


def test_a_book_that_is_not_whole_is_refused(html, tmp_path):
    (html / "book" / "three.html").unlink()
    with pytest.raises(ChapterError, match=r"three\.html.*build --force"):
        pdf.reading_order(html)
    (html / "book" / "two.html").write_text("<p>other</p>", encoding="utf-8")
    with pytest.raises(ChapterError, match="no article"):
        pdf.assemble(html, title="T", author="A", about="")
    with pytest.raises(ChapterError, match="make book"):
        pdf.make(tmp_path / "none", tmp_path / "x.pdf", title="T", author="A", about="", date="2026")


def parsed(writer: PdfWriter, text: str) -> PdfObject:
    """What some PDF syntax says."""
    return read_object(io.BytesIO(text.encode()), writer)


def added(writer: PdfWriter, text: str) -> str:
    """A reference to an object added to a document."""
    return f"{writer._add_object(parsed(writer, text)).idnum} 0 R"


def printed(marks: list[str], first: int = 1) -> bytes:
    """A page with bookmarks and two tagged cells, whose names count on from a first one, as Chromium's do."""
    writer, out = PdfWriter(), io.BytesIO()
    writer.add_blank_page(100, 100)
    names = [f"(node{first + i:08d})" for i in range(2)]
    head = added(writer, f"<< /S /TH /ID {names[0]} >>")
    cell = added(writer, f"<< /S /TD /ID {names[1]} /A [ << /Headers [ {names[0]} ] >> ] >>")
    kid = added(writer, f"<< /Names [ {names[0]} {head} ] >>")
    tree = added(writer, f"<< /Type /StructTreeRoot /K [ {head} {cell} ] /IDTree << /Kids [ {kid} ] >> >>")
    writer.root_object.update(parsed(writer, f"<< /StructTreeRoot {tree} >>"))
    parent = None
    for mark in marks:
        parent = writer.add_outline_item(mark, 0, parent=parent)
    writer.metadata = {"/CreationDate": "D:20200101000000Z"}
    writer.write(out)
    return out.getvalue()


def test_the_pdf_says_what_the_book_says_and_not_when_it_was_printed():
    tidy = pdf.tidy(printed(["Atwo", "B"]), ["A two", "B"], **ABOUT)
    reader = PdfReader(io.BytesIO(tidy))
    assert [reader.outline[0].title, reader.outline[1][0].title] == ["A two", "B"]
    assert reader.metadata["/CreationDate"] == reader.metadata["/ModDate"] == "D:20260102030405Z"
    with pytest.raises(ChapterError, match="2 bookmarks for 1 headings"):
        pdf.tidy(printed(["A", "B"]), ["A"], **ABOUT)


def test_names_of_elements_that_came_to_be_at_another_moment_make_no_difference():
    one, two = (pdf.tidy(printed(["A"], first), ["A"], **ABOUT) for first in (7, 400))
    assert one == two and printed(["A"], 7) != printed(["A"], 400)
    tree = PdfReader(io.BytesIO(one)).root_object["/StructTreeRoot"]
    names = tree["/IDTree"]["/Names"]
    assert [names[i + 1].get_object()["/ID"] for i in (0, 2)] == [names[0], names[2]]
    assert names[3].get_object()["/A"][0]["/Headers"] == [names[0]], "the cell still names its header"


def linked(*edges: float) -> bytes:
    """A page with one link, whose area on a line is cut at the edges between, and a link on the next line."""
    writer, out = PdfWriter(), io.BytesIO()
    page = writer.add_blank_page(100, 100)
    corners = [f"{left}.0 50.0 {right}.0 60.0" for left, right in pairwise(edges)] + ["10.0 30.0 30.0 40.0"]
    areas = [added(writer, f"<< /Rect [ {c} ] /StructParent {i} >>") for i, c in enumerate(corners, start=1)]
    page.update(parsed(writer, f"<< /StructParents 0 /Annots [ {' '.join(areas)} ] >>"))
    kids = [f"<< /Type /OBJR /Obj {area} >>" for area in areas]
    one, two = (added(writer, f"<< /S /Link /K [ 0 {' '.join(part)} ] >>") for part in (kids[:-1], kids[-1:]))
    owners = [f"[ {one} {two} ]", *[one] * (len(areas) - 1), two]
    numbers = " ".join(f"{i} {owner}" for i, owner in enumerate(owners))
    tree = added(writer, f"<< /K [ {one} {two} ] /ParentTree {added(writer, f'<< /Nums [ {numbers} ] >>')} >>")
    writer.root_object.update(parsed(writer, f"<< /StructTreeRoot {tree} >>"))
    writer.add_outline_item("A", 0)
    writer.write(out)
    return out.getvalue()


def test_a_link_in_several_types_is_one_area_however_chromium_cut_it():
    one, two = (pdf.tidy(linked(*edges), ["A"], **ABOUT) for edges in ((10, 90), (10, 40, 60, 90)))
    assert one == two and linked(10, 90) != linked(10, 40, 60, 90)
    reader = PdfReader(io.BytesIO(two))
    areas = [area.get_object() for area in reader.pages[0]["/Annots"]]
    assert [[float(x) for x in area["/Rect"]] for area in areas] == [[10, 50, 90, 60], [10, 30, 30, 40]]
    tree = reader.root_object["/StructTreeRoot"]
    owners = dict(pdf._numbered(tree["/ParentTree"]))
    for area in areas:
        (named,) = [kid["/Obj"] for kid in owners[area["/StructParent"]].get_object()["/K"] if isinstance(kid, dict)]
        assert named == area, "the element of an area names it"
    apart = PdfReader(io.BytesIO(pdf.tidy(linked(10, 39, 40, 41), ["A"], **ABOUT)))
    assert len(apart.pages[0]["/Annots"]) == 2 and len(owners) == 3


def test_two_links_that_touch_stay_two():
    reader = PdfReader(io.BytesIO(linked(10, 90)))
    other = reader.pages[0]["/Annots"][1].get_object()
    other[NameObject("/Rect")] = ArrayObject(map(FloatObject, (90, 50, 95, 60)))
    out = io.BytesIO()
    PdfWriter(clone_from=reader).write(out)
    found = PdfReader(io.BytesIO(pdf.tidy(out.getvalue(), ["A"], **ABOUT)))
    assert len(found.pages[0]["/Annots"]) == 2


def test_it_prints_until_two_prints_agree(html, tmp_path, monkeypatch):
    """Chromium now and then sets a line a quarter of a pixel higher."""
    printed_one_after_another = iter([b"off", b"good", b"good", b"never"])
    monkeypatch.setattr(pdf, "_print", lambda *_: next(printed_one_after_another))
    monkeypatch.setattr(pdf, "tidy", lambda printed, *_, **__: printed)
    assert pdf.make(html, tmp_path / "x.pdf", about="", **ABOUT).read_bytes() == b"good"
    assert next(printed_one_after_another) == b"never"
