"""Experiments (see `lib.studies`): which there are, what a run of one depends on, and one run, on any worker."""

import ast
import hashlib
import inspect
import io
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from lib import files
from lib.errors import BookError, ModelError, SweepError, WorkerError
from lib.facts import case_sums
from lib.files import ROOT, file_sha256
from lib.models import Model, load, use_device_of
from lib.studies import Row, one_thread

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "einops", "peft")  # numbers may depend on these
_one_at_a_time = threading.Lock()  # a worker with several threads has one model, and an edit changes it in place
_loaded: dict[str, Model] = {}


@cache
def listed() -> list[str]:
    """`module.function` of every function of lib/ that is marked, read from the text: no module is loaded."""
    texts = {p.stem: p.read_text(encoding="utf-8") for p in sorted((ROOT / "lib" / "studies").glob("*.py"))}
    marked = r"(?m)^@experiment\n(?:@.*\n)*def (\w+)"
    return [f"{stem}.{name}" for stem, text in texts.items() for name in re.findall(marked, text)]


def find(name: str) -> Callable[..., Row]:
    """The experiment of this name. Raises SweepError for any other function, before its module is loaded."""
    if name not in (known := listed()):
        raise SweepError(
            f"there is no experiment {name!r}; choose from {', '.join(known) or 'none'}, or mark one with @experiment."
        )
    module, function = name.split(".")
    return getattr(import_module(f"lib.studies.{module}"), function)


def complete(name: str, given: Row) -> Row:
    """The parameters of a run, its defaults that JSON holds among them, in the order of the function's signature.
    Raises SweepError for one that the experiment does not take, or that it needs and is not given."""
    takes = dict(list(inspect.signature(find(name)).parameters.items())[1:])  # the first one is the model
    if unknown := [key for key in given if key not in takes]:
        raise SweepError(f"{name} takes no {', '.join(map(repr, unknown))}; it takes {', '.join(takes) or 'nothing'}.")
    if missing := [key for key, p in takes.items() if p.default is p.empty and key not in given]:
        raise SweepError(f"{name} needs {', '.join(map(repr, missing))}; give it in the grid.")
    plain = (str, int, float, bool, type(None))
    return {key: given.get(key, p.default) for key, p in takes.items() if key in given or isinstance(p.default, plain)}


def code(name: str) -> dict[str, str]:
    """sha256 of each file that an experiment's numbers can depend on, by its path in the project or its part in a case
    of one's own, and the version of each package. Raises WorkerError if a module was changed after this process
    started: it may run the old one."""
    return _code(name) | case_sums()


@cache
def _code(name: str) -> dict[str, str]:
    data = [p for p in files.data_files(ROOT) if p.parent != ROOT / "data" / "sweeps"]
    sums = _sha256s([*files.modules({"studies/" + name.split(".")[0]}, ROOT), *data])
    if stale := [path for path, value in sums.items() if _AT_START.get(path, value) != value]:
        raise WorkerError(f"{_here()} started before {stale[0]} was changed, and may run the old one; start it again.")
    return sums | {package: version(package) for package in PACKAGES}


def meaning(name: str) -> dict[str, str]:
    """As `code`, of lib/ and packages alone, and blind to comments, docstrings and layout: what a record keeps."""
    sums = {key: value for key, value in code(name).items() if not key.startswith(("data/", "case/"))}
    return sums | {key: _meaning((ROOT / key).read_text(encoding="utf-8")) for key in sums if key.endswith(".py")}


@cache
def _meaning(text: str) -> str:
    """sha256 of what some Python does."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def code_sha256(name: str) -> str:
    return hashlib.sha256(json.dumps(code(name), sort_keys=True).encode()).hexdigest()


def differing(code: dict[str, str], other: dict[str, str]) -> str:
    """In words, what two results of `code` do not share; empty if nothing."""
    names = sorted(key for key in code.keys() | other.keys() if code.get(key) != other.get(key))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def perform(name: str, model_name: str, parameters: Row, *, seed: int, weights: str, code: str) -> Row:
    """One run, on a worker: {"result": ..., "seconds": ...}. One thread, so that sums are added in the same order
    whatever the machine has to spare; seed is for draws that the experiment does not seed itself. weights, code: what
    whoever asks for the run has. Raises WorkerError where this worker has others, BookError where the experiment gives
    something that JSON does not hold, repeats a parameter, or leaves the model changed; and what it raises itself."""
    if code_sha256(name) != code:
        raise WorkerError(f"{_here()} runs another version of the code; install the same one and start it again.")
    with _one_at_a_time, one_thread(), redirect_stderr(io.StringIO()):  # its bars would stand among ours
        model = _model(model_name, weights)
        before, start = _sums(model), time.perf_counter()
        set_seed(seed)
        result = find(name)(model, **parameters)
        seconds = time.perf_counter() - start
        if changed := [key for key, value in _sums(model).items() if value != before[key]]:
            _loaded.clear()
            raise BookError(f"{name} left the model changed ({changed[0]}); it must restore what it changes.")
    return {"result": _plain(name, result, parameters), "seconds": round(seconds, 3)}


def _model(name: str, weights: str) -> Model:
    """The one model of this worker: another one goes, with all that studies keep of it, before this one comes."""
    model = _loaded.get(name)
    if model is None or model.weights_sha256 != weights:
        _loaded.clear()
        try:
            model = use_device_of(load(name))
        except ModelError as error:
            raise WorkerError(f"{_here()} cannot load the model: {error}") from error
        if model.weights_sha256 != weights:
            raise WorkerError(
                f"{_here()} has other weights of {name} (sha256 {model.weights_sha256[:12]}..., not "
                f"{weights[:12]}...); run `python -m lib fetch {name} --force` there."
            )
        _loaded[name] = model
    return model


def _sums(model: Model) -> dict[str, int]:
    """A sum over the bits of each parameter: quick (0.06 s for SmolLM2), and it shows one that is not restored."""
    flat = {name: p.detach().flatten() for name, p in model.module.named_parameters()}
    return {name: int(p.view(torch.int64 if p.nbytes % 8 == 0 else torch.int32).sum()) for name, p in flat.items()}


def _plain(name: str, result: Any, parameters: Row) -> Row:
    if not isinstance(result, dict) or not all(isinstance(key, str) for key in result):
        raise BookError(f"{name} gave {type(result).__name__}, not a dictionary of names and values.")
    if both := sorted(result.keys() & parameters.keys()):
        raise BookError(f"{name} gives {', '.join(both)}, which it also takes; the table needs one name for each.")
    try:
        return json.loads(json.dumps(result))
    except (TypeError, ValueError) as error:
        raise BookError(f"{name} gave something that JSON does not hold: {error}.") from error


def _here() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _sha256s(files: Iterable[Path]) -> dict[str, str]:
    return {p.relative_to(ROOT).as_posix(): file_sha256(p) for p in files}


_AT_START = _sha256s((ROOT / "lib").rglob("*.py"))
