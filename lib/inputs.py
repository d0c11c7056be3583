"""What an output depends on: the modules of lib/ that some code imports, the files of data/, and their digests."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

BENCH = "bench.json"


def imports(code: str) -> set[str]:
    """Modules of lib/ that some code imports, by name; `from lib import x` may also mean a plain name, which no file
    has."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "lib":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lib."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("lib.")}
    return found


def modules(names: Iterable[str], root: Path) -> list[Path]:
    """The files of lib/ with these names, those that they import, and so on, imports inside functions included. What
    imports `sweep` also depends on the experiments that the specifications in data/sweeps name; what imports `costs`,
    on its record."""
    todo, found = set(names), {root / "lib" / "__init__.py"}
    while todo:
        path = root / "lib" / f"{todo.pop()}.py"
        if path.is_file() and path not in found:
            found.add(path)
            todo |= imports(path.read_text(encoding="utf-8"))
            if path.stem == "sweep":
                todo |= _experiments(root)
            if path.stem == "costs":
                found.add(root / "data" / BENCH)
    return sorted(found)


def data_files(root: Path) -> list[Path]:
    """The files of data/ that a computed number can depend on: not what is expected of it, nor the record of a
    benchmark, nor the weights, which have a sum of their own."""
    apart, folder = ("claims.yaml", BENCH), root / "data"
    return sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and p.suffix != ".safetensors" and p.name not in apart
        and not {"expected", "__pycache__"} & {*p.relative_to(folder).parts}
    )  # fmt: skip


def digest(files: Iterable[Path], extra: str, base: Path) -> str:
    """sha256 over a text and over the names and bytes of files; one that is missing counts as empty."""
    total = hashlib.sha256(extra.encode())
    for path in files:
        total.update(f"\n{path.relative_to(base)}\n".encode())
        total.update(path.read_bytes() if path.is_file() else b"")
    return total.hexdigest()


def _experiments(root: Path) -> set[str]:
    """Modules that the specifications of sweeps name."""
    texts = (p.read_text(encoding="utf-8") for p in (root / "data" / "sweeps").glob("*.yaml"))
    return {name for text in texts for name in re.findall(r"^run:\s*[\"']?(\w+)\.", text, re.MULTILINE)}
