"""Where finished runs are kept: a folder with a JSON file a run, named by the run's key.

`sweep.json` in it says whose results it holds, and a lock beside it keeps a second sweep out; the lock is the operating
system's, and goes with the process that holds it, however that ends.
"""

import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lib.errors import SweepError
from lib.files import make_folder, write_atomically
from lib.sweeps.experiments import differing

HEADER = "sweep.json"


@dataclass(frozen=True)
class Run:
    """One call of the experiment. key: the sha256 of all that its result depends on."""

    key: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Store:
    """A folder of finished runs. A file is written under another name and renamed, so it is whole or not there."""

    folder: Path

    def read(self, runs: Iterable[Run]) -> dict[str, dict[str, Any]]:
        """The records of those runs that are finished, by key. A file that was cut short, or that holds another run, is
        no finished run: it is done again."""
        records = {}
        for run in runs:
            with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                record = json.loads((self.folder / f"{run.key}.json").read_text(encoding="utf-8"))
                if record["parameters"] == run.parameters and {"result", "seconds"} < record.keys():
                    records[run.key] = record
        return records

    def write(self, key: str, record: dict[str, Any]) -> None:
        write_atomically(self.folder / f"{key}.json", json.dumps(record) + "\n")

    def fault(self, header: dict[str, Any]) -> str:
        """What makes the folder another sweep's than this header's, as the end of a sentence; empty if it is this
        one's, or still to be made. Raises SweepError for a folder that is no store at all."""
        path = self.folder / HEADER
        if not path.exists():
            if self.folder.is_file() or any(p.suffix != ".part" for p in self.folder.glob("*")):
                raise SweepError(f"{self.folder} is no store of a sweep, and not empty; give another folder.")
            return ""
        if all(p == path for p in self.folder.glob("*.json")):
            return ""  # whatever it was for, nothing came of it
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
            for key, what in (("model", "the model"), ("weights_sha256", "the weights"), ("experiment", "the run")):
                if theirs[key] != header[key]:
                    return f"holds results for {what} {theirs[key]}, not {header[key]}"
            names = differing(theirs["code"], header["code"])
            return f"holds results of another version of {names}" if names else ""
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return f"has a damaged {HEADER}"

    def begin(self, header: dict[str, Any]) -> None:
        """Say whose the folder is, and sweep up what a killed process left half-written."""
        write_atomically(self.folder / HEADER, json.dumps(header, indent=1) + "\n")
        for half_written in self.folder.glob("*.part"):
            half_written.unlink()

    def set_aside(self) -> Path:
        """Rename the folder; where it is then."""
        names = (self.folder.with_name(f"{self.folder.name}.old-{i}") for i in range(1, 10_000))
        return self.folder.rename(next(path for path in names if not path.exists()))

    def lock(self) -> AbstractContextManager[object]:
        """Held until it is left. Raises SweepError where another sweep holds it."""
        lock = FileLock(make_folder(self.folder.parent) / f"{self.folder.name}.lock")
        try:
            return lock.acquire(blocking=False)
        except Timeout:
            raise SweepError(
                f"another sweep is writing into {self.folder}; wait for its end, or give another folder with --store."
            ) from None


def in_turn(lock: FileLock, say: Callable[[str], None], words: str) -> AbstractContextManager[object]:
    """Held until it is left; where another process holds it, the words are said, and it is waited for."""
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        say(words)
        return lock.acquire()
