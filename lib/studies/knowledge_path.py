"""What chapter 2 shows beside the diagnosis itself: the trace over many prompts, the rule where the truth is known,
whether the weights rate the heads as the trace does, when the answer wins, and where the knowledge heads look."""

import json
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors.torch import load, save
from torch import Tensor

from lib.diagnosis import Diagnosis, diagnose_cases
from lib.facts import Case, Fact, load_cases, load_templates, prompts
from lib.files import BUILD, DATA, ROOT, digest, modules, write_atomically
from lib.interventions import run_with_cache
from lib.models import Model
from lib.recall import first_tokens, study_facts, tell
from lib.results import Results
from lib.sites import Site
from lib.static import TOP, JointMap, RelationMap, join, qk_overlap, relation_maps
from lib.statistics import ByHead, rank_correlation, top_overlap
from lib.trace import BATCH, capture, components, logit_lens, logit_traces, subject_attention

HEADS = 4  # knowledge heads whose attention is shown


def convention_terms(model: Model, row: pd.Series) -> pd.DataFrame:
    """Every component's term for a prompt (a row of a `tell` table): for its answer, its competitor and their
    difference, in every convention; the last row sums all terms, embedding and biases included."""
    seen = capture(model, [row.prompt])
    pair = torch.tensor([[row.answer_token, row.competitor_token]])
    columns: dict[tuple[str, str], list[float]] = {}
    for convention, trace in logit_traces(model, seen, pair).items():
        answer, competitor = torch.cat((trace.heads.flatten(2), trace.mlps, trace.total[..., None]), -1)[0]
        for name, terms in (("answer", answer), ("competitor", competitor), ("difference", answer - competitor)):
            columns[convention, name] = terms.tolist()
    return pd.DataFrame(columns, index=[*map(str, components(model)), "all terms"])


def strongest_terms(table: pd.DataFrame, *, k: int = 8) -> pd.DataFrame:
    """Of a `convention_terms` table the k components that move the prompt most, and the sum of all."""
    strongest = table["scaled", "difference"].iloc[:-1].abs().sort_values(ascending=False).index[:k]
    return table.loc[[*strongest, "all terms"]]


def relation_maps_once(model: Model, facts: Sequence[Fact]) -> dict[str, RelationMap]:
    """The `relation_maps` that two chapters and the dashboard show: made by whoever comes first, and kept on disk under
    the sha256 of weights (and of their present sums, which an edit changes), facts and code."""
    path = _kept("relation_maps", "static", model, [vars(fact) for fact in facts], "safetensors")
    if path.is_file():
        hits = load(path.read_bytes())  # in the file's own order
        return {name: RelationMap(hits[name]) for name in ("raw", "enriched")}
    maps = relation_maps(model, facts)
    write_atomically(path, save({name: m.hits.contiguous().cpu() for name, m in maps.items()}))
    return maps


def answers_once(
    model: Model, facts: Sequence[Fact], templates: dict[str, str], *, progress: str | None = None
) -> pd.DataFrame:
    """`recall.tell` of many questions that two studies ask (chapter 2, and what a failure is planted in): put by
    whoever comes first, and kept as `relation_maps_once` keeps maps."""
    asked = [torch.get_num_threads(), list(templates.values()), [vars(fact) for fact in facts]]
    path = _kept("answers", "recall", model, asked, "json")
    if path.is_file():
        table = pd.DataFrame(json.loads(path.read_text(encoding="utf-8")))
        return table.assign(template=[name for name in templates for _ in facts])
    table = tell(model, facts, templates, progress=progress)
    write_atomically(path, json.dumps(table.to_dict("list")))
    return table


def asked_before(model: Model) -> pd.DataFrame:
    """What chapter 2 asks of the untouched model, the study countries of its first case under every template: for the
    `known` of `recall.tell`, where only what is told is read."""
    return answers_once(model, study_facts(model, load_cases(model.name)[0]), load_templates())


def _kept(what: str, code: str, model: Model, inputs: list[Any], suffix: str) -> Path:
    """Where something is kept that a module of lib/ makes of a model and of plain values."""
    sums = [float(p.detach().cpu().numpy().sum(dtype=float)) for p in model.module.parameters()]  # no copy
    made_of = json.dumps([model.weights_sha256, model.bos, sums, torch.__version__, *inputs])
    return BUILD / "kept" / f"{what}-{digest(modules({code}, ROOT), made_of, ROOT)}.{suffix}"


def terms_by_site(table: pd.DataFrame) -> dict[str, dict[str, dict[str, float]]]:
    """A `convention_terms` table as results keep it: convention, then answer or competitor, then site."""
    return {c: {what: table[c, what].to_dict() for what in ("answer", "competitor")} for c in table.columns.unique(0)}


def completeness(model: Model, table: pd.DataFrame) -> dict[str, float]:
    """Largest |sum of terms - model's own value| by convention, over every prompt of a `tell` table, for its answer
    and its competitor; `raw` relative to the final residual stream's own product."""
    errors: dict[str, float] = {}
    for start in range(0, len(table), BATCH):
        part = table.iloc[start : start + BATCH]
        seen = capture(model, part.prompt.tolist())
        pairs = torch.tensor(part[["answer_token", "competitor_token"]].to_numpy())
        for convention, trace in logit_traces(model, seen, pairs).items():
            errors[convention] = max(errors.get(convention, 0.0), trace.error)
    return errors


def report_cases(report: Results, diagnoses: Sequence[Diagnosis]) -> None:
    """The keys that other chapters and the checks rely on, one entry a case; and the findings as words."""
    summaries = {d.case.name: d.summary() for d in diagnoses}
    for key in ("knowledge_head", "suppressor", "failure_kind", "diagnosed_layer", "confidence"):
        report.table(key, {name: summary[key] for name, summary in summaries.items()})
    report.table("diagnosis", summaries)
    report("knowledge_heads", [str(d.verdict.knowledge_head) for d in diagnoses])
    report("failure_kinds", [d.verdict.failure_kind for d in diagnoses])
    report("confidences", [d.confidence for d in diagnoses])


def same_findings(diagnoses: Sequence[Diagnosis], repeated: Sequence[Diagnosis]) -> bool:
    """Whether two rounds of diagnosis agree on every case: head, suppressor and kind; the shares may differ."""
    finding = attrgetter("case.name", "verdict.knowledge_head", "verdict.suppressor", "verdict.failure_kind")
    return {*map(finding, diagnoses)} == {*map(finding, repeated)}


def organism_truth() -> list[dict[str, str]]:
    """What was planted in the organism, by case: template, kind, knowledge_head, suppressor (or None)."""
    cases = json.loads((DATA / "organism" / "planted.json").read_text(encoding="utf-8"))["cases"]
    return [{**case, "kind": case["kind"].replace("_", " ")} for case in cases]


def judge_rule(organism: Model, *, seed: int = 0) -> pd.DataFrame:
    """The rule on the organism's planted failures, beside the truth: one row a case, and whether all three agree."""
    cases = load_cases("organism")
    static = join(relation_maps(organism, study_facts(organism, cases[0])).values(), seed=seed)
    by_template = {d.case.template: d for d in diagnose_cases(organism, cases, static, seed=seed)}
    rows = []
    for truth in organism_truth():
        d = by_template[truth["template"]]
        named = f"{d.verdict.knowledge_head} / {d.verdict.failure_kind} / {d.verdict.suppressor or 'none'}"
        true = f"{truth['knowledge_head']} / {truth['kind']} / {truth['suppressor'] or 'none'}"
        rows.append((d.case.title, true, named, d.verdict.unwritten, d.stability, named == true))
    columns = ["case", "planted: head / kind / suppressor", "named by the rule", "unwritten", "stability", "agrees"]
    return pd.DataFrame(rows, columns=columns)


def static_agreement(
    model: Model, maps: dict[str, RelationMap], joint: JointMap, attribution: ByHead, *, seed: int = 0
) -> pd.DataFrame:
    """Static scores of all heads against their direct logit attribution: the joint map, the enriched map alone, and
    two controls that should fail, the joint map of permuted answers and QK overlap. top5_chance: with heads that share
    a key/value head shuffled together."""
    order = torch.randperm(maps["raw"].hits.shape[-1], generator=torch.Generator().manual_seed(seed), device="cpu")
    scores = {
        "relation maps, joint": joint.score,
        "relation map, enriched": maps["enriched"].score,
        "control: permuted capitals": join([RelationMap(m.hits[..., order]) for m in maps.values()], seed=seed).score,
        "control: QK overlap": qk_overlap(model.weights),
    }
    rows, group = [], model.weights.n_heads // model.weights.n_kv_heads
    for name, score in scores.items():
        rho, p_heads = rank_correlation(score, attribution, seed=seed)
        p_layers = rank_correlation(score, attribution, by_layer=True, seed=seed)[1]
        shared, chance = top_overlap(score, attribution, group=group, seed=seed)
        rows.append((name, rho, p_heads, p_layers, shared, f"{chance:.1g}"))
    return pd.DataFrame(rows, columns=["static score", "rho", "p_heads", "p_layers", "top5", "top5_chance"])


def _templates(case: Case) -> dict[str, str]:
    """The texts that a case is shown under: its first control template, and the one that fails."""
    texts = load_templates()
    return {"control": texts[case.controls[0]], "failing": texts[case.template]}


def lens_by_case(model: Model, diagnoses: Sequence[Diagnosis]) -> dict[str, Float[Tensor, "fact n_layers+1"]]:
    """Rank of the answer in the logit lens, for the first case's first control and for each case's failing template."""
    ranks = {}
    for kind, d in [("control", diagnoses[0]), *(("failing", d) for d in diagnoses)]:
        facts, text = d.evidence.facts, _templates(d.case)[kind]
        answers = first_tokens(model, facts)[:, None]
        ranks[f"{kind}: {text}"] = logit_lens(model, capture(model, prompts(facts, text)), answers)[1][..., 0]
    return ranks


def lens_top(model: Model, texts: Sequence[str], answers: Int[Tensor, " text"]) -> int | None:
    """`first_in_top` of some prompts."""
    return first_in_top(logit_lens(model, capture(model, texts), answers[:, None])[1][..., 0])


def lens_rises(model: Model, diagnoses: Sequence[Diagnosis]) -> dict[str, int]:
    """The other reading of the lens, for the prompts of `lens_by_case`: the layer (from 1) over which each answer's
    logit minus the mean of the other answers' rises most, on average."""
    weights, layers = model.weights, {}
    for kind, d in [("control", diagnoses[0]), *(("failing", d) for d in diagnoses)]:
        facts, text = d.evidence.facts, _templates(d.case)[kind]
        stream, answers = capture(model, prompts(facts, text)).stream, first_tokens(model, facts)
        read = weights.norm_final(stream) @ weights.W_U[:, answers]
        own = read.diagonal(dim1=0, dim2=2).T  # (fact, layer)
        curves = own - (read.sum(-1) - own) / max(1, len(facts) - 1)
        layers[f"{kind}: {text}"] = int(curves.mean(0).diff().argmax()) + 1
    return layers


def first_in_top(ranks: Float[Tensor, "fact n_layers+1"]) -> int | None:
    """The layer (counted from 1) after which the median answer is first among the TOP, None if it never is."""
    inside = (ranks.float().median(0).values <= TOP).nonzero().flatten()
    return int(inside[0]) if len(inside) else None


def knowledge_heads(diagnosis: Diagnosis) -> list[Site]:
    """The HEADS heads with the largest direct logit attribution under the controls, largest first."""
    attribution = diagnosis.evidence.control.attribution.mean(0)
    order = [diagnosis.evidence.sites[i] for i in attribution.argsort(descending=True).tolist()]
    return [site for site in order if not site.mlp][:HEADS]


def attention_table(model: Model, diagnoses: Sequence[Diagnosis]) -> pd.DataFrame:
    """Attention from the last token to the subject in the strongest knowledge heads of the first case: one row a
    case, kind of template (failing; control: the case's first), head and fact."""
    heads, rows = knowledge_heads(diagnoses[0]), []
    for d in diagnoses:
        facts = d.evidence.facts
        for kind, text in _templates(d.case).items():
            run = run_with_cache(model, prompts(facts, text))
            attention = subject_attention(model, run.patterns, run.prompts, [f.subject for f in facts])
            for site in heads:
                to_subject = attention[:, site.layer, site.head].tolist()
                rows += [(d.case.title, kind, f.subject, str(site), w) for f, w in zip(facts, to_subject, strict=True)]
    return pd.DataFrame(rows, columns=["case", "kind", "subject", "site", "attention"])


def attention_pair(model: Model, diagnosis: Diagnosis) -> dict[str, tuple[list[str], Float[Tensor, " t"]]]:
    """The knowledge head's attention for one fact, by prompt: its tokens, and the weight of each. First the control."""
    head, rows = diagnosis.verdict.knowledge_head, {}
    for kind, text in _templates(diagnosis.case).items():
        (prompt,) = prompts(diagnosis.evidence.facts[:1], text)
        run = run_with_cache(model, [prompt])
        tokens = [model.token_text(t) for t in run.tokens[0].tolist()]
        rows[f"{kind}: {prompt}"] = (tokens, run.patterns[0, head.layer, head.head])
    return rows


def attention_numbers(table: pd.DataFrame, diagnosis: Diagnosis) -> dict[str, tuple[float, str]]:
    """What chapter 2 quotes of an `attention_table`: the knowledge head's mean attention to the subject, by kind."""
    own = table[(table.case == diagnosis.case.title) & (table.site == str(diagnosis.verdict.knowledge_head))]
    return {f"attention_{kind}": (float(mean), ".0%") for kind, mean in own.groupby("kind").attention.mean().items()}
