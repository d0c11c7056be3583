"""Pages, cards and READMEs that the press writes: Jinja templates in `templates/`, filled here.

    fill("space_card.md", title="Heads", ...)     # templates/space_card.md as text

A value that a template needs and is not given is an error, never a gap.
"""

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lib import __version__
from lib.sites import Site
from lib.statistics import exact_interval

TEMPLATES = Path(__file__).with_name("templates")


def fill(template: str, **values: object) -> str:
    """The text of a template, its last line break included. Raises jinja2's TemplateNotFound for a name that is no
    file of `templates/`, and UndefinedError for a value that the template needs and is not given."""
    return environment(TEMPLATES).get_template(template).render(**values)


def entries(name: str) -> dict[str, Any]:
    """Words for values: a YAML file of `templates/` that maps names to texts, or to entries of texts."""
    return yaml.safe_load((TEMPLATES / name).read_text(encoding="utf-8"))


def escape(text: object) -> str:
    """A text in which Markdown reads nothing as markup."""
    return re.sub(r"([\\`*_{}\[\]<>$|#])", r"\\\1", str(text))


def code(value: object) -> str:
    """A value as Markdown's code, so that nothing in it is read as markup."""
    return "`" + str(value).replace("`", "'") + "`"


def chapter_number(chapter: str) -> str:
    """The number that a chapter's name begins with: `3` of `03_four_pathways`."""
    return chapter.partition("_")[0].lstrip("0")


def cell(value: object) -> str:
    """A value as the text of one cell of a Markdown table."""
    return str(value).replace("|", "\\|").replace("\n", "\\n")


def between(ends: Sequence[float], form: str) -> str:
    """An interval: `0.1 to 0.3`."""
    return " to ".join(format(end, form) for end in ends)


def counted(k: int, n: int) -> str:
    """A count of a count, with the exact 95 % interval of the share: `2 of 19 (1% to 33%)`."""
    return f"{k} of {n} ({between(exact_interval(k, n), '.0%')})"


def rendered(text: str, **values: object) -> str:
    """A text with Jinja's marks, from one of the YAML files, filled as a template is, on one line a paragraph."""
    return environment(TEMPLATES).from_string(text).render(**values).strip()


@cache
def environment(folder: Path) -> Environment:
    environment = Environment(loader=FileSystemLoader(folder), undefined=StrictUndefined, keep_trailing_newline=True)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters |= {"format": format, "markdown": escape, "code": code, "cell": cell, "json": json.dumps}
    environment.filters |= {"number": chapter_number, "site": Site, "between": between}
    environment.globals |= {"version": __version__, "changed": entries("changed.yaml"), "counted": counted}
    return environment
