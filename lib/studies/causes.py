"""studies.causes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lib.diagnosis import Diagnosis
from lib.facts import Case, Fact, load_templates, prompts
from lib.forward import next_token_logits
from lib.models import Model
from lib.recall import load_prefixes, scorable, study_facts, tell
from lib.static import load_token_types
from lib.trace import capture, subject_stream_norm


def prefix_runs(model: Model, cases: Sequence[Case], *, large: bool, progress: str | None = None) -> pd.DataFrame:
    """What is told when a neutral prefix stands before the failing prompt; no weight is touched. One row a case,
    prefix and fact; pieces: how many tokens spell the subject at the very start of a text."""
    text, rows = load_templates(), []
    for case in cases:
        facts = study_facts(model, case) if large else scorable(model, case.facts)
        pieces = [len(model.token_ids(f.subject)) for f in facts]
        for name, prefix in load_prefixes(model).items():
            told = tell(model, facts, {case.template: text[case.template]}, prefix=prefix, progress=progress).told
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


def any_word(model: Model, case: Case, *, words: int = 40, seed: int = 0, progress: str | None = None) -> pd.DataFrame:
    """The same with words drawn at random from the token types (no proper noun), each followed by a space: if any
    word at all repairs the case, its meaning is not what repairs it."""
    rng, text = np.random.default_rng(seed), load_templates()
    types = load_token_types(model)
    pool = sorted(i for name in ("common_noun", "verb", "adjective") for i in types[name])
    chosen = [model.token_text(i).strip() for i in rng.choice(pool, size=min(words, len(pool)), replace=False)]
    facts = scorable(model, case.facts)
    lines = [p for word in chosen for p in prompts(facts, text[case.template], f"{word} ")]
    top = next_token_logits(model, lines, progress=progress).argmax(-1).view(len(chosen), len(facts))
    answers = torch.tensor([model.first_token(f.answer) for f in facts])
    return pd.DataFrame({"word": chosen, "told": (top == answers).sum(1).cpu().numpy(), "n": len(facts)})


def subject_streams(
    model: Model, case: Case, facts: Sequence[Fact], prefixes: Sequence[str]
) -> dict[str, Float[Tensor, "fact n_layers+1"]]:
    """Norm of the residual stream at the subject's last token, by layer: the failing prompt with each prefix (by
    name), and the case's first control."""
    text, names = load_templates(), [f.subject for f in facts]
    known = load_prefixes(model)
    lines = {f"failing, prefix {p}": prompts(facts, text[case.template], known[p]) for p in prefixes if p in known}
    lines[f"control: {text[case.controls[0]]}"] = prompts(facts, text[case.controls[0]])
    return {label: subject_stream_norm(model, capture(model, p, everywhere=True), names) for label, p in lines.items()}


def stream_peaks(streams: dict[str, Float[Tensor, "fact n_layers+1"]]) -> dict[str, float]:
    """The largest mean norm over layers, by line of `subject_streams`."""
    return {name: float(values.mean(0).max()) for name, values in streams.items()}


SINK = 10  # how many times the control's peak norm the failing prompt's must reach to be called an attention sink


def sink(peaks: dict[str, float]) -> tuple[float, str]:
    """The first line's peak over the last's (the control's), and the verdict in words."""
    first, *_, control = peaks.values()
    return first / control, "an attention sink" if first > SINK * control else "no attention sink"


def many_pieces(model: Model, diagnosis: Diagnosis) -> tuple[Fact, ...]:
    """The diagnosed facts whose subject is several tokens at the start of a text; all of them, where none is."""
    facts = diagnosis.evidence.facts
    return tuple(f for f in facts if len(model.token_ids(f.subject)) > 1) or facts


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
