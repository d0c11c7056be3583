import re

import pandas as pd
import pytest

from lib.files import ROOT
from lib.show import tables


def aligned_right(table: pd.DataFrame, **options) -> list[str]:
    html = tables.plain(table, **options).data
    columns = [int(i) for i in re.findall(r"\.col(\d+) \{\s*text-align: right", html)]
    return [table.columns[i] for i in columns]


def test_numbers_stand_flush_right_and_words_left(monkeypatch):
    table = pd.DataFrame(
        {
            "site": ["L24 H4", "L1"],
            "n": [1, 20],
            "share": [0.25, float("nan")],
            "told": ["3 of 8", "8 of 8"],
            "interval": ["-0.1 to 0.2", "+1.0% to 2%"],
            "p": ["0.02", "< 0.01"],
            "mixed": ["1", "none"],
            "holds": [True, False],
            "parameters": ["3,540,096", "884,736"],
            "small": ["1.2e-05", "3e-06"],
        }
    )
    monkeypatch.setattr(tables, "SHOWN", 10)
    assert aligned_right(table) == ["n", "share", "told", "interval", "p", "parameters", "small"]
    assert aligned_right(table.iloc[:0]) == []


@pytest.mark.parametrize("index", [False, True])
def test_texts_of_a_model_are_shown_and_never_markup(index):
    evil = "<script>x</script>"
    table = pd.DataFrame({evil: [evil]}, index=[evil])
    html = tables.plain(table, index=index).data
    assert "<script" not in html and html.count("&lt;script&gt;") == 2 + index


def test_digits_and_what_is_missing():
    html = tables.plain(pd.DataFrame({"a": [0.12345, None], "b": [1, 2]}), digits=3).data
    assert ">0.123<" in html and ">–<" in html and ">2<" in html and "nan" not in html


def test_the_same_table_gives_the_same_bytes_and_can_be_scrolled_by_keyboard():
    table = pd.DataFrame({"a": [1.0]})
    assert tables.plain(table).data == tables.plain(table.copy()).data != tables.plain(table + 1).data
    assert 'tabindex="0" role="region" aria-label="table"' in tables.plain(table).data


@pytest.mark.parametrize("n, folded", [(7, False), (8, True)])
def test_a_table_shows_seven_columns_and_all_behind_a_fold(n, folded):
    html = tables.plain(pd.DataFrame([range(n)], columns=[f"c{i}" for i in range(n)])).data
    shown, _, whole = html.partition("<details")
    assert re.findall(r">(c\d)<", shown) == [f"c{i}" for i in range(7)]
    assert bool(whole) == folded and (not folded or (">c7<" in whole and "All 8 columns" in whole))


def test_cells_are_made_from_templates():
    """By hand: formats, alternatives where a value is missing, pairs, and the number of a row."""
    nan = float("nan")
    costs = {"row": ["trace", "edit"], "peer": "Captum", "ratio": 2.0, "least": 1.0, "most": 3.126, "goal": [nan, 2.5]}
    costs |= {"model": "tiny"}
    table = pd.DataFrame(costs | {"limit_s": [60.0, nan], "met": [None, True], "bound": [nan, 4.0]}).eval(
        "reached = ratio / bound"
    )
    made = tables.arranged("costs", table)
    assert made.index.tolist() == ["trace beside Captum", "edit beside Captum"]
    assert made.to_dict("list") == {
        "model": ["tiny", "tiny"],
        "times faster": ["2.00", "2.00"],
        "spread": ["1.00\u00a0to\u00a03.13"] * 2,
        "goal": ["60 s", "2.5x"],
        "met": ["", "yes"],
        "operations allow": ["–", "4.0x"],
        "of that": ["–", "50%"],
    }
    row = {"#": 7, "name": "v_only", "p": 0.0004, "ratio": 0.9876, "low": 1.0, "high": 1.0, "rank": 0, "gap": None}
    text = tables._text("{#} {name:words} {p:p3} {ratio:change} {low to high:.0f} {rank:rank}", row)
    assert text == "7 v only < 0.001 -1.24% 1 any"
    assert tables._text("{gap:.2f} of {#}|{gap}|none of {#}", row) == "none of 7" and tables._text("{gap}", row) == "–"


def test_a_table_or_a_column_that_is_not_there_is_an_error():
    with pytest.raises(KeyError, match="no_such"):
        tables.show("no_such", pd.DataFrame())
    with pytest.raises(KeyError, match="kind"):
        tables.show("contexts", pd.DataFrame({"told": [1]}))


def test_every_table_that_a_chapter_shows_has_columns():
    cells = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "book").glob("*.ipynb"))
    shown = set(re.findall(r'tables\.show\(\\"(\w+)\\"', cells))
    assert "rivals" in shown <= set(tables.COLUMNS)
