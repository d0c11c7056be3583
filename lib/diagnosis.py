"""From evidence to a diagnosis by one explicit rule (design, section 4).

    1. For every fact that is known and not told, trace the failing prompt, and the control prompts that tell it, all
       with the same pair of tokens: the answer, and the failing prompt's competitor.
    2. What a component *writes* is its contribution to the answer minus the mean contribution to the other facts'
       answers: it must say *this* capital, not capitals in general. What it *pushes* is its contribution to answer
       minus competitor.
    3. Knowledge head: the head that writes most under the controls, on average over facts.
    4. Failure kind: compare what is no longer written (the positive writing of all components, control minus failing)
       with the margin lost. At least half of it: `not retrieved`. Less: written, and `overridden`. (The ratio may
       exceed 1: writing is measured against other answers, the margin against the competitor.)
    5. Suppressor, of an overridden failure: the component whose push fell most, beyond what it no longer writes.
    6. Prescription: the knowledge head's layer, as the source page prescribes L10 although L12 reverses it.
    7. Confidence: how often resampled facts give the same head, kind and suppressor; and whether that head is among
       those that the relation maps, which saw no input, find (p corrected for heads and maps). Both: high. One:
       medium. Neither: low.

The rule has one constant, the half of step 4, and step 7's two thresholds. Planted failures judge it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from lib.errors import DataError
from lib.facts import Case, Fact, load_templates, prompts
from lib.models import Model
from lib.recall import known_and_told, scorable, study_facts, tell
from lib.sites import Site
from lib.static import JointMap
from lib.trace import BATCH, capture, components, logit_trace


class NoFailure(DataError):
    """A case has no fact that is known and not told."""


HALF = 0.5
STABLE = 0.95
STATIC_P = 0.05


@dataclass(frozen=True)
class Evidence:
    """What the facts of one case show, by component (all heads layer by layer, then all MLPs). Logits, `scaled`."""

    facts: tuple[Fact, ...]
    competitors: tuple[str, ...]
    sites: tuple[Site, ...]
    writes_control: Float[Tensor, "fact component"]
    writes_failing: Float[Tensor, "fact component"]
    pushes_control: Float[Tensor, "fact component"]
    pushes_failing: Float[Tensor, "fact component"]
    margin_control: Float[Tensor, " fact"]
    margin_failing: Float[Tensor, " fact"]
    curve_control: Float[Tensor, "fact n_layers+1"]  # cumulative answer minus competitor, by layer
    curve_failing: Float[Tensor, "fact n_layers+1"]
    completeness: float

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

    def same_finding(self, other: Verdict) -> bool:
        """Head, suppressor and kind agree; the shares may differ."""
        return (self.knowledge_head, self.suppressor, self.failure_kind) == (
            other.knowledge_head,
            other.suppressor,
            other.failure_kind,
        )


@dataclass(frozen=True)
class Diagnosis:
    """A verdict with its evidence, its stability and the static map's opinion of the same head."""

    case: Case
    evidence: Evidence
    verdict: Verdict
    same_head: float
    same_kind: float
    same_suppressor: float
    static_score: float
    static_p: float
    static_rank: int

    @property
    def layer(self) -> int:
        """The prescribed layer, 0-based."""
        return self.verdict.knowledge_head.layer

    @property
    def stability(self) -> float:
        return min(self.same_head, self.same_kind, self.same_suppressor)

    @property
    def confidence(self) -> str:
        votes = (self.stability >= STABLE) + (self.static_p <= STATIC_P)
        return ("low", "medium", "high")[votes]

    def summary(self) -> dict[str, object]:
        """The finding as plain values, for results."""
        v = self.verdict
        return {
            "n": len(self.evidence.facts),
            "knowledge_head": v.knowledge_head,
            "suppressor": v.suppressor,
            "failure_kind": v.failure_kind,
            "diagnosed_layer": self.layer + 1,
            "retention": v.retention,
            "unwritten": v.unwritten,
            "stability": self.stability,
            "static_score": self.static_score,
            "static_p": self.static_p,
            "static_rank": self.static_rank,
            "confidence": self.confidence,
        }


def case_table(model: Model, case: Case, *, large: bool = False, progress: str | None = None) -> pd.DataFrame:
    """A `tell` table of the case's template and controls, over the eight or (large) the study part of the large set."""
    templates = load_templates()
    facts = study_facts(model, case) if large else scorable(model, case.facts)
    chosen = {t: templates[t] for t in dict.fromkeys((case.template, *case.controls))}
    return tell(model, facts, chosen, progress=progress)


def gather(model: Model, case: Case, table: pd.DataFrame, *, progress: str | None = None) -> Evidence:
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
        raise DataError(
            f"case {case.name!r} has one distinct answer; what is written of it needs others to compare with."
        )
    failed = _trace(model, prompts(facts, load_templates()[case.template]), pairs, bank, progress)
    control = _control_mean(model, case, facts, chosen.told_by.tolist(), pairs, bank, progress)
    return Evidence(
        facts=facts,
        competitors=tuple(failing.competitor),
        sites=components(model),
        writes_control=control.writes,
        writes_failing=failed.writes,
        pushes_control=control.pushes,
        pushes_failing=failed.pushes,
        margin_control=control.curve[:, -1],
        margin_failing=failed.curve[:, -1],
        curve_control=control.curve,
        curve_failing=failed.curve,
        completeness=max(failed.error, control.error),
    )


@dataclass(frozen=True)
class _Traced:
    """writes and pushes (fact, component), the cumulative curve (fact, layer), and the completeness error."""

    writes: Tensor
    pushes: Tensor
    curve: Tensor
    error: float


def _trace(model: Model, texts: Sequence[str], pairs: Tensor, bank: Tensor, progress: str | None) -> _Traced:
    """Trace prompts in batches. pairs: answer and competitor of each; bank: the first tokens of all answers."""
    writes, pushes, curves, error = [], [], [], 0.0
    starts = range(0, len(texts), BATCH)
    for i in tqdm(starts, desc=progress, disable=progress is None or len(starts) < 2, leave=False):
        seen, pair = capture(model, texts[i : i + BATCH]), pairs[i : i + BATCH]
        answers = logit_trace(model, seen, bank[None].expand(len(pair), -1))
        flat = torch.cat((answers.heads.flatten(2), answers.mlps), -1)  # (b, bank, component)
        own = flat[(bank[None] == pair[:, :1]).nonzero(as_tuple=True)]
        writes.append(own - (flat.sum(1) - own) / (len(bank) - 1))
        margin = logit_trace(model, seen, pair).difference()
        pushes.append(torch.cat((margin.heads.flatten(2), margin.mlps), -1)[:, 0])
        curves.append(margin.cumulative[:, 0])
        error = max(error, answers.error, margin.error)
    return _Traced(torch.cat(writes), torch.cat(pushes), torch.cat(curves), error)


def _control_mean(
    model: Model,
    case: Case,
    facts: Sequence[Fact],
    told_by: Sequence[tuple[str, ...]],
    pairs: Tensor,
    bank: Tensor,
    progress: str | None,
) -> _Traced:
    """Each fact's traces averaged over the control templates that tell it."""
    text = load_templates()
    rows = [(i, control) for control in case.controls for i, told in enumerate(told_by) if control in told]
    at = torch.tensor([i for i, _ in rows])
    lines = [prompts([facts[i]], text[control])[0] for i, control in rows]
    traced = _trace(model, lines, pairs[at], bank, progress)
    counts = torch.bincount(at, minlength=len(facts))[:, None]

    def mean(x: Tensor) -> Tensor:
        return torch.zeros(len(facts), x.shape[1]).index_add(0, at, x) / counts

    return _Traced(mean(traced.writes), mean(traced.pushes), mean(traced.curve), traced.error)


def decide(evidence: Evidence, rows: NDArray | None = None) -> Verdict:
    """Steps 3 to 5 of the rule, on all facts or on a resample of them."""
    pick = slice(None) if rows is None else torch.as_tensor(rows)
    control, failing = evidence.writes_control[pick].mean(0), evidence.writes_failing[pick].mean(0)
    heads = sum(not s.mlp for s in evidence.sites)
    best = int(control[:heads].argmax())
    unwritten = control.relu() - failing.relu()
    lost = float((evidence.margin_control - evidence.margin_failing)[pick].mean())
    share = float(unwritten.sum()) / lost
    kind = "not retrieved" if share >= HALF else "overridden"
    fallen = (evidence.pushes_failing - evidence.pushes_control)[pick].mean(0) + unwritten
    suppressor = evidence.sites[int(fallen.argmin())] if kind == "overridden" else None
    return Verdict(evidence.sites[best], suppressor, kind, float(failing[best] / control[best]), share)


def diagnose(evidence: Evidence, case: Case, static: JointMap, *, resamples: int = 1000, seed: int = 0) -> Diagnosis:
    """The whole rule. static: the relation maps, raw and enriched, read as one."""
    verdict, rng, n = decide(evidence), np.random.default_rng(seed), len(evidence.facts)
    again = [decide(evidence, rng.integers(n, size=n)) for _ in range(resamples)]
    at = (verdict.knowledge_head.layer, verdict.knowledge_head.head)
    return Diagnosis(
        case,
        evidence,
        verdict,
        same_head=float(np.mean([v.knowledge_head == verdict.knowledge_head for v in again])),
        same_kind=float(np.mean([v.failure_kind == verdict.failure_kind for v in again])),
        same_suppressor=float(np.mean([v.suppressor == verdict.suppressor for v in again])),
        static_score=float(static.score[at]),
        static_p=float(static.p[at]),
        static_rank=static.rank(verdict.knowledge_head),
    )


def prescribe(model: Model, case: Case) -> Verdict:
    """The rule's finding for a case, without the static map and the resampling that only rate its confidence."""
    return decide(gather(model, case, case_table(model, case)))


def diagnose_cases(
    model: Model,
    cases: Sequence[Case],
    static: JointMap,
    *,
    large: bool = False,
    seed: int = 0,
    progress: str | None = None,
) -> list[Diagnosis]:
    """Diagnose each case that has a fact known and not told. Raises DataError, with each case's reason, if none has."""
    found, reasons = [], []
    for case in cases:
        table = case_table(model, case, large=large, progress=progress)
        try:
            found.append(diagnose(gather(model, case, table, progress=progress), case, static, seed=seed))
        except NoFailure as reason:
            reasons.append(str(reason))
    if not found:
        raise DataError(f"nothing to diagnose on {model.name}. " + " ".join(reasons))
    return found
