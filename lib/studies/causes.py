"""What causes a failure, apart from where it is seen: repairs that touch no weight (chapter 2).

prefix_runs ... prefix_numbers    neutral prefixes before the failing prompt, for the eight and for the large set
found                             the cause of a failure, by a rule: the first position, the format, or none found
any_word                          any word at all: then its meaning is not what repairs
subject_streams ... sink          the subject's own residual stream, and whether its position is an attention sink
                                  (Xiao et al. 2023; Sun et al. 2024)
first_position                    the same by attention: who looks at position 0, and does the knowledge head look away?
reading                           does the knowledge head read again, once the cause is repaired? (chapter 8)
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from lib.diagnosis import Diagnosis, contributions
from lib.edits import Edit, applied
from lib.facts import Case, Fact, load_templates, prompts
from lib.forward import next_token_logits
from lib.interventions import run_with_cache
from lib.models import Model
from lib.recall import first_tokens, known_and_told, load_prefixes, scorable, study_facts, tell
from lib.show.sentences import words
from lib.sinks import TEXT
from lib.sites import Site
from lib.static import load_token_types
from lib.statistics import mean_interval
from lib.trace import subject_attention, subject_stream_norm


def prefix_runs(
    model: Model, cases: Sequence[Case], *, large: bool, known: pd.DataFrame | None = None, progress: str | None = None
) -> pd.DataFrame:
    """What is told when a neutral prefix stands before the failing prompt; no weight is touched. One row a case,
    prefix and fact; pieces: how many tokens spell the subject at the very start of a text. known: as in `tell`."""
    text, tables = load_templates(), []
    for case in cases:
        facts = study_facts(model, case) if large else scorable(model, case.facts)
        for name, prefix in load_prefixes(model).items():
            asked = {case.template: text[case.template]}
            table = tell(model, facts, asked, prefix=prefix, known=known, progress=progress)
            table["pieces"] = [len(model.pieces(f.subject)) for f in facts]
            label = f"{name} {prefix}" if prefix.startswith("<|") else name
            tables.append(table.assign(case=case.title, prefix=label, text=prefix))
    return pd.concat(tables, ignore_index=True)[["case", "prefix", "text", "subject", "pieces", "told"]]


def prefix_counts(runs: pd.DataFrame) -> pd.DataFrame:
    """Told and n by case and prefix, in the order of the runs."""
    return runs.groupby(["case", "prefix", "text"], sort=False).told.agg(told="sum", n="count").reset_index()


def prefix_by_pieces(runs: pd.DataFrame, case: Case) -> pd.DataFrame:
    """Told by prefix for subjects that are one token at the start of a text, and for longer ones."""
    part = runs[runs.case == case.title]
    counts = part.groupby(["prefix", part.pieces.gt(1)]).told.agg(["sum", "count"])
    cells = counts["sum"].astype(str) + " of " + counts["count"].astype(str)
    table = cells.unstack().loc[part.prefix.unique()].rename(columns={False: "one token", True: "several tokens"})
    return table.rename_axis(columns=None).reset_index()


def prefix_numbers(counts: pd.DataFrame, told: pd.DataFrame, case: Case) -> dict[str, Any]:
    """What chapter 2 quotes of the prefixes on the large set: none, the best, and the best control template."""
    part = counts[counts.case == case.title]
    best = part.loc[part.told.idxmax()]
    controls = told[told.template.isin(case.controls)].groupby("template").told.sum()
    return {
        "best_prefix": best.text.strip() or best.prefix,
        "best_prefix_told": int(best.told),
        "no_prefix_told": int(part.told.iloc[0]),
        "prefix_n": int(best.n),
        "best_control": load_templates()[controls.idxmax()],
        "best_control_told": int(controls.max()),
    }


ENDS = (" The answer is", " It is", "\n")  # what may stand at a prompt's end and say nothing about it
HALF = 0.5  # of the countries that are known and not told, which a cause must bring back


def found(model: Model, cases: Sequence[Case], runs: pd.DataFrame, large: pd.DataFrame) -> pd.DataFrame:
    """The cause of each case's failure: what, changed alone and without weights, makes told at least half of the study
    countries that are known and not told. `first position`: a neutral prefix does, so that something else stands there;
    `format`: another end of the prompt does; `none found` otherwise. The rule was written before it was asked of either
    case. runs: of `prefix_runs` on the large set; large: a `tell` table of the study countries."""
    rows = []
    for case in cases:
        states = known_and_told(large, case)
        failed = [f for f in study_facts(model, case) if f.subject in set(states[states.routing_failure].subject)]
        part = runs[(runs.case == case.title) & runs.subject.isin([f.subject for f in failed])]
        row: dict[str, Any] = {"case": case.name, "title": case.title, "n": len(failed), "cause": "none found"}
        row |= {"prefix": "", "prefix_told": 0, "end": "", "end_told": 0}
        if failed:
            by_prefix, text = part.groupby("prefix", sort=False).told.sum(), load_templates()[case.template]
            ends = {end: int(tell(model, failed, {"": text + end}).told.sum()) for end in ENDS}
            row |= {"prefix": by_prefix.idxmax(), "prefix_told": int(by_prefix.max())}
            row |= {"end": repr(max(ends, key=ends.__getitem__)), "end_told": max(ends.values())}
            reached = {"first position": row["prefix_told"], "format": row["end_told"]}
            row["cause"] = cause_of(reached, len(failed))
        rows.append(row)
    return pd.DataFrame(rows)


def cause_of(reached: dict[str, int], n: int) -> str:
    """The first cause that makes at least HALF of n failing facts told, or `none found`."""
    return next((name for name, told in reached.items() if told >= HALF * n), "none found")


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
    answers = first_tokens(model, facts)
    return pd.DataFrame({"word": chosen, "told": (top == answers).sum(1).cpu().numpy(), "n": len(facts)})


def subject_streams(
    model: Model, case: Case, facts: Sequence[Fact], prefixes: Sequence[str]
) -> dict[str, Float[Tensor, "fact n_layers+1"]]:
    """Norm of the residual stream at the subject's last token, by layer: the failing prompt with each prefix (by
    name), and the case's first control."""
    text, known, names = load_templates(), load_prefixes(model), [f.subject for f in facts]
    lines = {f"failing, prefix {p}": prompts(facts, text[case.template], known[p]) for p in prefixes if p in known}
    lines[f"control: {text[case.controls[0]]}"] = prompts(facts, text[case.controls[0]])
    return {label: subject_stream_norm(model, p, names) for label, p in lines.items()}


def stream_peaks(streams: dict[str, Float[Tensor, "fact n_layers+1"]]) -> dict[str, float]:
    """The largest mean norm over layers, by line of `subject_streams`."""
    return {name: float(values.mean(0).max()) for name, values in streams.items()}


SINK = 10  # how many times the control's peak norm the failing prompt's must reach to be called an attention sink


def sink(peaks: dict[str, float]) -> tuple[float, str]:
    """The first line's peak over the last's (the control's), and the verdict in words."""
    first, *_, control = peaks.values()
    return first / control, "an attention sink" if first > SINK * control else "no attention sink"


def first_position(
    model: Model, case: Case, facts: Sequence[Fact], site: Site, prefixes: Sequence[str] = ("none", "fact")
) -> pd.DataFrame:
    """A sink is a position that is looked at. Attention from the last token under the failing template with each prefix
    and under the case's first control; a row each, means over facts. every: to position 0, of all heads together; most:
    the share of heads that give it more than half; own_first, own_subject: of the knowledge head (site), to position 0
    and to the subject."""
    text, known, rows = load_templates(), load_prefixes(model), []
    lines = {f"failing, prefix {p}": prompts(facts, text[case.template], known[p]) for p in prefixes if p in known}
    lines[f"control: {text[case.controls[0]]}"] = prompts(facts, text[case.controls[0]])
    for name, asked in lines.items():
        run = run_with_cache(model, asked)
        first = run.patterns[..., 0]
        subject = subject_attention(model, run.patterns, run.prompts, [f.subject for f in facts])
        own = [float(x[:, site.layer, site.head].mean()) for x in (first, subject)]
        stands = {model.token_text(int(t)) for t in run.tokens[:, 0]}
        token = stands.pop() if len(stands) == 1 else "the subject's first"
        rows.append((name, token, float(first.mean()), float((first > 0.5).float().mean()), *own))
    return pd.DataFrame(rows, columns=["prompts", "token", "every", "most", "own_first", "own_subject"])


def reading(model: Model, case: Case, facts: Sequence[Fact], site: Site, edits: Mapping[str, Edit]) -> pd.DataFrame:
    """What the knowledge head (site) does on facts that no edit was trained on, a row each: the failing template as it
    is, after a line break and with each edit, and the first control template. looks: attention from the last token to
    the subject; writes: the head's exact share of the answer's logit minus the mean of its shares of the other answers,
    with the interval over facts; others_look, others_write: means over the other heads of its layer."""
    text, answers = load_templates(), first_tokens(model, facts)
    failing, broken = (prompts(facts, text[case.template], prefix) for prefix in ("", TEXT))
    asked: dict[str, tuple[Edit | None, list[str]]] = {"failing template": (None, failing)}
    asked |= {"after a line break": (None, broken)} | {f"with {words(k)}": (e, failing) for k, e in edits.items()}
    asked |= {"control template": (None, prompts(facts, text[case.controls[0]]))}
    rows, heads = [], slice(site.layer * model.weights.n_heads, (site.layer + 1) * model.weights.n_heads)
    rest = [head for head in range(model.weights.n_heads) if head != site.head]
    for name, (edit, texts) in asked.items():
        with applied(model, edit) if edit else nullcontext(model) as changed:
            run = run_with_cache(changed, texts)
            looks = subject_attention(changed, run.patterns, run.prompts, [f.subject for f in facts])[:, site.layer]
            traced = contributions(changed, run.capture(), answers[:, None].expand(-1, 2), answers.unique())
        pair = {"look": looks, "write": traced.attribution[:, heads]}
        own, told = {key: x[:, site.head].tolist() for key, x in pair.items()}, run.logits.argmax(-1) == answers
        others = {f"others_{key}": float(x[:, rest].mean()) for key, x in pair.items()}
        writes, low, high = mean_interval(own["write"]) if len(facts) > 1 else (own["write"][0], np.nan, np.nan)
        row = {"context": name, "edited": edit is not None, "told": int(told.sum()), "n": len(facts)}
        rows.append(row | {"looks": np.mean(own["look"]), "writes": writes, "low": low, "high": high} | others)
    return pd.DataFrame(rows)


def many_pieces(model: Model, diagnosis: Diagnosis) -> tuple[Fact, ...]:
    """The diagnosed facts whose subject is several tokens at the start of a text; all of them, where none is."""
    facts = diagnosis.evidence.facts
    return tuple(f for f in facts if len(model.pieces(f.subject)) > 1) or facts
