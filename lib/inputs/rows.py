"""Files of facts as they come, read right or refused: nothing is guessed that could shift a cell.

1. Text       UTF-8, with or without its mark, or UTF-16 with its mark; any other encoding is refused.
2. Records    CSV, TSV and semicolons line by line, so that a fault has its line; the first sheet of a workbook; JSON
              (a list of objects, or one mapping of subjects to answers) and JSONL.
3. Columns    `subject` and `answer` in any case and order, or the names that public sets give them: pairs without a
              header, `country,capital`, LAMA's and PARAREL's `sub_label` and `obj_label`, CounterFact's and ROME's
              `requested_rewrite`. Other columns are passed over. `split` is optional.
4. Cells      spaces around and doubled in them are dropped, letters composed (NFC); `A|B` are two accepted answers.
"""

import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lib.errors import DataError
from lib.inputs.columns import EDGES, LARGEST, Fault, at, columns
from lib.inputs.objects import objects
from lib.inputs.tables import delimited, sheet, table, text_of

TABLES, OBJECTS, BOOKS = (".csv", ".tsv", ".tab", ".txt"), (".json", ".jsonl", ".ndjson"), (".xlsx", ".xlsm")
SPLITS = {"train": "fit", "training": "fit", "valid": "selection", "validation": "selection", "dev": "selection"}
SPLITS |= {"test": "held_out", "held-out": "held_out", "held out": "held_out"}
SPLITS |= {name: name for name in ("fit", "selection", "held_out", "eight", "")}
HIDDEN = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200b\ufeff\ufffd"  # nobody sees them


@dataclass(frozen=True)
class Row:
    """A fact as a file has it. where: its line, entry or row in words; answers: all that are accepted."""

    where: str
    subject: str
    answers: tuple[str, ...]
    split: str = ""
    relation: str = ""
    public: bool = False  # of a set in which a subject that comes again adds an answer


def read_rows(path: Path, relation: str = "") -> list[Row]:
    """The rows of a file, each subject once. relation: read only those whose column `relation` has this value. Raises
    DataError, with the file, the line and a remedy, for what cannot be read right."""
    try:
        rows = [_row(where, cells) for where, cells in _records(path)]
        if not rows:
            raise Fault(" holds no fact: add at least one row subject,answer.")
        rows = _of_one_relation(rows, relation)
        return _merged(rows) if rows[0].public else _unrepeated(rows)
    except Fault as fault:
        raise DataError(f"{path}{fault}") from None
    except RecursionError:
        raise DataError(f"{path} is nested too deeply to hold facts; get it again.") from None
    except OSError as fault:
        raise DataError(f"{path} cannot be read: {fault.strerror or fault}. Give a file that you may read.") from None


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every row or object of a file: where it stands, and its cells by the name of their column."""
    kind = path.suffix.lower()
    if kind not in (*TABLES, *OBJECTS, *BOOKS):
        raise Fault(f" is of no kind that is read; give one of {', '.join((*TABLES, *OBJECTS, *BOOKS))}.")
    if path.stat().st_size > LARGEST:
        raise Fault(f" is larger than {LARGEST:,} bytes; give the facts that you need.")
    if kind in BOOKS:
        return table(sheet(path))
    text = text_of(path.read_bytes())
    if not text.strip():
        raise Fault(" is empty; it needs a line subject,answer and a row for each fact.")
    return objects(text) if kind in OBJECTS else delimited(text)


def _row(where: str, cells: dict[str, Any]) -> Row:
    """One fact of a file. Raises Fault for a cell that is no text, that is empty, or that no fact can have."""
    named = columns(list(cells), where)
    raw = {role: cells[name] for role, name in named.items()}
    answers = raw["answer"] if isinstance(raw["answer"], list) else [raw["answer"]]
    for value in (raw["subject"], *answers):
        if not isinstance(value, str):
            raise at(where, f"{value!r:.60} is no text; put it in quotes.")
    subject = _clean(where, raw["subject"])
    if not subject or not answers or not all(_clean(where, answer) for answer in answers):
        raise at(where, f"subject {raw['subject']!r:.60} with answer {raw['answer']!r:.60}; neither may be empty.")
    parts = [_clean(where, part) for answer in answers for part in answer.split("|")]
    if not all(parts):
        raise at(where, f"one of the answers of {raw['answer']!r:.60} is empty; write A|B for two.")
    split = _clean(where, str(raw.get("split") or "")).casefold()
    if split not in SPLITS:
        raise at(where, f"the split {split!r:.60} is none; write fit, selection or held_out, or leave it empty.")
    relation = _clean(where, str(raw.get("relation") or ""))
    public = named["subject"] == "sub_label"
    return Row(where, subject, tuple(dict.fromkeys(parts)), SPLITS[split], relation, public)


def _clean(where: str, cell: str) -> str:
    """A cell as it is compared: composed, without spaces around or doubled. Raises Fault for what a text cannot hold
    or what would make a terminal show another."""
    text = unicodedata.normalize("NFC", cell.strip(EDGES + " \t\n\r"))
    if "\n" in text or "\r" in text:
        raise at(where, f"{cell!r:.60} holds a line break; keep a cell on one line.")
    text = " ".join(text.split()).strip(EDGES)
    if odd := [c for c in text if unicodedata.category(c) in ("Cc", "Cs") or c in HIDDEN]:
        raise at(where, f"{cell!r:.60} holds the character {odd[0]!a}, which no name has; write it again.")
    return text


def _of_one_relation(rows: list[Row], relation: str) -> list[Row]:
    """The rows of a relation; all, if there is one."""
    counts = Counter(row.relation for row in rows)
    listed = ", ".join(f"{name or 'none'} {n}" for name, n in counts.most_common(6)) + ", ..." * (len(counts) > 6)
    if relation:
        if relation not in counts:
            raise Fault(f" holds no relation {relation!r}; it holds {listed}.")
        return [row for row in rows if row.relation == relation]
    if len(counts) > 1:
        name = counts.most_common(1)[0][0] or next(filter(None, counts))
        raise Fault(f" holds {len(counts)} relations ({listed}); name one after the file, as in FILE#{name}.")
    return rows


def _unrepeated(rows: list[Row]) -> list[Row]:
    subject, times = Counter(row.subject for row in rows).most_common(1)[0]
    if times > 1:
        places = " and ".join(row.where for row in rows if row.subject == subject)
        accepted = "|".join(dict.fromkeys(a for row in rows if row.subject == subject for a in row.answers))
        remedy = f"keep one row ({accepted} as its answer, if all are accepted)" if "|" in accepted else "keep one row"
        raise Fault(f": {subject!r} stands {times} times; {remedy}: {places}.")
    return rows


def _merged(rows: list[Row]) -> list[Row]:
    """Each subject once, with every answer that a public set has for it."""
    first: dict[str, Row] = {}
    for row in rows:
        before = first.setdefault(row.subject, row)
        first[row.subject] = replace(before, answers=tuple(dict.fromkeys((*before.answers, *row.answers))))
    return list(first.values())
