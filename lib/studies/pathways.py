"""Pathways head to head: the runs of a sweep (`train_at`), what is `further` to run, their controls, and one table."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lib.edits import Edit, applied, outside_unchanged
from lib.errors import EditError
from lib.models import Model
from lib.recall import tell
from lib.sinks import shapes
from lib.studies import Row, experiment, location, once_a_model
from lib.training import Comparison, Task, Trained, chosen_rows, false_facts, sink_task, train
from lib.weights import OF_A_LAYER, PATHWAYS, SINKS, pathway_slices, places, view

CURVES = ["margins", "kls"]  # of a run, by step: smallest margin, and KL on the step's neutral window
WAYS = ["facts", "longer"]  # which lesson, and for how long
LONGER = 4  # times the step limit, in the control


@experiment
def train_at(model: Model, *, pathway: str, rate: float, facts: str = "true", longer: int = 1, seed: int = 0) -> Row:
    """Train a pathway of the diagnosed layer on the model's first case. facts: `true` or `false`; longer: times the
    recipe's limit of steps. The outcome, and two curves by step. Raises EditError for other words."""
    if facts not in ("true", "false"):
        raise EditError(f"facts {facts!r}: choose true or false.")
    task = diagnosed_sink_task(model) if pathway in SINKS else diagnosed_task(model)
    task = replace(task, recipe=replace(task.recipe, max_steps=longer * task.recipe.max_steps))
    run = train(model, task if facts == "true" else false_facts(task), pathway, rate=rate, seed=seed)
    return run.outcome | {"margins": run.history.min_margin.tolist(), "kls": run.history.kl.tolist()}


def diagnosed_task(model: Model) -> Task:
    """What training takes at the diagnosed layer of the model's first case."""
    return location.tasks(model)[location.setting(model).verdict.knowledge_head.layer]


@once_a_model
def diagnosed_sink_task(model: Model) -> Task:
    """The same lesson for a sink before every text."""
    return sink_task(model, diagnosed_task(model))


def further(grid: pd.DataFrame, *, seeds: int, seed: int = 0) -> list[dict[str, list[Any]]]:
    """What follows from a finished grid, as grids of a sweep: for each pathway the rate that the rule chooses, with the
    seeds after the first; the same on false facts; and with more steps, where it missed its goal."""
    out = []
    for row in chosen_rows(grid).itertuples():
        point = {"pathway": [row.pathway], "rate": [row.rate]}
        out.append({**point, "seed": list(range(seed, seed + seeds))})
        out.append({**point, "seed": [seed], "facts": ["false"]})
        if not row.reached:
            out.append({**point, "seed": [seed], "longer": [LONGER]})
    return out


def gather(model: Model, grid: pd.DataFrame, runs: pd.DataFrame, trained: Sequence[Trained]) -> Comparison:
    """The comparison that two finished sweeps make (`pathways`, and what is `further`), with the first seed's runs once
    more, for their edits (trained). Raises EditError where one of these does not reach what its row does."""
    best = chosen_rows(grid)
    for row, run in zip(best.itertuples(), trained, strict=True):
        if run.reached != row.reached or run.diverged != row.diverged:
            raise EditError(
                f"{row.pathway} at rate {row.rate:g} came out otherwise than in the sweep ({run.steps} steps, not "
                f"{row.steps}); `python -m lib record pathways --model {model.name}` renews the record."
            )
    is_best = grid.merge(best[["pathway", "rate"]], how="left", indicator=True)["_merge"] == "both"
    tried = in_order(grid.drop(columns=[*CURVES, *WAYS]).assign(chosen=is_best.to_numpy()), "rate")
    seeds = in_order(runs[(runs.facts == "true") & (runs.longer == 1)], "seed")
    return Comparison(tried, seeds, {run.pathway: run for run in trained})


def in_order(table: pd.DataFrame, within: str) -> pd.DataFrame:
    """Sorted by pathway, as PATHWAYS lists them, and by another column."""
    order = table.pathway.map(PATHWAYS.index)
    return table.assign(_order=order).sort_values(["_order", within], ignore_index=True).drop(columns="_order")


def by_seed(seeds: pd.DataFrame) -> pd.Series:
    """What `recommended` would say of each seed's edits."""
    harm = seeds.assign(harm=seeds.kl.where(seeds.reached, np.inf)).pivot(index="seed", columns="pathway")["harm"]
    return harm.idxmin(axis=1).where(np.isfinite(harm.min(axis=1)), "none")


def controls(runs: pd.DataFrame) -> pd.DataFrame:
    """Two controls at each pathway's chosen rate, first seed: false facts; and, where a pathway did not reach its
    goal, LONGER times the steps. One row a run, with `control`. runs: of the sweep of what is `further`."""
    lies = in_order(runs[runs.facts == "false"], "seed").assign(control="false facts")
    longer = in_order(runs[runs.longer > 1], "seed").assign(control="more steps")
    return pd.concat((lies, longer), ignore_index=True).drop(columns=[*CURVES, *WAYS])


def before_after(model: Model, task: Task, edits: dict[str, Edit]) -> pd.DataFrame:
    """The `tell` table of the facts under the failing template, untouched (pathway `none`) and with each edit."""
    rows = []
    for name, edit in {"none": None, **edits}.items():
        with applied(model, edit) if edit else nullcontext(model) as changed:
            rows.append(tell(changed, task.facts, {"failing": task.template}).assign(pathway=name))
    return pd.concat(rows, ignore_index=True)


def gpt2_sizes() -> dict[str, dict[str, float]]:
    """Parameters of each pathway in GPT-2 small, and their share of it, counted on an empty model of its shape."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    counts = {name: sum(x.numel() for x in places(model, pathway_slices(model, 0, name))) for name in OF_A_LAYER}
    counts |= {name: sum(map(prod, shapes(view(model), name).values())) for name in SINKS}
    return {name: {"parameters": n, "share": n / model.num_parameters()} for name, n in counts.items()}


def head_to_head(model: Model, comparison: Comparison) -> pd.DataFrame:
    """One row a pathway, by the first seed's run: parameters, their share of the model, rate, steps, what is told
    before and after, smallest margin, KL, whether the rest is unchanged, and seconds of training."""
    seeds = comparison.seeds.drop_duplicates("pathway").set_index("pathway")
    rows = []
    for name, edit in comparison.edits.items():
        run, share = comparison.runs[name], edit.parameters / model.parameters
        size: dict[str, Any] = {"pathway": name, "parameters": edit.parameters, "share": share}
        told = {"told_before": sum(edit.told_before), "told_after": sum(edit.told_after), "reached": run.reached}
        harm = {"min_margin": seeds.min_margin[name], "kl": seeds.kl[name]}
        proof = {"outside_unchanged": outside_unchanged(model, edit), "seconds": run.seconds}
        rows.append({**size, "rate": run.rate, "steps": run.steps, **told, **harm, **proof})
    return pd.DataFrame(rows)


def spread(seeds: pd.DataFrame) -> pd.DataFrame:
    """One row a pathway: how many seeds reach the goal; mean and range of told, steps, margin and KL."""
    columns = ("told", "steps", "min_margin", "kl")
    ends = {f"{column}_{end}": (column, end) for column in columns for end in ("mean", "min", "max")}
    by = seeds.groupby("pathway", sort=False)
    return by.agg(seeds=("seed", "size"), reached=("reached", "sum"), **ends).reset_index()
