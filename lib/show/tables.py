"""DataFrames as a chapter shows them. Formatting only; every number was computed elsewhere."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import itables
import pandas as pd
from IPython.display import HTML
from itables.javascript import generate_init_offline_itables_html
from pandas.io.formats.style import Styler

from lib.diagnosis import Diagnosis
from lib.facts import Case
from lib.statistics import exact_interval

_NUMBER = r"(?:nan|–|<? ?[-+]?\d[\d.,]*(?:e[-+]\d+)?%?(?:[\s(/].*)?)"


def sortable(table: pd.DataFrame, *, rows: int = 12) -> HTML:
    """A table that the reader can sort and search, self-contained: it needs no network."""
    html = itables.to_html_datatable(
        table.round(3),
        connected=False,
        showIndex=False,
        pageLength=rows,
        lengthMenu=[rows, 50, 300],
        style="width:100%;font-size:85%",
        classes="display compact nowrap",
        scrollX=True,
    )
    return HTML(generate_init_offline_itables_html(itables.options.dt_bundle) + html)


def plain(table: pd.DataFrame, *, digits: int = 2, index: bool = False) -> HTML:
    """A small table, numbers to a number of digits and flush right, that scrolls sideways where the page is narrow.
    index: show the row names; then texts may wrap."""
    if index:  # names of sites stay on one line, sentences may wrap
        table = table.rename(index=lambda name: name.replace(" ", "\u00a0") if len(name) < 12 else name)
    align = [("th, td", "left"), *((f".col{i}", "right") for i, c in enumerate(table) if _is_numbers(table[c]))]
    styles = [{"selector": cells, "props": f"text-align: {side}"} for cells, side in align]
    name = hashlib.sha256(table.to_csv().encode()).hexdigest()[:8]  # the same table has the same name in every run
    styler = Styler(table, uuid=name, cell_ids=False, precision=digits, escape="html", na_rep="–")
    styler = styler.format_index(escape="html").format_index(escape="html", axis="columns")
    styler = styler.set_table_styles([*styles, {"selector": ".col_heading", "props": "white-space: normal"}])
    styler = styler.hide(axis="index", names=index).hide(axis="columns", names=True)  # names: of the axes only
    html = styler.set_table_attributes('class="dataframe"').to_html()
    wrap = "normal" if index else "nowrap"
    style = f"overflow-x:auto;font-size:85%;white-space:{wrap};font-variant-numeric:tabular-nums"
    return HTML(f'<div class="scroll" style="{style}" tabindex="0" role="region" aria-label="table">{html}</div>')


def _is_numbers(column: pd.Series) -> bool:
    """Whether a column holds nothing but numbers, or texts that begin with one: `3 of 8`, `-0.1 to 0.2`."""
    return len(column) > 0 and all(re.fullmatch(_NUMBER, str(v)) for v in column)


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
    return pd.DataFrame(
        {
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
        }
    )


def keyed(table: pd.DataFrame, column: str) -> dict[str, dict]:
    """A table as results keep it: one entry a value of the column."""
    return {row.pop(column): row for row in table.to_dict("records")}


def pathways(head: pd.DataFrame, gpt2: dict[str, dict[str, float]]) -> pd.DataFrame:
    """The head-to-head table of chapter 3; gpt2: the size of each slice there (`compare.gpt2_sizes`)."""
    return pd.DataFrame(
        {
            "pathway": head.pathway.str.replace("_", " "),
            "parameters": head.parameters.map("{:,}".format),
            "share": head.share.map("{:.2%}".format),
            "GPT-2": head.pathway.map(lambda name: f"{gpt2[name]['parameters']:,}"),
            "rate": head.rate.map("{:g}".format),
            "steps": head.steps,
            "told before": head.told_before,
            "after": head.told_after,
            "margin": head.min_margin.map("{:.2f}".format),
            "KL": head.kl,
            "outside": head.outside_unchanged.map({True: "unchanged", False: "CHANGED"}),
            "seconds": head.seconds.map("{:.1f}".format),
        }
    )


def spread(table: pd.DataFrame) -> pd.DataFrame:
    """`mean (least to most)` of what a `compare.spread` table holds."""

    def text(column: str, form: str) -> list[str]:
        parts = zip(*(table[f"{column}_{end}"] for end in ("mean", "min", "max")), strict=True)
        return [f"{mean:{form}} ({low:{form}} to {high:{form}})" for mean, low, high in parts]

    return pd.DataFrame(
        {
            "pathway": table.pathway.str.replace("_", " "),
            "goal reached": [f"{r} of {n} seeds" for r, n in zip(table.reached, table.seeds, strict=True)],
            "told": text("told", ".3g"),
            "steps": text("steps", ".3g"),
            "smallest margin": text("min_margin", ".2f"),
            "KL": text("kl", ".4f"),
        }
    )


def controls(checks: pd.DataFrame, head: pd.DataFrame) -> pd.DataFrame:
    """The controls beside the run that they are controls of."""
    own = head.set_index("pathway")
    return pd.DataFrame(
        {
            "control": checks.control,
            "pathway": checks.pathway.str.replace("_", " "),
            "goal": checks.reached.map({True: "reached", False: "missed"}),
            "told": checks.told,
            "steps": checks.steps,
            "smallest margin": checks.min_margin.map("{:.2f}".format),
            "KL": checks.kl,
            "true facts, usual limit: steps": checks.pathway.map(own.steps),
            "KL ": checks.pathway.map(own.kl),
        }
    )


def outcomes(table: pd.DataFrame, kinds: Sequence[str]) -> pd.DataFrame:
    """Before and after, gained and lost, McNemar's p, and what share of those right may have been lost."""
    part = table[table.what.isin(kinds)]
    return pd.DataFrame(
        {
            "pathway": part.pathway.str.replace("_", " "),
            "questions": part.what,
            "n": part.n,
            "right before": part.before,
            "after": part.after,
            "gained": part.gained,
            "lost": part.lost,
            "McNemar p": part.p.map(lambda p: f"{p:.2f}" if p >= 0.01 else "< 0.01"),
            "share lost, 95 %": [
                f"{low:.0%} to {high:.0%}" for low, high in zip(part.lost_low, part.lost_high, strict=True)
            ],
        }
    )


def reading(table: pd.DataFrame) -> pd.DataFrame:
    """Perplexity and KL by pathway."""
    return pd.DataFrame(
        {
            "pathway": table.pathway.str.replace("_", " "),
            "tokens": table.tokens.map("{:,}".format),
            "perplexity before": table.ppl_before,
            "after": table.ppl_after,
            "change": table.ratio.sub(1).map("{:+.2%}".format),
            "95 % interval": [
                f"{low - 1:+.2%} to {high - 1:+.2%}"
                for low, high in zip(table.ratio_low, table.ratio_high, strict=True)
            ],
            "KL, nats a token": table.kl.map("{:.4f}".format),
            "tokens moved": table.moved.map("{:.1%}".format),
        }
    )


def by_genre(table: pd.DataFrame) -> pd.DataFrame:
    """Change of perplexity by passage and pathway."""
    return table.rename(columns=lambda name: name.replace("_", " ")).sub(1).map("{:+.2%}".format)


def generalisation(table: pd.DataFrame, noise: pd.DataFrame) -> pd.DataFrame:
    """Held-out countries: repaired of the known but untold, beside the control."""
    part, control = (t[t.split == "held_out"].set_index("pathway") for t in (table, noise))
    return pd.DataFrame(
        {
            "pathway": [n.replace("_", " ") for n in part.index],
            "known, untold": part.untold.to_numpy(),
            "made told": part.repaired.to_numpy(),
            "exact 95 % interval": [f"{low:.0%} to {high:.0%}" for low, high in zip(part.low, part.high, strict=True)],
            "by noise": control.repaired.loc[part.index].to_numpy(),
            "of all held out, told before": part.told_before.to_numpy(),
            "after": part.told_after.to_numpy(),
        }
    )


def contexts(table: pd.DataFrame) -> pd.DataFrame:
    """Told by context."""
    return pd.DataFrame(
        {
            "kind": table.kind,
            "context": table.context.replace("''", "none"),
            "told": [f"{k} of {n}" for k, n in zip(table.told, table.n, strict=True)],
        }
    )


def frontier(runs: pd.DataFrame) -> pd.DataFrame:
    """Configurations of an edit that should carry over, on the selection countries; the chosen one first."""
    runs = runs.sort_values(["chosen", "layer", "rank"], ascending=[False, True, True], kind="stable")
    return pd.DataFrame(
        {
            "layer": runs.layer.map("L{}".format),
            "rank": runs["rank"].map(lambda r: str(r) if r else "any"),
            "parameters": runs.parameters.map("{:,}".format),
            "repaired": [f"{k} of {n}" for k, n in zip(runs.repaired, runs.untold, strict=True)],
            "mean log-probability": runs.log_probability,
            "perplexity": runs.ratio.sub(1).map("{:+.2%}".format),
            "KL, nats a token": runs.kl.map("{:.4f}".format),
            "capability lost": runs.capability_lost,
            "working lost": runs.working_lost,
            "harmless": runs.harmless.map({True: "yes", False: "no"}),
            "chosen": runs.chosen.map({True: "chosen", False: ""}),
        }
    )


def carryover(found: pd.DataFrame) -> pd.DataFrame:
    """What an edit and its noise control repair, by part."""
    parts = {"fit": "fit (trained on)", "selection": "selection (chosen on)", "held_out": "held out"}
    return pd.DataFrame(
        {
            "edit": found.pathway.replace({"edit": "chosen edit", "noise": "noise of its size"}),
            "countries": found.split.map(parts),
            "known, untold": found.untold,
            "told after": found.repaired,
            "exact 95 % interval": [
                f"{low:.0%} to {high:.0%}" for low, high in zip(found.low, found.high, strict=True)
            ],
            "best control": found.best_control,
        }
    )


def writing(table: pd.DataFrame) -> pd.DataFrame:
    """Free generation by pathway."""
    asked, other = (table[table.kind == k].groupby("pathway", sort=False) for k in ("failing prompt", "opening"))
    out = pd.DataFrame(
        {
            "answer said": asked.said.sum(),
            "of": asked.size(),
            "repeated": asked.repetition.mean(),
            "repeated, other texts": other.repetition.mean(),
            "trained answers in other texts": other.leaks.sum(),
        }
    )
    return out.rename(index={"none": "untouched"}).rename_axis("pathway").reset_index().replace("_", " ", regex=True)


def samples(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The continuations of the failing prompts, side by side for a few pathways."""
    part = table[(table.kind == "failing prompt") & table.pathway.isin(names)]
    wide = part.pivot(index="prompt", columns="pathway", values="text").loc[part.prompt.unique(), list(names)]
    wide = wide.map(lambda text: text.replace("\n", "↵"))
    return wide.rename(columns=lambda name: {"none": "untouched"}.get(name, name.replace("_", " ")))


def planted(table: pd.DataFrame) -> pd.DataFrame:
    """Edits of the organism, by planted case and pathway."""
    return pd.DataFrame(
        {
            "planted": table.case,
            "pathway": table.pathway.str.replace("_", " "),
            "told before": table.told_before,
            "after": table.told_after,
            "of": table.facts,
            "held out, known, untold": table.untold,
            "made told": table.repaired,
            "false told": table.false_told,
        }
    )


def neuron_agreement(table: pd.DataFrame) -> pd.DataFrame:
    """Captum against the trace, by layer or by template."""
    names = {
        "top1": "same top neuron",
        "top5": "of the top five shared",
        "rho": "rank correlation",
        "other_prompt": "control: another prompt's top neuron",
    }
    out = table.copy()
    for column in ("top1", "top5", "other_prompt"):
        if column in out:
            out[column] = out[column].map("{:.1%}".format)
    if "template" in out:
        out["template"] = out.template.str.replace("_", " ")
    return out.rename(columns=names)


def ablations(table: pd.DataFrame) -> pd.DataFrame:
    """Direct and total effect of taking a part away, in logits."""
    return pd.DataFrame(
        {
            "taken away": table.part,
            "put in its place": table.way,
            "prompts": table.n,
            "direct effect": table.direct.map("{:+.3f}".format),
            "total effect": table.total.map("{:+.3f}".format),
            "95 % interval": [f"{low:+.3f} to {high:+.3f}" for low, high in zip(table.low, table.high, strict=True)],
        }
    )


def libraries(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Largest differences between this book and TransformerLens, by subject."""
    return pd.DataFrame(
        [
            {
                "subject": name,
                "prompts": len(t),
                "logits": f"{t.logits.max():.1e}",
                "contributions of heads": f"{t['heads'].max():.1e}",
                "lens, logits": f"{t.lens.max():.1e}",
                "same strongest head": f"{(t.our_head == t.their_head).sum()} of {len(t)}",
            }
            for name, t in tables.items()
        ]
    )


def other_layers(others: pd.DataFrame) -> pd.DataFrame:
    """How many other layers do at least as well, by pathway."""
    n = others.others.astype(str)
    return pd.DataFrame(
        {
            "pathway": others.pathway.str.replace("_", " "),
            "as many told": others.told.astype(str) + " of " + n,
            "as many repaired": others.repaired.astype(str) + " of " + n,
            "both": others.as_well.astype(str) + " of " + n,
            "as many told, no later": others.sooner.astype(str) + " of " + n,
            "as many told, no more harm": others.gentler.astype(str) + " of " + n,
            "diagnosed layer: told": others.own_told.map("{:.0f}".format),
            "repaired": others.own_repaired.map("{:.0f}".format),
            "most repaired": [f"{r.most_repaired:.0f} (L{r.best_layer})" for r in others.itertuples()],
        }
    )


def seeds(table: pd.DataFrame) -> pd.DataFrame:
    """The diagnosed layer and its neighbours over seeds."""

    def ends(column: str, form: str = ".0f") -> list[str]:
        low, high = table[f"{column}_min"], table[f"{column}_max"]
        return [f"{a:{form}}" if a == b else f"{a:{form}} to {b:{form}}" for a, b in zip(low, high, strict=True)]

    return pd.DataFrame(
        {
            "pathway": table.pathway.str.replace("_", " "),
            "layer": table.layer.map("L{}".format),
            "seeds": table.seeds,
            "told": ends("told"),
            "repaired": ends("repaired"),
            "steps": ends("steps"),
            "KL": ends("kl", ".4f"),
        }
    )


def random_parts(parts: pd.DataFrame) -> pd.DataFrame:
    """The named part beside random ones of its size."""
    return pd.DataFrame(
        {
            "part": parts.part,
            "parameters": parts.parameters.map("{:,}".format),
            "told": parts.told,
            "random: told": parts.random_told.map("{:.1f}".format),
            "repaired": parts.repaired,
            "random: repaired": parts.random_repaired.map("{:.1f}".format),
            "KL": parts.kl.map("{:.4f}".format),
            "random: KL": parts.random_kl.map("{:.4f}".format),
            "better": [f"{r.better} of {r.random}" for r in parts.itertuples()],
        }
    )


def rivals(rows: pd.DataFrame) -> pd.DataFrame:
    """Rivals and pathways under one protocol, by number of parameters."""
    change = [
        "–" if pd.isna(r.ratio) else f"{r.ratio - 1:+.2%} ({r.ratio_low - 1:+.2%} to {r.ratio_high - 1:+.2%})"
        for r in rows.itertuples()
    ]
    share = [
        f"{r.held_out_repaired:.0f} of {r.held_out_n:.0f} ({r.low:.0%} to {r.high:.0%})" for r in rows.itertuples()
    ]
    return pd.DataFrame(
        {
            "": range(1, len(rows) + 1),
            "method": rows.rival,
            "setting": rows.strength,
            "parameters": rows.parameters.map("{:,}".format),
            "told": [f"{r.facts_told:.0f} of {r.facts_n:.0f}" for r in rows.itertuples()],
            "held-out told": share,
            "paraphrase": [f"{r.paraphrases_told:.0f} of {r.paraphrases_n:.0f}" for r in rows.itertuples()],
            "locality": [f"{r.local_lost:.0f} lost" for r in rows.itertuples()],
            "bled": rows.bled,
            "other relations": [f"{r.relations_told:.0f}, {r.relations_lost:.0f} lost" for r in rows.itertuples()],
            "probes": [f"{r.probes_lost:.0f} lost" for r in rows.itertuples()],
            "perplexity": change,
            "seconds": rows.seconds.map("{:.0f}".format),
        }
    )


def ladder(steps: pd.DataFrame) -> pd.DataFrame:
    """The fewest parameters that reach each goal."""
    names = {"whole": "all trained facts told", "general": "half of the held-out facts told"}
    return pd.DataFrame(
        {
            "goal": [names[goal] for goal in steps.index],
            "fewest parameters": steps.parameters.to_numpy(),
            "with the model as it is": steps.free.to_numpy(),
            "fewest with a change of the model": steps.changed.to_numpy(),
        }
    )


def rule_scores(table: pd.DataFrame) -> pd.DataFrame:
    """Shares of right kinds, layers and sites, with exact intervals: a row a rule and subject."""

    def share(what: str) -> list[str]:
        low, high = table[f"{what} low"], table[f"{what} high"]
        return [
            "–" if pd.isna(v) else f"{v:.0%}" if pd.isna(a) else f"{v:.0%} ({100 * a:.0f} to {100 * b:.0f})"
            for v, a, b in zip(table[what], low, high, strict=True)
        ]

    columns = {
        "kind": "kind",
        "layer": "exact layer",
        "within one": "within one layer",
        "site": "site",
        "kind and site": "kind and site",
    }
    out = {"subject": table.subject + ", " + table.n.astype(str), "rule": table.rule}
    return pd.DataFrame(out | {label: share(what) for what, label in columns.items()})


def rule_groups(table: pd.DataFrame) -> pd.DataFrame:
    """Right answers of one rule by planted kind and number of sites."""
    n = table.n.astype(str)
    return pd.DataFrame(
        {
            "subject": table.subject,
            "planted": table.planted,
            "sites": table.sites.astype(int),
            "kind": table.kind.astype(str) + " of " + n,
            "exact layer": table.layer.astype(str) + " of " + n,
            "site": table.site.astype(str) + " of " + n,
        }
    )


def rule_damages(table: pd.DataFrame) -> pd.DataFrame:
    """Right answers of one rule by what was damaged."""
    words = {
        "q": "query",
        "k": "key",
        "v": "value",
        "o": "a head's output",
        "ov": "a head's value and output",
        "mlp": "an MLP's output",
    }
    return pd.DataFrame(
        {
            "subject": table.subject,
            "planted": table.planted,
            "damaged": table.damaged.map(lambda d: words.get(d, d)),
            "kind and site": table.right.astype(str) + " of " + table.n.astype(str),
        }
    )


def rules_beside(table: pd.DataFrame) -> pd.DataFrame:
    """The joined rule beside every other, plant by plant."""
    return pd.DataFrame(
        {
            "subject": table.subject,
            "other rule": table.rule,
            "only the joined is right": table["only joined"],
            "only the other is right": table["only it"],
            "McNemar's p": table.p.map(lambda p: f"{p:.3f}" if p >= 0.001 else "< 0.001"),
        }
    )


def plant_repairs(table: pd.DataFrame) -> pd.DataFrame:
    """Plants repaired by retraining a layer, by planted kind and layer."""
    words = {"named": "named", "knowledge": "knowledge head's", "random": "random"}
    share = [f"{r.repaired} of {r.n} ({r.low:.0%} to {r.high:.0%})" for r in table.itertuples()]
    return pd.DataFrame(
        {
            "subject": table.subject,
            "planted": table.planted,
            "layer trained": table["trained layer"].map(words),
            "plants repaired": share,
            "facts told": table["facts told"].map("{:.0%}".format),
            "still told under controls": table["controls kept"].map("{:.0%}".format),
        }
    )


def every_plant(runs: pd.DataFrame) -> pd.DataFrame:
    """Each plant and what the joined rule said of it."""
    some = runs[runs.accepted]
    right = some["joined: kind"].astype(bool) & some["joined: site"].astype(bool)
    return pd.DataFrame(
        {
            "subject": some.subject,
            "seed": some.seed,
            "planted": some.kind,
            "damage": some.damage,
            "named": some["joined: named"],
            "said": some["joined: says"],
            "right": right.map({True: "yes", False: "no"}),
            "failing template": some.failing.str.replace("{}", "…"),
            "facts lost": some.untold.astype(int),
        }
    )


def costs(table: pd.DataFrame) -> pd.DataFrame:
    """How each comparison of the benchmark ended."""
    goal = [
        f"{r.goal:.3g}x" if pd.notna(r.goal) else f"{r.limit_s:g} s" if pd.notna(r.limit_s) else ""
        for r in table.itertuples()
    ]
    return pd.DataFrame(
        {
            "times faster": table.ratio.map("{:.2f}".format),
            "spread": _pairs(table.least, "to", table.most, 2),
            "goal": goal,
            "met": table.met.map({True: "yes", False: "no"}).fillna(""),
            "fewer operations": table.bound.map("{:.1f}x".format).replace("nanx", "–"),
        }
    ).set_index(table.row + " beside " + table.peer)


def costs_each(table: pd.DataFrame) -> pd.DataFrame:
    """What each way took: ours, then the peer's."""
    return pd.DataFrame(
        {
            "seconds": _pairs(table.ours_s, "/", table.peer_s, 3),
            "MB": _pairs(table.ours_mb, "/", table.peer_mb, 0),
            "of matmul rate": table.matmul_share.map("{:.0%}".format).replace("nan%", "–"),
            "differ by": table.difference.map("{:.0e}".format),
        }
    ).set_index(table.row + " beside " + table.peer)


def _pairs(one: pd.Series, between: str, other: pd.Series, digits: int) -> list[str]:
    """`0.84 to 0.91`, kept on one line."""
    return [f"{a:.{digits}f}\u00a0{between}\u00a0{b:.{digits}f}" for a, b in zip(one, other, strict=True)]


def sizes(table: pd.DataFrame) -> pd.DataFrame:
    """Shapes of models: what they need, and what was run."""
    some = table.reindex(columns=[*table, *({"precision", "seconds", "error", "peak_gb"} - set(table))])
    return pd.DataFrame(
        {
            "shape": some["shape"],
            "parameters": some.parameters.map("{:,}".format),
            "fp32, GB": some.fp32_gb.map("{:.1f}".format),
            "bf16, GB": some.bf16_gb.map("{:.1f}".format),
            "run in": some.precision.fillna("not run"),
            "trace, seconds": some.seconds.map("{:.2f}".format).replace("nan", "–"),
            "error, logits": some.error.map("{:.0e}".format).replace("nan", "–"),
            "peak, GB": some.peak_gb.map("{:.1f}".format).replace("nan", "–"),
        }
    )
