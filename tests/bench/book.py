"""How long `make book` takes: on a clone of the last commit with an empty home and no cache, and again with nothing
changed; and each chapter's seconds and memory, as its results say.

python -m tests.bench.book       writes _build/book.json, which `python -m tests.bench --book` takes into its record
"""

import json
import os
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from lib.files import BUILD, ROOT, commit, write_atomically

LIMITS = {"make book, cold": 480, "make book, unchanged": 15}  # seconds
BOOK = BUILD / "book.json"


def measure_all(folder: Path) -> list[dict[str, Any]]:
    """A row a build and a row a chapter, of a clone that is made in a folder. Raises CalledProcessError where a build
    fails."""
    stamp = {"commit": commit().partition("+")[0], "started": datetime.now(UTC).isoformat(timespec="seconds")}
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder / "clone")], check=True)
    (folder / "home").mkdir()
    apart = ("QKV_CACHE", "RECORD", "PYTHONPATH", "XDG_CACHE_HOME")
    environment = {k: v for k, v in os.environ.items() if k not in apart} | {"HOME": str(folder / "home")}
    rows = []
    for what, limit in LIMITS.items():
        start = perf_counter()
        subprocess.run(["make", "book"], cwd=folder / "clone", env=environment, check=True)
        rows.append(row(what, perf_counter() - start, limit) | stamp)
    return rows + [one | stamp for one in chapters(folder / "clone" / "_build" / "results" / "smollm2")]


def chapters(results: Path) -> list[dict[str, Any]]:
    """A row a chapter, from the provenance of its results."""
    runs = {path.stem: json.loads(path.read_text("utf-8"))["provenance"] for path in sorted(results.glob("*.json"))}
    return [row(name, run["seconds"], None) | {"peak_mb": run["peak_mb"]} for name, run in runs.items()]


def row(what: str, seconds: float, limit: float | None) -> dict[str, Any]:
    """limit: how long it may take, if that is a goal."""
    return {"what": what, "seconds": seconds, "limit_s": limit, "met": None if limit is None else seconds <= limit}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(write_atomically(BOOK, json.dumps(measure_all(Path(place)), indent=1) + "\n"))
