"""Negative controls: a page with everything wrong, and each wrong is found."""

import pytest

from tests.pages.checks import PHONE, is_outside, look

PAGE = """<!DOCTYPE html><html lang="en"><head><title>t</title>{head}</head><body><main>
<h1>Title</h1>{body}</main></body></html>"""
WRONG = {
    "console: oh": ("<script>console.error('oh')</script>", ""),
    "script: ": ("<script>throw new Error('x')</script>", ""),
    "asks outside: https://example.org/a.js": ("<script src='https://example.org/a.js'></script>", ""),
    "asks outside: file:///etc/hostname": ("", "<iframe title='x' src='file:///etc/hostname'></iframe>"),
    "missing image: none.png": ("", "<img alt='a' src='none.png'>"),
    "no alt text": ("", "<figure><img alt='' src='data:image/gif;base64,R0lGODlhAQABAAAAACw='></figure>"),
    "mathematics that is not set: $x^2$": ("", "<p>where $x^2$ is</p>"),
    "mathematics that is not set: \\(": ("", "<p>where \\(x\\) is</p>"),
    "the page scrolls sideways": ("", "<p style='width: 2000px'>wide</p>"),
    "dead link": ("", "<a href='gone.html'>gone</a>"),
    "color-contrast": ("", "<p style='color: #bbb; background: #fff'>pale</p>"),
    "image-alt": ("", "<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='>"),
}


@pytest.mark.parametrize("finding", WRONG)
def test_what_is_wrong_is_found(browser, tmp_path, finding):
    head, body = WRONG[finding]
    (tmp_path / "page.html").write_text(PAGE.format(head=head, body=body), encoding="utf-8")
    found = look(browser, tmp_path / "page.html", tmp_path, width=PHONE)
    assert any(finding in text for text in found), found


def test_nothing_is_found_where_nothing_is_wrong(browser, tmp_path):
    body = "<p>It costs $5, or <math><mi>x</mi></math>.</p><a href='page.html'>here</a><code>$x$</code>"
    (tmp_path / "page.html").write_text(PAGE.format(head="", body=body), encoding="utf-8")
    assert look(browser, tmp_path / "page.html", tmp_path, width=PHONE) == []


def test_what_is_outside_the_book(tmp_path):
    html = tmp_path / "a book"
    html.mkdir()
    page = (html / "page.html").as_uri()
    assert page.count("%20") == 1
    inside = [page, f"{page}#x", f"{page}?q=1", (html / "_static" / "a.js").as_uri()]
    assert not any(is_outside(url, html) for url in [*inside, "data:image/png;base64,x", "blob:x"])
    outside = ["https://example.org/", "http://localhost/", "ftp://x/", tmp_path.as_uri(), f"{html.as_uri()}/../x.html"]
    assert all(is_outside(url, html) for url in [*outside, f"{html.as_uri()}2/x.html"])
