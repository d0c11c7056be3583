"""Close-ups of diagnosed cases: what chapter 2 shows beside the diagnosis itself.

conventions      one prompt's strongest terms, the three logit conventions side by side
completeness     the largest error of the exact trace over many prompts
lens             rank of the answer by layer, failing against control
attention        from the last token to the subject, failing against control
rivals           repairs that touch no weight: neutral prefixes, any word at all, and the subject's own stream
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lib.diagnosis import Diagnosis, diagnose_cases
from lib.facts import load_cases, load_templates, prompts
from lib.files import DATA
from lib.models import Model
from lib.recall import study_facts
from lib.sites import Site
from lib.static import JointMap, RelationMap, join, qk_overlap, relation_maps
from lib.statistics import rank_correlation, top_overlap
from lib.trace import capture, last_patterns, logit_lens, subject_attention


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


def judge(model: Model, *, seed: int = 0) -> pd.DataFrame:
    """The rule on the organism's planted failures, beside the truth: one row a case, and whether all three agree."""
    cases = load_cases("organism")
    static = join(relation_maps(model, study_facts(model, cases[0])).values(), seed=seed)
    found = {d.case.template: d for d in diagnose_cases(model, cases, static, seed=seed)}
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


def agreement(
    model: Model,
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
    wrong = join([RelationMap(m.hits[..., order]) for m in maps.values()], seed=seed)
    scores = {
        "relation maps, joint": joint.score,
        "relation map, enriched": maps["enriched"].score,
        "control: permuted capitals": wrong.score,
        "control: QK overlap": qk_overlap(model.weights),
    }
    rows = []
    for name, score in scores.items():
        rho, p_heads = rank_correlation(score, writes, seed=seed)
        p_layers = rank_correlation(score, writes, by_layer=True, seed=seed)[1]
        same, chance = top_overlap(score, writes)
        rows.append((name, rho, p_heads, p_layers, same, f"{chance:.1g}"))
    return pd.DataFrame(rows, columns=["static score", "rho", "p_heads", "p_layers", "top5", "top5_chance"])


def lens_by_case(model: Model, diagnoses: Sequence[Diagnosis]) -> dict[str, Float[Tensor, "fact n_layers+1"]]:
    """Rank of the answer in the logit lens, for each case's failing template and for the first case's first control."""
    text, out = load_templates(), {}
    named = [(diagnoses[0], diagnoses[0].case.controls[0], "control")]
    named += [(d, d.case.template, "failing") for d in diagnoses]
    for d, template, kind in named:
        facts = d.evidence.facts
        seen = capture(model, prompts(facts, text[template]))
        answers = torch.tensor([[model.first_token(f.answer)] for f in facts])
        out[f"{kind}: {text[template]}"] = logit_lens(model, seen, answers)[1][..., 0]
    return out


def lens_flip(ranks: Float[Tensor, "fact n_layers+1"]) -> int | None:
    """The layer (counted from 1) after which the median answer is first among the top ten, None if it never is."""
    inside = (ranks.float().median(0).values <= 10).nonzero().flatten()
    return int(inside[0]) if len(inside) else None


def knowledge_heads(diagnosis: Diagnosis, k: int = 4) -> list[Site]:
    """The k heads that write most under the controls, strongest first."""
    written = diagnosis.evidence.control.attribution.mean(0)
    order = [diagnosis.evidence.sites[i] for i in written.argsort(descending=True).tolist()]
    return [s for s in order if not s.mlp][:k]


def attention_table(model: Model, diagnoses: Sequence[Diagnosis], k: int = 4) -> pd.DataFrame:
    """Attention from the last token to the subject in the strongest knowledge heads of the first case: one row a
    case, kind of template (failing; control: the case's first), fact and head."""
    text, heads, rows = load_templates(), knowledge_heads(diagnoses[0], k), []
    for d in diagnoses:
        facts = d.evidence.facts
        for kind, template in (("control", d.case.controls[0]), ("failing", d.case.template)):
            seen = capture(model, prompts(facts, text[template]), everywhere=True)
            attention = subject_attention(model, last_patterns(model, seen), seen.prompts, [f.subject for f in facts])
            rows += [
                (d.case.title, kind, fact.subject, str(site), float(attention[i, site.layer, site.head]))
                for site in heads
                for i, fact in enumerate(facts)
            ]
    return pd.DataFrame(rows, columns=["case", "kind", "subject", "site", "attention"])


def attention_pair(model: Model, diagnosis: Diagnosis) -> dict[str, tuple[list[str], Float[Tensor, " t"]]]:
    """The knowledge head's attention, token by token, for one fact: control prompt and failing prompt."""
    text, fact, head = load_templates(), diagnosis.evidence.facts[0], diagnosis.verdict.knowledge_head
    rows = {}
    for kind, template in (("control", diagnosis.case.controls[0]), ("failing", diagnosis.case.template)):
        prompt = prompts([fact], text[template])[0]
        seen = capture(model, [prompt], everywhere=True)
        tokens = [model.token_text(t) for t in seen.tokens[0].tolist()]
        rows[f"{kind}: {prompt}"] = (tokens, last_patterns(model, seen)[0, head.layer, head.head])
    return rows
