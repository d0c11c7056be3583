"""The book's findings, asked again with other people's tools (the source page's "cross-validation").

    Captum          gradient x activation of every MLP neuron, against this book's trace of the same neurons
    TransformerLens logits, logit lens and per-head contributions, against ours
    patching        what the answer loses when a head or a neuron is really taken away, against what the trace says

A trace is a decomposition: it says what a component wrote. An intervention says what the answer owes to it, later
layers' reactions included (total effect). The two differ where later layers repair the damage (Rushing and Nanda
2024), so both stand side by side. Every agreement is held against a control that should show none: another prompt's
neurons, a neighbouring layer, a random neuron or head.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.stats import bootstrap
from torch import Tensor, nn
from tqdm.auto import tqdm

from lib.diagnosis import Verdict, prescribe
from lib.errors import DataError
from lib.facts import Case, Fact, load_cases, load_templates, prompts, tell, trainable
from lib.replay import End, Pack, above, ends, entering, pack, packs, streams, through
from lib.site import Site
from lib.subjects import Subject, load
from lib.trace import capture, logit_trace, subject_positions
from lib.weights import Block

TOOLS = ("captum", "transformer-lens")
BATCH = 8
TOP = 5  # neurons compared as a set


def require_tools() -> dict[str, str]:
    """The versions of the tools that this chapter is about. Raises DataError for one that is not installed: a
    cross-validation without the other side is none, and must not look like one."""
    versions = {}
    for name in TOOLS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError as error:
            raise DataError(
                f"{name} is not installed, so nothing can be checked against it; install it with "
                "`pip install -r requirements.txt` and run the chapter again."
            ) from error
    return versions


# Captum: gradient x activation against the trace, neuron by neuron


@dataclass(frozen=True)
class Neurons:
    """For each prompt and each of a few layers: the trace's contribution of every neuron to the target's logit, and
    gradient x activation of the same neurons, at the last position."""

    layers: tuple[int, ...]
    trace: Float[Tensor, "prompt layer d_mlp"]
    gradient: Float[Tensor, "prompt layer d_mlp"]


def neurons(
    subject: Subject, texts: Sequence[str], targets: Int[Tensor, " prompt"], layers: Sequence[int], *,
    progress: str | None = None,
) -> Neurons:  # fmt: skip
    """Both attributions from one pass. The gradient is taken through last tokens alone, because what a last token's
    neurons write only last tokens read: Captum's own numbers, at a fraction of its cost (`captum_neurons`)."""
    low, weights, traces, gradients, done = min(layers), subject.weights, [], [], 0
    rows = list(packs(subject, [subject.token_ids(t) for t in texts], share=True))
    for some in tqdm(rows, desc=progress, disable=progress is None):
        before = streams(subject, some, range(low, weights.n_layers))
        own = targets[done : (done := done + len(some.last))]
        found = list(ends(subject, some, before, before[low][some.last].requires_grad_(), low))
        seen = [found[i - low].neurons for i in layers]
        logits = (weights.norm_final(found[-1].stream) * weights.W_U[:, own].T).sum(-1)
        slopes = torch.stack(torch.autograd.grad(logits.sum(), seen), 1)
        active, read = torch.stack(seen, 1).detach(), direction(subject, found[-1].stream.detach(), own)
        gradients.append(active * slopes)
        traces.append(active * torch.stack([read @ weights.blocks[i].mlp.W_out.T for i in layers], 1))
    return Neurons(tuple(layers), torch.cat(traces), torch.cat(gradients))


def captum_neurons(
    subject: Subject, texts: Sequence[str], targets: Int[Tensor, " prompt"], layers: Sequence[int], *,
    progress: str | None = "Captum",
) -> Float[Tensor, "prompt layer d_mlp"]:  # fmt: skip
    """Gradient x activation by Captum itself: a full forward and backward pass for each batch of prompts."""
    from captum.attr import LayerGradientXActivation

    modules = [subject.weights.blocks[i].mlp_out for i in layers]
    out = []
    for start in tqdm(range(0, len(texts), BATCH), desc=progress, disable=progress is None):
        tokens, last = subject.encode(texts[start : start + BATCH])
        rows, own = torch.arange(len(last)), targets[start : start + BATCH]

        def answer(embedded: Tensor, last: Tensor = last, rows: Tensor = rows, own: Tensor = own) -> Tensor:
            return subject.model(inputs_embeds=embedded, use_cache=False).logits[rows, last, own]

        method = LayerGradientXActivation(answer, modules)
        embedded = subject.model.get_input_embeddings()(tokens).requires_grad_()
        found = method.attribute(embedded, attribute_to_layer_input=True)
        out.append(torch.stack([x.view(*tokens.shape, -1)[rows, last].detach() for x in found], 1))  # its graph may go
    return torch.cat(out)


def agreement(one: Float[Tensor, "prompt d_mlp"], other: Float[Tensor, "prompt d_mlp"]) -> pd.DataFrame:
    """A row a prompt: do both name the same top neuron, how many of their top five do they share, and Spearman's rank
    correlation over all neurons."""
    a, b = one.topk(TOP, -1).indices, other.topk(TOP, -1).indices
    ranks = (x.argsort(-1).argsort(-1).float() for x in (one, other))
    mine, theirs = (r - r.mean(-1, keepdim=True) for r in ranks)
    rho = torch.cosine_similarity(mine, theirs, dim=-1)
    shared = (a[:, :, None] == b[:, None]).any(-1).sum(-1)
    found = {"top1": a[:, 0] == b[:, 0], "top5": shared / TOP, "rho": rho}
    return pd.DataFrame({name: values.cpu().numpy() for name, values in found.items()})


def agreement_by_layer(found: Neurons, *, seed: int = 0) -> pd.DataFrame:
    """A row a layer, with two controls: the gradient of another prompt, drawn at random, and that of the next layer."""
    order = torch.randperm(len(found.trace), generator=torch.Generator().manual_seed(seed), device="cpu")
    rows = []
    for i, layer in enumerate(found.layers):
        mine, theirs = found.trace[:, i], found.gradient[:, i]
        next_one = found.gradient[:, (i + 1) % len(found.layers)]
        for kind, other in (("same", theirs), ("other prompt", theirs[order]), ("other layer", next_one)):
            table = agreement(mine, other)
            rows.append({"layer": layer + 1, "compared": kind, "n": len(table), **table.mean().to_dict()})
    return pd.DataFrame(rows)


def agreement_by_template(found: Neurons, layer: int, names: Sequence[str], *, seed: int = 0) -> pd.DataFrame:
    """The same at one layer (0-based), a row a template (names: of each prompt), beside the other-prompt control drawn
    from the same template."""
    i, generator, rows = found.layers.index(layer), torch.Generator().manual_seed(seed), []
    for name in dict.fromkeys(names):
        pick = torch.tensor([n == name for n in names]).nonzero()[:, 0]
        mine, theirs = found.trace[pick, i], found.gradient[pick, i]
        other = theirs[torch.randperm(len(pick), generator=generator, device="cpu")]
        same, control = agreement(mine, theirs).mean(), agreement(mine, other).mean()
        rows.append({"template": name, "n": len(pick), **same.to_dict(), "other_prompt": control.top1})
    return pd.DataFrame(rows)


def large_prompts(subject: Subject, case: Case, *, templates: int = 10) -> pd.DataFrame:
    """Every fact of the large set under the first templates: template, prompt, answer_token."""
    chosen = dict(list(load_templates().items())[:templates])
    answers = [subject.first_token(f.answer) for f in case.large]
    parts = [
        pd.DataFrame({"template": name, "prompt": prompts(case.large, text), "answer_token": answers})
        for name, text in chosen.items()
    ]
    return pd.concat(parts, ignore_index=True)


def top_neuron(subject: Subject, texts: Sequence[str], answers: Int[Tensor, " prompt"], layer: int) -> int:
    """The neuron of a layer that writes most of the answers on average."""
    return int(neurons(subject, texts, answers, [layer]).trace[:, 0].mean(0).argmax())


# TransformerLens: the same model through another library


def bridge(subject: Subject):
    """The subject as TransformerLens' TransformerBridge. It replaces modules of the model that it is given: a copy."""
    from transformer_lens.model_bridge import TransformerBridge

    with tempfile.TemporaryDirectory() as folder:
        subject.model.config.save_pretrained(folder)
        subject.tokenizer.save_pretrained(folder)
        model = copy.deepcopy(subject.model)
        return TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=subject.tokenizer)


@dataclass(frozen=True)
class Lenses:
    """This book's and TransformerLens' view of the same prompts. table: a row a prompt with the largest differences of
    the logits, of all heads' contributions to the answer's logit, and of the lens' logits; and the head that writes
    most of the answer by each. The curves: the logit lens by layer, answer minus the mean of the other answers."""

    table: pd.DataFrame
    ours: Float[Tensor, "prompt n_layers+1"]
    theirs: Float[Tensor, "prompt n_layers+1"]


@torch.no_grad()
def against_transformerlens(subject: Subject, texts: Sequence[str], answers: Int[Tensor, " prompt"]) -> Lenses:
    """One prompt after the other through both libraries, answers[i] being the answer to texts[i]."""
    lens, weights, rows, curves = bridge(subject), subject.weights, [], []
    layers = range(weights.n_layers)
    for i, text in enumerate(tqdm(texts, desc="TransformerLens")):
        seen = capture(subject, [text])
        trace = logit_trace(subject, seen, answers[i].view(1, 1))
        own = (weights.norm_final(seen.stream[0]) @ weights.W_U)[:, answers]
        logits, cache = lens.run_with_cache(torch.tensor([subject.token_ids(text)]), prepend_bos=False)
        z = torch.stack([cache[f"blocks.{j}.attn.hook_z"][0, -1] for j in layers])
        W_O = torch.stack([b.attn.W_O.view(weights.n_heads, -1, weights.d_model) for b in lens.blocks])
        written = torch.einsum("lnh,lnhd->lnd", z.reshape(W_O.shape[:3]), W_O)
        last = cache[f"blocks.{layers[-1]}.hook_resid_post"][0, -1]
        heads = written @ direction(subject, last[None], answers[i : i + 1])[0]
        stream = torch.stack([*(cache[f"blocks.{j}.hook_resid_pre"][0, -1] for j in layers), last])
        read = lens.unembed(lens.ln_final(stream[None]))[0][:, answers]
        curves.append([x[:, i] - (x.sum(1) - x[:, i]) / max(1, len(answers) - 1) for x in (own, read)])
        rows.append({
            "prompt": text, "logits": float((seen.logits[0] - logits[0, -1]).abs().max()),
            "heads": float((trace.heads[0, 0] - heads).abs().max()), "lens": float((own - read).abs().max()),
            "our_head": _strongest(trace.heads[0, 0]), "their_head": _strongest(heads),
        })  # fmt: skip
    ours, theirs = (torch.stack(c) for c in zip(*curves, strict=True))
    return Lenses(pd.DataFrame(rows), ours, theirs)


def routing_layer(curves: Float[Tensor, "prompt n_layers+1"]) -> int:
    """The layer (0-based) over which the mean curve rises most: where the lens sees this answer, rather than other
    answers of its kind, appear."""
    return int(curves.mean(0).diff().argmax())


# Interventions: what happens when it is taken away


@contextmanager
def reading(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the input of each module, in their order, while the model runs."""
    seen: list[Tensor] = []
    handles = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for m in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replacing(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put change(input) for the module's input, while the model runs."""
    handle = module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


Ground = list[tuple[Pack, dict[int, Float[Tensor, "t d_model"]]]]  # packs, and the streams that enter their layers


def ground(subject: Subject, texts: Sequence[str], lowest: int) -> Ground:
    """Prompts run once, with what later questions about their last tokens look back on, from a layer up."""
    rows = packs(subject, [subject.token_ids(t) for t in texts], share=True)
    return [(some, streams(subject, some, range(lowest, subject.weights.n_layers))) for some in rows]


@dataclass(frozen=True)
class Part:
    """A component of a layer (0-based): a head, or a neuron of the MLP, or all of them."""

    site: Site
    neuron: int | None = None

    def held(self, end: End) -> Float[Tensor, "m width"]:
        """What the part holds at last tokens, before it is written into the stream."""
        if self.site.head is not None:
            return end.z[:, self.site.head]
        return end.neurons[:, self._rows()]

    def out(self, block: Block) -> Float[Tensor, "width d_model"]:
        """What it writes into the stream with each unit that it holds."""
        return block.mlp.W_out[self._rows()] if self.site.head is None else block.attn.W_O[self.site.head]

    def _rows(self) -> slice:
        return slice(None) if self.neuron is None else slice(self.neuron, self.neuron + 1)

    def __str__(self) -> str:
        return str(self.site) if self.neuron is None else f"L{self.site.layer + 1} neuron {self.neuron}"


@torch.no_grad()
def ablate(
    subject: Subject, texts: Sequence[str], answers: Int[Tensor, " prompt"], part: Part, *,
    against: Int[Tensor, " prompt"] | None = None, kept: Ground | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Take a part away at the last position, in three ways: `zero`; `mean` over the prompts; `resample`, what it did in
    the next prompt. A row a prompt and way: the change of the answer's logit (minus the logit of `against`, if given),
    direct (all later layers and the norm held as they were) and total (really run). kept: the prompts' `ground` from
    the part's layer or below, where several parts are taken from the same prompts."""
    columns = subject.weights.W_U[:, answers] - (0 if against is None else subject.weights.W_U[:, against])
    layer, kept = part.site.layer, ground(subject, texts, part.site.layer) if kept is None else kept
    found = [next(ends(subject, some, before, before[layer][some.last], layer)) for some, before in kept]
    own, out = torch.cat([part.held(end) for end in found]), part.out(subject.weights.blocks[layer])
    ways = {"none": own, "zero": torch.zeros_like(own), "mean": own.mean(0).expand_as(own), "resample": own.roll(-1, 0)}
    changes, rows, done = torch.stack(list(ways.values())) - own, [], 0
    for (some, before), end in zip(kept, found, strict=True):
        mine = slice(done, done := done + len(some.last))
        change, read = changes[:, mine], columns[:, mine].T
        final = _changed(subject, some, before, layer, end, change @ out, heads=part.site.head is not None)
        logits = (subject.weights.norm_final(final) * read).sum(-1)
        direct = (change * (_fold(subject, final[0], read) @ out.T)).sum(-1)
        totals = logits - logits[0]
        for way, d, t in list(zip(ways, direct.tolist(), totals.tolist(), strict=True))[1:]:
            rows.append(pd.DataFrame({"part": str(part), "way": way, "prompt": texts[mine], "direct": d, "total": t}))
    return pd.concat(rows, ignore_index=True)


def _changed(
    subject: Subject, some: Pack, before: dict[int, Tensor], layer: int, end: End,
    change: Float[Tensor, "way text d_model"], *, heads: bool,
) -> Float[Tensor, "way text d_model"]:  # fmt: skip
    """The final streams of last tokens if a layer's heads, or its MLP, had written something more."""
    block, rows = subject.weights.blocks[layer], end.stream + change
    if heads:  # the layer's own MLP reads it too
        middle = end.middle + change
        rows = middle + block.mlp(block.norm_mlp(middle))
    for later in ends(subject, some, before, rows.flatten(0, 1), layer + 1):
        rows = later.stream
    return rows.view(change.shape)


@torch.no_grad()
def ablate_own_neuron(
    subject: Subject, texts: Sequence[str], answers: Int[Tensor, " prompt"], layer: int, *, rank: int = 0
) -> pd.DataFrame:
    """Zero, in each prompt, the neuron of the layer that the trace ranks `rank`-th for that very prompt (0: the top
    one): its number, and the change of the answer's logit, direct and total."""
    block, done, tables = subject.weights.blocks[layer], 0, []
    for some, before in ground(subject, texts, layer):
        mine = slice(done, done := done + len(some.last))
        *_, last = found = list(ends(subject, some, before, before[layer][some.last], layer))
        trace = found[0].neurons * (direction(subject, last.stream, answers[mine]) @ block.mlp.W_out.T)
        chosen = trace.argsort(-1, descending=True)[:, rank]
        write = found[0].neurons.gather(1, chosen[:, None]) * block.mlp.W_out[chosen]
        final = _changed(subject, some, before, layer, found[0], -write[None], heads=False)
        both = subject.weights.norm_final(torch.cat((last.stream[None], final)))
        logits = (both * subject.weights.W_U[:, answers[mine]].T).sum(-1)
        tables.append(pd.DataFrame({
            "prompt": texts[mine], "neuron": chosen.tolist(),
            "direct": (-trace.gather(1, chosen[:, None])[:, 0]).tolist(), "total": (logits[1] - logits[0]).tolist(),
        }))  # fmt: skip
    return pd.concat(tables, ignore_index=True).assign(way="zero")


def ablations(table: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """A row a part and way of an `ablate` table: direct and total effect, means with bootstrap 95 % intervals."""
    rows = []
    for (part, way), group in table.groupby(["part", "way"], sort=False):
        found = {"part": part, "way": way, "n": len(group), "direct": group.direct.mean()}
        found["total"], found["low"], found["high"] = mean_interval(group.total, seed=seed)
        rows.append(found)
    return pd.DataFrame(rows)


@torch.no_grad()
def sweep(
    subject: Subject, facts: Sequence[Fact], failing: str, control: str, competitors: Int[Tensor, " fact"]
) -> dict[str, Float[Tensor, "n_layers n_heads fact"]]:
    """Every head of the failing prompt, one at a time, made to do what it does under the control template: at the last
    position, and at the last token of the subject. The share of the lost margin (answer minus competitor) that comes
    back; 1 is all of it."""
    weights, answers = subject.weights, torch.tensor([subject.first_token(f.answer) for f in facts])
    bad, good = (prompts(facts, t) for t in (failing, control))
    places = {name: [_place(subject, ts, facts, name) for ts in (bad, good)] for name in ("last", "subject")}
    ids, from_ids = ([subject.token_ids(t) for t in ts] for ts in (bad, good))
    whole, source = pack(subject, from_ids), pack(subject, ids * weights.n_heads)
    single = pack(subject, ids)
    pairs = torch.stack((answers, competitors), 1)
    lost = _margin(subject, whole, pairs) - (base := _margin(subject, single, pairs))
    out = {name: torch.zeros(weights.n_layers, weights.n_heads, len(facts)) for name in places}
    controls, stream = entering(subject, whole, 0), entering(subject, single, 0)
    for layer in tqdm(range(weights.n_layers), desc="patching"):
        block = weights.blocks[layer]
        with reading([block.heads_out]) as seen:
            controls = through(subject, whole, controls, layer)
        for name, (to, of) in places.items():
            z = seen[0].view(-1, weights.n_heads, weights.d_head)[_flat(whole, of)]
            change = _put_heads(z, _flat(single, to), len(single.tokens), weights.n_heads)
            with replacing(block.heads_out, change):
                final = above(subject, source, layer, stream.repeat(weights.n_heads, 1))[source.last]
            margin = _difference(subject, final.view(weights.n_heads, len(facts), -1), pairs)
            out[name][layer] = (margin - base) / lost
        stream = through(subject, single, stream, layer)
    return out


def mean_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """Mean with its bootstrap 95 % interval."""
    if len(values) < 2:
        raise DataError("an interval needs at least two prompts.")
    found = bootstrap((np.asarray(values),), np.mean, n_resamples=2000, method="percentile", random_state=seed)
    return float(np.mean(values)), float(found.confidence_interval.low), float(found.confidence_interval.high)


def direction(
    subject: Subject, final: Float[Tensor, "text d_model"], tokens: Int[Tensor, " text"]
) -> Float[Tensor, "text d_model"]:
    """The residual direction that each token's logit reads. final: the last stream, before the norm."""
    return _fold(subject, final, subject.weights.W_U[:, tokens].T)


def _fold(
    subject: Subject, final: Float[Tensor, "text d_model"], read: Float[Tensor, "text d_model"]
) -> Float[Tensor, "text d_model"]:
    """A direction of the normalised stream as one of the stream itself, the norm frozen at each text's own scale."""
    norm = subject.weights.norm_final
    return norm.fold(read.T).T / norm.scale(final)


def _strongest(heads: Float[Tensor, "n_layers n_heads"]) -> str:
    return str(Site(*divmod(int(heads.argmax()), heads.shape[1])))


def _put_heads(
    z: Float[Tensor, "fact n_heads d_head"], rows: Tensor, length: int, n_heads: int
) -> Callable[[Tensor], Tensor]:
    """For a pack that holds the texts once for each head: in the h-th copy, head h gets what z says."""

    def change(x: Tensor) -> Tensor:
        parts = x.reshape(n_heads, length, n_heads, -1).clone()
        for head in range(n_heads):
            parts[head, rows, head] = z[:, head]
        return parts.view(x.shape)

    return change


def _place(subject: Subject, texts: Sequence[str], facts: Sequence[Fact], name: str) -> list[int]:
    """Where to patch each text: its last token, or the last token of its subject."""
    if name == "last":
        return [len(subject.token_ids(t)) - 1 for t in texts]
    return [subject_positions(subject, t, f.subject)[-1] for t, f in zip(texts, facts, strict=True)]


def _flat(some: Pack, places: Sequence[int]) -> Int[Tensor, " text"]:
    """Rows of a pack for a position in each of its texts."""
    starts = torch.cat((torch.zeros(1, dtype=torch.long), some.last[:-1] + 1))
    return starts + torch.tensor(places)


def _margin(subject: Subject, some: Pack, pairs: Int[Tensor, "text 2"]) -> Float[Tensor, " text"]:
    return _difference(subject, above(subject, some, 0, entering(subject, some, 0))[some.last], pairs)


def _difference(
    subject: Subject, final: Float[Tensor, "*b text d_model"], pairs: Int[Tensor, "text 2"]
) -> Float[Tensor, "*b text"]:
    """First token's logit minus the second's."""
    directions = subject.weights.W_U[:, pairs[:, 0]] - subject.weights.W_U[:, pairs[:, 1]]
    return (final * directions.T).sum(-1)


# The agreement table


def parts_of(
    subject: Subject, verdict: Verdict, neuron: int, *, seed: int = 0, controls: int = 5
) -> dict[str, list[Part]]:
    """What is taken away: the knowledge head and the top neuron of its layer; and, as controls, other heads and
    neurons of the same layer, drawn at random."""
    layer, weights, draw = verdict.knowledge_head.layer, subject.weights, np.random.default_rng(seed)
    heads = [h for h in range(weights.n_heads) if h != verdict.knowledge_head.head]
    width = weights.blocks[layer].mlp.W_out.shape[0]
    others = draw.choice([n for n in range(width) if n != neuron], controls, replace=False)
    return {
        "knowledge head": [Part(verdict.knowledge_head)],
        "random heads": [Part(Site(layer, int(h))) for h in draw.choice(heads, controls, replace=False)],
        "top neuron": [Part(Site(layer), neuron)],
        "random neurons": [Part(Site(layer), int(n)) for n in others],
    }


def ablate_all(
    subject: Subject, texts: Sequence[str], answers: Int[Tensor, " prompt"], parts: dict[str, list[Part]]
) -> pd.DataFrame:
    """An `ablate` table of all parts, `part` being the kind: several random parts are averaged prompt by prompt."""
    tables, lowest = [], min(part.site.layer for some in parts.values() for part in some)
    kept = ground(subject, texts, lowest)
    for kind, some in parts.items():
        rows = pd.concat([ablate(subject, texts, answers, part, kept=kept) for part in some])
        means = rows.groupby(["way", "prompt"], sort=False)[["direct", "total"]].mean().reset_index()
        tables.append(means.assign(part=kind))
    return pd.concat(tables, ignore_index=True)


def strongest_neuron(
    subject: Subject, texts: Sequence[str], answers: Int[Tensor, " prompt"], candidates: Sequence[Part]
) -> Part:
    """Of some neurons, the one whose loss (zero ablation, total) costs the answers most."""
    return _costliest(subject, texts, answers, candidates, "zero")


def strongest_head(
    subject: Subject, texts: Sequence[str], answers: Int[Tensor, " prompt"], layers: Sequence[int]
) -> Part:
    """Of all heads of some layers, the one whose loss (resample ablation, total) costs the answers most."""
    candidates = [Part(Site(layer, head)) for layer in layers for head in range(subject.weights.n_heads)]
    return _costliest(subject, texts, answers, candidates, "resample")


def _costliest(
    subject: Subject, texts: Sequence[str], answers: Int[Tensor, " prompt"], candidates: Sequence[Part], way: str
) -> Part:
    kept = ground(subject, texts, min(part.site.layer for part in candidates))
    found = [ablate(subject, texts, answers, part, kept=kept) for part in candidates]
    return candidates[int(np.argmin([table[table.way == way].total.mean() for table in found]))]


def three_tools(
    subject: Subject, texts: Sequence[str], answers: Int[Tensor, " prompt"], verdict: Verdict, lenses: Lenses,
    *, around: int = 2, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """One row a question, one column a tool, on the same prompts; `-` where a tool does not answer it."""
    layer, n = verdict.knowledge_head.layer, subject.weights.n_layers
    found = neurons(subject, texts, answers, [layer])
    ours, theirs = (x[:, 0].mean(0) for x in (found.trace, found.gradient))
    top = [Part(Site(layer), int(i)) for i in ours.topk(10).indices]
    neuron = strongest_neuron(subject, texts, answers, top)
    head = strongest_head(subject, texts, answers, range(max(0, layer - around), min(n, layer + around + 1)))
    lost = ablate(subject, texts, answers, Part(verdict.knowledge_head)).query("way == 'resample'").total.mean()
    their_head = lenses.table.their_head.mode()[0]
    rows = [
        ("Which layer writes the answer?", f"L{layer + 1}", "-", f"L{routing_layer(lenses.theirs) + 1} (lens)",
         f"L{head.site.layer + 1}"),
        ("Which head?", str(verdict.knowledge_head), "-", f"{their_head} (most of the prompts)", str(head)),
        ("Which neuron of that layer?", str(int(ours.argmax())), str(int(theirs.argmax())), "-", str(neuron.neuron)),
        ("Does that neuron help the answer?", _sign(ours.max()), _sign(theirs[int(ours.argmax())]), "-",
         _sign(-ablate(subject, texts, answers, top[0]).query("way == 'zero'").total.mean())),
        ("Does that head help the answer?", "yes", "-", "yes", _sign(-lost)),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["question", "this book's trace", "Captum", "TransformerLens", "patching"])


def _sign(value: float | Tensor) -> str:
    return "yes" if float(value) > 0 else "no"


def agreed(table: pd.DataFrame) -> int:
    """On how many questions every tool that answers says the same."""
    answers = table.set_index("question").map(lambda text: text.split(" (")[0])
    return sum(len(set(row) - {"-"}) == 1 for row in answers.to_numpy().tolist())


# What chapter 5 calls


def same_as_captum(subject: Subject, sample: pd.DataFrame, layers: Sequence[int]) -> pd.DataFrame:
    """The fast path against Captum's own on the same prompts: a row a layer. Raises DataError where they differ by
    more than a thousandth of the largest attribution: rounding in another order stays far below."""
    texts, targets = list(sample.prompt), torch.tensor(sample.answer_token.to_numpy())
    fast, own = neurons(subject, texts, targets, layers).gradient, captum_neurons(subject, texts, targets, layers)
    rows = []
    for i, layer in enumerate(layers):
        difference, largest = float((fast[:, i] - own[:, i]).abs().max()), float(own[:, i].abs().max())
        if not difference <= 1e-3 * largest:
            raise DataError(f"gradient x activation of L{layer + 1} differs from Captum's by {difference:.2g}.")
        rows.append((layer + 1, len(texts), own.shape[-1], difference, largest))
    return pd.DataFrame(rows, columns=["layer", "prompts", "neurons", "largest difference", "largest attribution"])


def organism_through_transformerlens() -> dict[str, pd.DataFrame]:
    """The table of `against_transformerlens` for the organism, the other model family."""
    subject = load("organism")
    case = trainable(subject, load_cases("organism")[0])
    answers = torch.tensor([subject.first_token(f.answer) for f in case.facts])
    texts = prompts(case.facts, load_templates()[case.controls[0]])
    return {"organism": against_transformerlens(subject, texts, answers).table}


def routing_chance(
    curves: Float[Tensor, "prompt n_layers+1"], layer: int, *, shuffles: int = 1000, seed: int = 0
) -> float:
    """The control of a lens: how often the mean curve rises most over this layer if the rises of each prompt are put
    into a random order of layers."""
    rises, generator = curves.diff(), torch.Generator().manual_seed(seed)
    orders = torch.rand((shuffles, *rises.shape), generator=generator, device="cpu").argsort(-1).to(rises.device)
    tops = rises.expand(shuffles, -1, -1).gather(-1, orders).mean(1).argmax(-1)
    return float((tops == layer).float().mean())


def report_ablations(report: Callable[..., None], table: pd.DataFrame) -> None:
    """What the chapter's prose says of the ablations."""
    by = table.set_index(["part", "way"])
    neuron, head = by.loc[("top neuron", "zero")], by.loc[("knowledge head", "resample")]
    report("patching_effect", float(neuron.total), "+.2f")
    report("patching_interval", (float(neuron.low), float(neuron.high)), "+.2f")
    report("random_neuron_effect", float(by.total["random neurons", "zero"]), "+.2f")
    report("head_effect", float(head.total), "+.2f")
    report("head_interval", (float(head.low), float(head.high)), "+.2f")
    report("random_head_effect", float(by.total["random heads", "resample"]), "+.2f")
    own = by.loc[("each prompt's top neuron", "zero")]
    report("own_neuron_effect", float(own.total), "+.2f")
    report("own_neuron_interval", (float(own.low), float(own.high)), "+.2f")
    report("own_neuron_direct", float(own.direct), "+.2f")


def suppressors(subject: Subject, cases: Sequence[Case], *, seed: int = 0) -> pd.DataFrame:
    """Each suppressor that the rule names, taken away from its failing prompts: the change of answer minus competitor;
    beside the same kind of part one layer below. An `ablations` table, empty where no case has a suppressor."""
    parts: list[pd.DataFrame] = []
    for case in (trainable(subject, c) for c in cases):
        site = prescribe(subject, case).suppressor
        if site is None:
            continue
        failing = tell(subject, case.facts, {case.template: load_templates()[case.template]})
        answers, against = (torch.tensor(failing[c].tolist()) for c in ("answer_token", "competitor_token"))
        for name, where in (("suppressor", site), ("control", Site(site.layer - 1, site.head, site.mlp))):
            table = ablate(subject, list(failing.prompt), answers, Part(where), against=against)
            parts.append(ablations(table.assign(part=f"{case.title}: {name} {where}"), seed=seed))
    columns = ["part", "way", "n", "direct", "total", "low", "high"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def suppressor_words(table: pd.DataFrame) -> str:
    """One sentence on what the suppressors' loss gives back, by zero ablation."""
    some = table[(table.way == "zero") & table.part.str.contains(": suppressor")]
    if some.empty:
        return "No case of this subject has a suppressor, so there is nothing to take away."
    names = some.part.str.split(": suppressor ").str[1]
    words = [
        f"{name} {r.total:+.2f} ({r.low:+.2f} to {r.high:+.2f})"
        for name, r in zip(names, some.itertuples(), strict=True)
    ]
    return "Without it (zero), the margin changes by: " + "; ".join(words) + "."


def sweep_case(subject: Subject, case: Case) -> dict[str, Float[Tensor, "n_layers n_heads fact"]]:
    """`sweep` over the case's untold facts, from its first control template."""
    templates = load_templates()
    table = tell(subject, case.facts, {case.template: templates[case.template]})
    pick = ~table.told.to_numpy()
    facts = [f for f, untold in zip(case.facts, pick, strict=True) if untold]
    competitors = torch.tensor(table.competitor_token.to_numpy()[pick])
    return sweep(subject, facts, templates[case.template], templates[case.controls[0]], competitors)


def best_heads(grid: Float[Tensor, "n_layers n_heads fact"], k: int = 5) -> list[dict[str, object]]:
    """The heads that bring most of the margin back, on average."""
    mean = grid.mean(-1)
    order = mean.flatten().topk(k)
    return [{"head": str(Site(*divmod(int(i), mean.shape[1]))), "share": float(v)} for v, i in zip(*order, strict=True)]
