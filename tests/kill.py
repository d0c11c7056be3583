"""Kill commands at random moments and let them go on: `python tests/kill.py --kills 20`.

In a clone of this checkout's last commit, for each command:

1. It is done undisturbed, and what it left is noted: every file's sum, times and dates aside.
2. It is started again without that, and killed with -9 at a moment drawn from the time it took; what it started must
   go too. Whatever stands under a final name must be whole: the undisturbed file.
3. The same command goes on, and is killed again. Whenever it comes to its end, what it left must be what the
   undisturbed one left, file by file, with nothing unfinished beside it; then it begins anew, until all kills are done.

A table is printed, a line a command; exit 1 if anything differed.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from lib.files import ROOT, slug

PASSING = {"provenance", "seconds", "date", "start", "commit", "processor"}  # of JSON: what is another every time
TIMED = ("html", "executed", "logs", "dashboard")  # folders of _build whose pages show times


@dataclass(frozen=True)
class Command:
    """words: after `python -m lib`. leaves: what it makes, as patterns below the clone. first: what it needs done."""

    name: str
    words: tuple[str, ...]
    leaves: tuple[str, ...]
    first: tuple[tuple[str, ...], ...] = ()


@dataclass
class Tally:
    """What became of one command."""

    seconds: float
    killed: int = 0
    ended: int = 0
    files: int = 0
    faults: list[str] = field(default_factory=list)

    def note(self, name: str, event: str, faults: list[str]) -> None:
        """Something happened to the command, and these faults were seen then."""
        self.faults += faults
        said = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
        print(f"{name} {event}: {said or 'as it should be'}", file=sys.stderr, flush=True)


def commands(model: str) -> list[Command]:
    """The commands that are tried, in an order in which each finds what it needs."""
    name, at = slug(model), ("--model", model)
    results, edit = f"_build/results/{name}", f"_build/results/{name}/03_four_pathways/v_only.safetensors"
    return [
        Command("training", ("run", "3", *at), (results, f"_build/executed/{name}")),
        Command(
            "export",
            ("export", edit, "_build/exported"),
            ("_build/exported", "_build/.exported*"),
            (("run", "3", *at),),
        ),
        Command("chapters", ("run", "1", "5", *at), (results, f"_build/executed/{name}")),
        Command("sweep", ("sweep", "layers", *at), (f"_build/sweeps/{name}",)),
        Command("record", ("record", "near", *at), (f"_build/sweeps/{name}", f"data/record/{name}")),
        Command("book", ("book", *at), ("_build",)),
        Command(
            "snapshot",
            ("snapshot", *at, "-o", "_build/snapshot/a.zip"),
            ("_build/snapshot",),
            (("book", *at), ("pdf", *at)),
        ),
    ]


def noted(place: Path, command: Command) -> dict[str, str]:
    """The sum of every file that a command left, by name."""
    tops = [top for name in command.leaves for top in place.glob(name)]
    files = [p for top in tops for p in ([top] if top.is_file() else sorted(top.rglob("*"))) if p.is_file()]
    return {p.relative_to(place).as_posix(): _sum(p, place) for p in files if p.suffix not in (".lock", ".key", ".log")}


def _sum(path: Path, place: Path) -> str:
    """sha256 of a file's content, without what is another every time."""
    data = path.read_bytes()
    parts = path.relative_to(place).parts
    if parts[0] == "_build" and parts[1] in TIMED and path.suffix in (".html", ".ipynb", ".js", ".png", ".svg", ".inv"):
        return "a page"  # with times in it: that it is there, and whole, is what its key says
    if path.name in ("index.md", "verify.md") or parts[:2] == ("_build", "unchanged"):
        return "times"  # minutes of chapters, and when files were changed
    if path.suffix == ".json":
        data = json.dumps(_lasting(json.loads(data)), sort_keys=True).encode()
    if path.suffix == ".csv" and "record" in parts:
        data = "\n".join(",".join(line.split(",")[:-1]) for line in data.decode().splitlines()).encode()  # its seconds
    return hashlib.sha256(data).hexdigest()


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lasting(v) for k, v in value.items() if k not in PASSING and "seconds" not in k and k != "sha256"}
    return [_lasting(v) for v in value] if isinstance(value, list) else value


def clear(place: Path, command: Command) -> None:
    """Without what the command leaves, as it was committed."""
    for top in (top for name in command.leaves for top in place.glob(name)):
        shutil.rmtree(top, ignore_errors=True)
    subprocess.run(["git", "checkout", "--quiet", "--", "."], cwd=place, check=True)


def start(place: Path, words: tuple[str, ...], temporary: Path) -> subprocess.Popen[bytes]:
    """The command in the clone, with a folder of its own for what is temporary."""
    environment = os.environ | {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    with (temporary.parent / "said").open("wb") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "lib", *words], cwd=place, env=environment, stdout=said, stderr=said
        )


def done(place: Path, words: tuple[str, ...], temporary: Path) -> float:
    """Do a command to its end; the seconds that it took."""
    begun = time.perf_counter()
    if start(place, words, temporary).wait():
        raise SystemExit(f"{' '.join(words)} failed:\n{(temporary.parent / 'said').read_text()[-4000:]}")
    return time.perf_counter() - begun


def gone(processes: list[psutil.Process], seconds: float = 120) -> Iterator[str]:
    """Those that are still at work after a while, and are ended now, as texts. A server of kernels that was importing
    when its parent was killed ends when it has done so, which takes a while where the machine is busy."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(map(_works, processes)):
        time.sleep(0.05)
    for process in filter(_works, processes):
        with suppress(psutil.NoSuchProcess):
            yield f"still at work after {seconds:.0f} s: {' '.join(process.cmdline())[:80]}"
            process.kill()


def _works(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def try_out(place: Path, command: Command, kills: int, chance: random.Random, temporary: Path) -> Tally:
    """Steps 1 to 3 of one command."""
    for words in command.first:
        done(place, words, temporary)
    clear(place, command)
    tally = Tally(done(place, command.words, temporary))
    wanted = noted(place, command)
    tally.files = len(wanted)
    clear(place, command)
    before = noted(place, command)
    while True:
        process = start(place, command.words, temporary)
        if tally.killed < kills:
            with suppress(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0, tally.seconds))
        else:
            process.wait()
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.wait()
            tally.killed += 1
            tally.note(
                command.name, "killed", [*gone(children), *unlike(noted_or_none(place, command), wanted, before)]
            )
            continue
        tally.ended += 1
        said = (temporary.parent / "said").read_text(errors="replace")
        failed = [f"it failed: {said[-1500:]}"] if process.returncode else []
        tally.note(command.name, "came to its end", [*failed, *unlike(noted_or_none(place, command), wanted)])
        clear(place, command)
        if tally.killed == kills:
            return tally


def noted_or_none(place: Path, command: Command) -> dict[str, str]:
    """As `noted`; a file that cannot be read has its fault for a sum."""
    found: dict[str, str] = {}
    for name in command.leaves:
        try:
            found |= noted(place, Command("", (), (name,)))
        except ValueError as error:
            found[name] = f"unreadable: {error}"
    return found


def unlike(found: dict[str, str], wanted: dict[str, str], before: dict[str, str] | None = None) -> list[str]:
    """What is there and should not be, or not so. before: what was there when a command began that was killed; without,
    it came to its end, and what is missing or unfinished counts as well. What chapters keep for one another grows as
    they ask for more of it: it has its last content at the end."""
    unfinished = {name for name in found if ".part" in name or "/stage-" in name or "/.exported" in name}
    unfinished |= {name for name in found if before is not None and name.startswith("_build/kept/")}
    odd = [n for n, s in found.items() if n not in unfinished and s not in (wanted.get(n), (before or {}).get(n))]
    faults = [f"other than undisturbed: {name}" for name in odd]
    if before is None:
        faults += [f"missing: {name}" for name in wanted.keys() - found.keys()]
        faults += [f"unfinished: {name}" for name in unfinished]
    return sorted(faults)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="organism")
    options.add_argument("--kills", type=int, default=20, help="of each command")
    options.add_argument("--seed", type=int, default=0, help="of the moments")
    options.add_argument("--only", nargs="*", default=[], help="commands by name")
    given = options.parse_args()
    table = Table("command", "seconds undisturbed", "killed", "came to its end", "files compared", "faults")
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        place, temporary = Path(folder) / "clone", Path(folder) / "tmp"
        temporary.mkdir()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(place)], check=True)
        for command in commands(given.model):
            if given.only and command.name not in given.only:
                continue
            chance = random.Random(f"{given.seed} {command.name}")
            tally = try_out(place, command, given.kills, chance, temporary)
            shown = f"{tally.seconds:.0f}", tally.killed, tally.ended, tally.files, len(tally.faults)
            table.add_row(command.name, *map(str, shown))
            faults += [f"{command.name}: {fault}" for fault in tally.faults]
            print(f"{command.name}: killed {tally.killed} times, {len(tally.faults)} faults", flush=True)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    raise SystemExit("\n".join(faults) if faults else 0)


if __name__ == "__main__":
    main()
