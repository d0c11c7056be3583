"""Other models, beside the one of the build: what a whole run of the book on them reported, kept with their record.

    data/record/<model>/chapters/<chapter>.json      a results file, as the run wrote it
    data/record/<model>/chapters/knowledge_path.png  landing.png: pictures of chapters 2 and 8

`keep` puts them there; every build on another model shows them. Nothing of these models is loaded for it.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.checkpoints.fetching import weights_sha256
from lib.checkpoints.named import SPECS, canonical
from lib.errors import ChapterError
from lib.files import make_folder
from lib.press.check import judged_by
from lib.press.claims import Judged
from lib.press.execute import chapter_names, is_current
from lib.results import read, results_path
from lib.sweeps.record import FOLDER

PICTURES = ("knowledge_path.png", "landing.png")


@dataclass(frozen=True)
class Beside:
    """A named model that was run before. runs: results files by chapter. judged: what they make of the claims.
    pictures: those that there are, of PICTURES."""

    name: str
    runs: dict[str, dict[str, Any]]
    judged: list[Judged]
    pictures: list[Path]


def folder_of(model_name: str) -> Path:
    return FOLDER / model_name / "chapters"


def keep(model_name: str, say: Callable[[str], None] = print) -> Path:
    """Keep the results of a whole run of the book on a named model, in place of those that were kept, in one step.
    Raises ChapterError for a model without a name of its own, and where a chapter is not current."""
    model_name = canonical(model_name)
    if model_name not in SPECS:
        raise ChapterError(f"{model_name} has no name in data/models.yaml: results are kept of {', '.join(SPECS)}.")
    weights, folder = weights_sha256(model_name), folder_of(model_name)
    if old := [chapter for chapter in chapter_names() if not is_current(model_name, chapter, None, weights)]:
        fault = f"not run on {model_name} since its inputs changed: {', '.join(old)}"
        raise ChapterError(f"{fault}. Run `python -m lib run --model {model_name}` first.")
    paths = [results_path(model_name, chapter) for chapter in chapter_names()]
    paths += [path for name in PICTURES if (path := results_path(model_name, "").parent / name).is_file()]
    with tempfile.TemporaryDirectory(dir=make_folder(folder.parent)) as temporary:
        ready = make_folder(Path(temporary) / folder.name)
        for path in paths:
            shutil.copy(path, ready)
        shutil.rmtree(folder, ignore_errors=True)
        ready.rename(folder)
    say(f"kept the results of {model_name} in {folder}")
    return folder


def others(model_name: str) -> list[Beside]:
    """The models whose results are kept, but this one. Raises ChapterError as `results.read` does."""
    out = []
    for name in SPECS:
        folder = folder_of(name)
        kept = {chapter: path for chapter in chapter_names() if (path := folder / f"{chapter}.json").is_file()}
        if kept and name != model_name:
            runs = {chapter: read(name, SPECS[name].sha256, chapter, path) for chapter, path in kept.items()}
            verdicts = judged_by(name, {chapter: run["values"] for chapter, run in runs.items()})
            out.append(Beside(name, runs, verdicts, [p for n in PICTURES if (p := folder / n).is_file()]))
    return out
