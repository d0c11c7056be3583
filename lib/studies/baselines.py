"""Baselines of the edit (chapter 6's rivals): other ways to make the same facts told, judged by the same protocol.

    no training      a neutral prefix, a beginning-of-text token, one example in the context; the knowledge head
                     scaled up, the strongest opponent down; the competitors' logits lowered
    few parameters   a bias vector, the layer's norm gains, rank-1 LoRA on its value matrix (Hu et al. 2022, by `peft`)
    closed form      a change of the MLP's W_out at the same layer by least squares (after Meng et al. 2022 and 2023)
    everything       all blocks of the model

A rival changes what the model does inside a `with`, or what stands before its prompts. A strength is chosen on the
case's facts by one rule: of those that tell most, the one that moves neutral text least. What is trained shares the
pathways' objective, neutral windows and limit of steps.
"""

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

from lib import evaluation
from lib.edits import applied, restored, written
from lib.errors import EditError
from lib.evaluation import NONE, Measured, Protocol
from lib.facts import load_templates
from lib.forward import next_token_logits
from lib.models import Model
from lib.recall import load_prefixes, study_facts, tell
from lib.sites import Site
from lib.studies import experiment, once_a_model
from lib.studies.location import prepared, protocols, setting, summarise_answers
from lib.studies.side_effects import kept_streams
from lib.trace import hooked
from lib.training import DEFAULT, Task, chosen, losses, neutral_kl, optimise, slice_values, summary, train
from lib.weights import PAPER, Slice

Change = Callable[[], AbstractContextManager[Any]]
Training = Callable[[Model, Task, float], tuple[Sequence[Tensor], Change]]
RATES = {"few": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), "all": (1e-5, 3e-5, 1e-4)}  # few parameters take larger steps
SHRINK = 1e-3  # of neutral text's moment towards an even one: so few tokens leave it singular, and its inverse noise
RIDGES = (1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6)  # weight of neutral text against the facts, in the closed form
SCALES = {"head": (1.5, 2.0, 3.0, 4.0, 6.0), "opponent": (0.75, 0.5, 0.25, 0.0)}
LOWER = (0.5, 1.0, 2.0, 4.0, 8.0)  # logits
VECTOR_RATE = 0.3  # of the closed form's wanted vectors: they start at zero and grow to a stream's size


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
    """Build a rival by name (`RIVALS`) and ask it what every edit is asked. Plain values, as `location.outcome` gives
    them. Raises EditError for an unknown name."""
    if name not in RIVALS:
        raise EditError(f"there is no rival {name!r}; choose from {', '.join(RIVALS)}.")
    made, tokens = RIVALS[name](model), {}
    protocol = _asked_after(model, made.prefix) if made.prefix else _asked(model)[made.layer]
    with made.change():
        asked = evaluation.score_questions(model, protocol, None, bias=made.bias)
        if not made.prefix:
            tokens = evaluation.score_passages(model, protocol, {name: None}, bias=made.bias, divergence=False)
    row = {"rival": made.name, "parameters": made.parameters, "strength": made.strength}
    row |= summarise_answers(model, asked)
    if tokens:
        measured = Measured({NONE: asked, name: asked}, {NONE: _untouched(model)} | tokens)
        row |= evaluation.perplexity(measured, by="block")[["ratio", "ratio_low", "ratio_high"]].iloc[0].to_dict()
    return row


@once_a_model
def _asked(model: Model) -> dict[int, Protocol]:
    """Passages and all questions but the rarer controls about other countries, by layer where a rival may begin. The
    passages are those of chapter 4, and go on from what it has run."""
    own = setting(model)
    table = evaluation.questions(model, own.case)
    asked = (table.set != "large") | table.template.isin([own.case.template, own.case.controls[0]])
    layers = sorted({0, own.verdict.knowledge_head.layer, own.opponent.layer})
    return protocols(model, own.case, layers, table=table[asked], run=kept_streams)


def _asked_after(model: Model, prefix: str) -> Protocol:
    """The same questions, each with a prefix before its prompt."""
    table = _asked(model)[0].questions
    table = table.assign(prompt=[prefix + p for p in table.prompt])
    return evaluation.build_protocol(model, setting(model).case, 0, texts={}, table=table)


@once_a_model
def _untouched(model: Model) -> pd.DataFrame:
    return evaluation.score_passages(model, _asked(model)[model.weights.n_layers], {NONE: None}, divergence=False)[NONE]


# Without training


def _prefix(name: str, model: Model) -> Rival:
    known = load_prefixes(model)
    name = next(n for n in (name, "bos", "newline") if n in known)  # not every tokenizer has such a token
    return Rival(f"prefix: {name}", 0, 0, repr(known[name]), prefix=known[name])


def _example(model: Model) -> Rival:
    """One told fact of the study set, under the failing template itself."""
    case = setting(model).case
    told = tell(model, study_facts(model, case), {case.template: load_templates()[case.template]})
    first = told[told.told].iloc[0] if told.told.any() else told.iloc[0]
    return Rival("one example", 0, 0, first.subject, prefix=f"{first.prompt} {first.answer}.\n")


def _scaled(what: str, model: Model) -> Rival:
    """The knowledge head made louder, or the component that pushes hardest against the answers made softer."""
    site = setting(model).verdict.knowledge_head if what == "head" else setting(model).opponent
    name = f"{site} scaled" if what == "head" else f"opponent {site} scaled"
    made = [Rival(name, 1, site.layer, f"times {f:g}", partial(_times, model, site, f)) for f in SCALES[what]]
    return _chosen(model, _task(model, site.layer), made)


def _competitors(model: Model) -> Rival:
    """The logits of the case's competitors lowered, everywhere: by the least that tells most."""
    case = setting(model).case
    table = tell(model, case.facts, {"failing": load_templates()[case.template]})
    rivals, answers = sorted(set(table.competitor_token[~table.told])), torch.tensor(table.answer_token.tolist())
    logits = next_token_logits(model, list(table.prompt))
    biases = [torch.zeros(logits.shape[1]).index_fill(0, torch.tensor(rivals), -lower) for lower in LOWER]
    told = [int(((logits + bias).argmax(1) == answers).sum()) for bias in biases]
    best = told.index(max(told))  # the first: LOWER rises
    strength = f"by {LOWER[best]:g} logits"
    return Rival("competitors lowered", len(rivals), model.weights.n_layers, strength, bias=biases[best])


def _times(model: Model, site: Site, factor: float) -> AbstractContextManager[None]:
    """A head's z, or an MLP's output, multiplied at every position."""
    block, width = model.weights.blocks[site.layer], model.weights.d_head
    if site.head is None:
        return hooked(after={block.mlp_written: lambda out: out * factor})
    scale = torch.ones(model.weights.n_heads * width)
    scale[site.head * width : (site.head + 1) * width] = factor
    return hooked(before={block.heads_out: lambda z: z * scale})


# Trained: a function of the rate gives what was trained and the change


def _best_rate(training: Training, name: str, model: Model, *, rates: str = "few", layer: int | None = None) -> Rival:
    """The best of one training a rate."""
    task, made = _task(model, layer), []
    for rate in RATES[rates]:
        leaves, change = training(model, task, rate)
        made.append(Rival(name, sum(v.numel() for v in leaves), task.layer, f"rate {rate:g}", change))
    return _chosen(model, task, made)


def _vector(model: Model, task: Task, rate: float) -> tuple[Sequence[Tensor], Change]:
    """One vector added to the stream after the layer, at every position."""
    vector = torch.zeros(model.weights.d_model, requires_grad=True)
    added = partial(hooked, after={model.weights.blocks[task.layer].mlp_written: lambda out: out + vector})
    with added():
        optimise(model, task, [vector], {}, rate=rate)
    return [vector.requires_grad_(False)], added


def _gains(model: Model, task: Task, rate: float) -> tuple[Sequence[Tensor], Change]:
    """The gains of the layer's two norms."""
    layout = model.weights.layout
    values = slice_values(model, [Slice(layout.prefix(task.layer) + name) for name in layout.gains])
    leaves = [v.requires_grad_() for v in values.values()]
    optimise(model, task, leaves, values, rate=rate)
    return leaves, partial(written, model.module, values)


def _lora(model: Model, task: Task, rate: float) -> tuple[Sequence[Tensor], Change]:
    """Rank 1 on the layer's value projection; of GPT-2, on the fused projection that holds it."""
    attention, name, _ = model.weights.layout.matrices["W_V"].split(".")
    parent = model.weights.blocks[task.layer].module.get_submodule(attention)
    config = LoraConfig(r=1, lora_alpha=1, target_modules=[name], fan_in_fan_out=model.weights.layout.input_first)
    torch.manual_seed(0)  # of the adapter's first values
    with _swapped(parent, name, getattr(parent, name)):
        inject_adapter_in_model(config, parent)  # type: ignore[arg-type]
        adapted = getattr(parent, name)
    leaves = [p for n, p in adapted.named_parameters() if "lora_" in n]
    with _swapped(parent, name, adapted):
        optimise(model, task, leaves, {}, rate=rate)
    return leaves, partial(_swapped, parent, name, adapted.requires_grad_(False))


@contextmanager
def _swapped(parent: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """A module in the place of a parent's own."""
    plain = getattr(parent, name)
    setattr(parent, name, module)
    try:
        yield
    finally:
        setattr(parent, name, plain)
        vars(parent).pop("peft_config", None)  # which an injection leaves


def _everything(model: Model, task: Task, rate: float) -> tuple[Sequence[Tensor], Change]:
    """All blocks of the model; the embedding, which is the unembedding too, stays."""
    prefix = model.weights.layout.blocks + "."
    blocks = {Slice(n): p for n, p in model.module.named_parameters() if n.startswith(prefix)}
    leaves = list(blocks.values())
    with restored(leaves):
        try:
            optimise(model, task, [p.requires_grad_() for p in leaves], {}, rate=rate)
            values = slice_values(model, list(blocks))
        finally:
            for p in leaves:
                p.requires_grad_(False).grad = None
    return leaves, partial(written, model.module, values)


def _pathway(name: str, model: Model) -> Rival:
    """A pathway of the diagnosed layer, its rate chosen from the recipe's as in chapter 3."""
    task = _task(model)
    runs = [train(model, task, name, rate=rate) for rate in task.recipe.rates]
    run = runs[chosen(summary(runs))]
    if run.edit is None:
        raise EditError(f"every training of {name} diverged on {model.name}; there is nothing to compare.")
    title, change = f"{name.replace('_', '-')}, L{task.layer + 1}", partial(applied, model, run.edit)
    return Rival(title, run.edit.parameters, task.layer, f"rate {run.rate:g}", change)


# Closed form


def _closed_form(model: Model) -> Rival:
    """ROME and MEMIT's two steps at the diagnosed layer: for each fact the vector that, added after the MLP at the last
    position, makes it told; then the least-squares change of W_out that gives these for the facts' neurons and as
    little as may be for those of neutral text (`least_squares`)."""
    task, layout, seen = _task(model), model.weights.layout, list[Tensor]()
    mlp_out, last = model.weights.blocks[task.layer].mlp_out, task.texts.last[: len(task.facts)]
    wanted = torch.zeros(len(last), model.weights.d_model, requires_grad=True)
    see = {mlp_out: lambda neurons: seen.append(neurons.detach().flatten(0, -2))}
    add = {mlp_out: lambda out: out.index_add(-2, last, wanted[None] if out.ndim == 3 else wanted)}
    with hooked(before=see, after=add):
        optimise(model, task, [wanted], {}, rate=VECTOR_RATE)
        seen.clear()
        with torch.no_grad():
            for rows in torch.arange(task.n_training).split(task.recipe.windows):
                losses(model, task, {}, rows)
    keys, values = seen[-1][last], wanted.detach()
    neutral = torch.cat([neurons[len(task.prompt_stream) :] for neurons in seen])
    part, made = Slice(layout.name(task.layer, "W_out")), []
    weight = slice_values(model, [part])[part]
    for ridge, change in zip(RIDGES, least_squares(keys, values, neutral, RIDGES), strict=True):
        new = weight + (change if layout.input_first else change.T)
        put = partial(written, model.module, {part: new})
        made.append(Rival("closed form on W_out", new.numel(), task.layer, f"ridge {ridge:g}", put))
    return _chosen(model, task, made)


def least_squares(
    keys: Float[Tensor, "fact d_mlp"],
    values: Float[Tensor, "fact d_model"],
    neutral: Float[Tensor, "t d_mlp"],
    ridges: Sequence[float],
) -> list[Float[Tensor, "d_mlp d_model"]]:
    """For each ridge, the change of W_out that gives the facts' keys their values and other neurons as little as may
    be: (n ridge C + K'K)^-1 K' V for n facts, where C is the second moment of neutral neurons, shrunk towards an even
    one by SHRINK. In fp64, because the system is nearly singular still."""
    K, V, N = (x.double() for x in (keys, values, neutral))
    moment = N.T @ N / len(N)
    moment += SHRINK * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    solved = (torch.linalg.solve(ridge * moment * len(K) + K.T @ K, K.T @ V) for ridge in ridges)
    return [change.to(values.dtype) for change in solved]


# Shared


def _task(model: Model, layer: int | None = None) -> Task:
    """What training at a layer (0-based) needs; at the one that the diagnosis prescribes, if none is given."""
    layer = setting(model).verdict.knowledge_head.layer if layer is None else layer
    return replace(prepared(model)[layer][0], recipe=DEFAULT)


@torch.no_grad()
def _chosen(model: Model, task: Task, made: Sequence[Rival]) -> Rival:
    """The rule: most facts told; of these, the least KL on the neutral windows that training does not see."""

    def score(candidate: Rival) -> tuple[int, float]:
        with candidate.change():
            margins = losses(model, task, {}, torch.arange(task.recipe.windows))[2]
            harm = neutral_kl(model, task, {})
        return int((margins > 0).sum()), -harm

    return max(made, key=score)


RIVALS: dict[str, Callable[[Model], Rival]] = {"newline": partial(_prefix, "newline")}
RIVALS |= {"bos": partial(_prefix, "document"), "example": _example}
RIVALS |= {name: partial(_scaled, name) for name in SCALES} | {"competitors": _competitors}
RIVALS |= {"vector": partial(_best_rate, _vector, "bias vector"), "gains": partial(_best_rate, _gains, "norm gains")}
RIVALS |= {"lora": partial(_best_rate, _lora, "LoRA, rank 1, on W_V"), "closed_form": _closed_form}
RIVALS |= {"everything": partial(_best_rate, _everything, "all blocks", rates="all", layer=0)}
RIVALS |= {name: partial(_pathway, name) for name in PAPER}
