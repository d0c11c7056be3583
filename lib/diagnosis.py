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

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import hypergeom, rankdata, spearmanr
from torch import Tensor
from tqdm.auto import tqdm

from lib.errors import DataError
from lib.facts import DATA, Case, Fact, known_and_told, load_cases, load_templates, prompts, scorable, study_facts, tell
from lib.site import Site
from lib.static import JointMap, RelationMap, join, qk_overlap, relation_maps
from lib.subjects import Subject
from lib.trace import capture, logit_trace


class NoFailure(DataError):
    """A case has no fact that is known and not told."""


HALF = 0.5
STABLE = 0.95
STATIC_P = 0.05
BATCH = 8


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
            other.knowledge_head, other.suppressor, other.failure_kind,
        )  # fmt: skip


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
            "n": len(self.evidence.facts), "knowledge_head": v.knowledge_head, "suppressor": v.suppressor,
            "failure_kind": v.failure_kind, "diagnosed_layer": self.layer + 1, "retention": v.retention,
            "unwritten": v.unwritten, "stability": self.stability, "static_score": self.static_score,
            "static_p": self.static_p, "static_rank": self.static_rank, "confidence": self.confidence,
        }  # fmt: skip


def case_table(subject: Subject, case: Case, *, large: bool = False, progress: str | None = None) -> pd.DataFrame:
    """A `tell` table of the case's template and controls, over the eight or (large) the study part of the large set."""
    templates = load_templates()
    facts = study_facts(subject, case) if large else scorable(subject, case.facts)
    chosen = {t: templates[t] for t in dict.fromkeys((case.template, *case.controls))}
    return tell(subject, facts, chosen, progress=progress)


def gather(subject: Subject, case: Case, table: pd.DataFrame, *, progress: str | None = None) -> Evidence:
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
    failed = _trace(subject, prompts(facts, load_templates()[case.template]), pairs, bank, progress)
    control = _control_mean(subject, case, facts, chosen.told_by.tolist(), pairs, bank, progress)
    return Evidence(
        facts=facts, competitors=tuple(failing.competitor), sites=components(subject),
        writes_control=control.writes, writes_failing=failed.writes,
        pushes_control=control.pushes, pushes_failing=failed.pushes,
        margin_control=control.curve[:, -1], margin_failing=failed.curve[:, -1],
        curve_control=control.curve, curve_failing=failed.curve,
        completeness=max(failed.error, control.error),
    )  # fmt: skip


def components(subject: Subject) -> tuple[Site, ...]:
    """All heads, layer by layer, then all MLPs: the order of every component vector."""
    layers, heads = range(subject.weights.n_layers), range(subject.weights.n_heads)
    return (*(Site(layer, head) for layer in layers for head in heads), *(Site(layer, mlp=True) for layer in layers))


@dataclass(frozen=True)
class _Traced:
    """writes and pushes (fact, component), the cumulative curve (fact, layer), and the completeness error."""

    writes: Tensor
    pushes: Tensor
    curve: Tensor
    error: float


def _trace(subject: Subject, texts: Sequence[str], pairs: Tensor, bank: Tensor, progress: str | None) -> _Traced:
    """Trace prompts in batches. pairs: answer and competitor of each; bank: the first tokens of all answers."""
    writes, pushes, curves, error = [], [], [], 0.0
    starts = range(0, len(texts), BATCH)
    for i in tqdm(starts, desc=progress, disable=progress is None or len(starts) < 2, leave=False):
        seen, pair = capture(subject, texts[i : i + BATCH]), pairs[i : i + BATCH]
        answers = logit_trace(subject, seen, bank[None].expand(len(pair), -1))
        flat = torch.cat((answers.heads.flatten(2), answers.mlps), -1)  # (b, bank, component)
        own = flat[(bank[None] == pair[:, :1]).nonzero(as_tuple=True)]
        writes.append(own - (flat.sum(1) - own) / (len(bank) - 1))
        margin = logit_trace(subject, seen, pair).difference()
        pushes.append(torch.cat((margin.heads.flatten(2), margin.mlps), -1)[:, 0])
        curves.append(margin.cumulative[:, 0])
        error = max(error, answers.error, margin.error)
    return _Traced(torch.cat(writes), torch.cat(pushes), torch.cat(curves), error)


def _control_mean(
    subject: Subject, case: Case, facts: Sequence[Fact], told_by: Sequence[tuple[str, ...]], pairs: Tensor,
    bank: Tensor, progress: str | None,
) -> _Traced:  # fmt: skip
    """Each fact's traces averaged over the control templates that tell it."""
    text = load_templates()
    rows = [(i, control) for control in case.controls for i, told in enumerate(told_by) if control in told]
    at = torch.tensor([i for i, _ in rows])
    lines = [prompts([facts[i]], text[control])[0] for i, control in rows]
    traced = _trace(subject, lines, pairs[at], bank, progress)
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
        case, evidence, verdict,
        same_head=float(np.mean([v.knowledge_head == verdict.knowledge_head for v in again])),
        same_kind=float(np.mean([v.failure_kind == verdict.failure_kind for v in again])),
        same_suppressor=float(np.mean([v.suppressor == verdict.suppressor for v in again])),
        static_score=float(static.score[at]), static_p=float(static.p[at]),
        static_rank=static.rank(verdict.knowledge_head),
    )  # fmt: skip


def prescribe(subject: Subject, case: Case) -> Verdict:
    """The rule's finding for a case, without the static map and the resampling that only rate its confidence."""
    return decide(gather(subject, case, case_table(subject, case)))


def diagnose_cases(
    subject: Subject, cases: Sequence[Case], static: JointMap, *, large: bool = False, seed: int = 0,
    progress: str | None = None,
) -> list[Diagnosis]:  # fmt: skip
    """Diagnose each case that has a fact known and not told. Raises DataError, with each case's reason, if none has."""
    found, reasons = [], []
    for case in cases:
        table = case_table(subject, case, large=large, progress=progress)
        try:
            found.append(diagnose(gather(subject, case, table, progress=progress), case, static, seed=seed))
        except NoFailure as reason:
            reasons.append(str(reason))
    if not found:
        raise DataError(f"nothing to diagnose on {subject.name}. " + " ".join(reasons))
    return found


def report_cases(
    report: Callable[..., None], tabulate: Callable[[str, object], None], found: Sequence[Diagnosis]
) -> None:
    """The keys that other chapters and the checks rely on, one entry a case; and the findings as words."""
    summaries = {d.case.name: d.summary() for d in found}
    for key in ("knowledge_head", "suppressor", "failure_kind", "diagnosed_layer", "confidence"):
        tabulate(key, {name: s[key] for name, s in summaries.items()})
    tabulate("diagnosis", summaries)
    report("knowledge_heads", [str(d.verdict.knowledge_head) for d in found])
    report("failure_kinds", [d.verdict.failure_kind for d in found])
    report("confidences", [d.confidence for d in found])


def same_findings(found: Sequence[Diagnosis], again: Sequence[Diagnosis]) -> bool:
    """Whether two rounds of diagnosis agree on every case."""
    other = {d.case.name: d.verdict for d in again}
    return len(found) == len(again) and all(
        d.case.name in other and d.verdict.same_finding(other[d.case.name]) for d in found
    )


def planted() -> list[dict[str, str]]:
    """The ground truth of the organism's cases: template, kind, knowledge_head, suppressor (or None)."""
    cases = json.loads((DATA / "organism" / "planted.json").read_text(encoding="utf-8"))["cases"]
    return [{**case, "kind": case["kind"].replace("_", " ")} for case in cases]


def judge(subject: Subject, *, seed: int = 0) -> pd.DataFrame:
    """The rule on the organism's planted failures, beside the truth: one row a case, and whether all three agree."""
    cases = load_cases("organism")
    static = join(relation_maps(subject, study_facts(subject, cases[0])).values(), seed=seed)
    found = {d.case.template: d for d in diagnose_cases(subject, cases, static, seed=seed)}
    rows = []
    for truth in planted():
        d = found[truth["template"]]
        named = (str(d.verdict.knowledge_head), d.verdict.failure_kind, str(d.verdict.suppressor or "none"))
        true = (truth["knowledge_head"], truth["kind"], truth["suppressor"] or "none")
        rows.append(
            (d.case.title, " / ".join(true), " / ".join(named), d.verdict.unwritten, d.stability, named == true)
        )
    columns = ["case", "planted: head / kind / suppressor", "named by the rule", "unwritten", "stability", "agrees"]
    return pd.DataFrame(rows, columns=columns)


def rank_correlation(
    a: Float[Tensor, "n_layers n_heads"],
    b: Float[Tensor, "n_layers n_heads"],
    *,
    permutations: int = 10_000,
    by_layer: bool = False,
    seed: int = 0,
) -> tuple[float, float]:
    """Spearman's rho over all heads and its two-sided permutation p-value. Heads are shuffled, or (by_layer) whole
    layers: heads of a layer are no independent draws, they share key/value heads and what they can read."""
    rng = np.random.default_rng(seed)
    rho = float(spearmanr(a.flatten().cpu().numpy(), b.flatten().cpu().numpy()).statistic)
    ra, rb = (rankdata(grid.flatten().cpu().numpy()).reshape(grid.shape) for grid in (a, b))
    ra, rb = ra - ra.mean(), rb - rb.mean()

    def shuffled() -> NDArray:
        return rng.permutation(ra) if by_layer else rng.permutation(ra.ravel()).reshape(ra.shape)

    null = np.array([(shuffled() * rb).sum() for _ in range(permutations)]) / np.sqrt((ra**2).sum() * (rb**2).sum())
    return rho, float((1 + (np.abs(null) >= abs(rho) - 1e-12).sum()) / (1 + permutations))


def agreement(
    subject: Subject,
    maps: dict[str, RelationMap],
    joint: JointMap,
    writes: Float[Tensor, "n_layers n_heads"],
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Static scores of all heads against what they write: the joint map, the enriched map alone, and two controls
    that should fail, the joint map of permuted answers and QK overlap."""
    n = next(iter(maps.values())).hits.shape[-1]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed), device="cpu")
    wrong = join([RelationMap(m.hits[..., order], m.k) for m in maps.values()], seed=seed)
    scores = {
        "relation maps, joint": joint.score,
        "relation map, enriched": maps["enriched"].score,
        "control: permuted capitals": wrong.score,
        "control: QK overlap": qk_overlap(subject.weights),
    }
    rows = []
    for name, score in scores.items():
        rho, p_heads = rank_correlation(score, writes, seed=seed)
        p_layers = rank_correlation(score, writes, by_layer=True, seed=seed)[1]
        same, chance = top_overlap(score, writes)
        rows.append((name, rho, p_heads, p_layers, same, f"{chance:.1g}"))
    return pd.DataFrame(rows, columns=["static score", "rho", "p_heads", "p_layers", "top5", "top5_chance"])


def top_overlap(
    a: Float[Tensor, "n_layers n_heads"], b: Float[Tensor, "n_layers n_heads"], k: int = 5
) -> tuple[int, float]:
    """How many of the top k heads of two gradings are the same, and the chance of as many (hypergeometric)."""
    tops = [set(grid.flatten().topk(k).indices.tolist()) for grid in (a, b)]
    shared = len(tops[0] & tops[1])
    return shared, float(hypergeom(a.numel(), k, k).sf(shared - 1))
