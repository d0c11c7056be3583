"""DataFrames as a chapter shows them. Formatting only; every number was computed elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import itables
import pandas as pd
from IPython.display import HTML
from itables.javascript import generate_init_offline_itables_html

from lib.diagnosis import Diagnosis
from lib.facts import Case, exact_interval


def sortable(table: pd.DataFrame, *, rows: int = 12) -> HTML:
    """A table that the reader can sort and search, self-contained: it needs no network."""
    html = itables.to_html_datatable(
        table.round(3), connected=False, showIndex=False, pageLength=rows,
        lengthMenu=[rows, 50, 300], style="width:100%;font-size:85%", classes="display compact nowrap", scrollX=True,
    )  # fmt: skip
    return HTML(generate_init_offline_itables_html(itables.options.dt_bundle) + html)


def plain(table: pd.DataFrame, *, digits: int = 2, index: bool = False) -> HTML:
    """A small table, numbers to a number of digits, that scrolls sideways where the page is narrow."""
    wrap = "normal" if index else "nowrap"
    if index:  # names of sites stay on one line, sentences may wrap
        table = table.rename(index=lambda name: name.replace(" ", "\u00a0") if len(name) < 12 else name)
    html = table.to_html(index=index, float_format=lambda v: f"{v:.{digits}f}", border=0, classes="dataframe")
    return HTML(f'<div style="overflow-x:auto;font-size:85%;white-space:{wrap}" tabindex="0">{html}</div>')


def told_by_template(table: pd.DataFrame) -> pd.DataFrame:
    """Told of n by template with the exact 95 % interval of the share."""
    counts = table.groupby("template", sort=False).told.agg(["sum", "count"])
    rows = []
    for template, told, n in counts.itertuples():
        low, high = exact_interval(int(told), int(n))
        rows.append((template.replace("_", " "), told, n, f"{told / n:.0%} ({low:.0%} to {high:.0%})"))
    return pd.DataFrame(rows, columns=["template", "told", "of", "share told, exact 95 % interval"])


def known_by_case(
    cases: Sequence[Case], eight: dict[str, pd.DataFrame], large: dict[str, pd.DataFrame]
) -> pd.DataFrame:
    """Counts of told, known, and known but not told, from `known_and_told` tables by case name."""
    rows = []
    for case in cases:
        for label, state in (("the eight", eight[case.name]), ("large set", large[case.name])):
            rows.append(
                (
                    case.title,
                    label,
                    len(state),
                    int(state.told.sum()),
                    int(state.known.sum()),
                    int(state.routing_failure.sum()),
                )
            )
    return pd.DataFrame(rows, columns=["case", "facts", "n", "told", "known", "known, not told"])


def words_by_case(cases: Sequence[Case], words: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """How many facts random words before the prompt tell, by case, from `any_word` tables."""
    rows = [
        (c.title, len(w), int(w.n.iloc[0]), w.told.mean(), int(w.told.min()), int(w.told.max()))
        for c, w in ((c, words[c.name]) for c in cases)
    ]
    return pd.DataFrame(rows, columns=["case", "words", "facts", "told on average", "fewest", "most"])


def diagnoses(found: Sequence[Diagnosis]) -> pd.DataFrame:
    """One column a case: what the rule read, and how sure it is."""
    return pd.DataFrame({
        f"{d.case.title} (n = {len(d.evidence.facts)})": {
            "knowledge head": str(d.verdict.knowledge_head),
            "it still writes, of what it writes under the controls": f"{d.verdict.retention:.0%}",
            "no longer written by all components, of the lost margin": f"{d.verdict.unwritten:.0%}",
            "failure kind": d.verdict.failure_kind,
            "suppressor": str(d.verdict.suppressor or "none"),
            "prescribed layer": f"L{d.layer + 1}",
            "same head when resampled": f"{d.same_head:.1%}",
            "same kind when resampled": f"{d.same_kind:.1%}",
            "same suppressor when resampled": f"{d.same_suppressor:.1%}",
            "relation maps: rank, score, p": f"{d.static_rank}, {d.static_score:.2f}, {d.static_p:.3f}",
            "confidence": d.confidence,
        }
        for d in found
    })  # fmt: skip
