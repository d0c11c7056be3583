"""Sentences whose words depend on numbers: Jinja templates in `words/`, filled here.

    say("pathways", "verdict", reached=3, paths=4)     # the entry `verdict` of words/pathways.yaml

A file of words maps keys to templates; one may say another of its file: `{{ say("goal", reached=3) }}`. A value that a
template needs and is not given is an error, never a gap.
"""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import yaml
from jinja2 import Environment, StrictUndefined, Template

WORDS = Path(__file__).with_name("words")


def words(name: object) -> str:
    """A name as prose has it: blanks for underscores."""
    return str(name).replace("_", " ")


def listed(names: Sequence[object], nothing: str = "none") -> str:
    """`a`, `a and b`, `a, b and c`; underscores are blanks. nothing: what an empty list is called."""
    return " and ".join(", ".join(map(words, names)).rsplit(", ", 1)) or nothing


def say(study: str, key: str, **values: object) -> str:
    """The sentence of a key, on one line. Raises KeyError for a key that the study's words lack, and jinja2's
    UndefinedError for a value that the sentence needs."""
    return " ".join(_templates(study)[key].render(**values).split())


@cache
def _templates(study: str) -> dict[str, Template]:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"listed": listed, "format": lambda value, form: format(value, form)}
    environment.globals |= {"say": partial(say, study), "format": format}
    words = yaml.safe_load((WORDS / f"{study}.yaml").read_text(encoding="utf-8"))
    return {key: environment.from_string(text) for key, text in words.items()}
