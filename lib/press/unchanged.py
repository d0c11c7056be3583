"""Whether anything changed since the book of a model was built: asked in a second, before anything is imported that
takes seconds to import.

After a build `note` keeps what it was made from and what it made; `since` compares. Files of up to SMALL bytes are
known by their bytes, larger ones by size and time of change. In doubt the answer is that something changed: then each
part of the build looks for itself, as it always does.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from lib import files
from lib.files import cache_folder, case_file, live, run_folder, slug, write_atomically

ROOMS = ("book", "data", "lib")
VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "OMP_NUM_THREADS")
SMALL = 4_000_000


def inputs(model_name: str) -> str:
    """sha256 over all that a build reads of this project, of its packages and of its settings."""
    rooms = [path for room in ROOMS for path in _walked(files.ROOT / room)]
    packages = sorted(p.name for folder in {*sys.path} for p in Path(folder or ".").glob("*-info"))
    places = [str(Path(model_name).resolve()), str(case_file()), str(cache_folder())]
    settings = [model_name, sys.version, live(), *places, *map(os.getenv, VARIABLES)]
    sums = seals([*sorted(filter(Path.is_file, files.ROOT.iterdir())), *rooms])
    return hashlib.sha256(json.dumps([settings, packages, sums]).encode()).hexdigest()


def seals(paths: Iterable[Path]) -> dict[str, str]:
    """What files hold, and what stands right in folders, by their path; nothing where there is none."""
    return {str(path): _seal(path) for path in paths}


def listing(folder: Path) -> str:
    """sha256 over all files within a folder, wherever it stands: one that is gone, or that was changed, is missed."""
    within = {str(path.relative_to(folder)): _seal(path) for path in _walked(folder)}
    return hashlib.sha256(json.dumps(within).encode()).hexdigest()


def since(model_name: str, before: str) -> bool:
    """Whether a build by these `inputs` is kept, and all that it read elsewhere and made is as it was then."""
    try:
        kept = json.loads(_path(model_name).read_text(encoding="utf-8"))
        return bool(kept["inputs"] == before and kept["seals"] == seals(map(Path, kept["seals"])))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def note(model_name: str, before: str) -> None:
    """Keep what a build came to. before: its `inputs`, from before it began: what was changed meanwhile is seen. Of a
    model of the hub that is not pinned nothing is kept: only the hub knows whether it changed."""
    from lib.checkpoints.fetching import locate
    from lib.checkpoints.named import SPECS, canonical, hub_id, split
    from lib.facts import own_case
    from lib.press.build import dashboard_path

    name = canonical(model_name)
    if hub_id(split(name)[0]) and split(name)[0] not in SPECS:
        _path(model_name).unlink(missing_ok=True)
        return
    build, folder, page = files.BUILD, run_folder(name), dashboard_path(name)
    trees = ["html", f"executed/{folder}", f"results/{folder}", f"checks/{slug(name)}", "checks/organism"]
    made = [build / "html.key", page, page.with_suffix(".key"), *(p for t in trees for p in _walked(build / t))]
    own = case.files.values() if (case := own_case(name)) else ()
    kept = {"inputs": before, "seals": seals([locate(name).folder, *own, *made])}
    write_atomically(_path(model_name), json.dumps(kept))


def _path(model_name: str) -> Path:
    return files.BUILD / "unchanged" / f"{run_folder(model_name)}.json"


def _walked(folder: Path) -> Iterator[Path]:
    """The files in a folder and in those within it, but what Python and editors keep for themselves."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & {*path.parts}:
            yield path


def _seal(path: Path) -> str:
    try:
        if path.is_dir():
            return json.dumps([(p.name, "" if p.is_dir() else _seal(p)) for p in sorted(path.iterdir())])
        stat = path.stat()
        if stat.st_size > SMALL:
            return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""
