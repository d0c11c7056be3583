"""What random changes of a slice do to what a model tells: the floor that any edit has to be judged against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lib.edits import written
from lib.errors import DataError
from lib.facts import load_cases, load_templates
from lib.models import Model
from lib.recall import tell
from lib.statistics import gaussian
from lib.studies import experiment
from lib.weights import pathway_slices


@experiment
def told_under(
    model: Model, *, layer: int, pathway: str = "v_only", scale: float, draws: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Facts of the subject's first case that are told under its failing template and under its first control template
    while a pathway of a layer (counted from 1) is noisy: means over draws. scale: as in `noisy`. Raises DataError for
    a negative scale or no draw, ValueError for a layer or pathway that is not there."""
    if scale < 0 or draws < 1:
        raise DataError(f"scale {scale} and {draws} draws: noise is not less than none, 0, and drawn at least once.")
    case, templates = load_cases(model.name)[0], load_templates()
    generator = torch.Generator().manual_seed(seed)
    totals = dict.fromkeys(("told_failing", "margin_failing", "told_control", "margin_control"), 0.0)
    for _ in range(draws):
        with noisy(model, layer - 1, pathway, scale, generator):
            for name, template in (("failing", case.template), ("control", case.controls[0])):
                found = tell(model, case.facts, {template: templates[template]})
                totals[f"told_{name}"] += float(found.told.sum())
                totals[f"margin_{name}"] += float(found.margin.mean())
    return {"facts": len(case.facts)} | {name: total / draws for name, total in totals.items()}


@contextmanager
@torch.no_grad()
def noisy(model: Model, layer: int, pathway: str, scale: float, generator: torch.Generator) -> Iterator[None]:
    """Gaussian noise on the tensors of a pathway of a layer (0-based), restored afterwards bit for bit. scale: root
    mean square of the noise over that of each tensor."""
    parameters = dict(model.module.named_parameters())
    own = {s: s.of(parameters[s.name]) for s in pathway_slices(model.module, layer, pathway)}
    noise = {s: v.square().mean().sqrt() * gaussian(v.shape, generator) for s, v in own.items()}
    with written(model.module, {s: v + scale * noise[s] for s, v in own.items()}):
        yield
