"""Rivals of the edit: other ways to make the same facts told, judged by the same protocol.

    no training      a neutral prefix, a beginning-of-text token, one example in the context; the knowledge head
                     scaled up, the strongest opponent down; the competitors' logits lowered
    few parameters   a bias vector, the layer's norm gains, rank-1 LoRA on its value matrix (Hu et al. 2022, by `peft`)
    closed form      a change of the MLP's W_out at the same layer by least squares (after Meng et al. 2022 and 2023)
    everything       all blocks of the model

A rival changes what the model does inside a `with`, or what stands before its prompts. A strength is chosen on the
case's facts by one rule: of those that tell most, the one that moves neutral text least. What is trained shares the
pathways' objective, neutral windows and limit of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from lib.edits import applied, written
from lib.errors import EditError
from lib.evaluation import (
    NONE,
    Measured,
    Protocol,
    build_protocol,
    perplexity,
    questions,
    score_passages,
    score_questions,
)
from lib.facts import load_templates
from lib.forward import next_token_logits
from lib.models import Model
from lib.recall import load_prefixes, study_facts, tell
from lib.sites import Site
from lib.studies import experiment, once_a_model
from lib.studies.location import answers, prepared, protocols, setting
from lib.studies.pathways import PAPER
from lib.training import DEFAULT, Task, chosen, losses, neutral_kl, optimise, summary, train
from lib.weights import Slice

Change = Callable[[], AbstractContextManager[Any]]
RATES = {"few": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), "all": (1e-5, 3e-5, 1e-4)}  # few parameters take larger steps
RIDGES = (1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6)  # weight of neutral text against the facts, in the closed form
SCALES = {"head": (1.5, 2.0, 3.0, 4.0, 6.0), "opponent": (0.75, 0.5, 0.25, 0.0)}
LOWER = (0.5, 1.0, 2.0, 4.0, 8.0)  # logits


@dataclass(frozen=True)
class Rival:
    """layer: the first one (0-based) that it changes; below it nothing is run again. change: puts it in place, and
    takes it away again. prefix: before every prompt that is asked; it does not act on running text. bias: added to the
    logits of every next token."""

    name: str
    parameters: int
    layer: int
    strength: str = ""
    change: Change = nullcontext
    prefix: str = ""
    bias: Float[Tensor, " vocab"] | None = None


@experiment
def rival(model: Model, *, name: str) -> dict[str, Any]:
    """Build a rival by name (`RIVALS`) and ask it what every edit is asked. Plain values, as `controls.outcome` gives
    them. Raises EditError for an unknown name."""
    if name not in RIVALS:
        raise EditError(f"there is no rival {name!r}; choose from {', '.join(RIVALS)}.")
    made = RIVALS[name](model)
    protocol = _asked_after(model, made.prefix) if made.prefix else _asked(model)[made.layer]
    with made.change():
        asked = score_questions(model, protocol, None, bias=made.bias)
        read_now = (
            None
            if made.prefix
            else score_passages(model, protocol, {NONE: None}, bias=made.bias, divergence=False)[NONE]
        )
    out = {"rival": made.name, "parameters": made.parameters, "strength": made.strength} | answers(model, asked)
    if read_now is not None:
        ppl = perplexity(Measured({NONE: asked, name: asked}, {NONE: _untouched(model), name: read_now})).iloc[0]
        out |= {k: float(ppl[k]) for k in ("ratio", "ratio_low", "ratio_high")}
    return out


@once_a_model
def _asked(model: Model) -> dict[int, Protocol]:
    """All questions but the rarer controls about other countries, and the passages, for each layer at which a rival may
    begin."""
    own, table = setting(model), questions(model, setting(model).case)
    layers = {0, own.verdict.knowledge_head.layer, own.opponent.layer}
    some = (table.set != "large") | table.template.isin([own.case.template, own.case.controls[0]])
    return protocols(model, own.case, sorted(layers), texts=None, table=table[some])


def _asked_after(model: Model, prefix: str) -> Protocol:
    """The same questions, each with a prefix before its prompt."""
    table = _asked(model)[0].questions
    table = table.assign(prompt=[prefix + p for p in table.prompt])
    return build_protocol(model, setting(model).case, 0, texts={}, table=table)


@once_a_model
def _untouched(model: Model) -> pd.DataFrame:
    return score_passages(model, _asked(model)[model.weights.n_layers], {NONE: None}, divergence=False)[NONE]


# Without training


def _prefix(name: str, model: Model) -> Rival:
    known = load_prefixes(model)
    if name not in known:  # a tokenizer without such a token
        name = "bos" if "bos" in known else "newline"
    return Rival(f"prefix: {name}", 0, 0, repr(known[name]), prefix=known[name])


def _example(model: Model) -> Rival:
    """One told fact of the study set, under the failing template itself."""
    own, text = setting(model), load_templates()
    told = tell(model, study_facts(model, own.case), {own.case.template: text[own.case.template]})
    first = told[told.told].iloc[0] if told.told.any() else told.iloc[0]
    return Rival("one example", 0, 0, first.subject, prefix=f"{first.prompt} {first.answer}.\n")


def _scaled(what: str, model: Model) -> Rival:
    """The knowledge head made louder, or the component that pushes hardest against the answers made softer."""
    own = setting(model)
    site = own.verdict.knowledge_head if what == "head" else own.opponent
    made = [
        Rival(
            f"{site} scaled" if what == "head" else f"opponent {site} scaled",
            1,
            site.layer,
            f"times {factor:g}",
            partial(_times, model, site, factor),
        )
        for factor in SCALES[what]
    ]
    return _chosen(model, _task(model, site.layer), made)


def _competitors(model: Model) -> Rival:
    """The logits of the case's competitors lowered, everywhere: by the least that tells most."""
    own, text = setting(model), load_templates()
    table = tell(model, own.case.facts, {"failing": text[own.case.template]})
    rivals = sorted(set(table.competitor_token[~table.told]))
    logits = next_token_logits(model, list(table.prompt))
    found = []
    for lower in LOWER:
        bias = torch.zeros(logits.shape[1]).index_fill(0, torch.tensor(rivals), -lower)
        found.append((int(((logits + bias).argmax(1) == torch.tensor(table.answer_token.tolist())).sum()), lower, bias))
    _, lower, bias = max(found, key=lambda row: (row[0], -row[1]))
    return Rival("competitors lowered", len(rivals), model.weights.n_layers, f"by {lower:g} logits", bias=bias)


@contextmanager
def _times(model: Model, site: Site, factor: float) -> Iterator[None]:
    """A head's z, or an MLP's output, multiplied at every position."""
    block, width = model.weights.blocks[site.layer], model.weights.d_head

    def head(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        scale = torch.ones(args[0].shape[-1])
        scale[site.head * width : (site.head + 1) * width] = factor  # type: ignore[operator]
        return (args[0] * scale,)

    module = block.mlp_out if site.mlp else block.heads_out
    with _hook(
        module.register_forward_hook(lambda m, a, out: out * factor)
        if site.mlp
        else module.register_forward_pre_hook(head)
    ):
        yield


# Few parameters


def _vector(model: Model) -> Rival:
    """One vector added to the stream after the diagnosed layer, at every position."""
    layer = setting(model).verdict.knowledge_head.layer
    module = model.weights.blocks[layer].mlp_out

    @contextmanager
    def added(vector: Tensor) -> Iterator[None]:
        with _hook(module.register_forward_hook(lambda m, a, out: out + vector)):
            yield

    def trained(rate: float) -> Rival:
        vector = torch.zeros(model.weights.d_model, requires_grad=True)
        with added(vector):
            optimise(model, _task(model), [vector], {}, rate=rate)
        return Rival("bias vector", vector.numel(), layer, f"rate {rate:g}", partial(added, vector.detach()))

    return _chosen(model, _task(model), [trained(rate) for rate in RATES["few"]])


def _gains(model: Model) -> Rival:
    """The gains of the diagnosed layer's two norms."""
    layer, parameters = setting(model).verdict.knowledge_head.layer, dict(model.module.named_parameters())
    slices = [Slice(model.weights.layout.prefix(layer) + name) for name in model.weights.layout.gains]

    def trained(rate: float) -> Rival:
        leaves = {s: parameters[s.name].detach().clone().requires_grad_() for s in slices}
        optimise(model, _task(model), list(leaves.values()), leaves, rate=rate)
        values = {s: v.detach() for s, v in leaves.items()}
        size = sum(v.numel() for v in values.values())
        return Rival("norm gains", size, layer, f"rate {rate:g}", partial(written, model.module, values))

    return _chosen(model, _task(model), [trained(rate) for rate in RATES["few"]])


def _lora(model: Model) -> Rival:
    """Rank 1 on the diagnosed layer's value projection; of GPT-2, on the fused projection that holds it."""
    layer = setting(model).verdict.knowledge_head.layer
    attention, name, _ = model.weights.layout.matrices["W_V"].split(".")
    parent = model.weights.blocks[layer].module.get_submodule(attention)
    plain = getattr(parent, name)

    @contextmanager
    def swapped(module: nn.Module) -> Iterator[None]:
        setattr(parent, name, module)
        try:
            yield
        finally:
            setattr(parent, name, plain)

    def trained(rate: float) -> Rival:
        torch.manual_seed(0)  # of the adapter's first values
        config = LoraConfig(r=1, lora_alpha=1, target_modules=[name], fan_in_fan_out=model.weights.layout.input_first)
        try:
            inject_adapter_in_model(config, parent)  # type: ignore[arg-type]
            adapted = getattr(parent, name)
        finally:
            setattr(parent, name, plain)
            vars(parent).pop("peft_config", None)
        leaves = [p for n, p in adapted.named_parameters() if "lora_" in n]
        with swapped(adapted):
            optimise(model, _task(model), leaves, {}, rate=rate)
        size = sum(p.numel() for p in leaves)
        return Rival(
            "LoRA, rank 1, on W_V", size, layer, f"rate {rate:g}", partial(swapped, adapted.requires_grad_(False))
        )

    return _chosen(model, _task(model), [trained(rate) for rate in RATES["few"]])


# Closed form, and everything


def _closed_form(model: Model) -> Rival:
    """ROME and MEMIT's two steps at the diagnosed layer: for each fact the vector that, added after the MLP at the last
    position, makes it told; then the least-squares change of W_out that gives these for the facts' neurons and as
    little as may be for those of neutral text: dW = (ridge C + K'K)^-1 K' V."""
    task, layer = _task(model), setting(model).verdict.knowledge_head.layer
    mlp_out, last = model.weights.blocks[layer].mlp_out, task.texts.last[: len(task.facts)]
    wanted = torch.zeros(len(last), model.weights.d_model, requires_grad=True)
    seen: list[Tensor] = []

    def add(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        seen.append(args[0].detach().reshape(-1, args[0].shape[-1]))
        return out.index_add(-2, last, wanted[None] if out.ndim == 3 else wanted)

    with _hook(mlp_out.register_forward_hook(add)):
        optimise(model, task, [wanted], {}, rate=0.3)
        neutral = _neutral_neurons(model, task, seen)
    keys, values = neutral[0], wanted.detach()
    moment = neutral[1].T @ neutral[1] / len(neutral[1])
    part = Slice(model.weights.layout.name(layer, "W_out"))
    weight = dict(model.module.named_parameters())[part.name].detach()
    made = []
    for ridge in RIDGES:
        change = torch.linalg.solve(ridge * moment * len(keys) + keys.T @ keys, keys.T @ values)
        new = weight + (change if model.weights.layout.input_first else change.T)
        put = partial(written, model.module, {part: new})
        made.append(Rival("closed form on W_out", new.numel(), layer, f"ridge {ridge:g}", put))
    return _chosen(model, task, made)


def _neutral_neurons(model: Model, task: Task, seen: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The facts' neurons at their last position, and those of the windows that training draws from."""
    windows = []
    for start in range(0, task.n_training, task.recipe.windows):
        seen.clear()
        with torch.no_grad():
            losses(model, task, {}, torch.arange(start, min(start + task.recipe.windows, task.n_training)))
        windows.append(seen[0][len(task.prompt_stream) :])
    return seen[0][task.texts.last[: len(task.facts)]], torch.cat(windows)


def _everything(model: Model) -> Rival:
    """All blocks of the model, at small rates; the embedding, which is the unembedding too, stays."""
    task = _task(model, 0)
    names = [n for n, _ in model.module.named_parameters() if n.startswith(model.weights.layout.blocks + ".")]
    parameters = dict(model.module.named_parameters())
    before = {n: parameters[n].detach().clone() for n in names}

    def trained(rate: float) -> Rival:
        leaves = [parameters[n].requires_grad_() for n in names]
        try:
            optimise(model, task, leaves, {}, rate=rate)
            values = {Slice(n): parameters[n].detach().clone() for n in names}
        finally:
            with torch.no_grad():
                for n in names:
                    parameters[n].requires_grad_(False).copy_(before[n])
                    parameters[n].grad = None
        size = sum(v.numel() for v in values.values())
        return Rival("all blocks", size, 0, f"rate {rate:g}", partial(written, model.module, values))

    return _chosen(model, task, [trained(rate) for rate in RATES["all"]])


def _pathway(name: str, model: Model) -> Rival:
    """A pathway of the diagnosed layer, its rate chosen from the recipe's as in chapter 3."""
    task = _task(model)
    runs = [train(model, task, name, rate=rate) for rate in task.recipe.rates]
    run = runs[chosen(summary(runs))]
    if run.edit is None:
        raise EditError(f"every training of {name} diverged on {model.name}; there is nothing to compare.")
    return Rival(
        f"{name.replace('_', '-')}, L{task.layer + 1}",
        run.edit.parameters,
        task.layer,
        f"rate {run.rate:g}",
        partial(applied, model, run.edit),
    )


# Shared


def _task(model: Model, layer: int | None = None) -> Task:
    """What training at a layer needs; at the diagnosed one, if none is given."""
    layer = setting(model).verdict.knowledge_head.layer if layer is None else layer
    return replace(prepared(model)[layer][0], recipe=DEFAULT)


@torch.no_grad()
def _chosen(model: Model, task: Task, made: Sequence[Rival]) -> Rival:
    """The rule: most facts told; of these, the least KL on the neutral windows that training does not see."""

    def score(one: Rival) -> tuple[int, float]:
        with one.change():
            margins = losses(model, task, {}, torch.arange(task.recipe.windows))[2]
            harm = neutral_kl(model, task, {})
        return int((margins > 0).sum()), -harm

    return max(made, key=score)


@contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


RIVALS: dict[str, Callable[[Model], Rival]] = {
    "newline": partial(_prefix, "newline"),
    "bos": partial(_prefix, "document"),
    "example": _example,
    "head": partial(_scaled, "head"),
    "opponent": partial(_scaled, "opponent"),
    "competitors": _competitors,
    "vector": _vector,
    "gains": _gains,
    "lora": _lora,
    "closed_form": _closed_form,
    "everything": _everything,
    **{name: partial(_pathway, name) for name in PAPER},
}
