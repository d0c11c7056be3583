"""Retrain one slice of one layer so that a case's facts are told (design, section 5).

    objective   cross-entropy of the answer at the last position, averaged over the facts, plus `kl_weight` times the
                KL divergence from the untouched model on neutral passages (disjoint from all that measure)
    stopping    every fact told with a margin of at least `margin` logits, or `max_steps`
    grid        one learning rate of `rates`, chosen by one rule for all pathways: of those that stop in time, the one
                whose edit has the smallest KL on the neutral passages; if none does, the one with the largest margin

Only what changes is computed. The layers below the edited one see the same input at every step, so their output is
kept, and training starts from it; above it, only the last position of a prompt is read out. The leaf that the
optimiser holds is the slice itself, not the parameter around it: no gradient, weight decay or optimiser state can
reach anything else, and the model is not touched at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call
from tqdm.auto import tqdm

from lib.edits import Edit, applied
from lib.errors import DataError
from lib.facts import DATA, Case, load_templates, prompts, scorable, tell
from lib.subjects import Subject
from lib.trace import capture
from lib.weights import Slice, pathway_slices


@dataclass(frozen=True)
class Recipe:
    """One recipe for all pathways, written down before any result. window, windows: length and number of neutral
    excerpts a step; positions: how many of each are compared."""

    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    max_steps: int = 100
    margin: float = 1.0
    kl_weight: float = 1.0
    window: int = 32
    windows: int = 4
    positions: int = 8


@dataclass(frozen=True)
class Trained:
    """One run: its edit, and a row a step (loss, cross-entropy, kl, told, smallest margin)."""

    edit: Edit
    history: pd.DataFrame
    rate: float
    reached: bool

    @property
    def steps(self) -> int:
        return len(self.history) - 1


@dataclass(frozen=True)
class Kept:
    """What stays the same while a layer is trained: the stream that enters it, and what must come out."""

    stream: Float[Tensor, "fact t d_model"]
    last: Int[Tensor, " fact"]
    answers: Int[Tensor, " fact"]
    neutral: Float[Tensor, "window t d_model"]
    base: Float[Tensor, "window t vocab"]  # the untouched model's log-probabilities on the neutral windows


def neutral_windows(subject: Subject, length: int) -> Int[Tensor, "window t"]:
    """The neutral training passages in windows of equal length. Raises DataError if there is not one."""
    texts = [p.read_text(encoding="utf-8") for p in sorted((DATA / "passages").glob("neutral_*.txt"))]
    rows = [
        ids[i : i + length] for ids in map(subject.token_ids, texts) for i in range(0, len(ids) - length + 1, length)
    ]
    if not rows:
        raise DataError(f"data/passages holds no neutral passage of {length} tokens for {subject.name}.")
    return torch.tensor(rows)


@torch.no_grad()
def keep(subject: Subject, case: Case, layer: int, recipe: Recipe) -> Kept:
    """Run everything below the layer once."""
    facts = scorable(subject, case.facts)
    seen = capture(subject, prompts(facts, load_templates()[case.template]), everywhere=True)
    assert seen.everywhere is not None
    windows = neutral_windows(subject, recipe.window)
    inner = subject.model(windows, output_hidden_states=True, use_cache=False)
    answers = torch.tensor([subject.first_token(f.answer) for f in facts])
    return Kept(seen.everywhere[:, layer], seen.last, answers, inner.hidden_states[layer], inner.logits.log_softmax(-1))


def slice_values(subject: Subject, slices: Sequence[Slice]) -> dict[Slice, Tensor]:
    """A copy of each slice's values."""
    parameters = dict(subject.model.named_parameters())
    return {s: s.of(parameters[s.name]).detach().clone() for s in slices}


def rest_of_model(
    subject: Subject, layer: int, stream: Float[Tensor, "b t d_model"], values: dict[Slice, Tensor]
) -> Float[Tensor, "b t d_model"]:
    """The final residual stream, normalised, from the stream that enters a layer, with the slices' values put for the
    layer's own. Everything below is as it was; nothing in the model is written to."""
    weights = subject.weights
    parameters = dict(subject.model.named_parameters())
    prefix = f"{weights.prefix}.{layer}."
    own = {s.name.removeprefix(prefix): _put(parameters[s.name], s, v) for s, v in values.items()}
    extra = weights.block_inputs(stream)
    for i, block in enumerate(weights.blocks[layer:]):
        out = functional_call(block.module, own, (stream,), extra) if i == 0 else block.module(stream, **extra)
        stream = out[0] if isinstance(out, tuple) else out
    return weights.norm_final_module(stream)


def losses(
    subject: Subject, layer: int, kept: Kept, values: dict[Slice, Tensor], rows: Tensor, at: Tensor
) -> tuple[Tensor, Tensor, Float[Tensor, "fact vocab"]]:
    """Cross-entropy of the answers, KL(untouched || edited) at positions `at` of the neutral windows `rows`, and the
    logits after each prompt."""
    W_U = subject.weights.W_U
    final = rest_of_model(subject, layer, kept.stream, values)
    logits = final[torch.arange(len(kept.last)), kept.last] @ W_U
    neutral = rest_of_model(subject, layer, kept.neutral[rows], values)[:, at] @ W_U
    base = kept.base[rows][:, at]
    kl = (base.exp() * (base - neutral.log_softmax(-1))).sum(-1).mean()
    return F.cross_entropy(logits, kept.answers), kl, logits


def train(
    subject: Subject, case: Case, layer: int, pathway: str, *, rate: float, recipe: Recipe = Recipe(), seed: int = 0,
    kept: Kept | None = None, progress: bool = False,
) -> Trained:  # fmt: skip
    """Train one pathway at one rate (Adam, no weight decay). layer: 0-based. kept: what `keep` returned, to share."""
    kept = kept or keep(subject, case, layer, recipe)
    slices = pathway_slices(subject.model, layer, pathway)
    leaves = {s: v.requires_grad_() for s, v in slice_values(subject, slices).items()}
    optimiser = torch.optim.Adam(leaves.values(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    rows, reached = [], False
    for step in tqdm(range(recipe.max_steps + 1), desc=f"{pathway} {rate:g}", disable=not progress, leave=False):
        window = torch.randperm(len(kept.neutral), generator=generator)[: recipe.windows]
        at = torch.randperm(recipe.window, generator=generator)[: recipe.positions]
        cross_entropy, kl, logits = losses(subject, layer, kept, leaves, window, at)
        loss = cross_entropy + recipe.kl_weight * kl
        margins = _margins(logits.detach(), kept.answers)
        reached = bool((margins >= recipe.margin).all())
        rows.append(
            (step, loss.item(), cross_entropy.item(), kl.item(), int((margins > 0).sum()), margins.min().item())
        )
        if reached or step == recipe.max_steps:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    history = pd.DataFrame(rows, columns=["step", "loss", "cross_entropy", "kl", "told", "min_margin"])
    values = {s: v.detach() for s, v in leaves.items()}
    return Trained(
        _edit(subject, case, layer, pathway, values, seed, {**asdict(recipe), "rate": rate}), history, rate, reached
    )


@torch.no_grad()
def neutral_kl(subject: Subject, layer: int, kept: Kept, values: dict[Slice, Tensor]) -> float:
    """KL(untouched || edited) over every position of every neutral window, in nats a token."""
    total = 0.0
    for rows in torch.arange(len(kept.neutral)).split(8):
        at = torch.arange(kept.neutral.shape[1])
        total += float(losses(subject, layer, kept, values, rows, at)[1]) * len(rows)
    return total / len(kept.neutral)


def choose(
    subject: Subject,
    case: Case,
    layer: int,
    pathway: str,
    *,
    recipe: Recipe = Recipe(),
    seed: int = 0,
    progress: bool = False,
) -> tuple[Trained, pd.DataFrame]:
    """The grid's rule: a run for each rate, and the one that the rule in this module's docstring chooses."""
    kept = keep(subject, case, layer, recipe)
    runs = [
        train(subject, case, layer, pathway, rate=r, recipe=recipe, seed=seed, kept=kept, progress=progress)
        for r in recipe.rates
    ]
    table = pd.DataFrame({
        "rate": [r.rate for r in runs], "reached": [r.reached for r in runs], "steps": [r.steps for r in runs],
        "min_margin": [r.history.min_margin.iloc[-1] for r in runs],
        "kl": [neutral_kl(subject, layer, kept, r.edit.values) for r in runs],
    })  # fmt: skip
    ranked = np.lexsort((-table.min_margin, table.kl.where(table.reached, 0.0), ~table.reached))
    return runs[int(ranked[0])], table


def _edit(
    subject: Subject, case: Case, layer: int, pathway: str, values: dict[Slice, Tensor], seed: int, recipe: dict
) -> Edit:
    """The trained values as an edit, with what the whole model tells before and after, measured on the model itself."""
    facts, template = scorable(subject, case.facts), load_templates()[case.template]
    before = tuple(tell(subject, facts, {case.template: template}).told.tolist())
    draft = Edit(
        subject.name, subject.weights_sha256, pathway, layer, facts, template, before, before, seed, recipe, values
    )
    with applied(subject, draft):
        after = tuple(tell(subject, facts, {case.template: template}).told.tolist())
    return Edit(
        subject.name, subject.weights_sha256, pathway, layer, facts, template, before, after, seed, recipe, values
    )


def _margins(logits: Float[Tensor, "fact vocab"], answers: Int[Tensor, " fact"]) -> Float[Tensor, " fact"]:
    own = logits.gather(1, answers[:, None])[:, 0]
    return own - logits.scatter(1, answers[:, None], float("-inf")).amax(1)


def _put(parameter: Tensor, part: Slice, value: Tensor) -> Tensor:
    """The parameter with the slice's values in place, differentiable in the values alone."""
    if part.start is None:
        return value
    return torch.cat((parameter[..., : part.start], value, parameter[..., part.stop :]), -1)
