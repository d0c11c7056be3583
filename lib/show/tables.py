"""DataFrames as a chapter shows them. Formatting only; every number was computed elsewhere.

    tables.show("reading", table)                    # the columns that columns.yaml lists under `reading`
    tables.plain(tables.controls(checks, head))      # a table that is put together first

Labels of columns, and what stands under them, are in columns.yaml.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

import itables
import pandas as pd
import yaml
from IPython.display import HTML
from itables.javascript import generate_init_offline_itables_html
from pandas.io.formats.style import Styler

from lib.diagnosis import Diagnosis
from lib.facts import Case
from lib.show.sentences import words
from lib.statistics import exact_interval

# a number, or a text that begins with one: `3 of 8`, `-0.1 to 0.2`
_NUMBER = r"(?:nan|–|<? ?[-+]?\d[\d.,]*(?:e[-+]\d+)?%?(?:[\s(/].*)?)"
SHOWN = 7  # columns of a table on the page; the rest is behind a fold
SHORT_NAME = 12  # characters: a shorter name of a row is a site or a number, and stays on one line
ROW_NAMES = "row names"  # the label in columns.yaml under which the rows' names stand

COLUMNS: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_name("columns.yaml").read_text("utf-8"))
WORDS: dict[str, dict[Any, str]] = COLUMNS.pop("words")  # type: ignore[assignment]  # formats: words for values
UNTOUCHED = {"none": "untouched"}  # the model without an edit, where tables have pathways
FORMATS: dict[str, Callable[[Any], str]] = {
    "words": words,
    "change": lambda ratio: f"{ratio - 1:+.2%}",
    "points": lambda share: f"{100 * share:.0f}",
    "p2": lambda p: f"{p:.2f}" if p >= 0.01 else "< 0.01",
    "p3": lambda p: f"{p:.3f}" if p >= 0.001 else "< 0.001",
}


class _Missing(Exception):
    """A template needs a value that the row lacks."""


class _Cell(Formatter):
    """str.format with WORDS and FORMATS. `{low to high}` formats both values; equal ones stand once."""

    def get_value(self, key: int | str, args: Any, row: Any) -> Any:
        ends = str(key).split(" to ")
        return tuple(row[end] for end in ends) if len(ends) > 1 else row[key]

    def format_field(self, value: Any, form: str) -> str:
        if isinstance(value, tuple):
            return " to ".join(self.format_field(end, form) for end in dict.fromkeys(value))
        if pd.isna(value):
            raise _Missing
        if form in WORDS:
            return str(WORDS[form].get(value, value))
        return FORMATS[form](value) if form in FORMATS else str(super().format_field(value, form))


def arranged(name: str, table: pd.DataFrame) -> pd.DataFrame:
    """The columns that columns.yaml lists under a name, of a table that has what they are made from. Raises KeyError
    for a name, or a column of the table, that is not there."""
    rows = [{"#": i, **row} for i, row in enumerate(table.rename_axis("index").reset_index().to_dict("records"), 1)]
    columns = {
        label: [_text(template, row) for row in rows] if "{" in template else table[template].tolist()
        for label, template in COLUMNS[name].items()
    }
    names = columns.pop(ROW_NAMES, table.index)
    return pd.DataFrame(columns, index=names)


def _text(template: str, row: dict[str, Any]) -> str:
    """The first of the template's alternatives that misses no value of the row."""
    for alternative in template.split("|"):
        try:
            return _Cell().vformat(alternative, (), row)
        except _Missing:
            continue
    return "–"


def show(name: str, table: pd.DataFrame, *, digits: int = 2) -> HTML:
    """A table with the columns of a name in columns.yaml, as `plain` shows it."""
    return plain(arranged(name, table), digits=digits, index=ROW_NAMES in COLUMNS[name])


def sortable(table: pd.DataFrame, *, rows: int = 12) -> HTML:
    """A table that the reader can sort and search, self-contained: it needs no network."""
    look: dict[str, Any] = {"style": "width:100%;font-size:85%", "classes": "display compact nowrap", "scrollX": True}
    lengths: dict[str, Any] = {"pageLength": rows, "lengthMenu": [rows, 50, 300]}
    html = itables.to_html_datatable(table.round(3), connected=False, showIndex=False, **lengths, **look)
    return HTML(generate_init_offline_itables_html(itables.options.dt_bundle) + html)


def plain(table: pd.DataFrame, *, digits: int = 2, index: bool = False) -> HTML:
    """A small table, numbers to a number of digits and flush right, that scrolls sideways where the page is narrow. Of
    more than SHOWN columns the first stand there, and all of them behind a fold. index: show the row names; then texts
    may wrap."""
    if index:  # names of sites stay on one line, sentences may wrap
        table = table.rename(index=lambda name: name.replace(" ", "\u00a0") if len(name) < SHORT_NAME else name)
    n = table.shape[1]
    html = _scrolling(table.iloc[:, :SHOWN] if n > SHOWN else table, digits, index)
    if n > SHOWN:
        whole = _scrolling(table, digits, index)
        html += f'<details class="whole"><summary>All {n} columns</summary>{whole}</details>'
    return HTML(html)


def _scrolling(table: pd.DataFrame, digits: int, index: bool) -> str:
    """The HTML of a table in a box that can be scrolled."""
    texts = [column.map(str).str for _, column in table.items() if len(table)]
    right = [f".col{i}" for i, column in enumerate(texts) if column.fullmatch(_NUMBER).all()]
    align = {"th, td": "left", **dict.fromkeys(right, "right")}
    styles = [{"selector": cells, "props": f"text-align: {side}"} for cells, side in align.items()]
    name = hashlib.sha256(table.to_csv().encode()).hexdigest()[:8]  # the same table has the same name in every run
    styler = Styler(table, uuid=name, cell_ids=False, precision=digits, escape="html", na_rep="–")
    styler = styler.format_index(escape="html").format_index(escape="html", axis="columns")
    styler = styler.set_table_styles([*styles, {"selector": ".col_heading", "props": "white-space: normal"}])
    styler = styler.hide(axis="index", names=index).hide(axis="columns", names=True)  # names: of the axes only
    html = styler.set_table_attributes('class="dataframe"').to_html()
    wrap = "normal" if index else "nowrap"
    style = f"overflow-x:auto;font-size:85%;white-space:{wrap};font-variant-numeric:tabular-nums"
    return f'<div class="scroll" style="{style}" tabindex="0" role="region" aria-label="table">{html}</div>'


def told_by_template(table: pd.DataFrame) -> pd.DataFrame:
    """Told of n by template with the exact 95 % interval of the share."""
    counts = table.groupby("template", sort=False).told.agg(told="sum", n="count").reset_index()
    ends = [exact_interval(int(told), int(n)) for told, n in zip(counts.told, counts.n, strict=True)]
    low, high = zip(*ends, strict=True)
    return arranged("told_by_template", counts.assign(share=counts.told / counts.n, low=low, high=high))


def known_by_case(
    cases: Sequence[Case], eight: dict[str, pd.DataFrame], large: dict[str, pd.DataFrame]
) -> pd.DataFrame:
    """Counts of told, known, and known but not told, from `known_and_told` tables by case name."""
    rows = [
        (case.title, label, len(facts), *(int(facts[c].sum()) for c in ("told", "known", "routing_failure")))
        for case in cases
        for label, facts in (("the eight", eight[case.name]), ("large set", large[case.name]))
    ]
    return pd.DataFrame(rows, columns=["case", "facts", "n", "told", "known", "known, not told"])


def words_by_case(cases: Sequence[Case], words: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """How many facts random words before the prompt tell, by case, from `any_word` tables."""
    rows = [
        (c.title, len(w), int(w.n.iloc[0]), w.told.mean(), int(w.told.min()), int(w.told.max()))
        for c, w in ((c, words[c.name]) for c in cases)
    ]
    return pd.DataFrame(rows, columns=["case", "words", "facts", "told on average", "fewest", "most"])


def diagnoses(cases: Sequence[Diagnosis]) -> pd.DataFrame:
    """One column a case: what the rule read, and how sure it is."""
    rows = [{"d": d, "n": len(d.evidence.facts), "layer": d.layer + 1} for d in cases]
    return arranged("diagnoses", pd.DataFrame(rows)).T


def pathways(head: pd.DataFrame, gpt2: dict[str, dict[str, float]]) -> pd.DataFrame:
    """The head-to-head table of chapter 3; gpt2: the size of each slice there (`pathways.gpt2_sizes`)."""
    return arranged("pathways", head.assign(gpt2=[gpt2[name]["parameters"] for name in head.pathway]))


def controls(checks: pd.DataFrame, head: pd.DataFrame) -> pd.DataFrame:
    """The controls beside the run that they are controls of."""
    usual = head.set_index("pathway")
    beside = checks.assign(usual_steps=checks.pathway.map(usual.steps), usual_kl=checks.pathway.map(usual.kl))
    return arranged("controls", beside)


def outcomes(table: pd.DataFrame, kinds: Sequence[str]) -> pd.DataFrame:
    """Before and after, gained and lost, their exact test by country, and what share of those right may be lost."""
    return arranged("outcomes", table[table.what.isin(kinds)])


def by_genre(table: pd.DataFrame) -> pd.DataFrame:
    """Change of perplexity by passage and pathway."""
    return table.rename(columns=words).map(FORMATS["change"])


def generalisation(table: pd.DataFrame, noise: pd.DataFrame) -> pd.DataFrame:
    """Held-out countries: repaired of the known but untold, beside the control."""
    part, control = (t[t.split == "held_out"].set_index("pathway") for t in (table, noise))
    return arranged("generalisation", part.assign(noise=control.repaired).reset_index())


def frontier(runs: pd.DataFrame) -> pd.DataFrame:
    """Configurations of an edit that should carry over, on the selection countries; the chosen one first."""
    return arranged("frontier", runs.sort_values(["chosen", "layer", "rank"], ascending=[False, True, True]))


def writing(table: pd.DataFrame) -> pd.DataFrame:
    """Free generation by pathway."""
    asked, other = (table[table.kind == k].groupby("pathway", sort=False) for k in ("failing prompt", "opening"))
    out = asked.agg(said=("said", "sum"), prompts=("said", "size"), repetition=("repetition", "mean"))
    out = out.assign(other_repetition=other.repetition.mean(), leaks=other.leaks.sum())
    return arranged("writing", out.rename(index=UNTOUCHED).reset_index())


def samples(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The continuations of the failing prompts, side by side for a few pathways."""
    part = table[(table.kind == "failing prompt") & table.pathway.isin(names)]
    wide = part.pivot(index="prompt", columns="pathway", values="text").loc[part.prompt.unique(), list(names)]
    return wide.map(lambda text: text.replace("\n", "↵")).rename(columns=UNTOUCHED).rename(columns=words)


def libraries(compared: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Largest differences between this book and TransformerLens, by model."""
    table = pd.concat(compared, names=["model"]).assign(same=lambda heads: heads.our_head == heads.their_head)
    by_model = table.groupby("model", sort=False)
    largest = by_model[["logits", "heads", "lens"]].max()
    return arranged("libraries", largest.assign(prompts=by_model.size(), same=by_model.same.sum()).reset_index())


def every_plant(runs: pd.DataFrame) -> pd.DataFrame:
    """Each plant and what the joined rule said of it."""
    plants = runs[runs.accepted]
    right = plants["joined: kind"].astype(bool) & plants["joined: site"].astype(bool)
    failing = plants.failing.str.replace("{}", "…")
    return arranged("every_plant", plants.assign(right=right, failing=failing, untold=plants.untold.astype(int)))


def sizes(table: pd.DataFrame) -> pd.DataFrame:
    """Shapes of models: what they need, and what was run (columns that nothing was run for are made, and empty)."""
    run = ("precision", "batch", "seconds", "error", "peak_gb")
    return arranged("sizes", table.reindex(columns=list(dict.fromkeys([*table, *run]))))
