"""Where things are kept, how a file is written, and what an output depends on: files of lib/, of data/, digests."""

import ast
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from platformdirs import user_cache_path

from lib.errors import BookError, ChapterError

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
BUILD = ROOT / "_build"
CASE_VARIABLE = "QKV_CASE"  # of the environment: the file of a case of one's own
BENCH = "bench*.json"  # in data/: the records of a benchmark, one a model


def cache_folder() -> Path:
    """Where fetched models are kept: $QKV_CACHE, or the user's cache folder."""
    return Path(os.environ.get("QKV_CACHE") or user_cache_path("qkv-decomposition"))


def live() -> bool:
    """Whether sweeps are done here ($RECORD is `off`) instead of being read from their record."""
    return os.environ.get("RECORD", "").lower() == "off"


def case_file() -> Path | None:
    """The case of one's own ($QKV_CASE) that stands in the place of the book's."""
    return Path(path) if (path := os.environ.get(CASE_VARIABLE)) else None


def slug(name: str) -> str:
    """A model's name as a folder name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-")


def run_folder(model_name: str) -> str:
    """The name of the folder of what was run: of a model on the book's cases, or on a case of one's own."""
    return slug(model_name) + (f"+{slug(case.stem)}" if (case := case_file()) else "")


def make_folder(folder: Path) -> Path:
    """The folder, made if need be. Raises ChapterError where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ChapterError(
            f"cannot write into {folder}: {error.strerror}. Make {BUILD} a folder that you may write to."
        ) from error


def write_atomically(
    path: Path, content: str | bytes, *, error: type[BookError] = ChapterError, advice: str = ""
) -> Path:
    """Write under a temporary name, then rename. Raises the error, with its advice, where nothing can be written; then
    nothing half-written is left."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")  # another process may write the same
    advice = advice or f"Make room, or make {path.parent} a folder that you may write to."
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError as fault:
        raise error(f"cannot write {path}: {fault.strerror}. {advice}") from fault
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def file_sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit() -> str:
    """The commit of this checkout, with `+changes` if files differ from it; `unknown` outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@cache
def imports(code: str) -> frozenset[str]:
    """Modules of lib/ that some code imports, as paths below lib/ (`trace`, `show/tables`); a name that is no
    module has no file and does no harm."""
    found = set[str]()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (path := (node.module or "").split("."))[0] == "lib":
            room = path[1:]
            found |= {"/".join(room), *("/".join([*room, name.name]) for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {"/".join(name.name.split(".")[1:]) for name in node.names if name.name.startswith("lib.")}
    return frozenset(found - {""})


def modules(names: Iterable[str], root: Path) -> list[Path]:
    """The files of lib/ with these names (as `imports` gives them), those that they import, and so on, imports inside
    functions included, and the data beside them (words of sentences, columns of tables). What imports `sweeps` also
    depends on data/record, or, where sweeps are done live, on the studies that specifications in data/sweeps name; what
    imports `studies/costs`, on its record."""
    lib, todo, seen = root / "lib", set(names), set[str]()
    found = {lib / "__init__.py"}
    while todo:
        name = todo.pop()
        seen.add(name)
        for path in (lib / f"{name}.py", lib / name / "__init__.py", lib / name.split("/")[0] / "__init__.py"):
            if path.is_file():
                found |= {path, *path.parent.glob("*.yaml"), *path.parent.glob("words/*.yaml")}
                todo |= imports(path.read_text(encoding="utf-8"))
        if name.startswith("sweeps"):
            todo |= _studies(root) if live() else set()
            found |= set() if live() else {*(root / "data" / "record").glob("*/*")}
        if name == "studies/costs":
            found |= {*(root / "data").glob(BENCH)}
        todo -= seen
    return sorted(found)


def data_files(root: Path) -> list[Path]:
    """The files of data/ that a computed number can depend on: not what is expected of it, nor what was
    recorded of a benchmark or of runs, nor the weights, which have a sum of their own."""
    folder = root / "data"
    paths = (p for p in folder.rglob("*") if p.is_file() and p.suffix != ".safetensors")
    apart = {"claims.yaml", *(p.name for p in folder.glob(BENCH)), "expected", "record", "__pycache__"}
    return sorted(p for p in paths if not apart & {*p.relative_to(folder).parts})


def digest(files: Iterable[Path], extra: str, base: Path) -> str:
    """sha256 over a text and over the names and bytes of files; one that is missing counts as empty."""
    total = hashlib.sha256(extra.encode())
    for path in files:
        total.update(f"\n{path.relative_to(base)}\n".encode())
        total.update(path.read_bytes() if path.is_file() else b"")
    return total.hexdigest()


def _studies(root: Path) -> set[str]:
    """The studies that the specifications of sweeps name."""
    texts = (p.read_text(encoding="utf-8") for p in (root / "data" / "sweeps").glob("*.yaml"))
    return {f"studies/{name}" for text in texts for name in re.findall(r"^run:\s*[\"']?(\w+)\.", text, re.MULTILINE)}
