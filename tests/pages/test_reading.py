"""What a reader does with the built book: enlarge a figure, scroll a table, search, go on, take the numbers along."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from playwright.sync_api import expect
from pypdf import PdfReader

from lib.files import file_sha256
from lib.press import pdf
from tests.pages.checks import PHONE

FIGURES, TABLES = "book/02_knowledge_path.html", "book/05_cross_validation.html"


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": PHONE, "height": 800}, offline=True)
    yield context.new_page()
    context.close()


def test_a_figure_opens_large_by_keyboard_and_closes_by_escape(page, html):
    page.goto((html / FIGURES).as_uri())
    button = page.get_by_role("button", name="Enlarge Fig. 2.1", exact=True)
    button.focus()
    page.keyboard.press("Enter")
    large = page.get_by_role("dialog").get_by_role("img")
    assert large.get_attribute("alt")
    page.wait_for_function("([i, w]) => i.clientWidth > w", arg=[large.element_handle(), 2 * PHONE])  # than the phone
    page.keyboard.press("Escape")
    expect(page.locator("dialog.zoom")).to_have_count(0)
    expect(button).to_be_focused()


def test_a_figure_opens_large_by_a_click_and_closes_by_one(page, html):
    page.goto((html / FIGURES).as_uri())
    page.locator("#fig-told img").click()
    page.locator("dialog.zoom img").click()
    expect(page.locator("dialog.zoom")).to_have_count(0)


def test_a_wide_table_scrolls_by_keyboard_in_a_region_named_by_its_caption(page, html):
    page.goto((html / TABLES).as_uri())
    box = page.get_by_role("region", name="Table 5.6")
    assert box.evaluate("b => b.scrollWidth > b.clientWidth")
    box.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("b => b.scrollLeft > 0", arg=box.element_handle())


def test_a_word_is_explained_where_it_stands_by_keyboard_and_by_pointer(page, html):
    page.goto((html / FIGURES).as_uri())
    word, tip = page.locator(".bd-article a[href*='term-Known']").first, page.get_by_role("tooltip")
    word.focus()
    expect(tip).to_contain_text("A fact is known when")
    expect(word).to_have_attribute("aria-describedby", tip.get_attribute("id"))
    assert tip.evaluate("t => t.getBoundingClientRect().right <= innerWidth")
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    word.hover()
    expect(tip).to_be_visible()


def test_a_figure_can_be_linked_and_taken_along(page, html):
    page.goto((html / FIGURES).as_uri())
    links = page.locator("#fig-told .files a")
    assert links.all_inner_texts() == ["Link", "SVG", "Numbers"]
    assert links.first.evaluate("a => a.hash") == "#fig-told"
    for link in links.all()[1:]:
        assert (html / "book" / link.evaluate("a => new URL(a.href).pathname")).is_file()


def test_a_link_to_a_folded_figure_opens_it_and_a_fold_by_keyboard(page, html):
    page.goto(f"{(html / FIGURES).as_uri()}#fig-lens")
    expect(page.locator("#fig-lens img")).to_be_in_viewport()
    table = page.locator("details.folded:has(#tab-conventions)")
    summary = table.locator("> summary")
    assert summary.inner_text().startswith("Table 2.3: One failing prompt")
    expect(page.locator("#tab-conventions table").first).to_be_hidden()
    summary.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#tab-conventions table").first).to_be_visible()
    page.evaluate("location.hash = '#tab-planted'")
    expect(page.locator("#tab-planted table").first).to_be_visible()


def test_every_chapter_opens_with_its_question_answer_and_figure(page, html):
    for chapter in sorted((html / "book").glob("0*.html")):
        page.goto(chapter.as_uri())
        box = page.locator(".admonition.answer")
        assert "Question." in box.inner_text() and "to read" in box.inner_text(), chapter
        if "Answer." in box.inner_text():
            figure = box.locator("a:has(img)").get_attribute("href")
            assert page.locator(f"figure{figure}").count() == 1, chapter


def test_the_landing_page_is_light_and_leads_in(page, html):
    index = html / "book" / "index.html"
    assert index.stat().st_size < 300_000
    page.goto(index.as_uri())
    assert page.locator("#what-was-found ol > li").count() >= 5
    for door in page.locator(".doors a").all():
        target, _, place = door.evaluate("a => a.href").removeprefix("file://").partition("#")
        assert f'id="{place}"' in Path(target).read_text() if place else Path(target).is_file()
    assert "@software" in page.locator("#how-to-cite .highlight:has(button.copybtn)").inner_text()


def test_search_finds_a_word_from_disk(page, html):
    page.goto((html / "search.html").as_uri() + "?q=suppressor")
    page.wait_for_selector("#search-results li a")
    assert any("02_knowledge_path" in a.get_attribute("href") for a in page.locator("#search-results li a").all())


def test_previous_and_next_lead_through_all_chapters(page, html):
    page.goto((html / "book" / "index.html").as_uri())
    seen = [page.url]
    while (following := page.locator("a.right-next")).count():
        page.goto(following.evaluate("a => a.href"))
        assert page.locator("a.left-prev").evaluate("a => a.href") == seen[-1]
        seen.append(page.url)
    names = [url.rpartition("/")[2].removesuffix(".html") for url in seen]
    assert names[1:6] == sorted(p.stem for p in (html / "book").glob("0*.html"))[:5] and names[-1] == "references"


def test_a_chapter_ends_with_its_run_and_its_files(page, html):
    page.goto((html / FIGURES).as_uri())
    foot = page.locator(".colophon")
    links = [html / "book" / a.get_attribute("href") for a in foot.locator("a").all()]
    numbers, notebook = (json.loads(path.read_text(encoding="utf-8")) for path in links)
    assert numbers["provenance"]["weights_sha256"] in foot.inner_text()
    assert numbers["provenance"]["start"] in foot.inner_text()
    assert any(cell.get("outputs") for cell in notebook["cells"])


def test_the_pdf_is_the_same_twice(html, tmp_path):
    about = {"title": "T", "author": "A", "about": "of a test", "date": "2026-01-02T03:04:05+00:00"}
    with ThreadPoolExecutor(1) as pool:  # one browser a thread
        one, two = (pool.submit(pdf.make, html, tmp_path / f"{i}.pdf", **about).result() for i in (1, 2))
    assert file_sha256(one) == file_sha256(two)
    chapters = [mark.title for mark in PdfReader(one).outline if not isinstance(mark, list)]
    assert len(chapters) == len(pdf.reading_order(html)) and any(title.startswith("5. ") for title in chapters)
    assert not list((html / "book").glob(".print-*"))
