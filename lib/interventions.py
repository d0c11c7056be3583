"""Run prompts and keep what patching needs; then give one component what it did elsewhere, and run what follows.

A run keeps, of every layer, the stream at all positions and the last position's heads and MLP output, its attention,
and the keys and values that it saw. So

    rerun     after a change of weights in some layer, everything below it is not computed again
    patched   nothing before the last position can notice a patch there: only last rows are run, from the patched
              layer up, all components of a model in one sweep

`crosscheck.sweep` patches the same heads by whole forward passes; a test holds the two against each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from lib.facts import Fact, prompts
from lib.forward import End, Pack, Past, above, ends, entering, gathered, pack, packs, streams, through
from lib.models import Model
from lib.sites import Site
from lib.statistics import mean_interval
from lib.trace import Capture, before_norm, logit_direction, subject_positions
from lib.weights import Block

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


Prefilled = list[tuple[Pack, dict[int, Float[Tensor, "t d_model"]]]]  # packs, and the streams that enter their layers


def prefill(model: Model, texts: Sequence[str], lowest: int) -> Prefilled:
    """Prompts run once, with what later questions about their last tokens look back on, from a layer up."""
    rows = packs(model, [model.token_ids(t) for t in texts], share=True)
    return [(some, streams(model, some, range(lowest, model.weights.n_layers))) for some in rows]


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
    model: Model,
    texts: Sequence[str],
    answers: Int[Tensor, " prompt"],
    part: Part,
    *,
    against: Int[Tensor, " prompt"] | None = None,
    kept: Prefilled | None = None,
) -> pd.DataFrame:
    """Take a part away at the last position, in three ways: `zero`; `mean` over the prompts; `resample`, what it did in
    the next prompt. A row a prompt and way: the change of the answer's logit (minus the logit of `against`, if given),
    direct (all later layers and the norm held as they were) and total (really run). kept: the prompts' `prefill` from
    the part's layer or below, where several parts are taken from the same prompts."""
    columns = model.weights.W_U[:, answers] - (0 if against is None else model.weights.W_U[:, against])
    layer, kept = part.site.layer, prefill(model, texts, part.site.layer) if kept is None else kept
    found = [next(ends(model, some, before, before[layer][some.last], layer)) for some, before in kept]
    own, out = torch.cat([part.held(end) for end in found]), part.out(model.weights.blocks[layer])
    ways = {"none": own, "zero": torch.zeros_like(own), "mean": own.mean(0).expand_as(own), "resample": own.roll(-1, 0)}
    changes, rows, done = torch.stack(list(ways.values())) - own, [], 0
    for (some, before), end in zip(kept, found, strict=True):
        mine = slice(done, done := done + len(some.last))
        change, read = changes[:, mine], columns[:, mine].T
        final = _changed(model, some, before, layer, end, change @ out, heads=part.site.head is not None)
        logits = (model.weights.norm_final(final) * read).sum(-1)
        direct = (change * (before_norm(model, final[0], read) @ out.T)).sum(-1)
        totals = logits - logits[0]
        for way, d, t in list(zip(ways, direct.tolist(), totals.tolist(), strict=True))[1:]:
            rows.append(pd.DataFrame({"part": str(part), "way": way, "prompt": texts[mine], "direct": d, "total": t}))
    return pd.concat(rows, ignore_index=True)


def _changed(
    model: Model,
    some: Pack,
    before: dict[int, Tensor],
    layer: int,
    end: End,
    change: Float[Tensor, "way text d_model"],
    *,
    heads: bool,
) -> Float[Tensor, "way text d_model"]:
    """The final streams of last tokens if a layer's heads, or its MLP, had written something more."""
    block, rows = model.weights.blocks[layer], end.stream + change
    if heads:  # the layer's own MLP reads it too
        middle = end.middle + change
        rows = middle + block.mlp(block.norm_mlp(middle))
    for later in ends(model, some, before, rows.flatten(0, 1), layer + 1):
        rows = later.stream
    return rows.view(change.shape)


@torch.no_grad()
def ablate_top_neurons(
    model: Model, texts: Sequence[str], answers: Int[Tensor, " prompt"], layer: int, *, rank: int = 0
) -> pd.DataFrame:
    """Zero, in each prompt, the neuron of the layer that the trace ranks `rank`-th for that very prompt (0: the top
    one): its number, and the change of the answer's logit, direct and total."""
    block, done, tables = model.weights.blocks[layer], 0, []
    for some, before in prefill(model, texts, layer):
        mine = slice(done, done := done + len(some.last))
        *_, last = found = list(ends(model, some, before, before[layer][some.last], layer))
        trace = found[0].neurons * (logit_direction(model, last.stream, answers[mine]) @ block.mlp.W_out.T)
        chosen = trace.argsort(-1, descending=True)[:, rank]
        write = found[0].neurons.gather(1, chosen[:, None]) * block.mlp.W_out[chosen]
        final = _changed(model, some, before, layer, found[0], -write[None], heads=False)
        both = model.weights.norm_final(torch.cat((last.stream[None], final)))
        logits = (both * model.weights.W_U[:, answers[mine]].T).sum(-1)
        tables.append(
            pd.DataFrame(
                {
                    "prompt": texts[mine],
                    "neuron": chosen.tolist(),
                    "direct": (-trace.gather(1, chosen[:, None])[:, 0]).tolist(),
                    "total": (logits[1] - logits[0]).tolist(),
                }
            )
        )
    return pd.concat(tables, ignore_index=True).assign(way="zero")


def summarise_ablations(table: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """A row a part and way of an `ablate` table: direct and total effect, means with bootstrap 95 % intervals."""
    rows = []
    for (part, way), group in table.groupby(["part", "way"], sort=False):
        found = {"part": part, "way": way, "n": len(group), "direct": group.direct.mean()}
        found["total"], found["low"], found["high"] = mean_interval(group.total, seed=seed)
        rows.append(found)
    return pd.DataFrame(rows)


@torch.no_grad()
def patch_heads(
    model: Model, facts: Sequence[Fact], failing: str, control: str, competitors: Int[Tensor, " fact"]
) -> dict[str, Float[Tensor, "n_layers n_heads fact"]]:
    """Every head of the failing prompt, one at a time, made to do what it does under the control template: at the last
    position, and at the last token of the subject. The share of the lost margin (answer minus competitor) that comes
    back; 1 is all of it."""
    weights, answers = model.weights, torch.tensor([model.first_token(f.answer) for f in facts])
    bad, good = (prompts(facts, t) for t in (failing, control))
    places = {name: [_place(model, ts, facts, name) for ts in (bad, good)] for name in ("last", "subject")}
    ids, from_ids = ([model.token_ids(t) for t in ts] for ts in (bad, good))
    whole, source = pack(model, from_ids), pack(model, ids * weights.n_heads)
    single = pack(model, ids)
    pairs = torch.stack((answers, competitors), 1)
    lost = _margin(model, whole, pairs) - (base := _margin(model, single, pairs))
    out = {name: torch.zeros(weights.n_layers, weights.n_heads, len(facts)) for name in places}
    controls, stream = entering(model, whole, 0), entering(model, single, 0)
    for layer in tqdm(range(weights.n_layers), desc="patching"):
        block = weights.blocks[layer]
        with reading([block.heads_out]) as seen:
            controls = through(model, whole, controls, layer)
        for name, (to, of) in places.items():
            z = seen[0].view(-1, weights.n_heads, weights.d_head)[_flat(whole, of)]
            change = _put_heads(z, _flat(single, to), len(single.tokens), weights.n_heads)
            with replacing(block.heads_out, change):
                final = above(model, source, layer, stream.repeat(weights.n_heads, 1))[source.last]
            margin = _difference(model, final.view(weights.n_heads, len(facts), -1), pairs)
            out[name][layer] = (margin - base) / lost
        stream = through(model, single, stream, layer)
    return out


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


def _place(model: Model, texts: Sequence[str], facts: Sequence[Fact], name: str) -> list[int]:
    """Where to patch each text: its last token, or the last token of its subject."""
    if name == "last":
        return [len(model.token_ids(t)) - 1 for t in texts]
    return [subject_positions(model, t, f.subject)[-1] for t, f in zip(texts, facts, strict=True)]


def _flat(some: Pack, places: Sequence[int]) -> Int[Tensor, " text"]:
    """Rows of a pack for a position in each of its texts."""
    starts = torch.cat((torch.zeros(1, dtype=torch.long), some.last[:-1] + 1))
    return starts + torch.tensor(places)


def _margin(model: Model, some: Pack, pairs: Int[Tensor, "text 2"]) -> Float[Tensor, " text"]:
    return _difference(model, above(model, some, 0, entering(model, some, 0))[some.last], pairs)


def _difference(
    model: Model, final: Float[Tensor, "*b text d_model"], pairs: Int[Tensor, "text 2"]
) -> Float[Tensor, "*b text"]:
    """First token's logit minus the second's."""
    directions = model.weights.W_U[:, pairs[:, 0]] - model.weights.W_U[:, pairs[:, 1]]
    return (final * directions.T).sum(-1)


@dataclass(frozen=True)
class Layer:
    """What one layer did with n prompts (padded on the right to t tokens)."""

    stream: Float[Tensor, "n t d_model"]  # before the layer, at all positions
    keys: Float[Tensor, "n n_kv t d_head"]  # rotated to their positions
    values: Float[Tensor, "n n_kv t d_head"]
    pattern: Float[Tensor, "n n_heads t"]  # attention from the last position
    z: Float[Tensor, "n n_heads d_head"]  # of the last position, as all below
    middle: Float[Tensor, "n d_model"]  # the stream between attention and MLP
    mlp: Float[Tensor, "n d_model"]


@dataclass(frozen=True)
class CachedRun:
    """A forward pass over n prompts."""

    prompts: tuple[str, ...]
    tokens: Int[Tensor, "n t"]
    last: Int[Tensor, " n"]
    layers: tuple[Layer, ...]
    final: Float[Tensor, "n d_model"]  # the last position's stream before the final norm
    logits: Float[Tensor, "n vocab"]

    @property
    def z(self) -> Float[Tensor, "n n_layers n_heads d_head"]:
        return torch.stack([layer.z for layer in self.layers], 1)

    @property
    def mlps(self) -> Float[Tensor, "n n_layers d_model"]:
        return torch.stack([layer.mlp for layer in self.layers], 1)

    @property
    def patterns(self) -> Float[Tensor, "n n_layers n_heads t"]:
        return torch.stack([layer.pattern for layer in self.layers], 1)

    def capture(self) -> Capture:
        """As `trace.capture` would have it."""
        rows = torch.arange(len(self.prompts))
        stream = torch.stack([*(layer.stream[rows, self.last] for layer in self.layers), self.final], 1)
        return Capture(self.prompts, self.tokens, self.last, stream, self.z, self.mlps, self.logits, None)

    def take(self, rows: Sequence[int]) -> CachedRun:
        """Some of the prompts."""
        at = torch.tensor(list(rows), dtype=torch.long)
        layers = tuple(Layer(*(x[at] for x in vars(layer).values())) for layer in self.layers)
        prompts = tuple(self.prompts[i] for i in rows)
        return CachedRun(prompts, self.tokens[at], self.last[at], layers, self.final[at], self.logits[at])


@torch.no_grad()
def run_with_cache(model: Model, prompts: Sequence[str]) -> CachedRun:
    """All layers, by the weight view. Raises DataError for an empty or too long prompt."""
    tokens, last = model.encode(prompts)
    return _upwards(model, tuple(prompts), tokens, last, (), model.weights.embed(tokens))


@torch.no_grad()
def rerun_from(model: Model, before: CachedRun, layer: int) -> CachedRun:
    """The run again from a layer up (0-based), after a change of weights there or above."""
    below = before.layers[:layer]
    return _upwards(model, before.prompts, before.tokens, before.last, below, before.layers[layer].stream)


def _upwards(
    model: Model, prompts: tuple[str, ...], tokens: Tensor, last: Tensor, below: tuple[Layer, ...], stream: Tensor
) -> CachedRun:
    layers, rows, weights = list(below), torch.arange(len(last)), model.weights
    for block in weights.blocks[len(below) :]:
        done, stream = _layer(block, stream, last)
        layers.append(done)
    final = stream[rows, last]
    return CachedRun(prompts, tokens, last, tuple(layers), final, weights.norm_final(final) @ weights.W_U)


def _layer(block: Block, stream: Float[Tensor, "n t d_model"], last: Int[Tensor, " n"]) -> tuple[Layer, Tensor]:
    attn, rows, x = block.attn, torch.arange(len(last)), block.norm_attn(stream)
    q, k = attn.queries_keys(x)
    v, pattern = attn.values(x), attn.probabilities(q, k)
    z = attn.mix(pattern, v)
    middle = stream + attn.out(z)
    mlp = block.mlp(block.norm_mlp(middle))
    kept = Layer(
        stream,
        k[:, :: q.shape[1] // v.shape[1]],
        v,
        pattern[rows, :, last],
        z[rows, :, last],
        middle[rows, last],
        mlp[rows, last],
    )
    return kept, middle + mlp


def logit_differences(run: CachedRun, pairs: Int[Tensor, "n 2"]) -> Float[Tensor, " n"]:
    """First token's logit minus the second's."""
    return -run.logits.gather(1, pairs).diff()[:, 0]


@torch.no_grad()
def patch_components(
    model: Model,
    run: CachedRun,
    z: Float[Tensor, "n n_layers n_heads d_head"],
    mlps: Float[Tensor, "n n_layers d_model"],
    pairs: Int[Tensor, "n 2"],
    *,
    lowest: int = 0,
) -> Float[Tensor, "component n"]:
    """Margin of each prompt with one component at a time made to put out what z or mlps say: all heads layer by layer,
    then all MLPs, as `diagnosis.components` orders them. Below the layer `lowest` nothing is patched."""
    weights, n = model.weights, len(run.prompts)
    rows = deque(patched_streams(model, run, z, mlps, start=lowest), maxlen=1)[0]  # what leaves the last layer
    own = logit_differences(run, pairs).expand(lowest, weights.n_heads + 1, n)
    found = torch.cat((own, patched_logit_differences(model, rows, pairs).view(-1, weights.n_heads + 1, n)))
    return torch.cat((found[:, :-1].flatten(0, 1), found[:, -1]))


@torch.no_grad()
def patched_streams(
    model: Model,
    run: CachedRun,
    z: Float[Tensor, "n n_layers n_heads d_head"],
    mlps: Float[Tensor, "n n_layers d_model"] | None = None,
    *,
    start: int = 0,
    below: Float[Tensor, "m d_model"] | None = None,
) -> Iterator[Float[Tensor, "m d_model"]]:
    """The patched last rows that leave each layer from `start` up: those of the layers below, one layer further, then a
    head each (and the MLP, if mlps are given), the n prompts together. below: those that enter `start`, from a model
    with the same weights up to there."""
    rows = run.final[:0] if below is None else below
    before = torch.arange(run.tokens.shape[1]) < run.last[:, None]
    for i in range(start, model.weights.n_layers):
        block, layer = model.weights.blocks[i], run.layers[i]
        change = einsum(z[:, i] - layer.z, block.attn.W_O, "b n h, n h d -> n b d")
        seen = Past(layer.keys, layer.values, before, run.last)
        below = rows + block.attn.write(gathered(block, seen, rows))
        middle = torch.cat((below, (layer.middle + change).flatten(0, 1)))
        rows = middle + block.mlp(block.norm_mlp(middle))
        if mlps is not None:
            rows = torch.cat((rows, layer.middle + mlps[:, i]))
        yield rows


def patched_logit_differences(
    model: Model, rows: Float[Tensor, "m d_model"], pairs: Int[Tensor, "n 2"]
) -> Float[Tensor, "copy n"]:
    """Margins of patched rows that left the last layer."""
    weights = model.weights
    directions = (weights.W_U[:, pairs[:, 0]] - weights.W_U[:, pairs[:, 1]]).T
    return (weights.norm_final(rows).view(-1, *directions.shape) * directions).sum(-1)
