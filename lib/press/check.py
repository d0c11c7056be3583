"""A regression test: are the numbers of the current results still those that an earlier run of this repository gave
(data/expected)? It finds what has changed, and cannot find what was wrong from the start; whether the paper's claims
hold is `judged`. Only the results of chapters that belong to their present inputs count; all others are `not run`."""

import json
from pathlib import Path
from typing import Any

from lib.checkpoints.fetching import weights_sha256
from lib.checkpoints.named import canonical
from lib.errors import ChapterError
from lib.facts import load_cases
from lib.files import ROOT, slug
from lib.press import claims
from lib.press.execute import chapter_names, is_current
from lib.results import reach, read


def check(model_name: str, folder: Path = ROOT / "data" / "expected") -> list[tuple[str, str, Any, Any, bool]]:
    """The regression test: results beside data/expected/<model>.json, rows (chapter, key, expected, found, holds). An
    expectation is {"value": v} with "tolerance" (absolute) for numbers, or {"min": a, "max": b}. A value that no run of
    the present inputs produced is `not run` and does not hold. Raises ChapterError where nothing is expected of the
    model."""
    model_name = canonical(model_name)
    path = folder / f"{slug(model_name)}.json"
    if not path.is_file():
        known = "Expected figures exist for this repository's own models."
        raise ChapterError(f"nothing is expected of {model_name!r}: there is no {path}. {known}")
    rows, values = [], current_values(model_name)
    for chapter, keys in json.loads(path.read_text(encoding="utf-8")).items():
        for key, wanted in keys.items():
            value = reach(values.get(chapter, {}), key)
            rows.append((chapter, key, _wish(wanted), value, _holds(wanted, value)))
    return rows


def judged(model_name: str) -> list[claims.Judged]:
    """The source page's claims and what the current results of a model make of them."""
    model_name = canonical(model_name)
    return judged_by(model_name, current_values(model_name))


def judged_by(model_name: str, values: dict[str, dict[str, Any]]) -> list[claims.Judged]:
    """The claims and what a model's values, by chapter, make of them."""
    listed, case = claims.load(ROOT / "data" / "claims.yaml", chapters=chapter_names()), load_cases(model_name)[0].name
    return [claims.judge(claim, model_name, values, case=case) for claim in listed]


def current_values(model_name: str) -> dict[str, dict[str, Any]]:
    """What a model's chapters reported, of those whose results belong to their present inputs. Raises ChapterError for
    a results file that the run of another model has left there."""
    weights = weights_sha256(model_name)
    current = [chapter for chapter in chapter_names() if is_current(model_name, chapter, None, weights)]
    return {chapter: read(model_name, weights, chapter)["values"] for chapter in current}


def _holds(wanted: dict[str, Any], value: Any) -> bool:
    if "value" in wanted and not isinstance(wanted["value"], float):
        return value == wanted["value"]
    if not isinstance(value, int | float):
        return False
    if "value" in wanted:
        return abs(value - wanted["value"]) <= wanted["tolerance"]
    return wanted.get("min", float("-inf")) <= value <= wanted.get("max", float("inf"))


def _wish(wanted: dict[str, Any]) -> str:
    if "value" in wanted:
        return str(wanted["value"]) + (f" ± {wanted['tolerance']}" if "tolerance" in wanted else "")
    words = (("min", "at least"), ("max", "at most"))
    return " and ".join(f"{word} {wanted[end]}" for end, word in words if end in wanted)
