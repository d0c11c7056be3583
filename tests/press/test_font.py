"""The Korean letters that pages show come with the book."""

import re

from fontTools.ttLib import TTFont

from lib.files import ROOT

FONT = ROOT / "book" / "_static" / "korean.woff"
KOREAN = re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]")
SHOWN = [ROOT / "data" / "claims.yaml", *(ROOT / "book").glob("*.md"), *(ROOT / "book").glob("*.ipynb")]


def test_every_korean_letter_of_the_book_is_in_its_font():
    letters = {letter for path in SHOWN for letter in KOREAN.findall(path.read_text(encoding="utf-8"))}
    assert len(letters) > 100
    assert not letters - {chr(code) for code in TTFont(FONT).getBestCmap()}


def test_the_font_is_small_and_does_not_bear_the_reserved_name():
    names = {str(record) for record in TTFont(FONT)["name"].names if record.nameID in (1, 4, 6)}
    assert names == {"Book Korean", "BookKorean"} and FONT.stat().st_size < 40_000
