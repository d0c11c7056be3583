"""What columns of facts may be called, and what is wrong with a file, in words."""

import unicodedata
from collections.abc import Iterable, Sequence

LARGEST = 256 * 2**20  # bytes of a file, or of what a workbook unpacks to: CounterFact has 45 MB
EDGES = "\ufeff\u200b\u200e\u200f\u061c"  # marks that spreadsheets leave at the ends of a cell
ROLES = {  # what a column may be called; the book's own name first
    "subject": ("subject", "sub_label", "country", "head", "entity"),
    "answer": ("answer", "answers", "obj_label", "object", "capital", "tail", "attribute"),
    "split": ("split",),
    "relation": ("relation", "relation_id", "predicate_id"),
}


class Fault(Exception):
    """What is wrong, as the end of a sentence that begins with the file."""


def at(where: str, text: str) -> Fault:
    return Fault(f", {where}: {text}")


def plain(name: str) -> str:
    """The name of a column, whatever its case and the marks around it."""
    return unicodedata.normalize("NFC", name).strip(EDGES + " \t").casefold()


def named(names: Iterable[str]) -> set[str]:
    """Those that mean a subject or an answer."""
    return {*ROLES["subject"], *ROLES["answer"]}.intersection(names)


def columns(names: Sequence[str], where: str) -> dict[str, str]:
    """Role -> the name of its column. Raises Fault where subject or answer has none, or more than one."""
    found: dict[str, str] = {}
    place = f", {where}," if where else ""
    for role, known in ROLES.items():
        there = [name for name in names if name in known]
        own = [name for name in there if name == role] or there
        if len(own) > 1 and role != "relation":
            raise Fault(f"{place} has {len(own)} columns for the {role} ({', '.join(own)}); keep one.")
        found |= {role: own[0]} if own else {}
    if missing := [role for role in ("subject", "answer") if role not in found]:
        raise Fault(f"{place} has no column {' and no column '.join(missing)}; it needs subject,answer.")
    return found
