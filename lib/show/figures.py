"""Arrays -> matplotlib figures. Nothing here runs a model.

Colours are Okabe and Ito's, safe for colour-blind readers; signed quantities use a diverging map centred on zero,
shares a sequential one. Layers are numbered from 1 and heads from 0 on every axis.
"""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from IPython import get_ipython
from jaxtyping import Float
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib_inline.backend_inline import set_matplotlib_formats
from torch import Tensor

from lib.diagnosis import Diagnosis
from lib.evaluation import Measured
from lib.show.sentences import words
from lib.show.tables import UNTOUCHED, WORDS
from lib.sites import Site
from lib.statistics import exact_interval

MARGIN = "answer − competitor (logits)"
BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
VIOLET = "#7E57C2"
GREY, BLACK = "#777777", "#000000"
TYPE_COLOURS = (RED, BLUE, GREEN, ORANGE, GREY, PINK, SKY, BLACK)
PATHWAY_COLOURS = {"full": BLACK, "attention": BLUE, "ffn": ORANGE, "v_only": GREEN, "q_only": PINK, "k_only": RED}
PATHWAY_COLOURS |= {"sink_kv": SKY, "sink_token": VIOLET, "newline": GREY, "none": GREY}
KIND_COLOURS = {"no training": GREY, "few parameters": BLUE, "closed form": PINK, "pathway": ORANGE}
KIND_COLOURS |= {"everything": RED, "general": GREEN, "learned sink": SKY}
Grid = Float[Tensor, "n_layers n_heads"]
WIDE = 16  # a model of more layers gets wide panels, one below another, and every third layer a number
WORDING = 300  # characters of a table's cell, at most
NAMED = 6  # heads of a scatter that bear their names
NEXT = 4  # times as many parameters: dots that are nearer share a label
LEFT_EDGE = 0.3  # where no parameters stand on a logarithmic axis of their number
ROLE_COLOURS = {"copies": BLUE, "suppresses": RED, "maps relation": GREEN, "neither": "#dddddd"}


def style() -> None:
    """The book's look: call it once in a chapter's set-up cell. In a notebook figures are drawn as SVG, sharp at every
    size, with nothing in the file that differs from run to run."""
    if get_ipython() is not None:
        set_matplotlib_formats("svg", metadata={"Date": None})
    plt.style.use(Path(__file__).with_name("book.mplstyle"))
    pd.options.display.max_colwidth = WORDING  # of a table that a cell shows as it is, no wording is cut


def head_heatmap(
    grids: dict[str, Grid], *, label: str, signed: bool = False, mark: Sequence[Site] = (), chance: Sequence[float] = ()
) -> Figure:
    """One panel a grid, layers across and heads down, one colour scale for all. mark: heads to frame.
    chance: mean, low, high of a null, drawn on the colour bar."""
    values = np.stack([grid.cpu().numpy() for grid in grids.values()])
    n, layers, heads = values.shape
    fig, axes = _panels(n, 1, (9, 0.7 + 1.75 * n)) if layers > WIDE else _panels(1, n, (1.5 + 4.4 * n, 3.6))
    top = float(np.abs(values).max() if signed else values.max()) or 1.0
    colours, bottom, edge = ("RdBu_r", -top, "black") if signed else ("viridis", 0, "white")
    for ax, title, grid in zip(axes.flat, grids, values, strict=True):
        ax.imshow(grid.T, aspect="auto", cmap=colours, vmin=bottom, vmax=top)
        _head_axes(ax, layers, heads)
        ax.set_title(title, loc="left")
        for layer, head in ((site.layer, site.head) for site in mark if site.head is not None):
            ax.add_patch(mpl.patches.Rectangle((layer - 0.5, head - 0.5), 1, 1, fill=False, ec=edge, lw=2))
    bar = fig.colorbar(axes[0, 0].images[0], ax=axes, label=label, fraction=0.05, pad=0.02)
    if chance:
        mean, low, high = chance
        bar.ax.axhline(mean, color="white", lw=2)
        bar.ax.axhspan(low, high, color="white", alpha=0.35, lw=0)
    return fig


def role_map(roles: pd.DataFrame) -> Figure:
    """Every head coloured by the role of its value channel."""
    names = list(ROLE_COLOURS)
    grid = roles.pivot(index="head", columns="layer", values="value").map(names.index)
    fig, ax = _panel((9, 2.7) if grid.shape[1] > WIDE else (6.5, 3.4))
    ax.imshow(grid, aspect="auto", cmap=ListedColormap(list(ROLE_COLOURS.values())), vmin=0, vmax=len(names) - 1)
    _head_axes(ax, grid.shape[1], grid.shape[0])
    handles = [mpl.patches.Patch(color=ROLE_COLOURS[n], label=f"{n} ({(roles.value == n).sum()})") for n in names]
    return _legend(fig, ncols=4, handles=handles)


def k_norm_by_layer(table: pd.DataFrame) -> Figure:
    """K-norm of each token type relative to the layer's mean over types, with bootstrap bands."""
    centre = table.groupby("layer")["mean"].transform("mean")
    relative = table.assign(**{column: table[column] / centre for column in ("low", "mean", "high")})
    fig, ax = _panel((9, 3.6), ylabel="K-norm, relative to\nthe mean of the types", xlabel="layer")
    for colour, (name, part) in zip(TYPE_COLOURS, relative.groupby("type", sort=False), strict=False):
        ax.fill_between(part.layer + 1, part.low, part.high, color=colour, alpha=0.15, lw=0)
        ax.plot(part.layer + 1, part["mean"], color=colour, lw=3 if name == "proper_noun" else 1.3, label=words(name))
    ax.axhline(1, color="black", lw=0.6)
    ax.set_xlim(1, table.layer.max() + 1)
    return _legend(fig, ncols=4)


def told_matrix(table: pd.DataFrame) -> Figure:
    """Templates down, facts across: filled where the answer is told; where not, the token that is said instead."""
    subjects, templates = list(table.subject.unique()), list(table.template.unique())
    fig, ax = _panel((10, 0.27 * len(templates) + 0.7))
    told = table.pivot(index="template", columns="subject", values="told").loc[templates, subjects]
    names = [f"{words(name)}  {count}/{len(subjects)}" for name, count in told.sum(1).items()]
    _matrix(ax, told.set_axis(names), BLUE)
    for row in table.itertuples():
        x, y, colour = subjects.index(row.subject), templates.index(row.template), "white" if row.told else "black"
        ax.text(x, y, visible(row.top), ha="center", va="center", fontsize=9, color=colour)
    return fig


def cumulative_curves(diagnoses: Sequence[Diagnosis]) -> Figure:
    """Answer minus competitor by layer, in logits: each failing prompt thin, means bold, controls beside them."""
    fig, axes = _panels(1, len(diagnoses), (4.9 * len(diagnoses), 3.3), ylabel=MARGIN, xlabel="layers summed")
    for ax, d in zip(axes.flat, diagnoses, strict=True):
        _curves(ax, d.evidence.control.curve.T.cpu().numpy(), BLUE, "told under control templates", (0.6, 0.45))
        _curves(ax, d.evidence.failing.curve.T.cpu().numpy(), RED, "failing template", (0.6, 0.45))
        ax.axhline(0, color="black", lw=0.6)
        _mark_layer(ax, d.verdict.knowledge_head, GREEN, 0.97)
        if d.verdict.suppressor:
            _mark_layer(ax, d.verdict.suppressor, ORANGE, 0.03)
        ax.set_title(f"{d.case.title} (n = {len(d.evidence.facts)})")
    return _legend(fig, ncols=2)


def writing_heatmaps(diagnosis: Diagnosis) -> Figure:
    """What each head writes of the answer, controls above (or left) and failing template below (or right)."""
    e = diagnosis.evidence
    grids = {
        "control templates: the answer, more than other answers": e.grid(e.control.attribution.mean(0)),
        f"failing template ({diagnosis.case.title})": e.grid(e.failing.attribution.mean(0)),
    }
    return head_heatmap(grids, label="logits written", signed=True, mark=[diagnosis.verdict.knowledge_head])


def lens_ranks(ranks: dict[str, Float[Tensor, "fact n_layers+1"]]) -> Figure:
    """Median rank of the answer in the logit lens by layer, with the middle half of the facts."""
    fig, ax = _panel((8.5, 3), yscale="log", xlabel="after layer", ylabel="rank of the answer\n(1 is the top)")
    for (name, by_fact), colour in zip(ranks.items(), (BLUE, RED, ORANGE, PINK, GREY), strict=False):
        low, middle, high = np.quantile(by_fact.cpu().numpy(), (0.25, 0.5, 0.75), axis=0)
        ax.fill_between(range(len(middle)), low, high, color=colour, alpha=0.15, lw=0)
        ax.plot(middle, color=colour, lw=2.5, label=name)
    ax.invert_yaxis()
    ax.legend(loc="upper left")
    return fig


def attention_rows(rows: dict[str, tuple[list[str], Float[Tensor, " t"]]], head: Site) -> Figure:
    """Attention of one head from the last token to each token of a few prompts."""
    fig, axes = _panels(len(rows), 1, (9, 1.15 * len(rows) + 0.6), yticks=[], frame_on=False)
    for ax, (title, (tokens, weights)) in zip(axes.flat, rows.items(), strict=True):
        ax.imshow(weights.cpu().numpy()[None], aspect="auto", cmap="Blues", vmin=0, vmax=1)
        ax.set_xticks(range(len(tokens)), [visible(t) for t in tokens], fontsize=9)
        ax.set_title(title, loc="left", fontsize=10, fontweight="normal")
        for i, w in enumerate(weights.tolist()):
            ax.text(i, 0, f"{w:.2f}", ha="center", va="center", fontsize=9, color="white" if w > 0.5 else "black")
    fig.suptitle(f"{head}: attention from the last token")
    return fig


def attention_by_template(table: pd.DataFrame) -> Figure:
    """Attention from the last token to the subject, one dot a fact: failing against control, by head and case."""
    heads = list(table.site.unique())
    fig, panels = _split(table, "case", (4.9 * table.case.nunique(), 2.9), ylabel="attention to the subject")
    for ax, case, by_case in panels:
        for kind, colour, shift in (("control", BLUE, -0.15), ("failing", RED, 0.15)):
            part = by_case[by_case.kind == kind]
            x = part.site.map(heads.index) + shift
            ax.scatter(x, part.attention, s=16, color=colour, alpha=0.5, lw=0, label=f"{kind} template")
            means = part.groupby("site").attention.mean().reindex(heads)
            ax.scatter(np.arange(len(heads)) + shift, means, s=240, marker="_", color=colour, lw=3)
        ax.set_xticks(range(len(heads)), heads)
        ax.set(title=case, ylim=(-0.03, 1.03))
    return _legend(fig, ncols=2)


def prefix_bars(table: pd.DataFrame) -> Figure:
    """Share told with each neutral prefix, with exact intervals, one panel a case."""
    fig, panels = _split(table, "case", (4.9 * table.case.nunique(), 0.27 * table.prefix.nunique() + 1.0))
    for ax, case, part in panels:
        names = [prefix if "<|" in prefix else words(prefix) for prefix in part.prefix]
        share = (part.told / part.n).to_numpy()
        ends = np.array([exact_interval(int(told), int(n)) for told, n in zip(part.told, part.n, strict=True)]).T
        ax.barh(names, share, color=[GREY if prefix == "none" else BLUE for prefix in part.prefix], height=0.65)
        ax.errorbar(share, names, xerr=np.abs(ends - share), fmt="none", ecolor="black", lw=1.2, capsize=2)
        ax.set(xlim=(0, 1), xlabel="share told", title=f"{case} (n = {part.n.iloc[0]})")
    fig.axes[0].invert_yaxis()
    return fig


WAYS = {"failing": RED, "control": BLUE, "prefix": ORANGE, "end": PINK, "repair": GREEN}


def told_by_way(table: pd.DataFrame) -> Figure:
    """Share told by each way of asking (way, kind, told, n), with exact intervals and the counts."""
    fig, ax = _panel((8, 0.27 * len(table) + 1), xlim=(0, 1.12), xlabel="share told")
    share, y = (table.told / table.n).to_numpy(), np.arange(len(table))
    ends = np.array([exact_interval(int(told), int(n)) for told, n in zip(table.told, table.n, strict=True)]).T
    ax.barh(y, share, color=table.kind.map(WAYS), height=0.65)
    ax.errorbar(share, y, xerr=np.abs(ends - share), fmt="none", ecolor="black", lw=1.2, capsize=2)
    for i, row in enumerate(table.itertuples()):
        _name_point(ax, f"{row.told} of {row.n}", max(share[i], ends[1][i]), i, (5, 0), va="center")
    ax.set_yticks(y, [words(way) for way in table.way])
    ax.invert_yaxis()
    return fig


def subject_norms(norms: dict[str, Float[Tensor, "fact n_layers+1"]]) -> Figure:
    """Norm of the residual stream at the subject's last token, layer by layer, one thin line a fact."""
    label = "norm of the subject's\nresidual stream"
    fig, ax = _panel((8.5, 3), yscale="log", xlabel="after layer", ylabel=label)
    for (name, values), colour in zip(norms.items(), (RED, BLUE, ORANGE, PINK, GREEN), strict=False):
        _curves(ax, values.T.cpu().numpy(), colour, name, (0.6, 0.5))
    ax.legend(loc="lower right")
    return fig


def static_against_dynamic(static: Grid, dynamic: Grid) -> Figure:
    """Every head: the relation map's score against what it writes; the strongest are named."""
    fig, ax = _panel((7, 3.5), ylabel="written of the answer\nunder controls (logits)")
    x, y = static.flatten().cpu().numpy(), dynamic.flatten().cpu().numpy()
    ax.scatter(x, y, s=22, color=BLUE, alpha=0.6, lw=0)
    ax.axhline(0, color="black", lw=0.6)
    strength = x / (x.max() or 1) + y / (np.abs(y).max() or 1)
    named = sorted(np.argsort(-strength)[:NAMED], key=lambda i: x[i])
    for i, offset in zip(named, (4, -12) * NAMED, strict=False):  # above and below in turn: neighbours do not meet
        _name_point(ax, str(Site(*divmod(int(i), static.shape[1]))), x[i], y[i], (6, offset))
    ax.set_xlim(-0.03 * x.max(), 1.15 * x.max() + 1e-9)
    ax.set_xlabel("relation map: share of countries with their\ncapital in the head's top 10 (no input)")
    return fig


def training_curves(seeds: pd.DataFrame, margin: float) -> Figure:
    """Smallest margin over the facts, and KL on the step's neutral window, by step: one thin line a seed."""
    fig, axes = _panels(1, 2, (9.8, 3.3))
    margins, kls = axes[0]
    for name, runs in seeds.groupby("pathway", sort=False):
        for i, run in enumerate(runs.itertuples()):
            look = {"color": PATHWAY_COLOURS[name], "lw": 0.7 if i else 2, "alpha": 0.5 if i else 1}
            margins.plot(run.margins, label="" if i else words(name), **look)
            kls.plot(np.clip(run.kls, 1e-6, None), **look)
    margins.axhline(margin, color="black", lw=1, ls="--")
    margins.axhline(0, color="black", lw=0.6)
    margins.set(xlabel="step", ylabel="smallest margin of\nthe facts (logits)")
    kls.set(xlabel="step", ylabel="KL on a neutral window\n(nats a token)", yscale="log")
    return _legend(fig, ncols=6)


def before_after(table: pd.DataFrame) -> Figure:
    """Probability of each answer under the failing template, before (grey) and after each edit; filled where told."""
    before = table[table.pathway == "none"].set_index("subject")
    y = np.arange(len(before))
    fig, panels = _split(table[table.pathway != "none"], "pathway", (9.8, 0.44 * len(before) + 1.4), rows=2)
    for ax, name, part in panels:
        after = part.set_index("subject").loc[before.index]
        ax.hlines(y, before.prob, after.prob, color="#bbbbbb", lw=1.5, zorder=1)
        for state, colour in ((before, GREY), (after, PATHWAY_COLOURS[name])):
            ax.scatter(state.prob, y, s=34, lw=1.4, ec=colour, c=np.where(state.told, colour, "white"), zorder=2)
        told = f"{int(before.told.sum())} → {int(after.told.sum())} of {len(before)}"
        ax.set_title(f"{words(name)}: {told}", loc="left", fontsize=10)
        ax.set(xscale="log", xlim=(min(1e-4, before.prob.min() / 2), 1.4), yticks=y, yticklabels=before.answer)
        ax.grid(axis="x")
    return _rows_down(fig, "probability of the answer's first token")


def price(table: pd.DataFrame, seeds: pd.DataFrame) -> Figure:
    """Parameters of a pathway against its KL on neutral passages: a dot a seed, filled where the goal was reached."""
    fig, ax = _panel((8, 3.5), xscale="log", yscale="log", ylabel="KL on neutral passages\n(nats a token)")
    for row in table.itertuples():
        part, colour = seeds[seeds.pathway == row.pathway], PATHWAY_COLOURS[row.pathway]
        fill = np.where(part.reached, colour, "white")
        ax.scatter(np.full(len(part), row.parameters), part.kl, s=36, ec=colour, c=fill, alpha=0.8)
        name = f"{words(row.pathway)}: {int(part.reached.sum())}/{len(part)}"
        y, offset = (part.kl.min(), -15) if row.pathway == "k_only" else (part.kl.max(), 7)
        _name_point(ax, name, row.parameters, y, (0, offset), ha="center", color=colour, fontsize=10)
    ax.set(xlabel="parameters trained", xmargin=0.15, ymargin=0.2)
    return fig


def probe_matrix(measured: Measured) -> Figure:
    """Every probe by pathway: filled where it is right; a frame where an edit changed the outcome."""
    base = measured.asked["none"]
    pick = base.set.isin(["capability", "unrelated"])
    right = pd.DataFrame({name: asked.told[pick] for name, asked in measured.asked.items()})
    counts = right.groupby(base.set[pick]).sum()
    names = [f"{words(UNTOUCHED.get(n, n))}\n{counts[n]['capability']} + {counts[n]['unrelated']}" for n in right]
    fig, ax = _panel((7.4, 0.2 * len(right) + 0.9))
    _matrix(ax, right.set_axis(base["item"][pick].map(words)).set_axis(names, axis=1), SKY, fontsize=8.5)
    for y, x in zip(*np.nonzero(right.ne(right["none"], axis=0).to_numpy()), strict=True):
        colour = GREEN if right.iloc[y, x] else RED
        ax.add_patch(mpl.patches.Rectangle((x - 0.45, y - 0.45), 0.9, 0.9, fill=False, ec=colour, lw=2.5))
    ax.axhline((base.set[pick] == "capability").sum() - 0.5, color="black", lw=1.2)
    return fig


def perplexity_ratios(table: pd.DataFrame, band: float) -> Figure:
    """Perplexity after over before, with intervals over texts; grey: within the band around 1."""
    fig, ax = _panel((8, 0.34 * len(table) + 0.9), xlabel="perplexity after the edit / before")
    ax.axvspan(1 - band, 1 + band, color="#dddddd", lw=0)
    ax.axvline(1, color="black", lw=0.6)
    y = np.arange(len(table))
    _intervals(ax, y, table.ratio_low, table.ratio, table.ratio_high, table.pathway.map(PATHWAY_COLOURS), s=40)
    ax.set_yticks(y, table.pathway.map(words))
    ax.invert_yaxis()
    return fig


def outcomes(table: pd.DataFrame, kinds: Sequence[str]) -> Figure:
    """For each kind of question: the share told before (grey) and after (colour) each pathway's edit."""
    fig, panels = _split(table.set_index("what").loc[list(kinds)].reset_index(), "what", (9.8, 4.4), rows=2)
    for ax, kind, part in panels:
        y, before, after = np.arange(len(part)), part.before / part.n, part.after / part.n
        ax.hlines(y, before, after, color="#bbbbbb", lw=2, zorder=1)
        ax.scatter(before, y, color=GREY, s=30, zorder=2)
        ax.scatter(after, y, color=part.pathway.map(PATHWAY_COLOURS), s=46, zorder=3)
        ax.set(xlim=(-0.05, 1.05), yticks=y, yticklabels=part.pathway.map(words))
        ax.set_title(f"{kind.replace(', ', ',' + chr(10))}, n = {part.n.iloc[0]}", fontsize=9.5, loc="left")
        ax.grid(axis="x")
    return _rows_down(fig, "share told: before (grey), after (colour)")


def bleeding(table: pd.DataFrame, control: pd.DataFrame) -> Figure:
    """Prompts about other countries that are wrongly answered with a trained answer, by pathway."""
    fig, ax = _panel((8, 2.9), ylabel=f"trained answers, wrongly\n(of {table.prompts.iloc[0]} prompts)")
    x = np.arange(len(table))
    ax.bar(x, table.bled, color=table.pathway.map(PATHWAY_COLOURS), width=0.6, alpha=0.85)
    ax.scatter(x[1:] + 0.36, control.bled[1:], marker="x", color="black", s=36, label="noise of the same size")
    for i, count in enumerate(table.bled):
        _name_point(ax, str(count), i, count, (0, 3), ha="center", fontsize=10)
    ax.set_xticks(x, table.pathway.replace(UNTOUCHED).map(words))
    ax.set_ylim(0, 1.15 * table.bled.max() + 1)
    return _legend(fig, ncols=1)


def generalisation(table: pd.DataFrame, control: pd.DataFrame) -> Figure:
    """Share of the held-out known but untold countries that each edit makes told, with exact intervals; crosses: a
    random change of the same size; dashed: the single best control template, with no edit at all."""
    part, noise = (t[t.split == "held_out"].reset_index(drop=True) for t in (table, control))
    fig, ax = _panel((8, 3.1))
    x, n = np.arange(len(part)), part.untold
    share = part.repaired / n
    ax.bar(x, share, color=part.pathway.map(PATHWAY_COLOURS), width=0.6, alpha=0.85)
    ends = np.abs(part[["low", "high"]].to_numpy().T - share.to_numpy())
    ax.errorbar(x, share, yerr=ends, fmt="none", ecolor=GREY, lw=1.5, capsize=3)
    ax.scatter(x + 0.36, noise.repaired / noise.untold, marker="x", color="black", s=36, label="noise of the same size")
    ceiling = part.best_control.iloc[0] / n.iloc[0]
    ax.axhline(ceiling, color="black", lw=1, ls="--", label="best control template, no edit")
    ax.set_xticks(x, part.pathway.map(words))
    ax.set(ylim=(-0.02, 1), ylabel=f"share made told\n(of {n.iloc[0]} held-out countries)")
    return _legend(fig, ncols=2)


def carried(table: pd.DataFrame, whole: int, layer: int) -> Figure:
    """What each place carries by layer. whole: told with the whole prefix; layer: the diagnosed one."""
    fig, ax = _panel((8.5, 3.2))
    for (place, part), colour in zip(table.groupby("place", sort=False), (BLUE, ORANGE, GREY), strict=True):
        ax.plot(part.layer, part.told, "o-", ms=3.5, lw=1.6, color=colour, label=place)
    ax.axhline(whole, color="black", lw=1, ls="--")
    ax.axvline(layer, color="black", lw=1, ls=":")
    ax.set(xlabel="stream that enters layer", ylabel=f"told, of {table.n.iloc[0]}", ylim=(-0.5, None))
    return _legend(fig, ncols=3)


def place_and_cause(table: pd.DataFrame) -> Figure:
    """Of edits trained on the eight facts: held-out countries told, and trained answers where they are wrong. table: of
    `carrying_over.judged`, with case_title."""
    eight = table[table.facts == "eight"].reset_index(drop=True)
    colours = eight.kind.map({"cause": BLUE, "place": ORANGE, "fixed prefix": GREY})
    y = np.arange(len(eight)) + eight.case.diff().fillna(0).cumsum() * 0.8  # a gap between cases
    fig, axes = _panels(1, 2, (9.8, 0.34 * len(eight) + 1.6), sharey=True)
    share, bled = axes[0]
    share.hlines(y, eight.low, eight.high, color=colours, lw=2)
    share.scatter(eight.repaired / eight.untold, y, color=colours, zorder=3, s=46)
    share.set(xlim=(-0.02, 1.02), xlabel="share of held-out countries told")
    share.set_yticks(y, [f"{row.case_title}: {words(row.pathway)}" for row in eight.itertuples()])
    bled.hlines(y, 0, eight.bled, color=colours, lw=2)
    bled.scatter(eight.bled, y, color=colours, zorder=3, s=46)
    bled.set(xlim=(0, None), xlabel=f"trained capitals said wrongly, of {int(eight.bled_n.max())}")
    share.invert_yaxis()
    return _legend(
        fig, ncols=3, handles=_dots({"edit of the cause": BLUE, "edit of the place": ORANGE, "line break": GREY}, lw=0)
    )


def effects_of_parts(table: pd.DataFrame) -> Figure:
    """Direct effect (hollow) and total effect (filled, with its interval) of taking each part away."""
    parts = list(table.part.unique())
    fig, panels = _split(table, "way", (9.8, 0.36 * len(parts) + 1.2))
    for ax, way, effects in panels:
        y, by_part = np.arange(len(parts)), effects.set_index("part").reindex(parts)
        ax.axvline(0, color="black", lw=0.6)
        _intervals(ax, y, by_part.low, by_part.total, by_part.high, BLUE, s=40, label="total")
        ax.scatter(by_part.direct, y, s=40, ec=ORANGE, c="white", lw=1.8, zorder=2, label="direct")
        ax.set_yticks(y, parts)
        ax.set_title(way, loc="left", fontsize=10)
    return _legend(_rows_down(fig, "change of the answer's logit"), ncols=2)


def layer_sweep(means: pd.DataFrame, layer: int) -> Figure:
    """Told, held-out repaired and harm by layer, one line a pathway. layer: the diagnosed one, counted from 1."""
    panels = {"facts_told": "facts told", "held_out_repaired": "held-out repaired", "kl": "KL on neutral text (nats)"}
    fig, axes = _panels(1, 3, (10, 2.8), xlabel="layer")
    for ax, (column, label) in zip(axes.flat, panels.items(), strict=True):
        for i, (name, part) in enumerate(means.sort_values("layer").groupby("pathway", sort=False)):
            beside = part.layer + 0.2 * (i - 1.5)  # so that equal values are all seen
            ax.plot(beside, part[column], "o-", ms=3.5, lw=1.2, color=PATHWAY_COLOURS[name], label=words(name))
        ax.axvline(layer, color="black", lw=1, ls=":")
        ax.set_ylabel(label)
    told, repaired, kl = axes[0]
    told.set_ylim(-0.3, means.facts_told.max() + 0.3)
    repaired.set_ylim(-0.5, means.held_out_n.max() + 0.5)
    kl.set_yscale("log")
    for axis in (told.yaxis, repaired.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    return _legend(fig, ncols=6)


def depth(table: pd.DataFrame, layer: int) -> Figure:
    """Held-out repaired and bled by layer: the mean over pathways, and their range. layer: the diagnosed one."""
    fig, axes = _panels(1, 2, (10, 2.6), xlabel="layer")
    labels = {"repaired": "held-out repaired", "bled": "trained answers, wrongly"}
    for ax, (name, label), colour in zip(axes.flat, labels.items(), (BLUE, RED), strict=True):
        ax.fill_between(table.layer, table[f"{name}_min"], table[f"{name}_max"], color=colour, alpha=0.15, lw=0)
        ax.plot(table.layer, table[f"{name}_mean"], "o-", ms=3.5, lw=2, color=colour)
        ax.axvline(layer, color="black", lw=1, ls=":")
        ax.set(ylabel=label, ylim=(0, None))
    return fig


def correlations(table: pd.DataFrame) -> Figure:
    """Rank correlations with intervals: a panel a score, a row a measure, a dot a pathway; hollow: 0 is within."""
    measures = list(table.measure.unique())
    fig, panels = _split(table, "score", (10, 3), sharey=False)
    for ax, score, by_score in panels:
        ax.axvline(0, color="black", lw=0.6)
        for i, (pathway, part) in enumerate(by_score.groupby("pathway", sort=False)):
            for row in part[part.rho.notna()].itertuples():
                y, colour = measures.index(row.measure) + 0.15 * (i - 1.5), PATHWAY_COLOURS[pathway]
                ax.plot([row.low, row.high], [y, y], color=colour, lw=1)
                ax.plot(row.rho, y, "o", color=colour, mfc=colour if row.low > 0 or row.high < 0 else "white", ms=5)
        ax.set(title=score, xlabel="rank correlation", xlim=(-1.05, 1.05), ylim=(len(measures) - 0.5, -0.5), yticks=[])
    fig.axes[0].set_yticks(range(len(measures)), [WORDS["measure"].get(name, words(name)) for name in measures])
    return _legend(fig, ncols=6, handles=_dots({name: PATHWAY_COLOURS[name] for name in table.pathway.unique()}))


def ladder(rows: pd.DataFrame, general: float) -> Figure:
    """Facts told and held-out facts repaired over the number of changed parameters, one labelled dot a method. general:
    the share of the held-out facts from which a method generalises."""
    panels = {"facts told": ("facts_told", "facts_n"), "held-out repaired": ("held_out_repaired", "held_out_n")}
    fig, axes = _panels(2, 1, (9.5, 4.8), xscale="log")
    for ax, (label, (measure, size)) in zip(axes.flat, panels.items(), strict=True):
        top = rows[size].max()
        ax.axhline(top, color="#cccccc", lw=0.8)
        placed = rows.assign(x=rows.parameters.clip(lower=LEFT_EDGE)).sort_values([measure, "x"], kind="stable")
        ax.scatter(placed.x, placed[measure], color=placed.kind.map(KIND_COLOURS), s=49)
        apart = (placed.x > NEXT * placed.x.shift()) | placed[measure].diff().ne(0)
        for _, group in placed.groupby(apart.cumsum()):  # neighbours share a label, at the right of the last
            numbers = ", ".join(str(i + 1) for i in sorted(group.index))
            _name_point(ax, numbers, group.x.iloc[-1], group[measure].iloc[0], (6, 0), fontsize=8, va="center")
        ax.set(ylabel=label, ylim=(-0.05 * top, 1.15 * top))
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))  # facts are whole
    ax.axhline(general * top, color="black", lw=1, ls=":")
    ax.set_xlabel("changed parameters (left edge: none)")
    names = [f"{i} {name}" + ("" if i % 4 else "\n") for i, name in enumerate(rows.rival, 1)]  # four a line
    fig.supxlabel("   ".join(names), fontsize=8)
    return _legend(fig, ncols=4, handles=_dots({k: c for k, c in KIND_COLOURS.items() if k in set(rows.kind)}, lw=0))


def planted_curves(table: pd.DataFrame) -> Figure:
    """Answer minus competitor by layer before and after planting, a panel a plant; facts thin, means bold."""
    colours = {"controls, planted": GREY, "failing template, before": BLUE, "failing template, planted": RED}
    table = table.sort_values("seed", kind="stable")
    size, label = (4.9 * table.seed.nunique(), 3.1), MARGIN
    fig, panels = _split(table, "seed", size, sharey=False, xlabel="layers summed", ylabel=label)
    for ax, _, plant in panels:
        for name, part in plant.groupby("curve", sort=False):
            lines = part.pivot(index="layer", columns="fact", values="logits")
            look = {"ls": "--", "zorder": 4} if name.startswith("controls") else {"zorder": 3}
            _curves(ax, lines, colours[name], name, (0.5, 0.35), lw=2.6, **look)
        ax.axhline(0, color="black", lw=0.6)
        first = plant.iloc[0]
        _mark_layer(ax, Site.parse(first.site), ORANGE, 0.97)
        ax.set_title(f"{first.planted}\n{first.template.replace('{}', '…')}", loc="left", fontsize=9.5)
    return _legend(fig, ncols=3)


def rule_scores(table: pd.DataFrame, goals: dict[str, float]) -> Figure:
    """Share of plants of which each rule is right, with exact intervals; one panel a question, one colour a model.
    Dashed: the goal. Diamonds: chance, which has no interval."""
    panels = {"kind": "failure kind", "layer": "exact layer", "kind and site": "kind and site"}
    fig, axes = _panels(1, len(panels), (10, 3.2), sharey=True, xlim=(-0.03, 1.03))
    rules = table.rule.str.replace(r"^always .*", "best constant", regex=True).unique()
    models = table.model.nunique()
    for ax, (question, label) in zip(axes.flat, panels.items(), strict=True):
        for i, (name, part) in enumerate(table.groupby("model", sort=False)):
            y, colour = np.arange(len(part)) + 0.3 * (i - (models - 1) / 2), (BLUE, ORANGE)[i % 2]
            low, share, high = (part[f"{question}{end}"] for end in (" low", "", " high"))
            _intervals(ax, y, low, share.where(low.notna()), high, colour, s=30, label=name)
            ax.scatter(share.where(low.isna()), y, color=colour, s=30, marker="D", zorder=3)
        if question in goals:
            ax.axvline(goals[question], color="black", lw=1, ls="--")
        ax.set_title(label)
        ax.set_xticks((0, 0.25, 0.5, 0.75, 1), ("0", "", "50 %", "", "100 %"))
        ax.grid(axis="x")
    axes[0, 0].set_yticks(range(len(rules)), rules)
    return _legend(_rows_down(fig, "share of plants"), ncols=2)


def planted_and_named(runs: pd.DataFrame) -> Figure:
    """One column a plant, ordered by where it was planted: hollow, the layers of its sites; filled, the layer named by
    the joined rule, blue where site and kind are right. A row a planted kind."""
    plants = runs[runs.accepted].sort_values("kind", kind="stable")
    n = plants.kind.nunique()
    fig, panels = _split(plants, "kind", (10, 1.8 * n + 0.3), rows=n, sharey=False)
    for ax, kind, part in panels:
        planted = [sorted({Site.parse(site).layer + 1 for site in text.split(", ")}) for text in part.truth]
        named = [Site.parse(site).layer + 1 for site in part["joined: named"]]
        right = part["joined: kind"].astype(bool) & part["joined: site"].astype(bool)
        for x, (layers, layer, is_right) in enumerate(sorted(zip(planted, named, right, strict=True))):
            ax.plot([x] * len(layers), layers, color="#cccccc", lw=1, zorder=1)
            ax.scatter([x] * len(layers), layers, s=52, ec="black", c="white", lw=1, zorder=2)
            colour, marker = (BLUE, "o") if is_right else (RED, "X")
            ax.scatter(x, layer, s=22, color=colour, marker=marker, zorder=3)
        ax.set(xticks=[], ylabel="layer", xlim=(-1, len(part)))
        ax.set_title(f"planted: {kind} (n = {len(part)}, {int(right.sum())} right)", loc="left", fontsize=10)
    fig.supxlabel("plants, by planted layer", fontsize=11)
    handles = _dots({"planted": BLACK, "named, kind and site right": BLUE, "named, wrong": RED}, ls="", ms=7)
    handles[0].set(markerfacecolor="white")
    handles[2].set(marker="X")
    return _legend(fig, ncols=3, handles=handles)


def cost_ratios(table: pd.DataFrame) -> Figure:
    """How many times faster than each peer, a colour a model, with the spread over rounds; the goal as a bar; hollow:
    goal missed. A line a peer, without what its name has in brackets, which may be of one model."""
    peers = [textwrap.fill("beside " + peer.partition(" (")[0], 72) for peer in table.peer]
    names = [f"{row}\n{peer}" for row, peer in zip(table.row, peers, strict=True)]
    lines = list(dict.fromkeys(names))
    fig, ax = _panel((9.5, 0.46 * len(lines) + 1.1))
    ax.axvline(1, color="black", lw=0.8)
    parts = table.assign(y=[float(lines.index(name)) for name in names]).groupby("model", sort=False)
    for i, (colour, (model, part)) in enumerate(zip((BLUE, ORANGE, GREEN), parts, strict=False)):
        y = part.y + 0.36 * (i - (parts.ngroups - 1) / 2)
        ax.hlines(y, part.least, part.most, color=colour, lw=2)
        fill = ["white" if met is False else colour for met in part.met]
        ax.scatter(part.ratio, y, s=40, ec=colour, c=fill, lw=1.8, zorder=3)
        ax.scatter(part.goal, y, marker="|", s=130, color=RED, zorder=2, lw=2, label="goal")
        ax.scatter(part.bound, y, marker="d", s=30, ec=GREY, c="white", zorder=2, label="fewer operations")
        ax.scatter([], [], s=40, color=colour, label=model)
    ax.set_yticks(range(len(lines)), lines, fontsize=8.5)
    ax.set(xscale="log", xlabel="times faster than the peer")
    ax.xaxis.set_major_formatter("{x:g}x")
    ax.invert_yaxis()
    return _legend(fig, ncols=4)


def cost_growth(points: pd.DataFrame) -> Figure:
    """Seconds of a trace and of a plain forward pass, by what grows."""
    fig, panels = _split(points, "grows", (11, 3.2), sharey=False, ylabel="seconds")
    for ax, grows, part in panels:
        part = part.sort_values("at")
        ax.plot(part["at"], part.trace_s, "o-", ms=4, color=BLUE, label="trace, three conventions")
        ax.plot(part["at"], part.forward_s, "s--", ms=4, color=GREY, label="forward pass")
        ax.set(xscale="log", yscale="log", xlabel=grows)
        ticks = _apart(part["at"])
        ax.set_xticks(ticks, [EngFormatter(sep="", places=0)(v) for v in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(), major_formatter="{x:g}")
    return _legend(fig, ncols=2)


def visible(token: str) -> str:
    """A token as people can see it: leading space dropped, line ends and control tokens shown."""
    return token.replace("\n", "↵").strip() or "␣"


# How they are drawn


def _panels(
    rows: int, columns: int, size: tuple[float, float], *, sharey: bool = False, ylabel: str = "", **settings: Any
) -> tuple[Figure, np.ndarray]:
    """A figure that pyplot forgets at once: a notebook shows it when a cell returns it, and not a second time.
    ylabel: of the first panel; settings: of every panel."""
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=sharey, subplot_kw=settings)
    axes[0, 0].set_ylabel(ylabel)
    for ax in axes.flat if "layer" in settings.get("xlabel", "") else ():
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no layer 2.5
    plt.close(fig)
    return fig, axes


def _panel(size: tuple[float, float], **settings: Any) -> tuple[Figure, Axes]:
    fig, axes = _panels(1, 1, size, **settings)
    return fig, axes[0, 0]


def _split(
    table: pd.DataFrame, column: str, size: tuple[float, float], *, rows: int = 1, sharey: bool = True, **settings: Any
) -> tuple[Figure, list[tuple[Axes, Any, pd.DataFrame]]]:
    """A panel a value of a column, in rows, with the value and its part of the table."""
    parts = list(table.groupby(column, sort=False))
    fig, axes = _panels(rows, -(-len(parts) // rows), size, sharey=sharey, **settings)
    for ax in axes.flat[len(parts) :]:
        ax.set_visible(False)
    return fig, [(ax, value, part) for ax, (value, part) in zip(axes.flat, parts, strict=False)]


def _head_axes(ax: Axes, layers: int, heads: int) -> None:
    step = 3 if layers > WIDE else 1
    ax.set_xticks(range(0, layers, step), [str(i + 1) for i in range(0, layers, step)])
    ax.set_yticks(range(0, heads, 2), [str(h) for h in range(0, heads, 2)])
    ax.set(xlabel="layer", ylabel="head")


def _mark_layer(ax: Axes, site: Site, colour: str, height: float) -> None:
    """A dashed line at a site's layer, with its name at a height (a share of the axis)."""
    ax.axvline(site.layer + 1, color=colour, lw=1.2, ls="--")
    look = {"xycoords": ("data", "axes fraction"), "ha": "right", "va": "top" if height > 0.5 else "bottom"}
    _name_point(ax, str(site), site.layer + 1, height, (-3, 0), color=colour, **look)


def _name_point(ax: Axes, text: str, x: float, y: float, offset: tuple[float, float], **look: Any) -> None:
    """Text beside a point; offset in points."""
    ax.annotate(text, (x, y), xytext=offset, textcoords="offset points", **{"fontsize": 9, **look})


def _curves(ax: Axes, by_layer: Any, colour: str, label: str, thin: tuple[float, float], **look: Any) -> None:
    """Of layer x fact: a line a fact, thin (width, opacity), and their mean bold (look)."""
    table, (width, opacity) = pd.DataFrame(by_layer), thin
    ax.plot(table, color=colour, lw=width, alpha=opacity)
    ax.plot(table.mean(1), **{"color": colour, "lw": 3, "label": label, **look})


def _intervals(ax: Axes, y: Any, low: pd.Series, middle: pd.Series, high: pd.Series, colour: Any, **look: Any) -> None:
    """A dot and its interval a row."""
    ax.hlines(y, low, high, color=colour, lw=2)
    ax.scatter(middle, y, **{"color": colour, "zorder": 3, **look})


def _matrix(ax: Axes, filled: pd.DataFrame, colour: str, *, fontsize: float = 11) -> None:
    """Cells, filled where true, with thin lines between them and the table's names at the left and on top."""
    n_rows, n_columns = filled.shape
    ax.imshow(filled.to_numpy(), aspect="auto", cmap=ListedColormap(["#ffffff", colour]), vmin=0, vmax=1)
    ax.set_xticks(range(n_columns), filled.columns)
    ax.xaxis.tick_top()
    ax.set_yticks(range(n_rows), filled.index, fontsize=fontsize)
    ax.set_xticks(np.arange(n_columns + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(n_rows + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="#cccccc", lw=0.6)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)


def _legend(fig: Figure, *, ncols: int, handles: Sequence[mpl.artist.Artist] = ()) -> Figure:
    """The figure with a legend above the panels: of the handles, or of what the panels label, each label once."""
    labelled = {label: handle for ax in fig.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(handles=list(handles or labelled.values()), ncols=ncols, loc="outside upper center")
    return fig


def _rows_down(fig: Figure, below: str) -> Figure:
    """The figure with the rows of its panels from the top down, and a label below them all."""
    fig.axes[0].invert_yaxis()
    fig.supxlabel(below, fontsize=11)
    return fig


def _dots(colours: dict[str, str], **look: Any) -> list[mpl.artist.Artist]:
    """Handles of a legend: a dot a label."""
    return [mpl.lines.Line2D([], [], marker="o", color=c, label=words(k), **look) for k, c in colours.items()]


def _apart(values: Iterable[float]) -> list[float]:
    """Of values, those far enough apart to bear a label each on a logarithmic axis, the largest among them."""
    apart: list[float] = []
    for value in sorted(values, reverse=True):
        if not apart or apart[-1] >= 1.4 * value:
            apart.append(value)
    return apart[::-1]
