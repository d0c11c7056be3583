"""Close-ups of diagnosed cases: what chapter 2 shows beside the diagnosis itself.

conventions      one prompt's strongest terms, the three logit conventions side by side
completeness     the largest error of the exact trace over many prompts
lens             rank of the answer by layer, failing against control
attention        from the last token to the subject, failing against control
rivals           repairs that touch no weight: neutral prefixes, any word at all, and the subject's own stream
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lib.diagnosis import BATCH, Diagnosis, components
from lib.facts import Case, Fact, known_and_told, load_prefixes, load_templates, prompts, scorable, study_facts, tell
from lib.replay import next_token_logits
from lib.site import Site
from lib.static import load_token_types
from lib.subjects import Subject
from lib.trace import (
    CONVENTIONS,
    capture,
    last_patterns,
    logit_lens,
    logit_trace,
    subject_attention,
    subject_stream_norm,
)


def convention_terms(subject: Subject, row: pd.Series) -> pd.DataFrame:
    """Every component's term for a prompt (a row of a `tell` table): for its answer, its competitor and their
    difference, in every convention; the last row sums all terms, embedding and biases included."""
    seen = capture(subject, [row.prompt])
    pair = torch.tensor([[row.answer_token, row.competitor_token]])
    columns: dict[tuple[str, str], list[float]] = {}
    for convention in CONVENTIONS:
        trace = logit_trace(subject, seen, pair, convention)
        answer, competitor = torch.cat((trace.heads.flatten(2), trace.mlps, trace.model[..., None]), -1)[0]
        for name, terms in (("answer", answer), ("competitor", competitor), ("difference", answer - competitor)):
            columns[convention, name] = terms.tolist()
    return pd.DataFrame(columns, index=[*map(str, components(subject)), "all terms"])


def strongest_terms(table: pd.DataFrame, *, k: int = 8) -> pd.DataFrame:
    """Of a `convention_terms` table the k components that move the prompt most, and the sum of all."""
    strongest = table["scaled", "difference"].iloc[:-1].abs().sort_values(ascending=False).index[:k]
    return table.loc[[*strongest, "all terms"]]


def terms_by_site(table: pd.DataFrame) -> dict[str, dict[str, dict[str, float]]]:
    """A `convention_terms` table as results keep it: convention, then answer or competitor, then site."""
    return {c: {what: table[c, what].to_dict() for what in ("answer", "competitor")} for c in CONVENTIONS}


def first_failing(case: Case, table: pd.DataFrame) -> pd.Series:
    """The row of a `tell` table for the case's first fact known and not told, or its first fact."""
    states = known_and_told(table, case)
    rows = table[table.template == case.template].reset_index(drop=True)
    return rows.loc[int(states.routing_failure.to_numpy().argmax())]


def completeness(subject: Subject, table: pd.DataFrame) -> dict[str, float]:
    """Largest |sum of terms - model's own value| by convention, over every prompt of a `tell` table, for its answer
    and its competitor; `raw` relative to the final residual stream's own product."""
    errors: dict[str, float] = dict.fromkeys(CONVENTIONS, 0.0)
    for start in range(0, len(table), BATCH):
        part = table.iloc[start : start + BATCH]
        seen = capture(subject, part.prompt.tolist())
        pairs = torch.tensor(part[["answer_token", "competitor_token"]].to_numpy())
        for convention in CONVENTIONS:
            errors[convention] = max(errors[convention], logit_trace(subject, seen, pairs, convention).error)
    return errors


def lens_by_case(subject: Subject, diagnoses: Sequence[Diagnosis]) -> dict[str, Float[Tensor, "fact n_layers+1"]]:
    """Rank of the answer in the logit lens, for each case's failing template and for the first case's first control."""
    text, out = load_templates(), {}
    named = [(diagnoses[0], diagnoses[0].case.controls[0], "control")]
    named += [(d, d.case.template, "failing") for d in diagnoses]
    for d, template, kind in named:
        facts = d.evidence.facts
        seen = capture(subject, prompts(facts, text[template]))
        answers = torch.tensor([[subject.first_token(f.answer)] for f in facts])
        out[f"{kind}: {text[template]}"] = logit_lens(subject, seen, answers)[1][..., 0]
    return out


def lens_flip(ranks: Float[Tensor, "fact n_layers+1"]) -> int | None:
    """The layer (counted from 1) after which the median answer is first among the top ten, None if it never is."""
    inside = (ranks.float().median(0).values <= 10).nonzero().flatten()
    return int(inside[0]) if len(inside) else None


def knowledge_heads(diagnosis: Diagnosis, k: int = 4) -> list[Site]:
    """The k heads that write most under the controls, strongest first."""
    written = diagnosis.evidence.writes_control.mean(0)
    order = [diagnosis.evidence.sites[i] for i in written.argsort(descending=True).tolist()]
    return [s for s in order if not s.mlp][:k]


def attention_table(subject: Subject, diagnoses: Sequence[Diagnosis], k: int = 4) -> pd.DataFrame:
    """Attention from the last token to the subject in the strongest knowledge heads of the first case: one row a
    case, kind of template (failing; control: the case's first), fact and head."""
    text, heads, rows = load_templates(), knowledge_heads(diagnoses[0], k), []
    for d in diagnoses:
        facts = d.evidence.facts
        for kind, template in (("control", d.case.controls[0]), ("failing", d.case.template)):
            seen = capture(subject, prompts(facts, text[template]), everywhere=True)
            attention = subject_attention(subject, seen, [f.subject for f in facts])
            rows += [
                (d.case.title, kind, fact.subject, str(site), float(attention[i, site.layer, site.head]))
                for site in heads
                for i, fact in enumerate(facts)
            ]
    return pd.DataFrame(rows, columns=["case", "kind", "subject", "site", "attention"])


def attention_pair(subject: Subject, diagnosis: Diagnosis) -> dict[str, tuple[list[str], Float[Tensor, " t"]]]:
    """The knowledge head's attention, token by token, for one fact: control prompt and failing prompt."""
    text, fact, head = load_templates(), diagnosis.evidence.facts[0], diagnosis.verdict.knowledge_head
    rows = {}
    for kind, template in (("control", diagnosis.case.controls[0]), ("failing", diagnosis.case.template)):
        prompt = prompts([fact], text[template])[0]
        seen = capture(subject, [prompt], everywhere=True)
        tokens = [subject.token_text(t) for t in seen.tokens[0].tolist()]
        rows[f"{kind}: {prompt}"] = (tokens, last_patterns(subject, seen)[0, head.layer, head.head])
    return rows


def prefix_runs(subject: Subject, cases: Sequence[Case], *, large: bool, progress: str | None = None) -> pd.DataFrame:
    """What is told when a neutral prefix stands before the failing prompt; no weight is touched. One row a case,
    prefix and fact; pieces: how many tokens spell the subject at the very start of a text."""
    text, rows = load_templates(), []
    for case in cases:
        facts = study_facts(subject, case) if large else scorable(subject, case.facts)
        pieces = [len(subject.token_ids(f.subject)) for f in facts]
        for name, prefix in load_prefixes(subject).items():
            told = tell(subject, facts, {case.template: text[case.template]}, prefix=prefix, progress=progress).told
            label = f"{name} {prefix}" if prefix.startswith("<|") else name
            rows += [
                (case.title, label, prefix, *row) for row in zip([f.subject for f in facts], pieces, told, strict=True)
            ]
    return pd.DataFrame(rows, columns=["case", "prefix", "text", "subject", "pieces", "told"])


def prefix_counts(runs: pd.DataFrame) -> pd.DataFrame:
    """Told and n by case and prefix, in the order of the runs."""
    counts = runs.groupby(["case", "prefix", "text"], sort=False).told.agg(["sum", "count"]).reset_index()
    return counts.rename(columns={"sum": "told", "count": "n"})


def prefix_by_pieces(runs: pd.DataFrame, case: Case) -> pd.DataFrame:
    """Told by prefix for subjects that are one token at the start of a text, and for longer ones."""
    part = runs[runs.case == case.title]
    groups = part.groupby(["prefix", part.pieces.gt(1)], sort=False).told.agg(["sum", "count"]).unstack()
    table = pd.DataFrame({"prefix": part.prefix.unique()})
    for several, label in ((False, "one token"), (True, "several tokens")):
        if several in groups["count"]:
            counts = groups.xs(several, axis=1, level=1).loc[table.prefix]
            table[label] = [f"{told:.0f} of {n:.0f}" for told, n in counts.to_numpy()]
    return table


def report_prefixes(report: Callable[..., None], counts: pd.DataFrame, told: pd.DataFrame, case: Case) -> None:
    """What chapter 2 quotes of the prefixes on the large set: none, the best, and the best control template."""
    part = counts[counts.case == case.title]
    best = part.loc[part.told.idxmax()]
    controls = told[told.template.isin(case.controls)].groupby("template").told.sum()
    report("best_prefix", best.text.strip() or best.prefix)
    report("best_prefix_told", int(best.told))
    report("no_prefix_told", int(part.told.iloc[0]))
    report("prefix_n", int(best.n))
    report("best_control", load_templates()[controls.idxmax()])
    report("best_control_told", int(controls.max()))


def any_word(
    subject: Subject, case: Case, *, words: int = 40, seed: int = 0, progress: str | None = None
) -> pd.DataFrame:
    """The same with words drawn at random from the token types (no proper noun), each followed by a space: if any
    word at all repairs the case, its meaning is not what repairs it."""
    rng, text = np.random.default_rng(seed), load_templates()
    types = load_token_types(subject)
    pool = sorted(i for name in ("common_noun", "verb", "adjective") for i in types[name])
    chosen = [subject.token_text(i).strip() for i in rng.choice(pool, size=min(words, len(pool)), replace=False)]
    facts = scorable(subject, case.facts)
    lines = [p for word in chosen for p in prompts(facts, text[case.template], f"{word} ")]
    top = next_token_logits(subject, lines, progress=progress).argmax(-1).view(len(chosen), len(facts))
    answers = torch.tensor([subject.first_token(f.answer) for f in facts])
    return pd.DataFrame({"word": chosen, "told": (top == answers).sum(1).cpu().numpy(), "n": len(facts)})


def subject_streams(
    subject: Subject, case: Case, facts: Sequence[Fact], prefixes: Sequence[str]
) -> dict[str, Float[Tensor, "fact n_layers+1"]]:
    """Norm of the residual stream at the subject's last token, by layer: the failing prompt with each prefix (by
    name), and the case's first control."""
    text, names = load_templates(), [f.subject for f in facts]
    known = load_prefixes(subject)
    lines = {f"failing, prefix {p}": prompts(facts, text[case.template], known[p]) for p in prefixes if p in known}
    lines[f"control: {text[case.controls[0]]}"] = prompts(facts, text[case.controls[0]])
    return {
        label: subject_stream_norm(subject, capture(subject, p, everywhere=True), names) for label, p in lines.items()
    }


def stream_peaks(streams: dict[str, Float[Tensor, "fact n_layers+1"]]) -> dict[str, float]:
    """The largest mean norm over layers, by line of `subject_streams`."""
    return {name: float(values.mean(0).max()) for name, values in streams.items()}


SINK = 10  # how many times the control's peak norm the failing prompt's must reach to be called an attention sink


def sink(peaks: dict[str, float]) -> tuple[float, str]:
    """The first line's peak over the last's (the control's), and the verdict in words."""
    first, *_, control = peaks.values()
    return first / control, "an attention sink" if first > SINK * control else "no attention sink"


def many_pieces(subject: Subject, diagnosis: Diagnosis) -> tuple[Fact, ...]:
    """The diagnosed facts whose subject is several tokens at the start of a text; all of them, where none is."""
    facts = diagnosis.evidence.facts
    return tuple(f for f in facts if len(subject.token_ids(f.subject)) > 1) or facts


def assert_story(
    found: Sequence[Diagnosis],
    eight: pd.DataFrame,
    large: pd.DataFrame,
    words: dict[str, pd.DataFrame],
    short: dict[str, Float[Tensor, "fact n_layers+1"]],
    long: dict[str, Float[Tensor, "fact n_layers+1"]],
) -> None:
    """What chapter 2 says in words about SmolLM2 must hold in the run that renders it. Raises AssertionError."""
    first, question = found
    told = eight.groupby(["case", "text"]).told.sum()
    n = len(first.case.facts)
    assert first.verdict.failure_kind == "not retrieved" and first.verdict.retention < 0.25, "writes little"
    assert question.verdict.failure_kind == "overridden" and 0.3 < question.verdict.retention < 0.7, "about half"
    assert question.verdict.suppressor is not None and question.verdict.suppressor.mlp
    assert question.verdict.suppressor.layer == first.evidence.sites[-1].layer, "the last MLP"
    assert set(question.evidence.competitors) == {"\n", "<|im_end|>"}, "a line end or the end of the turn"
    assert eight[eight.case == first.case.title].pieces.max() == 1, "the eight are single tokens"
    assert told[first.case.title, "\n"] == told[first.case.title, "Fact: "] == n, "a newline or 'Fact:' tells all"
    assert n / 2 < told[first.case.title, "Well, "] < n, "'Well,' does not"
    assert words[first.case.name].told.mean() > 0.75 * n, "random words tell most"
    assert told[first.case.title, "<|im_start|>"] <= n / 2 < told[first.case.title, "<|endoftext|>"]
    assert told[question.case.title].max() == 0 and words[question.case.name].told.max() == 0, "no prefix helps"
    early = {name: float(values.mean(0)[5]) for name, values in short.items()}
    none, chat, document, fact, control = early.values()
    assert none > 3 * control and chat > 3 * control, "inflated early"
    assert document < 1.5 * control and fact < 1.5 * control, "normal early"
    assert sink(stream_peaks(short))[0] > SINK > 2 > sink(stream_peaks(long))[0], "a sink in the eight, not in the long"
    part = large[(large.case == first.case.title) & (large.pieces > 1)].groupby("text").told.mean()
    assert part[""] < part["Fact: "] < 0.6, "many of the long still fail"
