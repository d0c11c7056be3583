"""Tables of facts, row by row: CSV, TSV, semicolons, workbooks. No encoding is guessed, and no cell shifted."""

import csv
import logging
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lib.inputs.columns import LARGEST, Fault, at, columns, named, plain

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
log = logging.getLogger("lib.inputs")


def text_of(raw: bytes) -> str:
    """A file's text. Only what marks itself as UTF-16 is read as such: no encoding is guessed."""
    if raw.startswith(b"PK\x03\x04"):
        raise Fault(" is a workbook, not a text; give it the ending .xlsx, or save it as CSV (UTF-8).")
    utf16 = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = raw.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line, end = raw.count(b"\n", 0, error.start) + 1, raw.find(b"\n", error.start)
        start = raw.rfind(b"\n", 0, error.start) + 1
        seen = raw[start : end if end > 0 else None].decode("cp1252", "replace").strip()[:60]
        read = "is not the UTF-16 that it says" if utf16 else f"is not UTF-8; as cp1252 it would be {seen!r}"
        raise at(f"line {line}", f"it {read}. Save the file as UTF-8 (in a spreadsheet: CSV UTF-8).") from None
    if "\0" in text:
        raise Fault(" holds zero bytes: it is UTF-16 without its mark, or no text. Save it as UTF-8.")
    return text


def delimited(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a table whose lines are rows."""
    lines = [(f"line {n}", line) for n, line in enumerate(re.split(r"\r\n|\r|\n", text), 1) if line.strip()]
    told = re.fullmatch(r"sep=([,;\t])", lines[0][1].strip(" ").lower())  # as spreadsheets write it
    lines = lines[1:] if told else lines
    facts = [(where, line) for where, line in lines if not line.lstrip().startswith("#")]
    delimiter = told[1] if told else _delimiter(facts)
    lines = [(where, line) for where, line in lines if not _is_comment(where, line, delimiter)]
    return table([(where, _cells(where, line, delimiter)) for where, line in lines])


def _is_comment(where: str, line: str, delimiter: str) -> bool:
    """A line that begins with # is one, unless it may as well be a fact."""
    if not (start := re.match(r"\s*#+", line)):
        return False
    if delimiter in line and not re.match(r"\s|$", line[start.end() :]):
        raise at(where, "it begins with #; put a space after that if it is a comment, or the cell in quotes if not.")
    return True


def _delimiter(lines: Sequence[tuple[str, str]]) -> str:
    """What separates the cells: that by which the first line has known columns, or every line two cells."""
    first = lines[0][1] if lines else ""
    known = {d: len(named(plain(cell.strip('" ')) for cell in first.split(d))) for d in DELIMITERS}
    if any(known.values()):
        return max(known, key=lambda d: known[d])
    pairs = [d for d in DELIMITERS if all(line.count(d) == 1 or ('"' in line and d in line) for _, line in lines)]
    if lines and len(pairs) > 1:
        names = " or ".join(DELIMITERS[d] for d in pairs)
        raise Fault(f" may be separated by {names}; put a first line subject{pairs[0]}answer above.")
    return pairs[0] if pairs else ","


def _cells(where: str, line: str, delimiter: str) -> list[str]:
    """The cells of one line. Raises Fault for quotes that do not close, and where a space stands after some delimiters
    and not after others: then one of them may belong to a name, as in `United States,Washington, D.C.,note`."""
    spaced_quotes = re.search(rf'{re.escape(delimiter)} +"', line) is not None
    try:
        (row,) = csv.reader([line], delimiter=delimiter, skipinitialspace=spaced_quotes, strict=True)
    except csv.Error as error:
        advice = "close its quotes, write a quote within a cell twice, and keep a cell on one line"
        raise at(where, f"its cells cannot be told apart ({error}); {advice}.") from None
    rest = [cell for cell in row[1:] if cell.strip()]
    spaced = [cell for cell in rest if cell.startswith(" ")]
    if spaced and len(rest) > len(spaced) and not spaced_quotes:
        raise at(where, f"{spaced[0]!r} may belong to the cell before it; {_quote(spaced[0])}.")
    return row


def _quote(cell: str) -> str:
    return f"put quotes around a cell that holds a delimiter, and no space before {cell.strip()!r} if it is a cell"


def table(rows: list[tuple[str, list[str]]]) -> list[tuple[str, dict[str, Any]]]:
    """Rows below a header, or pairs without one -> cells by column. Rows without any text are passed over."""
    rows = [(where, cells) for where, cells in rows if any(cell.strip() for cell in cells)]
    if not rows:
        raise Fault(" is empty; it needs a line subject,answer and a row for each fact.")
    header = [plain(cell) for cell in rows[0][1]]
    while header and not header[-1]:
        header.pop()
    if not named(header) and all(len(cells) == 2 for _, cells in rows):
        log.info(f"{rows[0][0]} of the facts names no column: {' -> '.join(map(repr, rows[0][1]))} is read as a fact")
        header = ["subject", "answer"]
    else:
        rows = rows[1:]
    found = columns(header, "")
    front = {header.index(found[role]) for role in ("subject", "answer")} == {0, 1}
    for where, cells in rows:
        if any(cell.strip() for cell in cells[len(header) :]):
            first = next(cell for cell in cells[len(header) :] if cell.strip())
            raise at(where, f"it has {len(cells)} cells, and the header {len(header)}; {_quote(first)}.")
        if len(cells) < len(header) and not front:
            raise at(where, f"it has {len(cells)} cells, and the header {len(header)}; write the empty ones too.")
    return [(where, dict(zip(header, [*cells, *[""] * len(header)], strict=False))) for where, cells in rows]


def sheet(path: Path) -> list[tuple[str, list[str]]]:
    """The rows of a workbook's one sheet."""
    try:
        with zipfile.ZipFile(path) as parts:
            if sum(part.file_size for part in parts.infolist()) > LARGEST:
                raise Fault(f" unpacks to more than {LARGEST:,} bytes; give the facts that you need, as CSV.")
        sheets = pd.read_excel(path, sheet_name=None, header=None, dtype=str, keep_default_na=False, engine="openpyxl")
    except ImportError:
        raise Fault(" needs the package openpyxl: `pip install openpyxl`, or save it as CSV (UTF-8).") from None
    except Fault:
        raise
    except Exception as error:  # openpyxl raises whatever it meets in a damaged file
        raise Fault(f" is no workbook that can be read ({type(error).__name__}); save it as CSV (UTF-8).") from None
    filled = {name: sheet for name, sheet in sheets.items() if not sheet.empty}
    if len(filled) > 1:
        raise Fault(f" has {len(filled)} sheets ({', '.join(map(repr, filled))}); keep one, or save one as CSV.")
    return [(f"row {n}", list(map(str, r))) for s in filled.values() for n, r in enumerate(s.to_numpy().tolist(), 1)]
