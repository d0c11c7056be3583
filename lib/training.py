"""Retrain one slice of one layer so that a case's facts are told, and compare six slices under one recipe.

    objective    cross-entropy of the answer at the last position, averaged over the facts, plus `kl_weight` times the
                 KL divergence from the untouched model on neutral passages (disjoint from all that measure)
    stopping     every fact told with a margin of at least `margin` logits, or `max_steps`
    grid         one learning rate a pathway, chosen by one rule for all: of those that stop in time, the one whose edit
                 has the smallest KL on neutral passages that training does not see; if none does, the largest margin
    recommended  of the pathways that stop in time, the one whose edit has the smallest KL by the same measure
    control      false facts, which the model cannot know

Only what changes is computed: the streams that enter the layer are kept, and training starts from them
(`forward.above`); of what comes out, only the last position of a prompt and a few of a passage are read, and the
unembedding is fetched once for the loss and its gradient (`forward.log_normalisers`). The leaf that the optimiser holds
is the slice itself, not the parameter around it: no gradient, weight decay or optimiser state can reach anything else,
and the model is not touched at all.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from lib.diagnosis import prescribe
from lib.edits import Edit, load_all, make
from lib.errors import DataError, EditError
from lib.facts import Case, Fact, load_templates, prompts
from lib.files import DATA
from lib.forward import Pack, Reference, above, log_normalisers, pack, packs, reference, resid_pre, streams
from lib.models import Model
from lib.recall import screen, tell
from lib.sinks import ordinary, standing
from lib.weights import OF_A_LAYER, PAPER, PATHWAYS, SINK_SLICES, SINKS, Slice, pathway_slices, places


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

    @property
    def outcome(self) -> dict[str, Any]:
        """What the run reached, as plain values."""
        return {
            "diverged": self.diverged,
            "reached": self.reached,
            "steps": self.steps,
            "told": sum(self.edit.told_after) if self.edit else 0,
            "min_margin": float(self.history.min_margin.iloc[-1]),
            "kl": float(self.kl),
        }


@dataclass(frozen=True)
class Task:
    """What training a layer (0-based) takes, whichever of its pathways: what enters it, and what must come out."""

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
    sink: bool = False  # whether prompts and windows have one, which `untouched` has not
    middle: bool = False  # whether it stands in their middle


def neutral_windows(model: Model, length: int) -> tuple[list[list[int]], list[list[int]]]:
    """The neutral passages in windows of equal length: those for training, of every passage but the last half, and
    those for choosing. Raises DataError if there are none of either."""
    paths = sorted((DATA / "passages").glob("neutral_*.txt"))
    texts = [model.windows(path.read_text(encoding="utf-8"), length) for path in paths]
    cut = [[window for window in windows if len(window) == length] for windows in texts]
    training, choosing = (list(chain.from_iterable(part)) for part in (cut[: len(cut) // 2], cut[len(cut) // 2 :]))
    if not training or not choosing:
        raise DataError(f"data/passages needs two neutral passages of {length} tokens for {model.name}.")
    return training, choosing


def task_at(model: Model, case: Case, layer: int, recipe: Recipe = DEFAULT) -> Task:
    """Run everything below the layer once. Raises as `tasks_at`."""
    return tasks_at(model, case, [layer], recipe)[layer]


@torch.no_grad()
def tasks_at(
    model: Model,
    case: Case,
    layers: Sequence[int],
    recipe: Recipe = DEFAULT,
    *,
    templates: dict[str, str] | None = None,
) -> dict[int, Task]:
    """What stays the same while each of some layers is trained, from one run of the model. templates: by name, instead
    of the book's. Raises EditError for a layer that is not there, DataError for no facts, or for one whose answer its
    first token does not identify."""
    end = model.weights.n_layers
    if odd := [layer for layer in layers if not 0 <= layer < end]:
        raise EditError(f"there is no layer index {odd[0]}: {model.name} has {end}, from 0.")
    _identifiable(model, case.facts)
    template = (templates or load_templates())[case.template]
    training, choosing = neutral_windows(model, recipe.window)
    if len(training) < recipe.windows:
        raise DataError(f"the neutral passages make {len(training)} windows; the recipe takes {recipe.windows} a step.")
    told = tell(model, case.facts, {case.template: template})
    texts = [model.token_ids(p) for p in told.prompt]
    found = [(batch, streams(model, batch, [*layers, end])) for batch in packs(model, training + choosing)]
    final = [x[end][_compared(len(batch.last), recipe)] for batch, x in found]
    untouched = _said(model, torch.cat(final), recipe.positions)
    prompts = streams(model, pack(model, texts), layers)
    size = (-1, recipe.window, model.weights.d_model)
    entering = {layer: torch.cat([x[layer].view(size) for _, x in found]) for layer in layers}
    at_layer = partial(
        Task,
        facts=case.facts,
        template=template,
        told_before=tuple(told.told.tolist()),
        recipe=recipe,
        texts=pack(model, texts + training[: recipe.windows]),
        answers=torch.tensor(told.answer_token.tolist()),
        windows=training + choosing,
        n_training=len(training),
        untouched=untouched,
    )
    return {x: at_layer(layer=x, prompt_stream=prompts[x], window_streams=entering[x]) for x in layers}


@torch.no_grad()
def sink_task(model: Model, task: Task, *, middle: bool = False) -> Task:
    """The same lesson for a sink: prompts and neutral windows have it before them (middle: in their middle), and what
    enters is embeddings. The model is still held to what it says without one, which is compared where a token stands
    in both. Raises EditError where that says nothing at a compared position."""
    recipe = task.recipe
    with standing(model, ordinary(model, "sink_token"), middle=middle) as changed:
        training, choosing = neutral_windows(changed, recipe.window)
        streams = changed.weights.embed(torch.tensor(training + choosing))
    windows = torch.tensor(training + choosing)
    own = windows != len(model.weights.W_E)
    at = int((~own[0]).nonzero())
    if at in recipe.read or recipe.read[0] < len(model.bos):
        raise EditError(f"a window is compared at position {at}, where the sink stands; compare fewer.")
    without = windows[own].view(len(windows), -1).tolist()
    untouched = _untouched(model, without, recipe.read - (recipe.read > at).long())
    lesson = replace(task, windows=training + choosing, n_training=len(training), window_streams=streams)
    lesson = replace(lesson, layer=0, untouched=untouched, sink=True, middle=middle)
    return with_facts(model, lesson, task.facts)


@torch.no_grad()
def with_facts(model: Model, task: Task, facts: tuple[Fact, ...]) -> Task:
    """The same task with other facts. Raises DataError as `task_at` does."""
    _identifiable(model, facts)
    told = tell(model, facts, {"failing": task.template})
    first = ordinary(model, "sink_token") if task.sink else {}
    with standing(model, first, middle=task.middle) if task.sink else nullcontext(model) as changed:
        ids = [changed.token_ids(p) for p in prompts(facts, task.template)]
        stream = resid_pre(changed, pack(changed, ids), task.layer)
        whole = pack(changed, ids + task.windows[: task.recipe.windows])
    before, answers = tuple(told.told.tolist()), torch.tensor(told.answer_token.tolist())
    return replace(task, facts=facts, told_before=before, texts=whole, prompt_stream=stream, answers=answers)


def _untouched(model: Model, windows: list[list[int]], read: Int[Tensor, " positions"]) -> Reference:
    """What the model says at some positions of windows of equal length: (window, positions)."""
    end, size, final = model.weights.n_layers, len(windows[0]), []
    for batch in packs(model, windows):
        at = (torch.arange(len(batch.last))[:, None] * size + read).flatten()
        final.append(streams(model, batch, [end])[end][at])
    return _said(model, torch.cat(final), len(read))


def _said(model: Model, final: Float[Tensor, "n d_model"], positions: int) -> Reference:
    """What final streams say: (window, positions)."""
    said = reference(model.weights.norm_final_module(final), model.weights.W_U)
    return said[torch.arange(len(said.log_z)).view(-1, positions)]


def slice_values(model: Model, slices: Sequence[Slice]) -> dict[Slice, Tensor]:
    """A copy of each slice's values; of a sink's, those that training starts from."""
    if pathway := next((name for name in SINKS if set(slices) == set(SINK_SLICES[name])), None):
        return ordinary(model, pathway)
    return {s: x.detach().clone() for s, x in zip(slices, places(model.module, slices), strict=True)}


def losses(
    model: Model, task: Task, values: dict[Slice, Tensor], rows: Int[Tensor, " windows"]
) -> tuple[Tensor, Tensor, Float[Tensor, " fact"]]:
    """Cross-entropy of the answers, KL(untouched || edited) on the neutral windows `rows`, and by how much each
    answer's logit exceeds every other token's. One pass over prompts and windows together."""
    stream, n = torch.cat((task.prompt_stream, task.window_streams[rows].flatten(0, 1))), len(task.facts)
    read = torch.cat((task.texts.last[:n], len(task.prompt_stream) + _compared(len(rows), task.recipe)))
    final, W_U = _above(model, task, task.texts, stream, values, read), model.weights.W_U
    log_z, others = log_normalisers(final, W_U, task.answers)
    answers = (final[:n] * W_U[:, task.answers].T).sum(-1)  # their logits
    kl = task.untouched[rows].divergence(*(x[n:].unflatten(0, (len(rows), -1)) for x in (final, log_z)))
    return (log_z[:n] - answers).mean(), kl.mean(), answers.detach() - others


def _above(
    model: Model, task: Task, texts: Pack, stream: Tensor, values: dict[Slice, Tensor], read: Tensor
) -> Float[Tensor, "n d_model"]:
    """`forward.above` for what a task trains."""
    if not task.sink:
        return above(model, texts, task.layer, stream, values, read)
    with standing(model, values, middle=task.middle) as changed:
        own = changed.weights.embed(texts.tokens, texts.position)
        at = texts.tokens == changed.bos[-1]
        return above(changed, texts, 0, torch.where(at[:, None], own, stream), read=read)


def train(
    model: Model, task: Task, pathway: str, *, rate: float, seed: int = 0, masks: Mapping[Slice, Tensor] | None = None
) -> Trained:
    """Train one pathway at one rate (Adam, no weight decay). seed: of the order in which neutral windows come. masks:
    Boolean, of a slice: the entries that may change; all, if not given."""
    start, slices = perf_counter(), pathway_slices(model.module, task.layer, pathway)
    if task.sink != (pathway in SINKS):
        raise EditError(f"{pathway} needs a task {'with' if pathway in SINKS else 'without'} a sink (`sink_task`).")
    leaves = {s: v.requires_grad_() for s, v in slice_values(model, slices).items()}
    for part, mask in (masks or {}).items():  # Adam without weight decay leaves what has never had a gradient alone
        leaves[part].register_hook(lambda gradient, mask=mask: gradient * mask)
    history = optimise(model, task, list(leaves.values()), leaves, rate=rate, seed=seed)
    seconds, first, last = perf_counter() - start, history.iloc[0], history.iloc[-1]
    reached = bool(np.isfinite(last.loss) and last.min_margin >= task.recipe.margin)
    edit, kl = None, np.nan
    if reached or (np.isfinite(last.loss) and last.cross_entropy <= first.cross_entropy):
        values = {s: v.detach() for s, v in leaves.items()}
        kl = neutral_kl(model, task, values)
        recipe = asdict(task.recipe) | {"rate": rate, "steps": len(history) - 1, "reached": reached, "neutral_kl": kl}
        about = {name: getattr(task, name) for name in ("layer", "facts", "template", "told_before")}
        edit = make(model, values, pathway=pathway, seed=seed, recipe=recipe, **about)
    return Trained(pathway, rate, seed, edit, history, reached, kl, seconds)


def optimise(
    model: Model, task: Task, leaves: Sequence[Tensor], values: dict[Slice, Tensor], *, rate: float, seed: int = 0
) -> pd.DataFrame:
    """Minimise the objective over the leaves, in place, until the recipe says stop; a row a step. values: what the
    leaves are put for in the layer; leaves that a hook puts somewhere else need none."""
    recipe, rows = task.recipe, []
    optimiser, generator = torch.optim.Adam(leaves, lr=rate), torch.Generator().manual_seed(seed)
    for step in range(recipe.max_steps + 1):
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
    return pd.DataFrame(rows, columns=["step", "loss", "cross_entropy", "kl", "told", "min_margin"])


@torch.no_grad()
def neutral_kl(model: Model, task: Task, values: dict[Slice, Tensor]) -> float:
    """KL(untouched || edited) over the neutral windows that training does not see, in nats a token."""
    unseen = list(packs(model, task.windows[task.n_training :]))
    entering = task.window_streams[task.n_training :].split([len(texts.last) for texts in unseen])
    final = [
        _above(model, task, texts, stream.flatten(0, 1), values, _compared(len(texts.last), task.recipe))
        for texts, stream in zip(unseen, entering, strict=True)
    ]
    untouched, edited = task.untouched[task.n_training :], torch.cat(final)
    log_z, _ = log_normalisers(edited, model.weights.W_U)
    kl = untouched.divergence(edited.view_as(untouched.final), log_z.view_as(untouched.log_z))
    return max(0.0, float(kl.mean()))


def _identifiable(model: Model, facts: Sequence[Fact]) -> None:
    if not facts:
        raise DataError("there is no fact to train on; give at least one.")
    bad = screen(model, facts).query("left_out != ''")
    if len(bad):
        first = bad.iloc[0]
        raise DataError(
            f"{first.subject} -> {first.answer} cannot be trained or scored by the first token {first.token_text!r} "
            f"({first.left_out}); leave it out, with {len(bad) - 1} more like it (see `recall.scorable`)."
        )


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


def compare(
    model: Model, task: Task, *, seed: int = 0, pathways: Sequence[str] = OF_A_LAYER, progress: bool = True
) -> Comparison:
    """The grid for each pathway (of a layer, if not said), with one seed, in one process."""
    points = tqdm(list(product(pathways, task.recipe.rates)), desc="training", disable=not progress)
    tasks = dict.fromkeys(pathways, task) | {name: sink_task(model, task) for name in SINKS if name in pathways}
    runs = [train(model, tasks[pathway], pathway, rate=rate, seed=seed) for pathway, rate in points]
    grid = summary(runs)
    best = chosen_rows(grid)
    first = {runs[i].pathway: runs[i] for i in best.index}
    return Comparison(grid.assign(chosen=grid.index.isin(best.index)), best.reset_index(drop=True), first)


def summary(runs: Sequence[Trained]) -> pd.DataFrame:
    """One row a run: what it reached, at what cost."""
    return pd.DataFrame([{"pathway": r.pathway, "rate": r.rate, "seed": r.seed, **r.outcome} for r in runs])


def chosen(table: pd.DataFrame) -> int:
    """Row of a pathway's grid that the rule chooses: one that diverged only where all did."""
    harm = table.kl.where(table.reached, 0.0)
    return int(np.lexsort((-table.min_margin, harm, ~table.reached, table.diverged))[0])


def chosen_rows(grid: pd.DataFrame) -> pd.DataFrame:
    """The row of each pathway that the rule chooses, in the order of PATHWAYS."""
    rows = {name: part.index[chosen(part)] for name, part in grid.groupby("pathway")}
    return grid.loc[[rows[name] for name in PATHWAYS if name in rows]]


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


def saved_or_trained(model: Model, case: Case, folder: Path, *, seed: int = 0) -> dict[str, Edit]:
    """The edits that chapter 3 left in a folder, by pathway; trained here unless the paper's four are there and fit."""
    saved = load_all(folder)
    if {*PAPER} <= {*saved} and all(_fits(e, model, case, seed) for e in saved.values()):
        return saved
    return compare(model, task_at(model, case, prescribe(model, case).knowledge_head.layer), seed=seed).edits


def _fits(edit: Edit, model: Model, case: Case, seed: int) -> bool:
    wanted = json.loads(json.dumps(asdict(DEFAULT)))  # as a file gives it back
    made_for = (edit.base_sha256, edit.facts, edit.template, edit.seed, {k: edit.recipe.get(k) for k in wanted})
    return made_for == (model.weights_sha256, case.facts, load_templates()[case.template], seed, wanted)


def false_facts(task: Task) -> Task:
    """The control: each subject gets the next one's answer, so that there is nothing for the model to know."""
    answers = task.facts[1:] + task.facts[:1]
    facts = tuple(replace(f, answer=a.answer) for f, a in zip(task.facts, answers, strict=True))
    return replace(task, facts=facts, answers=task.answers.roll(-1), told_before=(False,) * len(facts))
