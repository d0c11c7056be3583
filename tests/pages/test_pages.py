"""Every page of the built book, from disk, with the network cut."""

import pytest

from tests.pages.checks import DESK, PHONE, look


@pytest.mark.parametrize("scheme, width", [("light", DESK), ("dark", DESK), ("light", PHONE)])
def test_a_page_is_whole_without_network(browser, html, page_name, scheme, width):
    assert look(browser, html / page_name, html, scheme=scheme, width=width) == []


def test_the_dashboard_is_one_file_of_a_size_that_opens(html):
    assert (html / "dashboard.html").stat().st_size < 8_000_000
