"""studies.pathways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from lib.diagnosis import prescribe
from lib.edits import Edit, applied, outside_unchanged
from lib.errors import EditError
from lib.facts import load_cases
from lib.models import Model
from lib.recall import tell, trainable
from lib.studies import experiment, once_a_model, one_thread
from lib.training import Comparison, Task, Trained, chosen_rows, false_facts, summary, task_at, train
from lib.weights import PATHWAYS, count_parameters, pathway_slices

CURVES = ["margins", "kls"]  # of a run, by step: smallest margin, and KL on the step's neutral window
WAYS = ["facts", "longer"]  # which lesson, and for how long
LONGER = 4  # times the step limit, in the control
PAPER = ("full", "attention", "ffn", "v_only")  # the source page's four; Q-only and K-only are this book's


# Runs as a sweep does them


@experiment
def train_at(
    model: Model, *, pathway: str, rate: float, facts: str = "true", longer: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Train a pathway of the diagnosed layer on the subject's first case. facts: `true` or `false`; longer: times the
    recipe's limit of steps. The outcome, and two curves by step. Raises EditError for other words."""
    if facts not in ("true", "false"):
        raise EditError(f"facts {facts!r}: choose true or false.")
    task = _task(model)
    task = replace(task, recipe=replace(task.recipe, max_steps=longer * task.recipe.max_steps))
    run = train(model, task if facts == "true" else false_facts(task), pathway, rate=rate, seed=seed)
    return run.outcome | {"margins": run.history.min_margin.tolist(), "kls": run.history.kl.tolist()}


@once_a_model
def _task(model: Model) -> Task:
    case = trainable(model, load_cases(model.name)[0])
    return task_at(model, case, prescribe(model, case).knowledge_head.layer)


def further(grid: pd.DataFrame, *, seed: int = 0, seeds: int = 10) -> list[dict[str, list[Any]]]:
    """What follows from a finished grid, as grids of a sweep: for each pathway the rate that the rule chooses, with the
    seeds after the first; the same on false facts; and with more steps, where it missed its goal."""
    out = []
    for row in chosen_rows(grid).itertuples():
        one = {"pathway": [row.pathway], "rate": [row.rate]}
        out.append({**one, "seed": list(range(seed, seed + seeds))})
        out.append({**one, "seed": [seed], "facts": ["false"]})
        if not row.reached:
            out.append({**one, "seed": [seed], "longer": [LONGER]})
    return out


def gather(model: Model, task: Task, grid: pd.DataFrame, runs: pd.DataFrame) -> Comparison:
    """The comparison that two finished sweeps make (`pathways`, and what is `further`), with the first seed's runs once
    more, for their edits. Raises EditError where one of these does not reach what its row does."""
    best = chosen_rows(grid)
    with one_thread():  # as a sweep runs it: sums are added in the same order
        first = {row.pathway: _again(model, task, row) for row in tqdm(list(best.itertuples()), desc="the edits")}
    is_best = grid.merge(best[["pathway", "rate"]], how="left", indicator=True)["_merge"] == "both"
    tried = in_order(grid.drop(columns=[*CURVES, *WAYS]).assign(chosen=is_best.to_numpy()), "rate")
    return Comparison(tried, in_order(runs[(runs.facts == "true") & (runs.longer == 1)], "seed"), first)


def _again(model: Model, task: Task, row: Any) -> Trained:
    run = train(model, task, row.pathway, rate=row.rate, seed=row.seed)
    if run.reached != row.reached or run.diverged != row.diverged:
        raise EditError(
            f"{row.pathway} at rate {row.rate:g} came out otherwise than in the sweep ({run.steps} steps, not "
            f"{row.steps}); delete _build/sweeps/{model.name} and run the chapter again with QKV_RUNS=off."
        )
    return run


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
    again = in_order(runs[runs.longer > 1], "seed").assign(control="more steps")
    return pd.concat((lies, again), ignore_index=True).drop(columns=[*CURVES, *WAYS])


def repeat(model: Model, task: Task, comparison: Comparison) -> pd.DataFrame:
    """A comparison's runs once more, on something else: the same rates, other facts."""
    runs = tqdm(comparison.runs.items(), desc="controls")
    return summary([train(model, task, name, rate=run.rate, seed=run.seed) for name, run in runs])


def before_after(model: Model, task: Task, edits: dict[str, Edit]) -> pd.DataFrame:
    """The `tell` table of the facts under the failing template, untouched (pathway `none`) and with each edit."""
    rows = [tell(model, task.facts, {"failing": task.template}).assign(pathway="none")]
    for name, edit in edits.items():
        with applied(model, edit):
            rows.append(tell(model, task.facts, {"failing": task.template}).assign(pathway=name))
    return pd.concat(rows, ignore_index=True)


def gpt2_sizes() -> dict[str, dict[str, float]]:
    """Parameters of each pathway in GPT-2 small, and their share of it, counted on an empty model of its shape."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    counts = {name: count_parameters(model, pathway_slices(model, 0, name)) for name in PATHWAYS}
    return {name: {"parameters": n, "share": n / model.num_parameters()} for name, n in counts.items()}


def head_to_head(model: Model, comparison: Comparison) -> pd.DataFrame:
    """One row a pathway, by the first seed's run: parameters, their share of the model, rate, steps, what is told
    before and after, smallest margin, KL, whether the rest is unchanged, and seconds of training."""
    rows = []
    for name, run in comparison.runs.items():
        if run.edit is None:
            continue
        own = comparison.seeds.query("pathway == @name").iloc[0]
        rows.append(
            {
                "pathway": name,
                "parameters": run.edit.parameters,
                "share": run.edit.parameters / model.parameters,
                "rate": run.rate,
                "steps": run.steps,
                "told_before": sum(run.edit.told_before),
                "told_after": sum(run.edit.told_after),
                "reached": run.reached,
                "min_margin": own.min_margin,
                "kl": own.kl,
                "outside_unchanged": outside_unchanged(model, run.edit),
                "seconds": run.seconds,
            }
        )
    return pd.DataFrame(rows)


def spread(seeds: pd.DataFrame) -> pd.DataFrame:
    """One row a pathway: how many seeds reach the goal; mean and range of told, steps, margin and KL."""
    by = seeds.groupby("pathway", sort=False)
    out = by.agg(seeds=("seed", "size"), reached=("reached", "sum"))
    for column in ("told", "steps", "min_margin", "kl"):
        part = by[column].agg(["mean", "min", "max"])
        out[[f"{column}_mean", f"{column}_min", f"{column}_max"]] = part
    return out.reset_index()


def report_comparison(
    report: Callable[..., None], head: pd.DataFrame, seeds: pd.DataFrame, checks: pd.DataFrame
) -> None:
    """What the chapter's prose says of a comparison."""
    whole = seeds.groupby("pathway", sort=False).reached.all()
    paper = [name for name in PAPER if whole.get(name, False)]
    able = head[head.pathway.map(whole)].sort_values("parameters")
    lies = checks[checks.control == "false facts"].set_index("pathway")
    liars = [name for name in PAPER if name in lies.index and lies.reached[name]]
    rest = [name for name in ("q_only", "k_only") if name in whole.index]
    report("paper_pathways_reached", len(paper))
    report("paper_pathways", len(PAPER))
    report("paper_verdict", "All four" if len(paper) == len(PAPER) else f"{len(paper)} of {len(PAPER)}")
    report("smallest", _words([able.pathway.iloc[0]] if len(able) else []))
    report("smallest_parameters", int(able.parameters.iloc[0]) if len(able) else 0, ",")
    report("smallest_share", float(able.share.iloc[0]) if len(able) else 0.0, ".2%")
    report("smallest_kl", float(able.kl.iloc[0]) if len(able) else 0.0, ".4f")
    report("least_kl", float(able.kl.min()) if len(able) else 0.0, ".4f")
    best = by_seed(seeds)
    report("recommended", best.iloc[0].replace("_", " "))
    report("recommended_seeds", int((best == best.iloc[0]).sum()))
    report("outside_unchanged", "unchanged" if head.outside_unchanged.all() else "NOT unchanged")
    report("q_k_verdict", _words([name for name in rest if whole[name]]))
    report("false_pathways", len(liars))
    steps = {name: (int(lies.steps[name]), int(head.set_index("pathway").steps[name])) for name in liars}
    found, lesson, short = _on_false_facts(steps)
    report("false_found", found)
    report("false_lesson", lesson)
    report("false_short", short)


def _on_false_facts(steps: dict[str, tuple[int, int]]) -> tuple[str, str, str]:
    """What the control found, what it means, and both in short. steps: of the pathways that learn false facts, the
    steps that these and the true ones take."""
    if not steps:
        return (
            f"None of the {len(PAPER)} pathways reaches its goal on capitals that are wrong.",
            "So on this subject, within these limits, telling all does say that something was there to build on.",
            "False capitals are not learned within the same limits.",
        )
    false, true = (", ".join(str(s[i]) for s in steps.values()) for i in (0, 1))
    return (
        f"False facts can be trained too: {len(steps)} of the {len(PAPER)} pathways ({_words(list(steps))}) reach "
        f"their goal on capitals that are wrong, in {false} steps where the true ones took {true}.",
        "So telling all of them is no evidence that knowledge was merely misrouted: the same few weights can be made "
        "to say what the model never knew. What the comparison of the steps does show is a head start: where the true "
        "facts take fewer steps, something was there to build on.",
        f"{len(steps)} of the {len(PAPER)} pathways learn false capitals as well. Success on the trained facts is no "
        "measure of routing.",
    )


def _words(names: Sequence[str]) -> str:
    return " and ".join(", ".join(n.replace("_", " ") for n in names).rsplit(", ", 1)) or "none"
