"""Arrays -> matplotlib figures. Nothing here runs a model.

Colours are Okabe and Ito's, safe for colour-blind readers; signed quantities use a diverging map centred on zero,
shares a sequential one. Layers are numbered from 1 and heads from 0 on every axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import fill

import matplotlib as mpl
import numpy as np
import pandas as pd
from IPython import get_ipython
from jaxtyping import Float
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
from matplotlib_inline.backend_inline import set_matplotlib_formats
from torch import Tensor

from lib.diagnosis import Diagnosis
from lib.evaluation import NONE, Measured
from lib.sites import Site
from lib.statistics import exact_interval

BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#777777",
)
TYPE_COLOURS = (RED, BLUE, GREEN, ORANGE, GREY, PINK, SKY, "#000000")
PATHWAY_COLOURS = {"full": "#000000", "attention": BLUE, "ffn": ORANGE, "v_only": GREEN, "q_only": PINK, "k_only": RED}
ROLE_COLOURS = {"copies": BLUE, "suppresses": RED, "maps relation": GREEN, "neither": "#dddddd"}


def style() -> None:
    """The book's look: call it once in a chapter's set-up cell. In a notebook figures are drawn as SVG, sharp at every
    size, with nothing in the file that differs from run to run."""
    if get_ipython() is not None:
        set_matplotlib_formats("svg", metadata={"Date": None})
    mpl.rcParams.update(
        {
            "figure.dpi": 220,
            "savefig.dpi": 160,
            "svg.hashsalt": "book",
            "figure.facecolor": "white",
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
            "image.interpolation": "nearest",
        }
    )


def head_heatmap(
    grids: dict[str, Float[Tensor, "n_layers n_heads"]],
    *,
    label: str,
    signed: bool = False,
    mark: Sequence[Site] = (),
    chance: tuple[float, float, float] | None = None,
) -> Figure:
    """One panel a grid, layers across and heads down, one colour scale for all. mark: heads to frame.
    chance: mean, low, high of a null, drawn on the colour bar."""
    first = next(iter(grids.values()))
    wide = first.shape[0] > 16
    shape = (len(grids), 1) if wide else (1, len(grids))
    fig, axes = _panels(*shape, (9, 0.9 + 2.5 * len(grids)) if wide else (1.5 + 4.4 * len(grids), 4.2))
    arrays = {title: grid.cpu().numpy() for title, grid in grids.items()}
    values = np.concatenate([a.ravel() for a in arrays.values()])
    top = float(np.abs(values).max() if signed else values.max()) or 1.0
    for ax, (title, grid) in zip(axes.flat, arrays.items(), strict=True):
        ax.imshow(grid.T, aspect="auto", cmap="RdBu_r" if signed else "viridis", vmin=-top if signed else 0, vmax=top)
        _head_axes(ax, grid.shape[0], grid.shape[1])
        ax.set_title(title, loc="left")
        edge = "black" if signed else "white"
        for layer, head in ((s.layer, s.head) for s in mark if s.head is not None):
            ax.add_patch(mpl.patches.Rectangle((layer - 0.5, head - 0.5), 1, 1, fill=False, ec=edge, lw=2))
    bar = fig.colorbar(axes[0, 0].images[0], ax=axes, label=label, fraction=0.05, pad=0.02)
    if chance:
        bar.ax.axhline(chance[0], color="white", lw=2)
        bar.ax.axhspan(chance[1], chance[2], color="white", alpha=0.35, lw=0)
    return fig


def role_map(roles: pd.DataFrame, column: str = "value") -> Figure:
    """Every head coloured by a categorical role."""
    names = list(ROLE_COLOURS)
    grid = roles.pivot(index="head", columns="layer", values=column).map(names.index)
    fig, ax = _panel((9, 3.1) if grid.shape[1] > 16 else (6.5, 4))
    ax.imshow(grid, aspect="auto", cmap=ListedColormap(list(ROLE_COLOURS.values())), vmin=0, vmax=len(names) - 1)
    _head_axes(ax, grid.shape[1], grid.shape[0])
    handles = [mpl.patches.Patch(color=ROLE_COLOURS[n], label=f"{n} ({(roles[column] == n).sum()})") for n in names]
    fig.legend(handles=handles, ncols=4, loc="outside upper center")
    return fig


def k_norm_by_layer(table: pd.DataFrame) -> Figure:
    """K-norm of each token type relative to the layer's mean over types, with bootstrap bands."""
    centre = table.groupby("layer")["mean"].transform("mean")
    fig, ax = _panel((9, 4.4))
    for colour, (name, part) in zip(
        TYPE_COLOURS, table.assign(centre=centre).groupby("type", sort=False), strict=False
    ):
        x, bold = part.layer + 1, name == "proper_noun"
        ax.fill_between(x, part.low / part.centre, part.high / part.centre, color=colour, alpha=0.15, lw=0)
        ax.plot(x, part["mean"] / part.centre, color=colour, lw=3 if bold else 1.3, label=name.replace("_", " "))
    ax.axhline(1, color="black", lw=0.6)
    ax.set(xlabel="layer", ylabel="K-norm, relative to\nthe mean of the types", xlim=(1, table.layer.max() + 1))
    fig.legend(ncols=4, loc="outside upper center")
    return fig


def told_matrix(table: pd.DataFrame) -> Figure:
    """Templates down, facts across: filled where the answer is told; where not, the token that is said instead."""
    subjects, templates = table.subject.unique(), table.template.unique()
    fig, ax = _panel((10, 0.42 * len(templates) + 1))
    told = table.pivot(index="template", columns="subject", values="told").loc[templates, subjects]
    ax.imshow(told, aspect="auto", cmap=ListedColormap(["#ffffff", BLUE]), vmin=0, vmax=1)
    for row in table.itertuples():
        y, x = list(templates).index(row.template), list(subjects).index(row.subject)
        ax.text(x, y, visible(row.top), ha="center", va="center", fontsize=9, color="white" if row.told else "black")
    ax.set_xticks(range(len(subjects)), subjects)
    ax.xaxis.tick_top()
    counts = told.sum(1)
    ax.set_yticks(range(len(templates)), [f"{t.replace('_', ' ')}  {counts[t]}/{len(subjects)}" for t in templates])
    ax.set_xticks(np.arange(len(subjects) + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(templates) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="#cccccc", lw=0.6)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)
    return fig


def cumulative_curves(diagnoses: Sequence[Diagnosis]) -> Figure:
    """Answer minus competitor by layer, in logits: each failing prompt thin, means bold, controls beside them."""
    fig, axes = _panels(1, len(diagnoses), (4.9 * len(diagnoses), 4))
    for ax, d in zip(axes.flat, diagnoses, strict=True):
        for curves, colour, name in (
            (d.evidence.control.curve, BLUE, "told under control templates"),
            (d.evidence.failing.curve, RED, "failing template"),
        ):
            layers = np.arange(curves.shape[1])
            ax.plot(layers, curves.T.cpu().numpy(), color=colour, lw=0.6, alpha=0.45)
            ax.plot(layers, curves.mean(0).cpu().numpy(), color=colour, lw=3, label=name)
        ax.axhline(0, color="black", lw=0.6)
        _mark_layer(ax, d.verdict.knowledge_head, GREEN, 0.97)
        if d.verdict.suppressor:
            _mark_layer(ax, d.verdict.suppressor, ORANGE, 0.03)
        ax.set(xlabel="layers summed", title=f"{d.case.title} (n = {len(d.evidence.facts)})")
    axes[0, 0].set_ylabel("answer − competitor (logits)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, ncols=2, loc="outside upper center")
    return fig


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
    fig, ax = _panel((8.5, 3.8))
    for (name, r), colour in zip(ranks.items(), (BLUE, RED, ORANGE, PINK, GREY), strict=False):
        low, mid, high = np.quantile(r.cpu().numpy(), (0.25, 0.5, 0.75), axis=0)
        x = np.arange(r.shape[1])
        ax.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        ax.plot(x, mid, color=colour, lw=2.5, label=name)
    ax.set(yscale="log", xlabel="after layer", ylabel="rank of the answer\n(1 is the top)")
    ax.invert_yaxis()
    ax.legend(loc="upper left")
    return fig


def attention_rows(rows: dict[str, tuple[list[str], Float[Tensor, " t"]]], head: Site) -> Figure:
    """Attention of one head from the last token to each token of a few prompts."""
    fig, axes = _panels(len(rows), 1, (9, 1.15 * len(rows) + 0.6))
    for ax, (title, (tokens, weights)) in zip(axes.flat, rows.items(), strict=True):
        ax.imshow(weights.cpu().numpy()[None], aspect="auto", cmap="Blues", vmin=0, vmax=1)
        ax.set_xticks(range(len(tokens)), [visible(t) for t in tokens], fontsize=9)
        ax.set_yticks([])
        ax.set_title(title, loc="left", fontsize=10, fontweight="normal")
        ax.spines[:].set_visible(False)
        for i, w in enumerate(weights.tolist()):
            ax.text(i, 0, f"{w:.2f}", ha="center", va="center", fontsize=9, color="white" if w > 0.5 else "black")
    fig.suptitle(f"{head}: attention from the last token")
    return fig


def attention_by_template(table: pd.DataFrame) -> Figure:
    """Attention from the last token to the subject, one dot a fact: failing against control, by head and case."""
    heads, cases = list(table.site.unique()), list(table.case.unique())
    fig, axes = _panels(1, len(cases), (4.9 * len(cases), 3.4), sharey=True)
    for ax, case in zip(axes.flat, cases, strict=True):
        for shift, (kind, colour) in zip((-0.15, 0.15), (("control", BLUE), ("failing", RED)), strict=True):
            part = table[(table.case == case) & (table.kind == kind)]
            x = part.site.map(heads.index) + shift
            ax.scatter(x, part.attention, s=16, color=colour, alpha=0.5, lw=0, label=f"{kind} template")
            means = part.groupby("site").attention.mean().reindex(heads)
            ax.scatter(np.arange(len(heads)) + shift, means, s=240, marker="_", color=colour, lw=3)
        ax.set_xticks(range(len(heads)), heads)
        ax.set(title=case, ylim=(-0.03, 1.03))
    axes[0, 0].set_ylabel("attention to the subject")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, ncols=2, loc="outside upper center")
    return fig


def prefix_bars(table: pd.DataFrame) -> Figure:
    """Share told with each neutral prefix, with exact intervals, one panel a case."""
    cases, prefixes = list(table.case.unique()), list(table.prefix.unique())
    fig, axes = _panels(1, len(cases), (4.9 * len(cases), 0.42 * len(prefixes) + 1.3), sharey=True)
    for ax, case in zip(axes.flat, cases, strict=True):
        part = table[table.case == case].set_index("prefix").loc[prefixes]
        share = part.told / part.n
        ends = np.array([exact_interval(int(k), int(n)) for k, n in zip(part.told, part.n, strict=True)]).T
        ax.barh(range(len(prefixes)), share, color=[GREY if p == "none" else BLUE for p in prefixes], height=0.65)
        ax.errorbar(
            share,
            range(len(prefixes)),
            xerr=np.abs(ends - share.to_numpy()),
            fmt="none",
            ecolor="black",
            lw=1.2,
            capsize=2,
        )
        ax.set_yticks(range(len(prefixes)), [p if "<|" in p else p.replace("_", " ") for p in prefixes])
        ax.set(xlim=(0, 1), xlabel="share told", title=f"{case} (n = {part.n.iloc[0]})")
    axes[0, 0].invert_yaxis()
    return fig


def subject_norms(norms: dict[str, Float[Tensor, "fact n_layers+1"]]) -> Figure:
    """Norm of the residual stream at the subject's last token, layer by layer, one thin line a fact."""
    fig, ax = _panel((8.5, 3.8))
    for (name, values), colour in zip(norms.items(), (RED, BLUE, ORANGE, PINK, GREEN), strict=False):
        ax.plot(values.T.cpu().numpy(), color=colour, lw=0.6, alpha=0.5)
        ax.plot(values.mean(0).cpu().numpy(), color=colour, lw=3, label=name)
    ax.set(yscale="log", xlabel="after layer", ylabel="norm of the subject's\nresidual stream")
    ax.legend(loc="lower right")
    return fig


def static_against_dynamic(
    static: Float[Tensor, "n_layers n_heads"], dynamic: Float[Tensor, "n_layers n_heads"], name: int = 6
) -> Figure:
    """Every head: the relation map's score against what it writes; the strongest are named."""
    fig, ax = _panel((7, 4.2))
    x, y = static.flatten().cpu().numpy(), dynamic.flatten().cpu().numpy()
    ax.scatter(x, y, s=22, color=BLUE, alpha=0.6, lw=0)
    ax.axhline(0, color="black", lw=0.6)
    order = np.argsort(-(x / (x.max() or 1) + y / (np.abs(y).max() or 1)))
    for i in order[:name]:
        ax.annotate(
            str(Site(*divmod(int(i), static.shape[1]))),
            (x[i], y[i]),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=9,
        )
    ax.set(
        xlim=(-0.03 * x.max(), 1.15 * x.max() + 1e-9),
        xlabel="relation map: share of countries with their\ncapital in the head's top 10 (no input)",
        ylabel="written of the answer\nunder controls (logits)",
    )
    return fig


def training_curves(seeds: pd.DataFrame, margin: float) -> Figure:
    """Smallest margin over the facts, and KL on the step's neutral window, by step: one thin line a seed."""
    fig, axes = _panels(1, 2, (9.8, 4))
    for name, some in seeds.groupby("pathway", sort=False):
        for i, run in enumerate(some.itertuples()):
            label = name.replace("_", " ") if i == 0 else None
            options = {"color": PATHWAY_COLOURS[name], "lw": 2 if i == 0 else 0.7, "alpha": 1 if i == 0 else 0.5}
            axes[0, 0].plot(run.margins, label=label, **options)
            axes[0, 1].plot(np.clip(run.kls, 1e-6, None), **options)
    axes[0, 0].axhline(margin, color="black", lw=1, ls="--")
    axes[0, 0].axhline(0, color="black", lw=0.6)
    axes[0, 0].set(xlabel="step", ylabel="smallest margin of\nthe facts (logits)")
    axes[0, 1].set(xlabel="step", ylabel="KL on a neutral window\n(nats a token)", yscale="log")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, ncols=6, loc="outside upper center")
    return fig


def before_after(table: pd.DataFrame) -> Figure:
    """Probability of each fact's answer under the failing template, before (grey) and after each pathway's edit;
    filled where the answer is told."""
    names = [n for n in table.pathway.unique() if n != "none"]
    before = table[table.pathway == "none"].set_index("subject")
    fig, axes = _panels(2, -(-len(names) // 2), (9.8, 0.55 * len(before) + 1.6), sharey=True)
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    for ax, name in zip(axes.flat, names, strict=False):
        after = table[table.pathway == name].set_index("subject").loc[before.index]
        y = np.arange(len(before))
        ax.hlines(y, before.prob, after.prob, color="#bbbbbb", lw=1.5, zorder=1)
        for part, colour in ((before, GREY), (after, PATHWAY_COLOURS[name])):
            ax.scatter(part.prob, y, s=34, lw=1.4, ec=colour, c=np.where(part.told, colour, "white"), zorder=2)
        told = f"{int(before.told.sum())} → {int(after.told.sum())} of {len(before)}"
        ax.set_title(f"{name.replace('_', ' ')}: {told}", loc="left", fontsize=10)
        ax.set(xscale="log", xlim=(min(1e-4, before.prob.min() / 2), 1.4), yticks=y, yticklabels=list(before.answer))
        ax.grid(axis="x", color="#dddddd", lw=0.6)
    axes[0, 0].invert_yaxis()
    fig.supxlabel("probability of the answer's first token", fontsize=11)
    return fig


def price(table: pd.DataFrame, seeds: pd.DataFrame) -> Figure:
    """Parameters of each pathway against its KL on the neutral passages: a dot a seed, filled where the goal was
    reached."""
    fig, ax = _panel((8, 4))
    for row in table.itertuples():
        part, colour = seeds[seeds.pathway == row.pathway], PATHWAY_COLOURS[row.pathway]
        fill = np.where(part.reached, colour, "white")
        ax.scatter(np.full(len(part), row.parameters), part.kl, s=36, ec=colour, c=fill, alpha=0.8)
        above = row.pathway != "k_only"
        ax.annotate(
            f"{row.pathway.replace('_', ' ')}: {int(part.reached.sum())}/{len(part)}",
            (row.parameters, part.kl.max() if above else part.kl.min()),
            xytext=(0, 7 if above else -15),
            textcoords="offset points",
            ha="center",
            color=colour,
            fontsize=10,
        )
    ax.set(xscale="log", yscale="log", xlabel="parameters trained", ylabel="KL on neutral passages\n(nats a token)")
    ax.margins(0.15, 0.2)
    return fig


def probe_matrix(measured: Measured) -> Figure:
    """Every probe by pathway: filled where it is right; a frame where an edit changed the outcome."""
    base = measured.asked[NONE]
    pick = base.set.isin(["capability", "unrelated"])
    right = pd.DataFrame({name: asked.told[pick] for name, asked in measured.asked.items()})
    labels = base["item"][pick].str.replace("_", " ")
    fig, ax = _panel((7.4, 0.27 * len(right) + 1))
    ax.imshow(right.to_numpy(), aspect="auto", cmap=ListedColormap(["#ffffff", SKY]), vmin=0, vmax=1)
    for y, x in zip(*np.nonzero(right.ne(right[NONE], axis=0).to_numpy()), strict=True):
        colour = GREEN if right.iloc[y, x] else RED
        ax.add_patch(mpl.patches.Rectangle((x - 0.45, y - 0.45), 0.9, 0.9, fill=False, ec=colour, lw=2.5))
    counts = right.groupby(base.set[pick]).sum()
    ax.axhline((base.set[pick] == "capability").sum() - 0.5, color="black", lw=1.2)
    heads = [
        f"{'untouched' if n == NONE else n.replace('_', ' ')}\n{counts[n]['capability']} + {counts[n]['unrelated']}"
        for n in right
    ]
    ax.set_xticks(range(right.shape[1]), heads)
    ax.xaxis.tick_top()
    ax.set_yticks(range(len(right)), labels, fontsize=9)
    ax.set_xticks(np.arange(right.shape[1] + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(right) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="#cccccc", lw=0.6)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)
    return fig


def perplexity_ratios(table: pd.DataFrame, band: float) -> Figure:
    """Perplexity after over before, with bootstrap intervals; grey: within the band around 1."""
    fig, ax = _panel((8, 0.45 * len(table) + 1.1))
    y = np.arange(len(table))
    ax.axvspan(1 - band, 1 + band, color="#dddddd", lw=0)
    ax.axvline(1, color="black", lw=0.6)
    for i, row in enumerate(table.itertuples()):
        colour = PATHWAY_COLOURS[row.pathway]
        ax.plot([row.ratio_low, row.ratio_high], [i, i], color=colour, lw=2)
        ax.scatter(row.ratio, i, color=colour, s=40, zorder=3)
    ax.set_yticks(y, table.pathway.str.replace("_", " "))
    ax.invert_yaxis()
    ax.set_xlabel("perplexity after the edit / before")
    return fig


def outcomes(table: pd.DataFrame, kinds: Sequence[str]) -> Figure:
    """For each kind of question: the share told before (grey) and after (colour) each pathway's edit."""
    fig, axes = _panels(2, -(-len(kinds) // 2), (9.8, 5.4), sharey=True)
    for ax in axes.flat[len(kinds) :]:
        ax.set_visible(False)
    for ax, kind in zip(axes.flat, kinds, strict=False):
        part = table[table.what == kind]
        y = np.arange(len(part))
        ax.hlines(y, part.before / part.n, part.after / part.n, color="#bbbbbb", lw=2, zorder=1)
        ax.scatter(part.before / part.n, y, color=GREY, s=30, zorder=2)
        ax.scatter(part.after / part.n, y, color=[PATHWAY_COLOURS[p] for p in part.pathway], s=46, zorder=3)
        ax.set(xlim=(-0.05, 1.05), yticks=y, yticklabels=part.pathway.str.replace("_", " "))
        ax.set_title(f"{kind.replace(', ', ',' + chr(10))}, n = {part.n.iloc[0]}", fontsize=9.5, loc="left")
        ax.grid(axis="x", color="#dddddd", lw=0.6)
    axes[0, 0].invert_yaxis()
    fig.supxlabel("share told: before (grey), after (colour)", fontsize=11)
    return fig


def bleeding(table: pd.DataFrame, control: pd.DataFrame) -> Figure:
    """Prompts about other countries that are wrongly answered with a trained answer, by pathway."""
    fig, ax = _panel((8, 3.4))
    x = np.arange(len(table))
    ax.bar(x, table.bled, color=[PATHWAY_COLOURS.get(p, GREY) for p in table.pathway], width=0.6, alpha=0.85)
    ax.scatter(x[1:] + 0.36, control.bled[1:], marker="x", color="black", s=36, label="noise of the same size")
    for i, count in zip(x, table.bled, strict=True):
        ax.annotate(str(count), (i, count), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=10)
    ax.set_xticks(x, ["untouched" if p == NONE else p.replace("_", " ") for p in table.pathway])
    label = f"trained answers, wrongly\n(of {table.prompts.iloc[0]} prompts)"
    ax.set(ylabel=label, ylim=(0, 1.15 * table.bled.max() + 1))
    fig.legend(loc="outside upper center")
    return fig


def generalisation(table: pd.DataFrame, control: pd.DataFrame) -> Figure:
    """Share of the held-out known but untold countries that each edit makes told, with exact intervals; crosses: a
    random change of the same size; dashed: the single best control template, with no edit at all."""
    part, noise = (t[t.split == "held_out"].reset_index(drop=True) for t in (table, control))
    fig, ax = _panel((8, 3.6))
    x, n = np.arange(len(part)), part.untold
    share = part.repaired / n
    ax.bar(x, share, color=[PATHWAY_COLOURS[p] for p in part.pathway], width=0.6, alpha=0.85)
    ends = np.abs(part[["low", "high"]].to_numpy().T - share.to_numpy())
    ax.errorbar(x, share, yerr=ends, fmt="none", ecolor=GREY, lw=1.5, capsize=3)
    ax.scatter(x + 0.36, noise.repaired / noise.untold, marker="x", color="black", s=36, label="noise of the same size")
    ceiling = part.best_control.iloc[0] / n.iloc[0]
    ax.axhline(ceiling, color="black", lw=1, ls="--", label="best control template, no edit")
    ax.set_xticks(x, part.pathway.str.replace("_", " "))
    ax.set(ylim=(-0.02, 1), ylabel=f"share made told\n(of {n.iloc[0]} held-out countries)")
    fig.legend(ncols=2, loc="outside upper center")
    return fig


def carried(table: pd.DataFrame, whole: int, layer: int) -> Figure:
    """What each place carries by layer. whole: told with the whole prefix; layer: the diagnosed one."""
    fig, ax = _panel((8.5, 3.8))
    for (place, part), colour in zip(table.groupby("place", sort=False), (BLUE, ORANGE, GREY), strict=True):
        ax.plot(part.layer, part.told, "o-", ms=3.5, lw=1.6, color=colour, label=place)
    ax.axhline(whole, color="black", lw=1, ls="--")
    ax.axvline(layer, color="black", lw=1, ls=":")
    ax.set(xlabel="stream that enters layer", ylabel=f"told, of {table.n.iloc[0]}", ylim=(-0.5, None))
    fig.legend(ncols=3, loc="outside upper center")
    return fig


def frontier(runs: pd.DataFrame, harmless: pd.Series, pick: int) -> Figure:
    """Repaired selection countries against KL on neutral text; a point a configuration."""
    fig, ax = _panel((8.5, 4.2))
    for (low, part), colour in zip(runs.groupby(runs["rank"] > 0), (BLUE, ORANGE), strict=False):
        ax.scatter(
            part.kl,
            part.repaired,
            s=42,
            edgecolors=colour,
            zorder=3,
            label="low rank" if low else "any change",
            facecolors=[colour if harmless[i] else "white" for i in part.index],
        )
    ax.scatter(runs.kl[pick], runs.repaired[pick], s=190, facecolors="none", edgecolors="black", lw=1.5)
    for row in runs.itertuples():
        ax.annotate(f"L{row.layer}", (row.kl, row.repaired), xytext=(5, 5), textcoords="offset points", fontsize=9)
    ax.axhline(runs.untold.iloc[0] / 2, color="black", lw=1, ls="--")
    ax.set(
        xscale="log",
        xlabel="KL on neutral text (nats a token)",
        ylim=(-0.5, runs.untold.iloc[0] / 2 + 1),
        ylabel=f"repaired, of {runs.untold.iloc[0]}\nselection countries",
    )
    fig.legend(ncols=2, loc="outside upper center")
    return fig


def effects_of_parts(table: pd.DataFrame) -> Figure:
    """Direct effect (hollow) and total effect (filled, with its interval) of taking each part away."""
    parts, ways = list(table.part.unique()), list(table.way.unique())
    fig, axes = _panels(1, len(ways), (9.8, 0.5 * len(parts) + 1.3), sharey=True)
    for ax, way in zip(axes.flat, ways, strict=True):
        some = table[table.way == way].set_index("part").reindex(parts)
        y = np.arange(len(parts))
        ax.axvline(0, color="black", lw=0.6)
        ax.hlines(y, some.low, some.high, color=BLUE, lw=2)
        ax.scatter(some.total, y, color=BLUE, s=40, zorder=3, label="total")
        ax.scatter(some.direct, y, s=40, ec=ORANGE, c="white", lw=1.8, zorder=2, label="direct")
        ax.set_yticks(y, parts)
        ax.set_title(way, loc="left", fontsize=10)
    axes[0, 0].invert_yaxis()
    fig.supxlabel("change of the answer's logit", fontsize=11)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, ncols=2, loc="outside upper center")
    return fig


def _panels(rows: int, columns: int, size: tuple[float, float], *, sharey: bool = False) -> tuple[Figure, np.ndarray]:
    """A figure that pyplot forgets at once: a notebook shows it when a cell returns it, and not a second time."""
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=sharey)
    plt.close(fig)
    return fig, axes


def _panel(size: tuple[float, float]) -> tuple[Figure, Axes]:
    fig, axes = _panels(1, 1, size)
    return fig, axes[0, 0]


def visible(token: str) -> str:
    """A token as people can see it: leading space dropped, line ends and control tokens shown."""
    return token.replace("\n", "↵").strip() or "␣"


def _head_axes(ax: Axes, layers: int, heads: int) -> None:
    step = 1 if layers <= 16 else 3
    ax.set_xticks(range(0, layers, step), [str(i + 1) for i in range(0, layers, step)])
    ax.set_yticks(range(0, heads, 2), [str(h) for h in range(0, heads, 2)])
    ax.set(xlabel="layer", ylabel="head")


def _mark_layer(ax: Axes, site: Site, colour: str, height: float) -> None:
    ax.axvline(site.layer + 1, color=colour, lw=1.2, ls="--")
    ax.annotate(
        str(site),
        (site.layer + 1, height),
        xycoords=("data", "axes fraction"),
        color=colour,
        fontsize=9,
        ha="right",
        va="top" if height > 0.5 else "bottom",
        xytext=(-3, 0),
        textcoords="offset points",
    )


def layer_sweep(means: pd.DataFrame, layer: int) -> Figure:
    """Told, held-out repaired and harm by layer, one line a pathway. layer: the diagnosed one, counted from 1."""
    panels = {"facts_told": "facts told", "held_out_repaired": "held-out repaired", "kl": "KL on neutral text (nats)"}
    fig, axes = _panels(1, 3, (10, 3.6))
    for ax, (column, label) in zip(axes.flat, panels.items(), strict=True):
        for i, (name, part) in enumerate(means.groupby("pathway", sort=False)):
            part = part.sort_values("layer")
            look = {"color": PATHWAY_COLOURS[name], "label": name.replace("_", " ")}
            at = part.layer + 0.2 * (i - 1.5)  # side by side, where equal
            ax.plot(at, part[column], "o-", ms=3.5, lw=1.2, **look)
        ax.axvline(layer, color="black", lw=1, ls=":")
        ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        ax.set(xlabel="layer", ylabel=label)
    axes[0, 0].set_ylim(-0.3, means.facts_told.max() + 0.3)
    axes[0, 1].set_ylim(-0.5, means.held_out_n.max() + 0.5)
    for ax in axes[0, :2]:
        ax.yaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    axes[0, 2].set_yscale("log")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, ncols=6, loc="outside upper center")
    return fig


def correlations(table: pd.DataFrame) -> Figure:
    """Rank correlations with intervals: a panel a score, a row a measure, a dot a pathway."""
    scores, measures = table.score.unique(), list(table.measure.unique())
    names = {
        "facts_told": "facts told",
        "steps": "fewer steps",
        "held_out_repaired": "held-out repaired",
        "kl": "less harm (KL)",
        "bled": "less bleeding",
    }
    fig, axes = _panels(1, len(scores), (10, 3.8))
    for ax, score in zip(axes.flat, scores, strict=True):
        ax.axvline(0, color="black", lw=0.6)
        for i, (pathway, part) in enumerate(table[table.score == score].groupby("pathway", sort=False)):
            for row in part[part.rho.notna()].itertuples():
                y, sure = measures.index(row.measure) + 0.15 * (i - 1.5), row.low > 0 or row.high < 0
                colour = PATHWAY_COLOURS[pathway]
                ax.plot([row.low, row.high], [y, y], color=colour, lw=1)
                ax.plot(row.rho, y, "o", color=colour, mfc=colour if sure else "white", ms=5)
        ax.set(title=score, xlabel="rank correlation", xlim=(-1.05, 1.05))
        ax.set_yticks(range(len(measures)), [names[m] for m in measures] if ax is axes[0, 0] else [])
        ax.set_ylim(len(measures) - 0.5, -0.5)
    handles = [
        mpl.lines.Line2D([], [], marker="o", color=PATHWAY_COLOURS[p], label=p.replace("_", " "))
        for p in table.pathway.unique()
    ]
    fig.legend(handles=handles, ncols=6, loc="outside upper center")
    return fig


def ladder(rows: pd.DataFrame, general: float) -> Figure:
    """Facts told and held-out facts repaired over the number of changed parameters, one labelled dot a method. general:
    the share of the held-out facts from which a method generalises."""
    kinds = {
        "no training": GREY,
        "few parameters": BLUE,
        "closed form": PINK,
        "pathway": ORANGE,
        "everything": RED,
        "general": GREEN,
    }
    fig, axes = _panels(2, 1, (9.5, 6.4))
    x = rows.parameters.clip(lower=0.3)
    for ax, (got, n, label) in zip(
        axes.flat,
        (("facts_told", "facts_n", "facts told"), ("held_out_repaired", "held_out_n", "held-out repaired")),
        strict=True,
    ):
        top = rows[n].max()
        ax.axhline(top, color="#cccccc", lw=0.8)
        for (at, value), group in rows.assign(x=x).groupby(["x", got]):
            names = ", ".join(str(i + 1) for i in group.index)  # dots in one place share a label
            ax.plot(at, value, "o", color=kinds[group.kind.iloc[0]], ms=7)
            ax.annotate(names, (at, value), xytext=(0, 6), textcoords="offset points", fontsize=8, ha="center")
        ax.set(xscale="log", ylabel=label, ylim=(-0.05 * top, 1.15 * top))
    axes[1, 0].axhline(general * rows.held_out_n.max(), color="black", lw=1, ls=":")
    axes[1, 0].set_xlabel("changed parameters (left edge: none)")
    text = "   ".join(f"{i + 1} {r.rival}" + ("\n" if i % 4 == 3 else "") for i, r in enumerate(rows.itertuples()))
    fig.supxlabel(text, fontsize=8)
    handles = [
        mpl.lines.Line2D([], [], marker="o", lw=0, color=c, label=k) for k, c in kinds.items() if (rows.kind == k).any()
    ]
    fig.legend(handles=handles, ncols=6, loc="outside upper center")
    return fig


def planted_curves(table: pd.DataFrame) -> Figure:
    """Answer minus competitor by layer before and after planting, a panel a plant; facts thin, means bold."""
    colours = {"controls, planted": GREY, "failing template, before": BLUE, "failing template, planted": RED}
    fig, axes = _panels(1, table.seed.nunique(), (4.9 * table.seed.nunique(), 4))
    for ax, (_, plant) in zip(axes.flat, table.groupby("seed"), strict=True):
        for name, part in plant.groupby("curve", sort=False):
            lines = part.pivot(index="layer", columns="fact", values="logits")
            ax.plot(lines.index, lines, color=colours[name], lw=0.5, alpha=0.35)
            ls, top = ("--", 4) if name.startswith("controls") else ("-", 3)
            ax.plot(lines.index, lines.mean(1), color=colours[name], lw=2.6, ls=ls, zorder=top, label=name)
        ax.axhline(0, color="black", lw=0.6)
        first = plant.iloc[0]
        _mark_layer(ax, Site.parse(first.site), ORANGE, 0.97)
        ax.set(xlabel="layers summed")
        ax.set_title(f"{first.planted}\n{first.template.replace('{}', '…')}", loc="left", fontsize=9.5)
    axes[0, 0].set_ylabel("answer − competitor (logits)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, ncols=3, loc="outside upper center")
    return fig


def rule_scores(table: pd.DataFrame, goals: dict[str, float]) -> Figure:
    """Share of plants of which each rule is right, with exact intervals; one panel a question, one colour a subject.
    Dashed: the goal. Diamonds: chance, which has no interval."""
    panels = {"kind": "failure kind", "layer": "exact layer", "kind and site": "kind and site"}
    fig, axes = _panels(1, len(panels), (10, 3.9), sharey=True)
    subjects = list(table.model.unique())
    for ax, (what, label) in zip(axes.flat, panels.items(), strict=True):
        for i, name in enumerate(subjects):
            part = table[table.model == name].reset_index(drop=True)
            y, colour = np.arange(len(part)) + 0.3 * (i - (len(subjects) - 1) / 2), (BLUE, ORANGE)[i % 2]
            known = part[f"{what} low"].notna()
            ax.hlines(y[known], part[f"{what} low"][known], part[f"{what} high"][known], color=colour, lw=2)
            ax.scatter(part[what][known], y[known], color=colour, s=30, zorder=3, label=name)
            ax.scatter(part[what][~known], y[~known], color=colour, s=30, marker="D", zorder=3)
        if what in goals:
            ax.axvline(goals[what], color="black", lw=1, ls="--")
        ax.set(xlim=(-0.03, 1.03), title=label)
        ax.set_xticks((0, 0.25, 0.5, 0.75, 1), ("0", "", "50 %", "", "100 %"))
        ax.grid(axis="x", color="#dddddd", lw=0.6)
    first = table[table.model == subjects[0]].rule.str.replace(r"^always .*", "best constant", regex=True)
    axes[0, 0].set_yticks(range(len(first)), first)
    axes[0, 0].invert_yaxis()
    fig.supxlabel("share of plants", fontsize=11)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, ncols=2, loc="outside upper center")
    return fig


def planted_and_named(runs: pd.DataFrame, rule: str = "joined") -> Figure:
    """One column a plant, ordered by where it was planted: hollow, the layers of its sites; filled, the layer named by
    a rule, blue where site and kind are right. A row a planted kind."""
    some = runs[runs.accepted]
    kinds = sorted(some.kind.unique())
    fig, axes = _panels(len(kinds), 1, (10, 2.7 * len(kinds)))
    for ax, kind in zip(axes.flat, kinds, strict=True):
        part = some[some.kind == kind]
        truth = [sorted({Site.parse(s).layer + 1 for s in text.split(", ")}) for text in part.truth]
        named = [Site.parse(s).layer + 1 for s in part[f"{rule}: named"]]
        right = part[f"{rule}: kind"].astype(bool) & part[f"{rule}: site"].astype(bool)
        rows = sorted(zip(truth, named, right, strict=True))
        for x, (layers, layer, hit) in enumerate(rows):
            ax.plot([x] * len(layers), layers, color="#cccccc", lw=1, zorder=1)
            ax.scatter([x] * len(layers), layers, s=52, ec="black", c="white", lw=1, zorder=2)
            ax.scatter(x, layer, s=22, color=BLUE if hit else RED, marker="o" if hit else "X", zorder=3)
        ax.set(xticks=[], ylabel="layer", xlim=(-1, len(rows)))
        ax.set_title(f"planted: {kind} (n = {len(rows)}, {int(right.sum())} right)", loc="left", fontsize=10)
    fig.supxlabel("plants, by planted layer", fontsize=11)
    looks = (
        ("planted", "o", "white", "black"),
        ("named, kind and site right", "o", BLUE, BLUE),
        ("named, wrong", "X", RED, RED),
    )
    handles = [mpl.lines.Line2D([], [], ls="", marker=m, mfc=c, mec=e, ms=7, label=n) for n, m, c, e in looks]
    fig.legend(handles=handles, ncols=3, loc="outside upper center")
    return fig


def cost_ratios(table: pd.DataFrame) -> Figure:
    """How many times faster than each peer, with the spread over rounds; the goal as a bar; hollow: goal missed."""
    fig, ax = _panel((8, 0.62 * len(table) + 1.2))
    y = np.arange(len(table))
    ax.axvline(1, color="black", lw=0.8)
    ax.hlines(y, table.least, table.most, color=BLUE, lw=2)
    ax.scatter(
        table.ratio, y, s=52, ec=BLUE, zorder=3, lw=1.8, c=["white" if met is False else BLUE for met in table.met]
    )
    ax.scatter(table.goal, y, marker="|", s=260, color=RED, zorder=2, lw=2, label="goal")
    ax.scatter(table.bound, y, marker="d", s=34, ec=GREY, c="white", zorder=2, label="fewer operations")
    ax.set_yticks(y, [f"{r.row}\n{fill(f'beside {r.peer}', 52)}" for r in table.itertuples()], fontsize=9)
    ax.set(xscale="log", xlabel="times faster than the peer")
    ax.xaxis.set_major_formatter("{x:g}x")
    ax.invert_yaxis()
    fig.legend(ncols=2, loc="outside upper center")
    return fig


def cost_growth(points: pd.DataFrame) -> Figure:
    """Seconds of a trace and of a plain forward pass, by what grows."""
    kinds = list(points.grows.unique())
    fig, axes = _panels(1, len(kinds), (11, 3.2))
    for ax, kind in zip(axes.flat, kinds, strict=True):
        part = points[points.grows == kind].sort_values("at")
        ax.plot(part["at"], part.trace_s, "o-", ms=4, color=BLUE, label="trace, three conventions")
        ax.plot(part["at"], part.forward_s, "s--", ms=4, color=GREY, label="forward pass")
        ax.set(xscale="log", yscale="log", xlabel=kind)
        ticks = _apart(part["at"])
        ax.set_xticks(ticks, [EngFormatter(sep="", places=0)(v) for v in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(), major_formatter="{x:g}")
    axes.flat[0].set_ylabel("seconds")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, ncols=2, loc="outside upper center")
    return fig


def _apart(values: Iterable[float], least: float = 1.4) -> list[float]:
    """Of rising values, those far enough from one another to bear a label each on a logarithmic axis; the last one is
    among them."""
    out: list[float] = []
    for value in sorted(values, reverse=True):
        if not out or out[-1] >= least * value:
            out.append(value)
    return out[::-1]
