import pytest

from lib.errors import ChapterError
from lib.press.browser import built_pages, is_outside


def test_what_is_outside_the_book(tmp_path):
    html = tmp_path / "a book"
    html.mkdir()
    page = (html / "page.html").as_uri()
    assert page.count("%20") == 1
    inside = [page, f"{page}#x", f"{page}?q=1", (html / "_static" / "a.js").as_uri()]
    assert not any(is_outside(url, html) for url in [*inside, "data:image/png;base64,x", "blob:x"])
    outside = ["https://example.org/", "http://localhost/", "ftp://x/", tmp_path.as_uri(), f"{html.as_uri()}/../x.html"]
    assert all(is_outside(url, html) for url in [*outside, f"{html.as_uri()}2/x.html"])


def test_pages_of_a_book_without_the_theme_s_own(tmp_path):
    with pytest.raises(ChapterError, match="make book"):
        built_pages(tmp_path)
    for name in ("index.html", "book/b.html", "book/a.html", "_static/x.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.name for p in built_pages(tmp_path)] == ["a.html", "b.html", "index.html"]
    (tmp_path / "index.html").unlink()
    with pytest.raises(ChapterError, match="no built book"):
        built_pages(tmp_path)
