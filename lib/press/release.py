"""What a release is called, and everything that must say so.

_config.yml    `repository:` names the repository (url) and the tag of the release (branch): the one setting
chapters       the badge below the title opens that tag in Colab, the set-up cell fetches it: `write` makes both
the rest       lib.__version__, CITATION.cff and .zenodo.json must agree with it: `disagreements` lists what does not
"""

import json
import re
from itertools import dropwhile
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import yaml

from lib import __version__
from lib.errors import ReleaseError
from lib.files import ROOT, write_atomically
from lib.press.texts import fill

SOURCE_RECORD = "https://zenodo.org/records/20061624"  # the work that the book rebuilds
BADGE = "[![Open in Colab](_static/open_in_colab.svg)]"


class Repository(NamedTuple):
    """Where the book is kept, and the tag of this release."""

    url: str
    tag: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]


def repository(config: Path = ROOT / "_config.yml") -> Repository:
    """The setting. Raises ReleaseError where it is missing or could not be opened in Colab."""
    found = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("repository") or {}
    url, tag = str(found.get("url")), str(found.get("branch"))
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url) or not re.fullmatch(r"v\d+(\.\d+)*[\w.-]*", tag):
        raise ReleaseError(
            f"{config} names the repository {url!r} and the tag {tag!r}. Under `repository:`, give `url` as "
            "https://github.com/OWNER/NAME and `branch` as a tag such as v0.1.0; Colab opens nothing else."
        )
    return Repository(url, tag)


def setup_code(repo: Repository) -> str:
    """The set-up cell, the same in every chapter. Nothing is done outside Colab."""
    return fill("setup_cell.txt", repository=repo).rstrip()


def dressed(notebook: dict[str, Any], chapter: str, repo: Repository) -> dict[str, Any]:
    """A chapter (its JSON) with the badge below its title and the set-up cell after it; those it has are replaced."""
    first, *rest = (c for c in notebook["cells"] if not c["id"].endswith("-setup"))
    title, *lines = (line for line in first["source"] if not line.startswith(BADGE))
    lines = list(dropwhile(lambda line: not line.strip(), lines))
    at_the_tag = f"{urlsplit(repo.url).path}/blob/{repo.tag}/book/{chapter}.ipynb"
    badge = f"{BADGE}(https://colab.research.google.com/github{at_the_tag})\n"
    first = {**first, "source": [title.rstrip("\n") + "\n", "\n", badge, *(["\n", *lines] if lines else [])]}
    name, source = f"{chapter[:2]}-setup", setup_code(repo).splitlines(keepends=True)
    setup: dict[str, Any] = {"cell_type": "code", "execution_count": None, "id": name, "metadata": {}, "outputs": []}
    setup |= {"metadata": {"tags": ["remove-cell"]}, "source": source}
    return {**notebook, "cells": [first, setup, *rest]}


def write(book: Path = ROOT / "book", repo: Repository | None = None, *, dry: bool = False) -> list[str]:
    """Put badge and set-up cell of the setting into every chapter. Returns the names of the chapters that changed, or,
    if dry, that would."""
    repo, changed = repo or repository(), []
    for path in sorted(book.glob("[0-9]*.ipynb")):
        old = path.read_text(encoding="utf-8")
        new = json.dumps(dressed(json.loads(old), path.stem, repo), indent=1, ensure_ascii=False) + "\n"
        if new != old:
            if not dry:
                write_atomically(path, new)
            changed.append(path.stem)
    return changed


def disagreements(root: Path = ROOT) -> list[str]:
    """Each place where version, tag, citation and deposit do not say the same; empty if they do. Raises ReleaseError
    for a file that is missing or cannot be read."""
    try:
        citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
        zenodo = json.loads((root / ".zenodo.json").read_text(encoding="utf-8"))
        repo = repository(root / "_config.yml")
        creators = [c["name"] for c in zenodo["creators"]]  # `Family, Given`, or the name of a group
        authors = [a.get("name") or f"{a['family-names']}, {a['given-names']}" for a in citation["authors"]]
        related = zenodo["related_identifiers"]
        derived = [r["identifier"] for r in related if r["relation"] == "isDerivedFrom"]
        supplement = [r["identifier"] for r in related if r["relation"] == "isSupplementTo"]
        pairs = {
            "the tag in _config.yml": (repo.tag, f"v{__version__}"),
            "version in CITATION.cff": (citation["version"], __version__),
            "repository-code in CITATION.cff": (citation["repository-code"], repo.url),
            "version in .zenodo.json": (zenodo["version"], __version__),
            "title in .zenodo.json": (zenodo["title"], citation["title"]),
            "license in .zenodo.json": (zenodo["license"], citation["license"]),
            "publication_date in .zenodo.json": (zenodo["publication_date"], str(citation["date-released"])),
            "creators in .zenodo.json": (creators, authors),
            "references in CITATION.cff": (SOURCE_RECORD in [r.get("url") for r in citation["references"]], True),
            "isDerivedFrom in .zenodo.json": (derived, [SOURCE_RECORD]),
            "isSupplementTo in .zenodo.json": (supplement, [f"{repo.url}/tree/{repo.tag}"]),
        }
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ReleaseError(f"CITATION.cff, .zenodo.json or _config.yml cannot be read: {error!r}. Mend it.") from error
    return [f"{place} is {found!r}, not {wanted!r}" for place, (found, wanted) in pairs.items() if found != wanted]
