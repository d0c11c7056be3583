"""Facts as JSON: a list of objects, one mapping of subjects to answers, or JSONL; CounterFact's `requested_rewrite`."""

import json
from collections import Counter
from typing import Any

from lib.inputs.columns import at, columns, named, plain


def objects(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON list, of a JSON mapping of subjects to answers, or of lines of JSON."""
    try:
        content = _json(text)
    except ValueError as whole:
        lines = [(f"line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        if len(lines) == 1 or text.lstrip().startswith("["):
            line = f"line {whole.lineno}" if isinstance(whole, json.JSONDecodeError) else "line 1"
            raise at(line, f"it is no JSON ({_first(whole)}); mend it, or get the file again.") from None
        return [(where, _object(where, _line(where, line))) for where, line in lines]
    if isinstance(content, dict) and not named(map(plain, content)) and "requested_rewrite" not in content:
        return [(f"entry {n}", {"subject": s, "answer": a}) for n, (s, a) in enumerate(content.items(), 1)]
    entries = content if isinstance(content, list) else [content]
    return [(f"entry {n}", _object(f"entry {n}", entry)) for n, entry in enumerate(entries, 1)]


def _json(text: str) -> Any:
    """JSON without a name that stands twice. Raises ValueError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        name, times = Counter(name for name, _ in pairs).most_common(1)[0] if pairs else ("", 0)
        if times > 1:
            raise ValueError(f"{name!r} stands {times} times in one object")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _line(where: str, line: str) -> Any:
    try:
        return _json(line)
    except ValueError as error:
        raise at(where, f"it is no JSON ({_first(error)}); mend it, or get the file again.") from None


def _first(error: ValueError) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)[:100]


def _object(where: str, entry: Any) -> dict[str, Any]:
    """The cells of one JSON object. CounterFact's keeps its fact in `requested_rewrite`, the true answer in
    `target_true.str`."""
    if not isinstance(entry, dict):
        raise at(where, f"{entry!r:.60} is no object with subject and answer.")
    if "requested_rewrite" not in entry:
        names = [plain(name) for name in entry]
        columns(names, where)
        return dict(zip(names, entry.values(), strict=True))
    try:
        asked = entry["requested_rewrite"]
        return {"sub_label": asked["subject"], "obj_label": asked["target_true"]["str"]} | {
            "relation": asked.get("relation_id") or ""
        }
    except (KeyError, TypeError, AttributeError):
        raise at(where, "its requested_rewrite lacks subject or target_true.str; get the file again.") from None
