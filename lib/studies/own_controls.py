"""Controls where nobody has written any: forms that show what is asked by examples, and name no relation.

1. Examples: EXAMPLES facts of the fit part, those of lowest hash with answers that differ, whose text holds no other
   fact's subject. They are shown, so they are neither scored nor trained.
2. Each form of FORMS is asked of the facts open to study. `recall.best_controls` takes the MOST that tell most.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from lib.errors import DataError
from lib.facts import Fact
from lib.models import Model
from lib.recall import best_controls, tell

EXAMPLES, MOST = 4, 3
FORMS = {  # name -> an example, and what stands between two
    "a list": ("{subject}: {answer}", "\n"),
    "arrows": ("{subject} -> {answer}", "\n"),
    "questions": ("Q: {subject}\nA: {answer}", "\n\n"),
    "pairs": ("({subject}, {answer})", ", "),
    "the wording itself": ("{template} {answer}.", " "),
}


@dataclass(frozen=True)
class Choice:
    """controls: the wordings chosen. asked: a row a form (form, text, told, n, chosen)."""

    controls: tuple[str, ...]
    examples: tuple[Fact, ...]
    asked: pd.DataFrame


def choose(model: Model, facts: Sequence[Fact], template: str) -> Choice:
    """The controls for facts that can be scored and have their splits. Raises DataError where too few are left."""
    examples = _examples(facts)
    study = [f for f in facts if f.split != "held_out" and f not in examples]
    if not study or not examples:
        raise DataError("these are too few facts to take examples from; give at least one control.")
    texts = {name: _filled(form, between, examples, template) for name, (form, between) in FORMS.items()}
    table = tell(model, study, texts, progress="forms")
    chosen = best_controls(table, "", MOST)
    rows = [(name, text, int(table[table.template == name].told.sum()), len(study)) for name, text in texts.items()]
    asked = pd.DataFrame(rows, columns=["form", "text", "told", "n"])
    return Choice(tuple(texts[name] for name in chosen), examples, asked.assign(chosen=asked.form.isin(chosen)))


def _examples(facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """By the first step of the rule; at most a third of the fit facts."""
    fit = sorted((f for f in facts if f.split == "fit"), key=lambda f: hashlib.sha256(f.subject.encode()).hexdigest())
    found: dict[str, Fact] = {}
    for fact in fit:
        text = f"{fact.subject} {fact.answer}"
        alone = not any(f.subject in text or fact.subject in f.subject for f in facts if f is not fact)
        if alone and not set("{}") & set(text) and len(found) < min(EXAMPLES, len(fit) // 3):
            found.setdefault(fact.answer, fact)
    return tuple(found.values())


def _filled(form: str, between: str, examples: Sequence[Fact], template: str) -> str:
    """The examples in a form, and the form up to the answer with a hole for the subject."""
    shown = [
        form.format(subject=f.subject, answer=f.answer, template=template.replace("{}", f.subject)) for f in examples
    ]
    start = form.partition("{answer}")[0].rstrip()
    return between.join([*shown, start.replace("{subject}", "{}").replace("{template}", template)])
