"""Studies: what chapters 2 to 9 ask of a model beyond one trace, one edit and one measurement.

    @experiment
    def edit_at(model: Model, *, layer: int, pathway: str, seed: int = 0) -> dict[str, Any]: ...

An experiment takes a model and plain JSON values, gives a dictionary of plain JSON values, and depends on nothing
else: the same inputs give the same numbers, in any order, on any worker of a sweep. `layer` counts from 1, as in all
that people read. What it changes in the model it restores (`edits.applied`).

    @once_a_model
    def setting(model: Model) -> Setting: ...

What many runs on one model share is made once and kept on the model itself, so that it goes when the model goes.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch

from lib.models import Model

Row = dict[str, Any]  # names and plain JSON values
Experiment = TypeVar("Experiment", bound=Callable[..., Row])
Function = TypeVar("Function", bound=Callable[..., Any])


def experiment(function: Experiment) -> Experiment:
    """Mark a function of a study as one that a sweep may name. It stays as it is."""
    return function


def once_a_model(function: Function) -> Function:
    """Keep in `model.memory` what a function of a model, and of further hashable arguments, gives: it runs once for
    each of these."""

    @wraps(function)
    def remembered(model: Model, *others: Hashable) -> Any:
        key = (function, *others)
        if key not in model.memory:
            model.memory[key] = function(model, *others)
        return model.memory[key]

    return remembered  # type: ignore[return-value]  # it takes and gives what the function does


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch with one thread, as every run of a sweep has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
