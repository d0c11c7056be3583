"""From evidence to a diagnosis by one explicit rule.

    1. For every fact that is known and not told, trace the failing prompt, and the control prompts that tell it, all
       with the same pair of tokens: the answer, and the failing prompt's competitor. The traces are direct logit
       attribution (Elhage et al. 2021).
    2. A component's *attribution* is its contribution to the answer minus the mean contribution to the other facts'
       answers: what it writes of *this* capital, not of capitals in general. Its *difference* is its contribution to
       the logit difference, answer minus competitor; of all components together, the *margin*.
    3. Knowledge head: the head with the largest attribution under the controls, on average over facts.
    4. Failure kind: compare what is no longer written (the positive attribution of all components, control minus
       failing) with the margin lost. At least half of it: `not retrieved`. Less: written, and `overridden`. (The ratio
       may exceed 1: attribution is measured against other answers, the margin against the competitor.)
    5. Suppressor, of an overridden failure: the component whose difference fell most, beyond what it no longer writes.
    6. Prescription: the knowledge head's layer, as the source page prescribes L10 although L12 reverses it.
    7. Confidence: how often resampled facts give the same head, kind and suppressor; and whether that head is among
       those that the relation maps, which saw no input, find (p corrected for heads and maps). Both: high. One:
       medium. Neither: low.

The rule has one constant, the half of step 4, and step 7's two thresholds. Planted failures judge it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from lib.errors import DataError
from lib.facts import Case, Fact, load_templates
from lib.models import Model
from lib.recall import known_and_told, scorable, study_facts, tell
from lib.sites import Site
from lib.static import JointMap
from lib.trace import BATCH, Capture, capture, components, logit_trace

NOT_RETRIEVED, OVERRIDDEN = "not retrieved", "overridden"
HALF = 0.5  # of the margin lost: step 4's boundary between the two failure kinds
STABLE = 0.95  # share of resampled facts that must agree with all of them
STATIC_P = 0.05
RESAMPLES = 1000

Label = str | None  # of a progress bar
Told = Bool[Tensor, "control fact"]


class NoFailure(DataError):
    """A case has no fact that is known and not told."""


@dataclass(frozen=True)
class Contributions:
    """Direct logit attribution of every component (all heads layer by layer, then all MLPs) at the last position, for
    n prompts, or for n facts as the mean of their prompts; in logits, `scaled`.

    attribution: to the answer, minus the mean contribution to the other answers of the set.
    difference: to the logit difference, answer minus competitor; margin: that difference as a whole.
    """

    attribution: Float[Tensor, "n component"]
    difference: Float[Tensor, "n component"]
    margin: Float[Tensor, " n"]


@dataclass(frozen=True)
class Traced(Contributions):
    """curve: the logit difference summed up to each layer."""

    curve: Float[Tensor, "n n_layers+1"]


@dataclass(frozen=True)
class Evidence:
    """What the facts of one case show, by component, under the controls that tell each and the failing template."""

    facts: tuple[Fact, ...]
    competitors: tuple[str, ...]
    sites: tuple[Site, ...]
    control: Traced
    failing: Traced

    def verdict(self, rows: NDArray | None = None) -> "Verdict":
        """What `decide` reads off these facts, or off a resample of them."""
        return decide(self.sites, self.control, self.failing, rows)

    def grid(self, values: Float[Tensor, " component"]) -> Float[Tensor, "n_layers n_heads"]:
        """The heads' part of a component vector as layer x head."""
        heads = [s for s in self.sites if not s.mlp]
        return values[: len(heads)].reshape(heads[-1].layer + 1, -1)


@dataclass(frozen=True)
class Verdict:
    """What the rule reads off a set of facts. retention: knowledge head, failing over control;
    unwritten: share of the lost margin that is knowledge no longer written."""

    knowledge_head: Site
    suppressor: Site | None
    failure_kind: str
    retention: float
    unwritten: float


@dataclass(frozen=True)
class Diagnosis:
    """A verdict with its evidence, its stability and the static map's opinion of the same head."""

    case: Case
    evidence: Evidence
    verdict: Verdict
    agreement: dict[str, float]  # share of resamples that agree on knowledge_head, failure_kind, suppressor
    static_score: float
    static_p: float
    static_rank: int

    @property
    def layer(self) -> int:
        """The prescribed layer, 0-based."""
        return self.verdict.knowledge_head.layer

    @property
    def stability(self) -> float:
        return min(self.agreement.values())

    @property
    def confidence(self) -> str:
        votes = (self.stability >= STABLE) + (self.static_p <= STATIC_P)
        return ("low", "medium", "high")[votes]

    def summary(self) -> dict[str, object]:
        """The finding as plain values, for results."""
        rated = ("stability", "static_score", "static_p", "static_rank", "confidence")
        where = {"n": len(self.evidence.facts), "diagnosed_layer": self.layer + 1}
        return where | vars(self.verdict) | {name: getattr(self, name) for name in rated}


def case_table(
    model: Model, case: Case, *, large: bool = False, known: pd.DataFrame | None = None, progress: Label = None
) -> pd.DataFrame:
    """A `tell` table of the case's template and controls, over the eight or (large) the study part of the large set.
    known: as in `tell`."""
    templates = load_templates()
    facts = study_facts(model, case) if large else scorable(model, case.facts)
    chosen = {t: templates[t] for t in dict.fromkeys((case.template, *case.controls))}
    return tell(model, facts, chosen, known=known, progress=progress)


def gather(model: Model, case: Case, table: pd.DataFrame, *, progress: Label = None) -> Evidence:
    """Trace the failing and the control prompts of every fact in a `case_table` that is known and not told.
    Raises NoFailure if there is none: then there is nothing to locate."""
    states = known_and_told(table, case)
    chosen = states[states.routing_failure]
    if chosen.empty:
        raise NoFailure(
            f"Case {case.name!r}: {int(states.told.sum())} of {len(states)} facts are told and "
            f"{int(states.known.sum())} known, none known and not told: no routing failure."
        )
    failing = table[table.template == case.template].set_index("subject").loc[chosen.subject]
    facts = tuple(Fact(*row) for row in zip(failing.index, failing.answer, failing.split, strict=True))
    pairs = torch.tensor(failing[["answer_token", "competitor_token"]].to_numpy())
    bank = torch.tensor(table.answer_token.unique())
    if len(bank) < 2:
        raise DataError(f"case {case.name!r} has one distinct answer, and no other to compare what is written with.")
    told = torch.tensor([[control in names for names in chosen.told_by] for control in case.controls])
    by_name = {name: part.set_index("subject").prompt for name, part in table.groupby("template", sort=False)}
    lines = {t: by_name[t].loc[chosen.subject].tolist() for t in (case.template, *case.controls)}
    telling = [lines[case.controls[c]][i] for c, i in told.nonzero().tolist()]
    failed = _trace(model, lines[case.template], pairs, bank, progress)
    controls = _trace(model, telling, pairs[told.nonzero()[:, 1]], bank, progress)
    return Evidence(facts, tuple(failing.competitor), components(model), _mean(controls, told), failed)


@torch.no_grad()
def contributions(model: Model, seen: Capture, pairs: Int[Tensor, "n 2"], bank: Int[Tensor, " answer"]) -> Traced:
    """What every component contributes to each prompt of a capture. pairs: first tokens of its answer and of its
    competitor; bank: those of all answers of the set, each once. Raises CompletenessError."""
    answers = logit_trace(model, seen, bank[None].expand(len(pairs), -1))
    by_answer = torch.cat((answers.heads.flatten(2), answers.mlps), -1)  # (n, answer, component)
    right = by_answer[(bank[None] == pairs[:, :1]).nonzero(as_tuple=True)]
    attribution = right - (by_answer.sum(1) - right) / max(1, len(bank) - 1)
    trace = logit_trace(model, seen, pairs).difference()
    difference, curve = torch.cat((trace.heads.flatten(2), trace.mlps), -1)[:, 0], trace.cumulative[:, 0]
    return Traced(attribution, difference, curve[:, -1], curve)


def _trace(model: Model, texts: Sequence[str], pairs: Tensor, bank: Tensor, progress: Label) -> Traced:
    """`contributions` to any number of prompts, in batches."""
    starts = range(0, len(texts), BATCH)
    parts = [
        contributions(model, capture(model, texts[i : i + BATCH]), pairs[i : i + BATCH], bank)
        for i in tqdm(starts, desc=progress, disable=progress is None or len(starts) < 2, leave=False)
    ]
    return Traced(*(torch.cat(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))


def control_mean(values: Float[Tensor, "control fact ..."], told: Told) -> Float[Tensor, "fact ..."]:
    """Each fact's mean over the controls that tell it, summed control by control."""
    weight = told.float().view(*told.shape, *[1] * (values.dim() - 2))
    return sum((values * weight).unbind(), start=torch.zeros(())) / weight.sum(0)


def _mean(traced: Traced, told: Told) -> Traced:
    """The `control_mean` of traces of the prompts that tell, control by control."""
    means = {}
    for name, values in vars(traced).items():
        by_control = values.new_zeros(*told.shape, *values.shape[1:])
        by_control[told] = values
        means[name] = control_mean(by_control, told)
    return Traced(**means)


def decide(
    sites: Sequence[Site], control: Contributions, failing: Contributions, rows: NDArray | None = None
) -> Verdict:
    """Steps 3 to 5 of the rule, on all facts or on a resample of them. sites: the components."""
    pick = slice(None) if rows is None else torch.as_tensor(rows)
    written, still_written = control.attribution[pick].mean(0), failing.attribution[pick].mean(0)
    best = int(written[: sum(not s.mlp for s in sites)].argmax())
    unwritten = written.relu() - still_written.relu()
    share = float(unwritten.sum()) / float((control.margin - failing.margin)[pick].mean())
    kind = NOT_RETRIEVED if share >= HALF else OVERRIDDEN
    fallen = (failing.difference - control.difference)[pick].mean(0) + unwritten
    suppressor = sites[int(fallen.argmin())] if kind == OVERRIDDEN else None
    return Verdict(sites[best], suppressor, kind, float(still_written[best] / written[best]), share)


def diagnose(evidence: Evidence, case: Case, static: JointMap, *, seed: int = 0) -> Diagnosis:
    """The whole rule. static: the relation maps, raw and enriched, read as one."""
    rng, n = np.random.default_rng(seed), len(evidence.facts)
    verdict = evidence.verdict()
    resampled = [evidence.verdict(rng.integers(n, size=n)) for _ in range(RESAMPLES)]
    found = ("knowledge_head", "failure_kind", "suppressor")
    agreement = {k: float(np.mean([getattr(v, k) == getattr(verdict, k) for v in resampled])) for k in found}
    at = (verdict.knowledge_head.layer, verdict.knowledge_head.head)
    score, p, rank = float(static.score[at]), float(static.p[at]), static.rank(verdict.knowledge_head)
    return Diagnosis(case, evidence, verdict, agreement, static_score=score, static_p=p, static_rank=rank)


def prescribe(model: Model, case: Case) -> Verdict:
    """The rule's finding for a case, without the static map and the resampling that only rate its confidence."""
    return gather(model, case, case_table(model, case)).verdict()


def diagnose_cases(
    model: Model, cases: Sequence[Case], maps: JointMap, *, seed: int = 0, progress: Label = None, **asked: Any
) -> list[Diagnosis]:
    """Diagnose each case that has a fact known and not told. asked: large and known, as in `case_table`. Raises
    DataError, with each case's reason, if none has."""
    diagnoses, reasons = [], []
    for case in cases:
        table = case_table(model, case, progress=progress, **asked)
        try:
            diagnoses.append(diagnose(gather(model, case, table, progress=progress), case, maps, seed=seed))
        except NoFailure as reason:
            reasons.append(str(reason))
    if not diagnoses:
        raise NoFailure(f"nothing to diagnose on {model.name}. " + " ".join(reasons))
    return diagnoses
