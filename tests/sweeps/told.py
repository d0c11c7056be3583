"""An experiment that takes no time: what random changes of a pathway's tensors do to what a model tells."""

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
@torch.no_grad()
def told_under(
    model: Model, *, layer: int, pathway: str = "v_only", scale: float, draws: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Means over draws of Gaussian noise on a pathway of a layer (counted from 1), as the first case's template has
    it. scale: root mean square of the noise over that of each tensor."""
    if scale < 0 or draws < 1:
        raise DataError(f"scale {scale} and {draws} draws: noise is not less than none, 0, and drawn at least once.")
    case, parameters = load_cases(model.name)[0], dict(model.module.named_parameters())
    values = {s: s.of(parameters[s.name]) for s in pathway_slices(model.module, layer - 1, pathway)}
    generator, told, margin = torch.Generator().manual_seed(seed), 0.0, 0.0
    for _ in range(draws):
        noise = {s: v.square().mean().sqrt() * gaussian(v.shape, generator) for s, v in values.items()}
        with written(model.module, {s: v + scale * noise[s] for s, v in values.items()}):
            table = tell(model, case.facts, {case.template: load_templates()[case.template]})
        told, margin = told + float(table.told.sum()), margin + float(table.margin.mean())
    return {"facts": len(case.facts), "told": told / draws, "margin": margin / draws}
