"""Damaged files for every reader: `python tests/fuzz.py --inputs 10000`.

A real file of each format is mutated: bits flipped, pieces cut out, doubled, swapped with pieces of other files;
numbers made huge or negative; words put in that other programs would act on. Each result is read, and must be taken or
refused by one of the project's own errors; nothing may be written beside it, and memory and time are bounded.

A table is printed, a line a format; exit 1 if anything else happened, with the input's number, which makes it again.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lib import edits, facts, models, results
from lib.checkpoints import reading
from lib.errors import BookError
from lib.files import DATA
from lib.press import archive
from lib.sweeps import record, specification

ACTED_ON = (  # by a shell, a terminal, a browser, a template or another reader
    b"../../x", b"/etc/passwd", b"<script>x</script>", b"\x1b[2J\x1b]0;x\x07", b"{{ 7*7 }}", b"{% for x in y %}",
    b"!!python/object/apply:os.system [x]", b"&a [*a, *a]", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"NaN",
    b"1e999", b"-1", b"null", b"{}", b"[]", b'"', b"[" * 3000, b"9" * 5000, b"\xed\xa0\x80", "\u202e".encode(),
)  # fmt: skip
SIZES = (0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, 10 * 2**30)
MEMORY = 1_500_000_000  # bytes more than before, of all inputs of a format together
SECONDS = 20  # of one input
SLOW = ("model folder", "GGUF")  # a model is loaded for each
FACTS = "subject,answer\nFrance,Paris\nGermany,Berlin\n" + "".join(f"S{i},A{i}\n" for i in range(40))
ARCHIVED = {
    "title": "t",
    "version": "1",
    "model": "s",
    "commit": "c",
    "changes": [],
    "weights_sha256": "0" * 64,
    "date": "2026-11-23",
}


@dataclass(frozen=True)
class Format:
    """files: real ones, of which one at a time is mutated; read: what a command does with the folder they are in."""

    files: dict[str, bytes]
    read: Callable[[Path], object]


def formats(model: Path, edit: bytes, gguf: bytes) -> dict[str, Format]:
    """Every format and its reader. model: a folder of a tiny model; edit, gguf: real files of these formats."""
    rows = [dict(zip(("subject", "answer"), pair, strict=True)) for pair in (("France", "Paris"), ("Japan", "Tokyo"))]
    case = b"facts: facts.csv\ntemplate: 'The capital of {} is'\ncontrols: [in_is, '{}, whose capital is']\ntitle: t\n"
    tables = {
        "csv": FACTS.encode(),
        "tsv": FACTS.replace(",", "\t").encode("utf-16"),
        "json": json.dumps(rows).encode(),
        "jsonl": "\n".join(map(json.dumps, rows)).encode(),
    }
    found = {
        f"facts, {kind}": Format({f"facts.{kind}": data}, lambda p, k=kind: facts.load_facts(p / f"facts.{k}"))
        for kind, data in tables.items()
    }
    recorded = {name: (DATA / "record" / "organism" / name).read_bytes() for name in ("near.csv", "near.json")}
    folder = {p.name: p.read_bytes() for p in model.iterdir()}
    contents = archive.complete({"html/index.html": b"<p>", "a b.py": b"x"}, ARCHIVED)
    return found | {
        "case": Format({"case.yaml": case, "facts.csv": tables["csv"]}, lambda p: facts.read_case(p / "case.yaml")),
        "templates": Format(
            {"templates.yaml": (DATA / "templates.yaml").read_bytes()},
            lambda p: facts.load_templates(p / "templates.yaml"),
        ),
        "sweep": Format(
            {"layers.yaml": (DATA / "sweeps" / "layers.yaml").read_bytes()},
            lambda p: specification.expand(specification.load(p / "layers.yaml", model_name="organism")),
        ),
        "record": Format(recorded, _read_record),
        "results": Format({"r.json": _RESULTS}, lambda p: results.read("s", "0" * 64, "01_a", p / "r.json")),
        "edit": Format({"edit.safetensors": edit}, lambda p: edits.load(p / "edit.safetensors")),
        "archive": Format(
            {"a.zip": archive.pack(contents, "f", datetime(2026, 11, 23, tzinfo=UTC)), "a.zip.sha256": b"0" * 64},
            lambda p: archive.verify(p / "a.zip"),
        ),
        "model folder": Format(folder, lambda p: models.load(str(p))),
        "GGUF": Format({"a.gguf": gguf}, lambda p: reading.read(reading.Files("a", p, "a.gguf"))),
    }


_RESULTS = json.dumps({
    "provenance": {"model": "s", "weights_sha256": "0" * 64, "lib": "1", "seed": 0},
    "values": {"a": 1},
}).encode()  # fmt: skip


def _read_record(folder: Path) -> object:
    """As chapters do, with this folder in the place of the organism's records."""
    kept, record.FOLDER = record.FOLDER, folder.parent
    try:
        return record.read(specification.load("near", model_name="organism"))
    finally:
        record.FOLDER = kept


def mutated(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """One to four changes of some content."""
    for _ in range(chance.choice((1, 1, 2, 4))):
        data = chance.choice(CHANGES)(data, others, chance)
    return data


def _flip(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    at = _place(data, chance)
    return data[:at] + bytes([(data[at] if at < len(data) else 0) ^ chance.randrange(1, 256)]) + data[at + 1 :]


def _cut(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    at = _place(data, chance)
    return data[:at] if chance.random() < 0.3 else data[:at] + data[at + chance.choice((1, 2, 8, 50, 1000)) :]


def _double(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    at, length = _place(data, chance), chance.choice((1, 4, 30, 500))
    return data[:at] + data[at : at + length] * chance.choice((2, 3, 50)) + data[at + length :]


def _swap(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    other, length = chance.choice(others), chance.choice((4, 30, 500))
    at, there = _place(data, chance), _place(other, chance)
    return data[:at] + other[there : there + length] + data[at + length :]


def _put(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    at, word = _place(data, chance), chance.choice(ACTED_ON)
    return data[:at] + word + data[at + chance.choice((0, 0, len(word))) :]


def _number(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """Another number: in digits where there are some, or in place of eight bytes."""
    size = chance.choice(SIZES)
    if (found := list(re.finditer(rb"\d+", data[:5000]))) and chance.random() < 0.7:
        start, end = chance.choice(found).span()
        return data[:start] + str(chance.choice((size, -size, size + 0.5))).encode() + data[end:]
    at, width = _place(data, chance), chance.choice((4, 8))
    return data[:at] + (size % 2 ** (8 * width)).to_bytes(width, "little") + data[at + width :]


CHANGES = (_flip, _cut, _double, _swap, _put, _number)


def _place(data: bytes, chance: random.Random) -> int:
    """Somewhere; half the time near the beginning, where headers are."""
    return chance.randrange(min(len(data), 400) + 1 if chance.random() < 0.5 else len(data) + 1)


class Watch:
    """Notes every file that is opened to be written outside a folder and the cache of models, while it is on."""

    def __init__(self) -> None:
        self.folder, self.seen = "", list[str]()
        sys.addaudithook(self._note)

    def _note(self, event: str, given: tuple[Any, ...]) -> None:
        if self.folder and event == "open" and isinstance(given[0], str) and given[2] & 0o3:
            inside = given[0].startswith((self.folder, os.environ["QKV_CACHE"], "/dev/null"))
            self.seen += [] if inside else [given[0]]


def put(files: dict[str, bytes], place: Path) -> Path:
    """A new folder with these files; it is called as a model is, because records are kept in such."""
    shutil.rmtree(place, ignore_errors=True)
    (folder := place / "organism").mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def outcome(form: Format, number: int, watch: Watch, place: Path) -> str:
    """What became of one input: `taken`, `refused`, or a fault in a line."""
    chance = random.Random(number)
    name, others = chance.choice(sorted(form.files)), list(form.files.values())
    folder = put(form.files | {name: mutated(form.files[name], others, chance)}, place)
    before = set(place.parent.rglob("*"))
    watch.folder, watch.seen = str(place), []
    signal.alarm(SECONDS)
    try:
        with redirect_stderr(StringIO()):
            form.read(folder)
        became = "taken"
    except BookError as error:
        became = "refused" if str(error).strip() and "\n  File " not in str(error) else f"says nothing: {error!r}"
    except BaseException as error:  # every one that is not the project's own is what is looked for
        if isinstance(error, KeyboardInterrupt):
            raise
        became = f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        watch.folder = ""
    if written := watch.seen + [str(p) for p in {*place.parent.rglob("*")} - before]:
        return f"written: {written[0]}"
    return became


def real_files(place: Path) -> dict[str, Format]:
    """The formats, with a tiny model and an edit of it made now."""
    from tests.conftest import tiny_gpt2, tiny_llama
    from tests.test_edits import an_edit
    from tests.test_refused import write_gguf

    tokenizer = models.load("organism").tokenizer
    for name, make in {"gpt2": tiny_gpt2, "llama": tiny_llama}.items():
        make(vocab_size=len(tokenizer)).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    edit = edits.save(an_edit(models.load(str(place / "gpt2"))), place / "edit.safetensors").read_bytes()
    gguf = write_gguf(place / "a.gguf", models.load(str(place / "llama"))).read_bytes()
    return formats(place / "gpt2", edit, gguf)


def _late(*_: object) -> None:
    raise TimeoutError(f"not read within {SECONDS} s")


def tried(form: Format, numbers: range, watch: Watch, place: Path) -> tuple[Counter[str], list[str]]:
    """How many inputs were taken and refused, and what else happened, by input. The files as they are must be taken."""
    form.read(put(form.files, place / "inputs" / "one"))
    signal.signal(signal.SIGALRM, _late)
    counts, faults = Counter[str](), []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in numbers:
            became = outcome(form, number, watch, place / "inputs" / "one")
            counts[became if became in ("taken", "refused") else "fault"] += 1
            faults += [] if became in ("taken", "refused") else [f"input {number}: {became}"]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return counts, faults + [f"{grown / 1e6:,.0f} MB of memory were needed"] * (grown > MEMORY)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--inputs", type=int, default=10_000, help="of each format; of models, a tenth")
    options.add_argument("--first", type=int, default=0, help="number of the first input")
    options.add_argument("--only", nargs="*", default=[], help="formats by name")
    given = options.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, resource.RLIM_INFINITY))
    table, all_faults, watch = Table("format", "inputs", "taken", "refused", "faults", "seconds"), list[str](), Watch()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name, tempfile.TemporaryDirectory() as cache:
        os.environ["QKV_CACHE"] = cache
        for kind, form in real_files(Path(name)).items():
            if given.only and kind not in given.only:
                continue
            n, begun = given.inputs // (10 if kind in SLOW else 1), time.process_time()
            counts, faults = tried(form, range(given.first, given.first + n), watch, Path(name))
            row = n, counts["taken"], counts["refused"], len(faults), round(time.process_time() - begun)
            table.add_row(kind, *map(str, row))
            all_faults += [f"{kind}, {fault}" for fault in faults]
            print(kind, *row, *faults[:20], sep="\n  ", flush=True)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    raise SystemExit("\n".join(all_faults) if all_faults else 0)


if __name__ == "__main__":
    main()
