"""Report a number once: it goes into JSON, with its provenance, and as formatted text into the prose.

    report = Results("01_static_diagnostics", model, seed=seed)
    report("qk_overlap_mean", overlap.mean(), ".3f")
    report.save()

In a chapter the text is glued under the key, so that `{glue:text}` followed by the key puts it into a sentence.
"""

import json
import platform
import resource
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from IPython import get_ipython
from matplotlib.figure import Figure

from lib import __version__
from lib.errors import ChapterError
from lib.facts import case_sums
from lib.files import BUILD, commit, make_folder, run_folder, write_atomically
from lib.models import Model
from lib.sites import Site

NOT_RUN = "not run"  # stands for a value that no run produced, and is never a pass
PACKAGES = ("torch", "transformers", "transformer-lens", "captum", "numpy", "matplotlib", "papermill", "jupyter-book")


class Results:
    """The numbers of one chapter on one model. Nothing is on disk before `save`."""

    def __init__(self, chapter: str, model: Model, *, seed: int = 0) -> None:
        self.chapter, self._start = chapter, time.perf_counter()
        self.values: dict[str, Any] = {}
        self.path = results_path(model.name, chapter)
        self.folder = chapter_folder(model.name, chapter)  # of files that others use; emptied before it is run anew
        self.provenance: dict[str, Any] = {
            "chapter": chapter,
            "model": model.name,
            **{key: getattr(model, key) for key in ("source", "licence", "weights_sha256")},
            "bos": model.before_texts,
            "lib": __version__,
            "commit": commit(),
            "python": platform.python_version(),
            "packages": {name: version(name) for name in PACKAGES},
            "seed": seed,
            **({"case": sums} if (sums := case_sums(model.name)) else {}),
            "threads": torch.get_num_threads(),
            "start": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def __call__(self, key: str, value: Any, form: str = "") -> None:
        """Keep the value as JSON and glue its text. form: a format specification such as ".2f" or ".1%"; a list is
        joined with commas. Raises KeyError for a key that is already reported."""
        self.table(key, value)
        _glue(key, as_text(value, form))

    def many(self, values: dict[str, Any]) -> None:
        """Report several numbers at once. An entry is a value, or a value and its format: `(0.25, ".0%")`,
        `((low, high), ".2f")`. A pair of numbers stays an interval. Raises what a single report does."""
        for key, entry in values.items():
            formatted = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], str)
            self(key, *(entry if formatted else (entry,)))

    def table(self, key: str, value: Any) -> None:
        """Keep a value that the prose does not quote (a dictionary of cases, a whole table)."""
        if key in self.values:
            raise KeyError(f"{key!r} is reported twice in {self.chapter}; a number is reported once")
        self.values[key] = _plain(value)

    def timing(self, key: str, seconds: Any) -> None:
        """Keep how long something took: with the provenance, because it is no result and never twice the same."""
        self.provenance.setdefault("timing", {})[key] = seconds

    def figure(self, name: str, figure: Figure) -> Figure:
        """Keep a figure as a picture beside the results, and give it back to be shown."""
        figure.savefig(make_folder(self.path.parent) / f"{name}.png")
        return figure

    def save(self) -> Path:
        """Write the file in one step and return its path. Raises ChapterError where that is impossible."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS, otherwise in kB
        peak_mb = peak // (1024**2 if sys.platform == "darwin" else 1024)
        provenance = {**self.provenance, "seconds": round(time.perf_counter() - self._start, 1), "peak_mb": peak_mb}
        content = json.dumps({"provenance": provenance, "values": self.values}, indent=1, ensure_ascii=False)
        return write_atomically(self.path, content + "\n")


def results_path(model_name: str, chapter: str) -> Path:
    """Where a chapter's results stand."""
    return BUILD / "results" / run_folder(model_name) / f"{chapter}.json"


def chapter_folder(model_name: str, chapter: str) -> Path:
    """Where a chapter puts files that others use."""
    return results_path(model_name, chapter).with_suffix("")


def read(model_name: str, weights_sha256: str, chapter: str, path: Path | None = None) -> dict[str, dict[str, Any]]:
    """A chapter's results file, or one that was kept at path: its provenance and its values. Raises ChapterError for a
    file that is missing or cannot be read, and for one of another model, or of other weights."""
    remedy = (
        f"Run `python -m lib run {chapter} --model {model_name} --force`{', then `python -m lib keep`' * bool(path)}."
    )
    path = path or results_path(model_name, chapter)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        maker, weights, *_ = (content["provenance"][key] for key in ("model", "weights_sha256", "lib", "seed"))
        content["values"].keys()
    except FileNotFoundError:
        raise ChapterError(f"there is no {path}. {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ChapterError(f"{path} is no results file ({error!r}). {remedy}") from error
    if (maker, weights) != (model_name, weights_sha256):
        asked = f"{model_name} ({weights_sha256[:12]}...)"
        raise ChapterError(f"{path} was made by {maker} ({weights[:12]}...), not by {asked}. {remedy}")
    return content


def reach(values: Any, key: str) -> Any:
    """The value under a dotted key (a number picks from a list), NOT_RUN if there is none."""
    for part in key.split("."):
        if isinstance(values, dict) and part in values:
            values = values[part]
        elif isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        else:
            return NOT_RUN
    return values


def _plain(value: Any) -> Any:
    """Numbers, texts, lists and dictionaries that JSON holds."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.tolist()
    return str(value) if isinstance(value, Site) else value


def as_text(value: Any, form: str = "") -> str:
    """A value as the prose shows it. form: a format specification; a list is joined with commas, a pair of numbers is
    an interval."""
    if isinstance(value, list | tuple):
        pair = isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, int | float) for v in value)
        return (" to " if pair else ", ").join(as_text(v, form) for v in value)
    return format(_plain(value), form)


def _glue(key: str, text: str) -> None:
    """Within a notebook only: there, myst_nb is loaded."""
    if get_ipython() is not None:
        from myst_nb import glue

        glue(key, text, display=False)
