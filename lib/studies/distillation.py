"""An edit that should carry over: fitted on the fit countries, chosen on the selection countries, judged once.

    teacher     the model itself, where it does tell: of the control templates and of the failing template after two
                worked examples, the context that gives the fit facts' answers the highest mean log-probability
    pupils      the failing prompt of every fit country, and of places that no fact names: for these the teacher's
                distribution stands in for an answer, so that names without a fact can be learned from as well
    objective   KL(teacher || pupil) at the last position, mixed with cross-entropy of the answer where the model knows
                it; plus KL from the untouched model on other prompts of the same countries and on neutral passages
    rule        of the runs that cost little (`harmless`), the one that makes most selection countries told that are
                known and untold; ties go to the higher mean log-probability of their answers

Held-out countries take no part: `lesson` refuses them, `cost` does not ask them, and the chapter asks them once, after
the rule has chosen. That the model's own answer in a better context can train it is context distillation (Snell et
al., 2022).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import compress, cycle
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from lib import evaluation
from lib.edits import Edit, make
from lib.errors import DataError, EditError
from lib.evaluation import BAND, NONE
from lib.facts import Case, Fact, load_cases, load_mapping, load_templates, prompts
from lib.files import DATA
from lib.forward import above, next_token_logits, pack, packs, resid_pre
from lib.models import Model
from lib.recall import first_tokens, known_and_told, scorable, tell, trainable
from lib.statistics import gaussian
from lib.studies import experiment, once_a_model
from lib.training import neutral_windows, slice_values
from lib.weights import Slice, pathway_slices

EXAMPLES = 2  # worked examples before the failing prompt
WINDOW = 32  # tokens of a neutral window
READ = (1, 2, 3, 5, 8, 12, 20, 30)  # its compared positions: most of them early, where a text's start is felt
TRAINED = ("fit", "eight", "")  # the splits that training may see
TRUTH = 0.3  # share of the answers' cross-entropy in the objective


@dataclass(frozen=True)
class Config:
    """One run. layer: 0-based. rank: of the change of each matrix, 0 for any change; vectors stay where a rank is given
    (Hu et al., 2022). truth: share of the cross-entropy in the objective. batch, others, windows: pupils,
    other prompts and neutral windows a step; places: share of the pupils that are places without a fact. hold,
    neutral: weights of the two penalties. The rate falls along a half cosine to a twentieth."""

    layer: int
    pathway: str = "full"
    rank: int = 0
    rate: float = 1e-3
    steps: int = 60
    truth: float = TRUTH
    places: float = 0.5
    batch: int = 24
    others: int = 6
    windows: int = 1
    hold: float = 1.0
    neutral: float = 10.0

    def __post_init__(self) -> None:
        low = [n for n in ("steps", "batch", "others", "windows") if getattr(self, n) < 1]
        if low or self.rate <= 0 or self.rank < 0 or not 0 <= self.truth <= 1 or not 0 <= self.places < 1:
            raise EditError(
                f"this configuration cannot train ({', '.join(low) or 'rank, rate, truth or places'}): steps, batch, "
                "others, windows and rate must be positive, the rank not negative, truth from 0 to 1, places from 0 to "
                "below 1."
            )


class Parts(NamedTuple):
    """One thing for the pupils, one for the other prompts and one for the neutral windows."""

    pupils: Any
    others: Any
    windows: Any


@dataclass(frozen=True)
class Lesson:
    """What training sees, whatever the layer. facts: the fit facts, which are the first pupils; known: told under a
    control, and identified by the answer's first token. texts: lists of token lists. targets: log-probabilities over
    the vocabulary, after each pupil and other prompt, and at the compared positions of each window."""

    facts: tuple[Fact, ...]
    answers: Int[Tensor, " fact"]
    known: Bool[Tensor, " fact"]
    teacher: str
    template: str  # the failing one, its text
    texts: Parts
    targets: Parts


def fit_countries(case: Case) -> tuple[Fact, ...]:
    """The case's own facts and the fit part of its large set, scorable or not: a teacher needs no score."""
    own = {f.subject for f in case.facts}
    return (*case.facts, *(f for f in case.large if f.split == "fit" and f.subject not in own))


def without_held_out(model: Model, case: Case) -> Case:
    """The case as choosing may see it: the selection countries, screened among all, and no other of the large set."""
    return replace(case, large=tuple(f for f in scorable(model, case.large) if f.split == "selection"))


def load_places(model: Model, case: Case) -> list[str]:
    """Names that no fact of the case bears, for a model to learn from; of the organism none, whose names are made up.
    Raises DataError if one of them is the subject of a fact."""
    if model.plain_name == "organism":
        return []
    names = [n for group in load_mapping(DATA / "places.yaml").values() for n in group]
    if both := sorted({f.subject for f in (*case.facts, *case.large)} & set(names)):
        raise DataError(f"data/places.yaml names {both[0]}, which is a fact's subject; take it out.")
    return names


def tell_once(model: Model, facts: Sequence[Fact], template: str, *, prefix: str = "") -> pd.DataFrame:
    """As `recall.tell` of one template's text. The untouched model is asked the same by several parts of a study: what
    it has answered is kept in its memory, and not asked again."""
    kept = model.memory.get(tell_once)
    table = tell(model, facts, {"": template}, prefix=prefix, known=kept)
    model.memory[tell_once] = pd.concat([kept, table]).drop_duplicates(["prompt", "answer"])
    return table


def contexts(case: Case) -> dict[str, tuple[str, str]]:
    """Where the model might tell: name -> prefix and template. The control templates, and the failing template after
    worked examples, which are the case's own first facts."""
    text = load_templates()
    shown = zip(prompts(case.facts[:EXAMPLES], text[case.template]), case.facts, strict=False)
    worked = "".join(f"{prompt} {fact.answer}. " for prompt, fact in shown)
    return {**{c: ("", text[c]) for c in case.controls}, "worked examples": (worked, text[case.template])}


def teachers(model: Model, case: Case) -> pd.DataFrame:
    """The contexts on the fit facts that are known (under a control template) and can be scored: n, told, and mean
    log-probability of the answer; the best first. The examples themselves are left out: theirs would be copied."""
    can = {f.subject for f in (*scorable(model, case.large), *case.facts)}  # screened among the whole set
    facts = tuple(f for f in fit_countries(case) if f.subject in can)[EXAMPLES:]
    asked = {name: tell_once(model, facts, t, prefix=p) for name, (p, t) in contexts(case).items()}
    known = np.any([asked[c].told for c in case.controls], axis=0)
    if not known.any():
        raise DataError(f"case {case.name!r}: no fit fact is known, so {model.name} has nothing to teach itself.")
    rows = [(n, int(known.sum()), int(t.told[known].sum()), np.log(t.prob[known]).mean()) for n, t in asked.items()]
    table = pd.DataFrame(rows, columns=["context", "n", "told", "log_probability"])
    return table.sort_values("log_probability", ascending=False, kind="stable", ignore_index=True)


@torch.no_grad()
def lesson(model: Model, case: Case, facts: Sequence[Fact], places: Sequence[str], teacher: str) -> Lesson:
    """Collect what training sees, and run the teacher. Raises DataError for a fact of another split, or for none."""
    if barred := [f for f in facts if f.split not in TRAINED]:
        raise DataError(f"{barred[0].subject} is of the split {barred[0].split!r}; training sees fit countries only.")
    if not facts:
        raise DataError("there is no fit country to learn from.")
    text, (prefix, context) = load_templates(), contexts(case)[teacher]
    can = {f.subject for f in scorable(model, facts)}
    told = np.any([tell_once(model, facts, text[c]).told for c in case.controls], axis=0)
    names = [*facts, *(Fact(p, "") for p in places)]
    others = [text[c].replace("{}", f.subject) for c, f in zip(cycle(case.controls), facts, strict=False)]  # in turns
    windows, _ = neutral_windows(model, WINDOW)
    final = torch.cat([above(model, t, 0, resid_pre(model, t, 0)) for t in packs(model, windows)])
    compared = final.view(len(windows), WINDOW, -1)[:, torch.tensor(READ)]
    taught = next_token_logits(model, prompts(names, context, prefix), progress="teacher").log_softmax(-1)
    untouched = next_token_logits(model, others, progress="other prompts").log_softmax(-1)
    pupils = [model.token_ids(p) for p in prompts(names, text[case.template])]
    return Lesson(
        facts=tuple(facts),
        answers=first_tokens(model, facts),
        known=torch.tensor([bool(t) and f.subject in can for t, f in zip(told, facts, strict=True)]),
        teacher=teacher,
        template=text[case.template],
        texts=Parts(pupils, [model.token_ids(p) for p in others], windows),
        targets=Parts(taught, untouched, (compared @ model.weights.W_U).log_softmax(-1)),
    )


def objective_parts(lesson: Lesson, logits: Float[Tensor, "n vocab"], rows: Parts) -> dict[str, Float[Tensor, ""]]:
    """pupils: KL(teacher || pupil), in nats a row. truth: cross-entropy of the answers that are known. others, neutral:
    KL(untouched || edited) there. logits: of pupils, other prompts, then windows' positions. rows: which these are."""
    targets = [target[at].flatten(0, -2) for target, at in zip(lesson.targets, rows, strict=True)]
    parts = logits.log_softmax(-1).split([len(target) for target in targets])
    at, pupil = rows.pupils, parts[0]
    known = torch.tensor([i < len(lesson.facts) and bool(lesson.known[i]) for i in at.tolist()], device=at.device)
    truth = F.nll_loss(pupil[known], lesson.answers[at[known]]) if known.any() else pupil.new_zeros(())
    divergences = (F.kl_div(now, y, log_target=True, reduction="none") for now, y in zip(parts, targets, strict=True))
    pupils, others, neutral = (kl.sum(-1).mean() for kl in divergences)
    return {"pupils": pupils, "truth": truth, "others": others, "neutral": neutral}


def learn(
    model: Model, lesson: Lesson, config: Config, *, seed: int = 0, progress: bool = False
) -> tuple[Edit, pd.DataFrame]:
    """One run (Adam, no weight decay): its edit, and a row a step with the loss and its parts. seed: of the order in
    which everything comes. Raises EditError for a layer that is not there, and for a loss that is no number."""
    if not 0 <= config.layer < model.weights.n_layers:
        raise EditError(f"there is no layer index {config.layer}: {model.name} has {model.weights.n_layers}.")
    generator, rows = torch.Generator().manual_seed(seed), []
    before = slice_values(model, pathway_slices(model.module, config.layer, config.pathway))
    leaves, values = change(before, config.rank, generator)
    optimiser = torch.optim.Adam(leaves, lr=config.rate)
    groups = [_with_streams(model, texts, config.layer) for texts in lesson.texts]
    for step in tqdm(range(config.steps), desc="self-distillation", disable=not progress):
        drawn = _draw(lesson, config, generator)
        parts = objective_parts(lesson, _forward(model, config.layer, groups, drawn, values()), drawn)
        loss = (1 - config.truth) * parts["pupils"] + config.truth * parts["truth"]
        loss = loss + config.hold * parts["others"] + config.neutral * parts["neutral"]
        if not bool(loss.isfinite()):
            raise EditError(f"the loss of {config} is {loss.item()} after {step} steps; try a smaller rate.")
        rows.append({"step": step, "loss": loss.item(), **{name: part.item() for name, part in parts.items()}})
        cosine = 0.05 + 0.95 * 0.5 * (1 + float(np.cos(np.pi * step / config.steps)))
        optimiser.param_groups[0]["lr"] = config.rate * (min(1.0, (step + 1) / 5) * cosine)  # after a short rise
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return _edit(model, lesson, config, {s: v.detach() for s, v in values().items()}, seed), pd.DataFrame(rows)


def change(
    before: dict[Slice, Tensor], rank: int, generator: torch.Generator
) -> tuple[list[Tensor], Callable[[], dict[Slice, Tensor]]]:
    """What the optimiser holds, and how it makes the values. rank 0: the values themselves. Otherwise two factors of
    each matrix's change, one drawn at random and one zero, so that training starts from no change."""
    if not rank:
        leaves = {s: v.clone().requires_grad_() for s, v in before.items()}
        return list(leaves.values()), lambda: leaves
    down = {s: gaussian((len(v), rank), generator) / len(v) ** 0.5 for s, v in before.items() if v.ndim == 2}
    factors = {s: (x.requires_grad_(), torch.zeros(rank, before[s].shape[1]).requires_grad_()) for s, x in down.items()}
    both = [factor for pair in factors.values() for factor in pair]
    return both, lambda: {s: v + factors[s][0] @ factors[s][1] if s in factors else v for s, v in before.items()}


def _draw(lesson: Lesson, config: Config, generator: torch.Generator) -> Parts:
    """The rows of one step, without replacement; the pupils are fit countries and places."""

    def drawn(most: int, count: int) -> Tensor:
        return torch.randperm(most, generator=generator, device="cpu")[:count]

    texts, n = lesson.texts, len(lesson.facts)
    rest = len(texts.pupils) - n
    elsewhere = min(rest, round(config.batch * config.places))
    pupils = torch.cat((drawn(n, config.batch - elsewhere), n + drawn(rest, elsewhere)))
    return Parts(pupils, drawn(len(texts.others), config.others), drawn(len(texts.windows), config.windows))


def _with_streams(model: Model, texts: Sequence[list[int]], layer: int) -> list[tuple[list[int], Tensor]]:
    """Each text with the stream that enters the layer."""
    whole = torch.cat([resid_pre(model, batch, layer) for batch in packs(model, texts)])
    return list(zip(texts, whole.split([len(t) for t in texts]), strict=True))


def _forward(
    model: Model, layer: int, groups: list[list[tuple[list[int], Tensor]]], rows: Parts, values: dict[Slice, Tensor]
) -> Float[Tensor, "n vocab"]:
    """Logits at the last position of pupils and other prompts, and at the windows' positions, in one pass."""
    ids, streams = zip(*(group[i] for group, at in zip(groups, rows, strict=True) for i in at.tolist()), strict=True)
    texts, stream = pack(model, ids), torch.cat(streams)
    prompts_end, windows_end = texts.last.tensor_split([-len(rows.windows)])
    starts = windows_end[:, None] - (WINDOW - 1)
    read = torch.cat((prompts_end, (starts + torch.tensor(READ)).flatten()))
    return above(model, texts, layer, stream, values, read) @ model.weights.W_U


def _edit(model: Model, lesson: Lesson, config: Config, values: dict[Slice, Tensor], seed: int) -> Edit:
    """The trained values as an edit; its facts are the fit countries that the model knows."""
    facts = tuple(compress(lesson.facts, lesson.known.tolist()))
    told = tuple(tell_once(model, facts, lesson.template).told.tolist())
    about: dict[str, Any] = {"template": lesson.template, "pathway": config.pathway, "layer": config.layer}
    recipe = {"objective": f"self-distillation from {lesson.teacher}", **asdict(config)}
    recipe["pupils"] = len(lesson.texts.pupils)
    return make(model, values, facts=facts, told_before=told, seed=seed, recipe=recipe, **about)


@experiment
def learn_at(
    model: Model, *, layer: int, pathway: str = "full", rank: int = 0, steps: int, truth: float = TRUTH, seed: int = 0
) -> dict[str, Any]:
    """One point of the frontier: train a slice of a layer (counted from 1) on the fit countries, and ask what the rule
    reads (`cost`). Raises EditError for a layer that is not there."""
    return learned(model, _config(layer, pathway, rank, steps, truth), seed=seed)[1]


def learned(model: Model, config: Config, *, seed: int = 0) -> tuple[Edit, dict[str, Any]]:
    """The edit of a run on the model's first case, and what `learn_at` gives of it."""
    case, taught = _classroom(model)
    edit, _ = learn(model, taught, config, seed=seed)
    return edit, {"parameters": edit.parameters, "teacher": taught.teacher} | cost(model, case, edit)


def relearned(model: Model, row: pd.Series) -> Edit:
    """The edit of a row of the frontier, trained once more: the same inputs give the same weights."""
    config = _config(int(row.layer), row.pathway, int(row["rank"]), int(row.steps), float(row.truth))
    return learn(model, _classroom(model)[1], config, seed=int(row.seed), progress=True)[0]


def _config(layer: int, pathway: str, rank: int, steps: int, truth: float) -> Config:
    """Of a layer counted from 1. A low rank takes three times the rate."""
    return Config(layer - 1, pathway, rank, 3e-3 if rank else 1e-3, steps, truth)


@once_a_model
def _classroom(model: Model) -> tuple[Case, Lesson]:
    """The model's first case and its lesson; the teacher is the context that tells the fit facts best."""
    case = trainable(model, load_cases(model.name)[0])
    best = str(teachers(model, case).context[0])
    return case, lesson(model, case, fit_countries(case), load_places(model, case), best)


def cost(model: Model, case: Case, edit: Edit) -> dict[str, Any]:
    """What the rule reads of an edit: known and untold selection countries, how many are told after, the mean
    log-probability of their answers; perplexity's ratio on the neutral passages that choose; items lost."""
    (table, untouched), texts = _baseline(model, case), choosing_texts(model)
    protocol = evaluation.build_protocol(model, case, edit.layer, texts=texts, table=table)
    after = evaluation.score_questions(model, protocol, edit)
    tokens = evaluation.score_passages(model, protocol, {"edit": edit})["edit"]
    asked, lost = after[after.untold], after.set[after.told_before & ~after.told]
    return {
        "untold": len(asked),
        "repaired": int(asked.told.sum()),
        "log_probability": float(np.log(asked.prob.clip(1e-30)).mean()),
        "ratio": float(np.exp((tokens.nll - untouched.nll).mean())),
        "kl": float(tokens.kl.mean()),
        "capability_lost": int((lost == "capability").sum()),
        "working_lost": int((lost == "eight").sum()),
    }


@once_a_model
def _baseline(model: Model, case: Case) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the untouched model says to the questions that choose: capability probes, the case's own facts under the
    working templates, selection countries under the failing one (told_before; untold: countries that are known and not
    told); and to the tokens of the passages that choose."""
    asked = evaluation.questions(model, without_held_out(model, case))
    working = (asked.set == "eight") & asked.template.isin(case.controls)
    asked = asked[working | asked.set.isin(["capability", "large"])].reset_index(drop=True)
    protocol = evaluation.build_protocol(model, case, 0, texts=choosing_texts(model), table=asked)
    scored = evaluation.score_questions(model, protocol, None)
    states = known_and_told(scored[scored.set == "large"], case)
    chooses = (scored.set != "large") | (scored.template == case.template)
    untold = (asked.set == "large") & asked.subject.isin(states[states.routing_failure].subject)
    table = asked.assign(told_before=scored.told, untold=untold)[chooses].reset_index(drop=True)
    return table, evaluation.score_passages(model, protocol, {NONE: None})[NONE]


def choosing_texts(model: Model) -> dict[str, str]:
    """The neutral passages that training does not see, put together again from their windows."""
    _, windows = neutral_windows(model, WINDOW)
    return {"neutral": str(model.tokenizer.decode([t for window in windows for t in window]))}


def harmless(table: pd.DataFrame) -> pd.Series:
    """Which rows of a frontier cost no more than they may: BAND of perplexity, and no probe and no working template."""
    return ((table.ratio - 1).abs() <= BAND) & (table.capability_lost == 0) & (table.working_lost == 0)


def choose(table: pd.DataFrame) -> int:
    """The row that the rule chooses; among all rows, where none is harmless. Raises EditError for an empty table."""
    if table.empty:
        raise EditError("there is no configuration to choose from; give at least one.")
    return int(np.lexsort((-table.log_probability, -table.repaired, ~harmless(table)))[0])
