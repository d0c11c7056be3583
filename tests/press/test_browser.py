import pytest

from lib.errors import ChapterError
from lib.press.browser import built_pages


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
