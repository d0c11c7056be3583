"""Retrain one slice of one layer so that a case's facts are told (design, section 5).

    objective   cross-entropy of the answer at the last position, averaged over the facts, plus `kl_weight` times the
                KL divergence from the untouched model on neutral passages (disjoint from all that measure)
    stopping    every fact told with a margin of at least `margin` logits, or `max_steps`

Only what changes is computed: the stream that enters the layer is kept, and training starts from it (`replay`); of
what comes out, only the last position of a prompt and a few of a passage are read, and the unembedding is fetched once
for the loss and its gradient (`vocabulary`). The leaf that the optimiser holds is the slice itself, not the parameter
around it: no gradient, weight decay or optimiser state can reach anything else, and the model is not touched at all.

Six pathways head to head, under one recipe (design, section 5; the source page's comparison of four).

    grid        one learning rate, chosen by one rule for all pathways: of those that stop in time, the one whose edit
                has the smallest KL on the neutral passages; if none does, the one with the largest margin
    recommended of the pathways that stop in time, the one whose edit has the smallest KL on the neutral passages
    controls    false facts, which the model cannot know; more steps, for a pathway that misses its goal
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from lib.diagnosis import prescribe
from lib.edits import Edit, applied, load_all
from lib.errors import DataError, EditError
from lib.facts import Case, Fact, load_templates
from lib.files import DATA
from lib.forward import Pack, Reference, above, log_normalisers, pack, packs, reference, streams
from lib.models import Model
from lib.recall import screen, tell
from lib.weights import PATHWAYS, Slice, pathway_slices

COLUMNS = ["step", "loss", "cross_entropy", "kl", "told", "min_margin"]


@dataclass(frozen=True)
class Recipe:
    """One recipe for all pathways, written down before any result. window, windows: length and number of neutral
    excerpts a step; positions: how many of each are compared, evenly spaced."""

    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    max_steps: int = 60
    margin: float = 1.0
    kl_weight: float = 10.0
    window: int = 32
    windows: int = 1
    positions: int = 8

    def __post_init__(self) -> None:
        wrong = [name for name in ("max_steps", "window", "windows", "positions") if getattr(self, name) < 1]
        if wrong or not self.rates or min(self.rates) <= 0 or self.kl_weight < 0:
            raise EditError(
                f"the recipe cannot train: {', '.join(wrong) or 'rates or kl_weight'}; steps, windows and rates must "
                "be positive, and at least one rate given."
            )
        if self.window % self.positions:
            raise EditError(f"a window of {self.window} tokens cannot be read at {self.positions} even positions.")

    @property
    def read(self) -> Int[Tensor, " positions"]:
        """The positions of a window that are compared: evenly spaced, the last one among them."""
        every = self.window // self.positions
        return torch.arange(every - 1, self.window, every)


DEFAULT = Recipe()


@dataclass(frozen=True)
class Trained:
    """One run, with a row a step (loss, cross_entropy, kl, told, min_margin). edit: None where it diverged: short of
    its goal, with a loss that is no number or answers less likely than at the start. kl: of the edit, over the neutral
    windows that training does not see (NaN where it diverged)."""

    pathway: str
    rate: float
    seed: int
    edit: Edit | None
    history: pd.DataFrame
    reached: bool
    kl: float
    seconds: float

    @property
    def steps(self) -> int:
        return len(self.history) - 1

    @property
    def diverged(self) -> bool:
        return self.edit is None


@dataclass(frozen=True)
class Task:
    """What training a layer (0-based) takes, whichever of its pathways: the streams that enter it, which stay what they
    are, and what must come out."""

    facts: tuple[Fact, ...]
    template: str  # its text
    told_before: tuple[bool, ...]
    recipe: Recipe
    layer: int
    texts: Pack  # the prompts, then as many windows as a step takes
    prompt_stream: Float[Tensor, "t d_model"]  # of the prompts
    answers: Int[Tensor, " fact"]
    windows: list[list[int]]  # all neutral windows
    n_training: int  # how many of them, the first, training draws from; the others are for choosing
    window_streams: Float[Tensor, "window t d_model"]  # the streams of these
    untouched: Reference  # what it says, at the compared positions of the windows: (window, positions)


def neutral_windows(model: Model, length: int) -> tuple[list[list[int]], int]:
    """The neutral passages in windows of equal length, and how many of them, the first, are for training: those of
    every passage but the last half. The others are for choosing. Raises DataError if either part is empty."""
    paths = sorted((DATA / "passages").glob("neutral_*.txt"))
    cut = [
        [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        for ids in (model.token_ids(p.read_text(encoding="utf-8")) for p in paths)
    ]
    training, choosing = (list(chain.from_iterable(part)) for part in (cut[: len(cut) // 2], cut[len(cut) // 2 :]))
    if not training or not choosing:
        raise DataError(f"data/passages needs two neutral passages of {length} tokens for {model.name}.")
    return training + choosing, len(training)


def task_at(model: Model, case: Case, layer: int, recipe: Recipe = DEFAULT) -> Task:
    """Run everything below the layer once. Raises as `tasks_at`."""
    return tasks_at(model, case, [layer], recipe)[layer]


@torch.no_grad()
def tasks_at(model: Model, case: Case, layers: Sequence[int], recipe: Recipe = DEFAULT) -> dict[int, Task]:
    """What stays the same while each of some layers is trained, from one run of the model. Raises EditError for a layer
    that is not there, DataError for no facts, or for one whose answer its first token does not identify."""
    end = model.weights.n_layers
    if odd := [layer for layer in layers if not 0 <= layer < end]:
        raise EditError(f"there is no layer index {odd[0]}: {model.name} has {end}, from 0.")
    _identifiable(model, case.facts)
    template, (windows, training) = load_templates()[case.template], neutral_windows(model, recipe.window)
    if training < recipe.windows:
        raise DataError(f"the neutral passages make {training} windows; the recipe takes {recipe.windows} a step.")
    told = tell(model, case.facts, {case.template: template})
    texts = [model.token_ids(p) for p in told.prompt]
    neutral, final = [], []
    for some in packs(model, windows):
        found = streams(model, some, [*layers, end])
        neutral.append({layer: found[layer].view(-1, recipe.window, model.weights.d_model) for layer in layers})
        final.append(found[end][_compared(len(some.last), recipe)])
    prompts = streams(model, pack(model, texts), layers)
    known = reference(model.weights.norm_final_module(torch.cat(final)), model.weights.W_U)
    known = known[torch.arange(len(known.log_z)).view(-1, recipe.positions)]
    return {
        layer: Task(
            case.facts,
            template,
            tuple(told.told.tolist()),
            recipe,
            layer,
            pack(model, texts + windows[: recipe.windows]),
            prompts[layer],
            torch.tensor(told.answer_token.tolist()),
            windows,
            training,
            torch.cat([some[layer] for some in neutral]),
            known,
        )
        for layer in layers
    }


def slice_values(model: Model, slices: Sequence[Slice]) -> dict[Slice, Tensor]:
    """A copy of each slice's values."""
    parameters = dict(model.module.named_parameters())
    return {s: s.of(parameters[s.name]).detach().clone() for s in slices}


def losses(
    model: Model, task: Task, values: dict[Slice, Tensor], rows: Int[Tensor, " windows"]
) -> tuple[Tensor, Tensor, Float[Tensor, " fact"]]:
    """Cross-entropy of the answers, KL(untouched || edited) on the neutral windows `rows`, and by how much each
    answer's logit exceeds every other token's. One pass over prompts and windows together."""
    stream, n = torch.cat((task.prompt_stream, task.window_streams[rows].flatten(0, 1))), len(task.facts)
    read = torch.cat((task.texts.last[:n], len(task.prompt_stream) + _compared(len(rows), task.recipe)))
    final, W_U = above(model, task.texts, task.layer, stream, values, read), model.weights.W_U
    log_z, others = log_normalisers(final, W_U, task.answers)
    own = (final[:n] * W_U[:, task.answers].T).sum(-1)
    kl = task.untouched[rows].divergence(*(x[n:].unflatten(0, (len(rows), -1)) for x in (final, log_z)))
    return (log_z[:n] - own).mean(), kl.mean(), own.detach() - others


def train(
    model: Model,
    task: Task,
    pathway: str,
    *,
    rate: float,
    seed: int = 0,
    bar: tqdm | None = None,
    masks: Mapping[Slice, Bool[Tensor, "*shape"]] | None = None,
) -> Trained:
    """Train one pathway at one rate (Adam, no weight decay). seed: of the order in which neutral windows come.
    bar: a progress bar to move on by one when done. masks: of a slice, the entries that may change; all, if not
    given."""
    recipe, start = task.recipe, perf_counter()
    slices = pathway_slices(model.module, task.layer, pathway)
    leaves = {s: v.requires_grad_() for s, v in slice_values(model, slices).items()}
    for part, mask in (masks or {}).items():  # Adam without weight decay leaves what has never had a gradient alone
        leaves[part].register_hook(lambda gradient, mask=mask: gradient * mask)
    name = f"{pathway}, rate {rate:g}, seed {seed}"
    history = optimise(model, task, list(leaves.values()), leaves, rate=rate, seed=seed, name=name, bar=bar)
    seconds, last = perf_counter() - start, history.iloc[-1]
    reached = bool(np.isfinite(last.loss) and last.min_margin >= recipe.margin)
    if not reached and not (np.isfinite(last.loss) and last.cross_entropy <= history.cross_entropy[0]):
        return Trained(pathway, rate, seed, None, history, False, np.nan, seconds)
    values = {s: v.detach() for s, v in leaves.items()}
    harm = neutral_kl(model, task, values)
    outcome = {"rate": rate, "steps": len(history) - 1, "reached": reached, "neutral_kl": harm}
    edit = _edit(model, task, pathway, values, seed, outcome)
    return Trained(pathway, rate, seed, edit, history, reached, harm, seconds)


def optimise(
    model: Model,
    task: Task,
    leaves: Sequence[Tensor],
    values: dict[Slice, Tensor],
    *,
    rate: float,
    seed: int = 0,
    name: str = "",
    bar: tqdm | None = None,
) -> pd.DataFrame:
    """Minimise the objective over the leaves, in place, until the recipe says stop; a row a step. values: what the
    leaves are put for in the layer; leaves that a hook puts somewhere else need none."""
    recipe, rows = task.recipe, []
    optimiser, generator = torch.optim.Adam(leaves, lr=rate), torch.Generator().manual_seed(seed)
    for step in range(recipe.max_steps + 1):
        if bar is not None:
            bar.set_postfix_str(f"{name}, step {step}", refresh=step % 10 == 0)
        windows = torch.randperm(task.n_training, generator=generator, device="cpu")[: recipe.windows]
        cross_entropy, kl, margins = losses(model, task, values, windows)
        loss = cross_entropy + recipe.kl_weight * kl
        told, least = int((margins > 0).sum()), margins.min().item()
        rows.append((step, loss.item(), cross_entropy.item(), kl.item(), told, least))
        if not np.isfinite(loss.item()) or least >= recipe.margin or step == recipe.max_steps:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    if bar is not None:
        bar.update()
    return pd.DataFrame(rows, columns=COLUMNS)


@torch.no_grad()
def neutral_kl(model: Model, task: Task, values: dict[Slice, Tensor]) -> float:
    """KL(untouched || edited) over the neutral windows that training does not see, in nats a token."""
    final, done = [], task.n_training
    for some in packs(model, task.windows[done:]):
        stream = task.window_streams[done : (done := done + len(some.last))].flatten(0, 1)
        final.append(above(model, some, task.layer, stream, values, _compared(len(some.last), task.recipe)))
    log_z, _ = log_normalisers(whole := torch.cat(final), model.weights.W_U)
    known = task.untouched[task.n_training :]
    return max(0.0, float(known.divergence(whole.view_as(known.final), log_z.view_as(known.log_z)).mean()))


def _identifiable(model: Model, facts: Sequence[Fact]) -> None:
    if not facts:
        raise DataError("there is no fact to train on; give at least one.")
    bad = screen(model, facts).query("left_out != ''")
    if len(bad):
        first = bad.iloc[0]
        raise DataError(
            f"{first.subject} -> {first.answer} cannot be trained or scored by the first token {first.token_text!r} "
            f"({first.left_out}); leave it out, with {len(bad) - 1} more like it (see `facts.scorable`)."
        )


def _edit(
    model: Model, task: Task, pathway: str, values: dict[Slice, Tensor], seed: int, outcome: dict[str, Any]
) -> Edit:
    """The trained values as an edit, with what the whole model tells afterwards, measured on the model itself."""
    recipe = {**asdict(task.recipe), **outcome}
    common = (model.name, model.weights_sha256, pathway, task.layer, task.facts, task.template, task.told_before)
    draft = Edit(*common, task.told_before, seed, recipe, values)
    with applied(model, draft):
        after = tell(model, task.facts, {"failing": task.template})
    return Edit(*common, tuple(after.told.tolist()), seed, recipe, values)


def _compared(windows: int, recipe: Recipe) -> Int[Tensor, " n"]:
    """The rows of the compared positions, in so many windows one after the other."""
    return (torch.arange(windows)[:, None] * recipe.window + recipe.read).flatten()


@dataclass(frozen=True)
class Comparison:
    """All pathways under one recipe. grid: a row a pathway and rate, `chosen` by the rule. seeds: a row a pathway and
    seed, at the chosen rate. runs: by pathway, the first seed's run at that rate."""

    grid: pd.DataFrame
    seeds: pd.DataFrame
    runs: dict[str, Trained]

    @property
    def edits(self) -> dict[str, Edit]:
        """The edit of each pathway, of the first seed."""
        return {name: run.edit for name, run in self.runs.items() if run.edit is not None}


# In one process


def compare(
    model: Model, task: Task, *, seed: int = 0, pathways: Sequence[str] = PATHWAYS, progress: bool = True
) -> Comparison:
    """The grid for each pathway, with one seed."""
    rates, grids, runs = task.recipe.rates, [], {}
    with tqdm(total=len(pathways) * len(rates), desc="training", disable=not progress) as bar:
        for pathway in pathways:
            tried = [train(model, task, pathway, rate=rate, seed=seed, bar=bar) for rate in rates]
            table = summary(tried)
            best = chosen(table)
            runs[pathway] = tried[best]
            grids.append(table.assign(chosen=table.index == best))
    grid = pd.concat(grids, ignore_index=True)
    return Comparison(grid, grid[grid.chosen].drop(columns="chosen").reset_index(drop=True), runs)


def summary(runs: Sequence[Trained]) -> pd.DataFrame:
    """One row a run: what it reached, at what cost."""
    return pd.DataFrame([{"pathway": r.pathway, "rate": r.rate, "seed": r.seed, **outcome(r)} for r in runs])


def outcome(run: Trained) -> dict[str, Any]:
    """What a run reached, as plain values."""
    return {
        "diverged": run.diverged,
        "reached": run.reached,
        "steps": run.steps,
        "told": sum(run.edit.told_after) if run.edit else 0,
        "min_margin": float(run.history.min_margin.iloc[-1]),
        "kl": float(run.kl),
    }


def chosen(table: pd.DataFrame) -> int:
    """Row of a pathway's grid that the rule chooses: one that diverged only where all did."""
    harm = table.kl.where(table.reached, 0.0)
    return int(np.lexsort((-table.min_margin, harm, ~table.reached, table.diverged))[0])


def recommended(edits: dict[str, Edit]) -> str:
    """The pathway that the rule recommends, `none` if no edit reaches its goal."""
    harm = {name: edit.recipe["neutral_kl"] for name, edit in edits.items() if edit.recipe["reached"]}
    return min(harm, key=harm.__getitem__) if harm else "none"


def under_study(edits: dict[str, Edit]) -> tuple[str, str]:
    """The pathway whose side effects are told of in full, and a clause that says why. Raises EditError for no edits."""
    if not edits:
        raise EditError("no pathway left an edit: every training diverged. Try smaller rates, or another case.")
    if (best := recommended(edits)) != "none":
        return best, "recommended by that chapter's rule, which saw none of what follows"
    most = max(edits, key=lambda name: (sum(edits[name].told_after), -edits[name].recipe["neutral_kl"]))
    return most, "the one that tells most, for none reaches its goal and the rule recommends none"


def made(
    model: Model, case: Case, folder: Path, *, seed: int = 0, recipe: Recipe = DEFAULT, progress: bool = True
) -> dict[str, Edit]:
    """The edits that chapter 3 left in a folder, by pathway; trained here by its rule where it left none that fit."""
    found = load_all(folder)
    if list(found) == list(PATHWAYS) and all(_fits(e, model, case, seed, recipe) for e in found.values()):
        return found
    task = task_at(model, case, prescribe(model, case).knowledge_head.layer, recipe)
    return compare(model, task, seed=seed, progress=progress).edits


def _fits(edit: Edit, model: Model, case: Case, seed: int, recipe: Recipe) -> bool:
    own = {key: edit.recipe.get(key) for key in asdict(recipe)}
    wanted = json.loads(json.dumps(asdict(recipe)))  # as a file gives it back
    return (edit.base_sha256, edit.facts, edit.template, edit.seed, own) == (
        model.weights_sha256,
        case.facts,
        load_templates()[case.template],
        seed,
        wanted,
    )


def false_facts(task: Task) -> Task:
    """The control: each subject gets the next one's answer, so that there is nothing for the model to know."""
    answers = task.facts[1:] + task.facts[:1]
    facts = tuple(replace(f, answer=a.answer) for f, a in zip(task.facts, answers, strict=True))
    return replace(task, facts=facts, answers=task.answers.roll(-1), told_before=(False,) * len(facts))
