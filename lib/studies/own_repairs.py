"""A repair of facts of one's own, and what else it changes.

1. Trained: at most MOST fit facts that are known, by chapter 3's objective and stopping rule, at the layer that the
   diagnosis names or, for a sink, before every text. Rates are tried from the largest down: the first that reaches the
   goal is kept; where none does, chapter 3's rule chooses.
2. Asked once: the held-out facts that are known and not told; every other fact, under the wording that fails and under
   the control that tells most; the book's probes; the start of each of its passages.
"""

from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from lib import evaluation
from lib.edits import Edit, applied
from lib.errors import EditError
from lib.facts import prompts
from lib.recall import tell
from lib.show.sentences import say as say_of
from lib.statistics import exact_interval
from lib.studies.own_facts import FAILING, MOST, Findings, Say
from lib.studies.repairs import passage_starts
from lib.training import DEFAULT, Trained, chosen, sink_task, summary, tasks_at, train
from lib.weights import PATHWAYS, SINKS

KINDS = {  # of `evaluation.kinds`, in the words of a table
    "neighbours": "other facts, told before",
    evaluation.ELSEWHERE: "other facts, under the best control",
    evaluation.CAPABILITY: "capability probes",
    "unrelated": "unrelated tasks",
}


@dataclass(frozen=True)
class Repair:
    """held: the held-out facts that are known and not told (subject, answer, before, after: what is said; told).
    effects: a row a kind of question (what, n, before, after, lost, gained). perplexity: ratio, low, high, tokens."""

    edit: Edit
    reached: bool
    held: pd.DataFrame
    effects: pd.DataFrame
    bled: tuple[int, int, int]  # wrong answers that were trained: before, after, of so many prompts
    perplexity: dict[str, float]

    @property
    def counts(self) -> dict[str, Any]:
        """What it came to, as plain values."""
        edit, told = self.edit, int(self.held.told.sum())
        out = {"pathway": edit.pathway, "parameters": edit.parameters, "reached": self.reached}
        out |= {"facts": len(edit.facts), "told_before": sum(edit.told_before), "told_after": sum(edit.told_after)}
        return out | {"untold": len(self.held), "repaired": told, "interval": exact_interval(told, len(self.held))}

    def __str__(self) -> str:
        return say_of("own", "repair", r=self)

    def as_json(self) -> dict[str, Any]:
        bled = dict(zip(("before", "after", "prompts"), self.bled, strict=True))
        tables = {"held_out": self.held.to_dict("records"), "effects": self.effects.to_dict("records")}
        return self.counts | tables | {"bled": bled, "perplexity": self.perplexity}


def check(pathway: str) -> None:
    """Raises EditError for another pathway."""
    if pathway not in PATHWAYS:
        raise EditError(f"unknown pathway {pathway!r}; choose from {', '.join(PATHWAYS)}.")


def repair(findings: Findings, pathway: str, *, seed: int = 0, say: Say = lambda text: None) -> Repair:
    """The edit of a pathway and all that is asked of it. Raises EditError for another pathway, where there is nothing
    to repair, and where every training diverged."""
    check(pathway)
    states, verdict = findings.states, findings.verdict
    if verdict is None:
        raise EditError(f"there is nothing to repair: {findings.say('failure')}.")
    fit = set(states[(states.split == "fit") & states.known].subject)
    if not (lesson := tuple(f for f in findings.case.facts if f.subject in fit)[:MOST]):
        raise EditError("there is nothing to train on: no fact of the fit part is known. Give more facts.")
    run = _trained(findings, lesson, verdict.knowledge_head.layer, pathway, seed, say)
    if run.edit is None:
        raise EditError(f"every training of {pathway} diverged; try another pathway.")
    say("held-out facts, probes and passages are asked")
    effects, bled, perplexity = _effects(findings, run.edit)
    return Repair(run.edit, run.reached, _held(findings, run.edit), effects, bled, perplexity)


def _trained(findings: Findings, lesson: tuple, layer: int, pathway: str, seed: int, say: Say) -> Trained:
    model, case = findings.model, replace(findings.case, facts=lesson)
    task = tasks_at(model, case, [layer], DEFAULT, templates=findings.templates)[layer]
    task, runs = (sink_task(model, task) if pathway in SINKS else task), list[Trained]()
    for rate in sorted(task.recipe.rates, reverse=True):
        say(f"{pathway} is trained on {len(lesson)} facts at rate {rate:g}, at most {task.recipe.max_steps} steps")
        runs.append(train(model, task, pathway, rate=rate, seed=seed))
        if runs[-1].reached:
            return runs[-1]
    return runs[chosen(summary(runs))]


def _held(findings: Findings, edit: Edit) -> pd.DataFrame:
    lost = set(findings.failed[findings.failed.split == "held_out"].subject)
    facts = [f for f in findings.case.facts if f.subject in lost]
    if not facts:
        return pd.DataFrame(columns=["subject", "answer", "before", "after", "told"])
    asked = {"": findings.templates[FAILING]}
    before = tell(findings.model, facts, asked)
    with applied(findings.model, edit) as changed:
        after = tell(changed, facts, asked)
    said = {"before": before.top, "after": after.top.to_numpy(), "told": after.told.to_numpy()}
    return before[["subject", "answer"]].assign(**said)


def _effects(findings: Findings, edit: Edit) -> tuple[pd.DataFrame, tuple[int, int, int], dict[str, float]]:
    """Side effects, by chapter 4's measures."""
    model, trained = findings.model, {f.subject for f in edit.facts}
    case = replace(findings.case, facts=edit.facts)
    others = [f for f in case.large if f.subject not in trained]
    parts = [evaluation.load_probes(), evaluation.load_more_probes()]
    for name in (FAILING, findings.best_control.name) if others else ():
        text = findings.templates[name]
        rows = pd.DataFrame([(f.subject, f.answer, f.split) for f in others], columns=["subject", "answer", "split"])
        parts.append(rows.assign(set="large", template=name, prompt=prompts(others, text)))
    table = pd.concat(parts, ignore_index=True).reindex(columns=[*parts[0], "subject", "split", "template"]).fillna("")
    first = [model.first_token(a, p) for a, p in zip(table.answer, table.prompt, strict=True)]
    asked = table.assign(answer_token=first)
    protocol = evaluation.build_protocol(model, case, edit.layer, texts=passage_starts(model), table=asked)
    measured = evaluation.measure(model, protocol, {edit.pathway: edit})
    outcomes = evaluation.outcomes(measured, case).set_index("what").reindex(list(KINDS))
    outcomes = outcomes[outcomes.n > 0].rename(index=KINDS).reset_index()
    row = evaluation.perplexity(measured).iloc[0]
    wrong = evaluation.bleeding(model, measured, case)
    ratio = {name: float(row[name]) for name in ("ratio", "ratio_low", "ratio_high")} | {"tokens": int(row.tokens)}
    before, after = map(int, wrong.bled)
    bled = (before, after, int(wrong.prompts.iloc[0]))
    return outcomes[["what", "n", "before", "after", "lost", "gained"]], bled, ratio
