"""Arrays -> matplotlib figures. Nothing here runs a model.

Colours are Okabe and Ito's, safe for colour-blind readers; signed quantities use a diverging map centred on zero,
shares a sequential one. Layers are numbered from 1 and heads from 0 on every axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from lib.diagnosis import Diagnosis
from lib.facts import exact_interval
from lib.site import Site

BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#777777",
)  # fmt: skip
TYPE_COLOURS = (RED, BLUE, GREEN, ORANGE, GREY, PINK, SKY, "#000000")
ROLE_COLOURS = {"copies": BLUE, "suppresses": RED, "maps relation": GREEN, "neither": "#dddddd"}


def style() -> None:
    """The book's look: call it once in a chapter's set-up cell."""
    mpl.rcParams.update({
        "figure.dpi": 110, "savefig.dpi": 160, "figure.facecolor": "white", "font.size": 11,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "axes.titleweight": "bold",
        "legend.frameon": False, "figure.constrained_layout.use": True, "image.interpolation": "nearest",
    })  # fmt: skip


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
    values = np.concatenate([g.numpy().ravel() for g in grids.values()])
    top = float(np.abs(values).max() if signed else values.max()) or 1.0
    for ax, (title, grid) in zip(axes.flat, grids.items(), strict=True):
        ax.imshow(
            grid.numpy().T, aspect="auto", cmap="RdBu_r" if signed else "viridis", vmin=-top if signed else 0, vmax=top
        )
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
            (d.evidence.curve_control, BLUE, "told under control templates"),
            (d.evidence.curve_failing, RED, "failing template"),
        ):
            layers = np.arange(curves.shape[1])
            ax.plot(layers, curves.T.numpy(), color=colour, lw=0.6, alpha=0.45)
            ax.plot(layers, curves.mean(0).numpy(), color=colour, lw=3, label=name)
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
        "control templates: the answer, more than other answers": e.grid(e.writes_control.mean(0)),
        f"failing template ({diagnosis.case.title})": e.grid(e.writes_failing.mean(0)),
    }
    return head_heatmap(grids, label="logits written", signed=True, mark=[diagnosis.verdict.knowledge_head])


def lens_ranks(ranks: dict[str, Float[Tensor, "fact n_layers+1"]]) -> Figure:
    """Median rank of the answer in the logit lens by layer, with the middle half of the facts."""
    fig, ax = _panel((8.5, 3.8))
    for (name, r), colour in zip(ranks.items(), (BLUE, RED, ORANGE, PINK, GREY), strict=False):
        low, mid, high = np.quantile(r.numpy(), (0.25, 0.5, 0.75), axis=0)
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
        ax.imshow(weights.numpy()[None], aspect="auto", cmap="Blues", vmin=0, vmax=1)
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
        ax.plot(values.T.numpy(), color=colour, lw=0.6, alpha=0.5)
        ax.plot(values.mean(0).numpy(), color=colour, lw=3, label=name)
    ax.set(yscale="log", xlabel="after layer", ylabel="norm of the subject's\nresidual stream")
    ax.legend(loc="lower right")
    return fig


def static_against_dynamic(
    static: Float[Tensor, "n_layers n_heads"], dynamic: Float[Tensor, "n_layers n_heads"], name: int = 6
) -> Figure:
    """Every head: the relation map's score against what it writes; the strongest are named."""
    fig, ax = _panel((7, 4.2))
    x, y = static.flatten().numpy(), dynamic.flatten().numpy()
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
        str(site), (site.layer + 1, height), xycoords=("data", "axes fraction"), color=colour, fontsize=9, ha="right",
        va="top" if height > 0.5 else "bottom", xytext=(-3, 0), textcoords="offset points",
    )  # fmt: skip
