"""Other models, beside the one of the build: what a whole run of the book on them reported, kept with their record.

    data/record/<model>/chapters/<chapter>.json     a results file, as the run wrote it
    data/record/<model>/chapters/knowledge_path.png  landing.png      pictures of chapters 2 and 8

`keep` puts them there; every build of another model shows them. Nothing of these models is loaded for it.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.checkpoints.fetching import weights_sha256
from lib.checkpoints.named import SPECS, canonical
from lib.errors import ChapterError
from lib.facts import load_cases
from lib.files import ROOT, write_atomically
from lib.press import claims
from lib.press.execute import chapter_names, is_current
from lib.results import results_path
from lib.sweeps.record import FOLDER

PICTURES = ("knowledge_path.png", "landing.png")


@dataclass(frozen=True)
class Beside:
    """A model that was run before. runs: results files by chapter, of those that there are."""

    name: str
    folder: Path
    runs: dict[str, dict[str, Any]]

    def judged(self) -> list[claims.Judged]:
        """What its results make of the claims."""
        listed = claims.load(ROOT / "data" / "claims.yaml", chapters=chapter_names())
        values = {chapter: run["values"] for chapter, run in self.runs.items()}
        return [claims.judge(claim, self.name, values, case=load_cases(self.name)[0].name) for claim in listed]

    @property
    def pictures(self) -> list[Path]:
        return [path for name in PICTURES if (path := self.folder / name).is_file()]


def folder_of(model_name: str) -> Path:
    return FOLDER / model_name / "chapters"


def keep(model_name: str, say: Callable[[str], None] = print) -> Path:
    """Keep the results of the chapters that are current on a named model, in place of those that were kept. Raises
    ChapterError for a model without a name of its own, and where no chapter is current."""
    model_name = canonical(model_name)
    if model_name not in SPECS:
        raise ChapterError(f"{model_name} has no name in data/models.yaml: results are kept of {', '.join(SPECS)}.")
    weights, folder = weights_sha256(model_name), folder_of(model_name)
    current = [chapter for chapter in chapter_names() if is_current(model_name, chapter, None, weights)]
    if not current:
        raise ChapterError(
            f"no chapter is current on {model_name}. Run `python -m lib run --model {model_name}` first."
        )
    paths = [results_path(model_name, chapter) for chapter in current]
    paths += [path for name in PICTURES if (path := results_path(model_name, "").parent / name).is_file()]
    shutil.rmtree(folder, ignore_errors=True)
    for path in paths:
        write_atomically(folder / path.name, path.read_bytes())
    say(f"kept {len(current)} of {len(chapter_names())} chapters of {model_name} in {folder}")
    return folder


def others(model_name: str) -> Sequence[Beside]:
    """The models whose results are kept, but this one. Raises ChapterError for results of other weights than the model
    has now, and for a file that cannot be read."""
    names = sorted(path.parent.name for path in FOLDER.glob("*/chapters") if path.parent.name != model_name)
    return [Beside(name, folder_of(name), _runs(name)) for name in names]


def _runs(name: str) -> dict[str, dict[str, Any]]:
    runs = {}
    for chapter in chapter_names():
        if (path := folder_of(name) / f"{chapter}.json").is_file():
            try:
                run = json.loads(path.read_text(encoding="utf-8"))
                weights = run["provenance"]["weights_sha256"]
                runs[chapter] = {"provenance": run["provenance"], "values": run["values"]}
            except (ValueError, KeyError, TypeError) as error:
                raise ChapterError(f"{path} is no results file ({error!r}). {_remedy(name)}") from error
            if name not in SPECS or weights != SPECS[name].sha256:
                raise ChapterError(f"{path} was made with weights {weights[:12]}..., not {name}'s. {_remedy(name)}")
    return runs


def _remedy(name: str) -> str:
    return f"`python -m lib run --model {name}` and `python -m lib keep --model {name}` renew it."
