"""Ablation and activation patching: what a model says when one component, at one position, puts out something else.

No token stands after a last one, so no other token notices a change there. Therefore

    1. Keep       the prompts are run once, and what later questions look back on is kept: the streams of a pack
                  (`prefill`), or of every layer the keys and values with all that the last position did
                  (`run_with_cache`; after a change of weights in some layer, `rerun_from` it).
    2. Replace    one component's output at the last position: by nothing, by its mean, or by what it is in another
                  prompt (`ablate`); by what it is under another template (`patch_components`).
    3. Propagate  the last positions alone, from the changed layer up, all components of a model together
                  (`patched_streams`).
    4. Compare    the answer's logit, or the logit difference of answer and competitor, with that of the run as it was.

Activation patching as in Meng et al. (2022); later layers may repair what an ablation takes away (Rushing and Nanda
2024), so `ablate` gives the direct and the total effect. Tests hold these answers against whole forward passes of the
model's own blocks.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from lib.forward import End, Pack, Past, Rows, Streams, ends, gathered, packs, streams
from lib.models import Model
from lib.sites import Site
from lib.statistics import mean_interval
from lib.trace import Capture, before_norm, logit_direction
from lib.weights import Block, NoNorm

Ids = Int[Tensor, " n"]  # first tokens of answers, or of what they are compared with
Pairs = Int[Tensor, "n 2"]  # of both
Z = Float[Tensor, "n n_layers n_heads d_head"]  # of last positions, as what follows
MLPs = Float[Tensor, "n n_layers d_model"]
Changes = Float[Tensor, "way text d_model"]

# Ablation: what the answer loses when a part is taken away

Prefilled = Sequence[tuple[Pack, Streams]]  # packs, and the streams that enter their layers


def prefill(model: Model, texts: Sequence[str], lowest: int) -> Prefilled:
    """Prompts run once, with what questions about their last tokens look back on, from the layer `lowest` up."""
    batches = packs(model, [model.token_ids(t) for t in texts], share=True)
    return [(batch, streams(model, batch, range(lowest, model.weights.n_layers))) for batch in batches]


@dataclass(frozen=True)
class Part:
    """A component of a layer (0-based): a head, or a neuron of the MLP, or all of them."""

    site: Site
    neuron: int | None = None

    def held(self, end: End) -> Float[Tensor, "m width"]:
        """What the part holds at last tokens, before it is written into the stream."""
        return end.neurons[:, self._neurons] if self.site.head is None else end.z[:, self.site.head]

    def read(self, block: Block, end: End, direction: Rows) -> Float[Tensor, "m width"]:
        """What each unit that it holds writes along a direction of the stream, norms after it as they were."""
        if self.site.head is None:
            return direction @ block.W_out[self._neurons].T / block.mlp_scale(end.neurons)
        return direction @ block.W_O[self.site.head].T / block.heads_scale(end.z)

    def written(self, block: Block, end: End, change: Float[Tensor, "way m width"]) -> Changes:
        """By how much what the layer adds to the stream changes if the part holds something more."""
        head = self.site.head
        if isinstance(block.after_mlp, NoNorm):
            return change @ (block.mlp.W_out[self._neurons] if head is None else block.attn.W_O[head])
        held, write = (end.neurons, block.write_neurons) if head is None else (end.z, block.write_heads)
        more = held.new_zeros(len(change), *held.shape)  # a norm would see the rounding of `whole - whole`
        more[(..., self._neurons) if head is None else (..., head, slice(None))] = change
        return write(held + more) - write(held)

    @property
    def _neurons(self) -> slice:
        return slice(None) if self.neuron is None else slice(self.neuron, self.neuron + 1)

    def __str__(self) -> str:
        return str(self.site) if self.neuron is None else f"L{self.site.layer + 1} neuron {self.neuron}"


@torch.no_grad()
def ablate(
    model: Model, texts: Sequence[str], answers: Ids, part: Part, *, against: Ids | None = None, kept: Prefilled = ()
) -> pd.DataFrame:
    """Take a part away at the last position, in three ways: `zero`; `mean` over the prompts; `resample`, what it did in
    the next prompt. A row a way and prompt: the change of the answer's logit (minus the logit of `against`, if given),
    direct (all later layers and the norm held as they were) and total (really run). kept: the prompts' `prefill` from
    the part's layer or below, where several parts are taken from the same prompts."""
    layer, W_U = part.site.layer, model.weights.W_U
    kept = kept or prefill(model, texts, layer)
    directions = (W_U[:, answers] - (0 if against is None else W_U[:, against])).T
    reached = [next(ends(model, batch, before, before[layer][batch.last], layer)) for batch, before in kept]
    held, block = torch.cat([part.held(end) for end in reached]), model.weights.blocks[layer]
    ways = {"zero": torch.zeros_like(held), "mean": held.mean(0).expand_as(held), "resample": held.roll(-1, 0)}
    changes = torch.stack((held, *ways.values())) - held  # (way, prompt, width); the first is none
    sizes, direct, total = [len(batch.last) for batch, _ in kept], [], []
    parts = zip(kept, reached, changes.split(sizes, 1), directions.split(sizes), strict=True)
    for (batch, before), end, change, read in parts:
        final = final_streams(model, batch, before, part.site, end, part.written(block, end, change))
        logits = (model.weights.norm_final(final) * read).sum(-1)
        direct.append((change * part.read(block, end, before_norm(model, final[0], read))).sum(-1))
        total.append(logits - logits[0])
    table = pd.DataFrame(product(ways, texts), columns=["way", "prompt"])
    effects = {"direct": torch.cat(direct, 1), "total": torch.cat(total, 1)}
    return table.assign(**{name: x[1:].flatten().tolist() for name, x in effects.items()}, part=str(part))


def final_streams(model: Model, batch: Pack, before: Streams, site: Site, end: End, change: Changes) -> Changes:
    """The final streams of last tokens if a head, or the MLP of a layer, had written something more."""
    block, rows = model.weights.blocks[site.layer], end.stream + change
    if site.head is not None:  # the layer's own MLP may read it too
        middle = end.middle + change
        rows = middle + block.write_mlp(end.entered.expand_as(middle), middle)
    for later in ends(model, batch, before, rows.flatten(0, 1), site.layer + 1):
        rows = later.stream
    return rows.view(change.shape)


@torch.no_grad()
def ablate_top_neurons(
    model: Model, texts: Sequence[str], answers: Ids, layer: int, kept: Prefilled = ()
) -> pd.DataFrame:
    """Zero, in each prompt, the neuron of the layer that the trace ranks first for that very prompt: its number, and
    the change of the answer's logit, direct and total. kept: as in `ablate`."""
    block, tables, kept = model.weights.blocks[layer], [], kept or prefill(model, texts, layer)
    for (batch, before), tokens in zip(kept, answers.split([len(b.last) for b, _ in kept]), strict=True):
        layers = list(ends(model, batch, before, before[layer][batch.last], layer))
        first, last = layers[0], layers[-1]
        trace = first.neurons * Part(Site(layer)).read(block, first, logit_direction(model, last.stream, tokens))
        chosen = trace.argsort(-1, descending=True)[:, 0]
        write = first.neurons.gather(1, chosen[:, None]) * block.mlp.W_out[chosen]
        change = block.after_mlp.moved(block.mlp.write(first.neurons), -write[None])
        final = final_streams(model, batch, before, Site(layer), first, change)
        both = model.weights.norm_final(torch.cat((last.stream[None], final)))
        logits = (both * model.weights.W_U[:, tokens].T).sum(-1)
        direct, total = -trace.gather(1, chosen[:, None])[:, 0], logits[1] - logits[0]
        tables.append(pd.DataFrame({"neuron": chosen.tolist(), "direct": direct.tolist(), "total": total.tolist()}))
    return pd.concat(tables, ignore_index=True).assign(prompt=list(texts), way="zero")


def summarise_ablations(table: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """A row a part and way of an `ablate` table: direct and total effect, means with bootstrap 95 % intervals."""
    groups = table.groupby(["part", "way"], sort=False)
    rows = [(*of, len(group), group.direct.mean(), *mean_interval(group.total, seed=seed)) for of, group in groups]
    return pd.DataFrame(rows, columns=["part", "way", "n", "direct", "total", "low", "high"])


# Patching of last positions alone


@dataclass(frozen=True)
class LayerCache:
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
    layers: tuple[LayerCache, ...]
    final: Float[Tensor, "n d_model"]  # the last position's stream before the final norm
    logits: Float[Tensor, "n vocab"]

    @property
    def z(self) -> Z:
        return torch.stack([layer.z for layer in self.layers], 1)

    @property
    def mlps(self) -> MLPs:
        return torch.stack([layer.mlp for layer in self.layers], 1)

    @property
    def patterns(self) -> Float[Tensor, "n n_layers n_heads t"]:
        return torch.stack([layer.pattern for layer in self.layers], 1)

    def entered(self, layer: int) -> Float[Tensor, "n d_model"]:
        """The last position's stream before a layer (0-based)."""
        return self.layers[layer].stream[torch.arange(len(self.prompts)), self.last]

    def capture(self) -> Capture:
        """As `trace.capture` would have it."""
        stream = torch.stack([*map(self.entered, range(len(self.layers))), self.final], 1)
        return Capture(self.prompts, self.tokens, self.last, stream, self.z, self.mlps, self.logits)

    def take(self, rows: Sequence[int]) -> "CachedRun":
        """Some of the prompts."""
        at = torch.tensor(list(rows), dtype=torch.long)
        layers = tuple(LayerCache(*(x[at] for x in vars(layer).values())) for layer in self.layers)
        prompts = tuple(self.prompts[i] for i in rows)
        return CachedRun(prompts, self.tokens[at], self.last[at], layers, self.final[at], self.logits[at])


@torch.no_grad()
def run_with_cache(model: Model, prompts: Sequence[str]) -> CachedRun:
    """All layers, by the weight view. Raises DataError for an empty or too long prompt."""
    tokens, last = model.encode(prompts)
    return _run_on(model, (tuple(prompts), tokens, last), [], model.weights.embed(tokens))


@torch.no_grad()
def rerun_from(model: Model, before: CachedRun, layer: int) -> CachedRun:
    """The run again from a layer up (0-based), after a change of weights there or above."""
    asked = before.prompts, before.tokens, before.last
    return _run_on(model, asked, [*before.layers[:layer]], before.layers[layer].stream)


def _run_on(
    model: Model, asked: tuple[tuple[str, ...], Tensor, Tensor], layers: list[LayerCache], stream: Tensor
) -> CachedRun:
    """The layers above those that were run, from the stream that leaves these. asked: the run's first three fields."""
    weights, last = model.weights, asked[2]
    rows = torch.arange(len(last))
    for block in weights.blocks[len(layers) :]:
        attn, x = block.attn, block.norm_attn(stream)
        pattern, keys, values = attn.attend(x)
        z = attn.mix(pattern, values).transpose(1, 2)
        middle = stream + block.write_heads(z)
        mlp = block.write_mlp(stream, middle)
        at_last = pattern[rows, :, last], z[rows, last], middle[rows, last], mlp[rows, last]
        keys = keys[:, :: keys.shape[1] // values.shape[1]]  # one for each key/value head
        layers.append(LayerCache(stream, keys, values, *at_last))
        stream = middle + mlp
    final = stream[rows, last]
    return CachedRun(*asked, tuple(layers), final, weights.norm_final(final) @ weights.W_U)


def logit_differences(run: CachedRun, pairs: Pairs) -> Float[Tensor, " n"]:
    """First token's logit minus the second's."""
    return -run.logits.gather(1, pairs).diff()[:, 0]


@torch.no_grad()
def patch_components(
    model: Model, run: CachedRun, z: Z, mlps: MLPs, pairs: Pairs, *, lowest: int = 0
) -> Float[Tensor, "component n"]:
    """Logit difference of each prompt with one component at a time made to put out what z or mlps say: all heads layer
    by layer, then all MLPs, as `trace.components` orders them. Below the layer `lowest` nothing is patched."""
    a_layer, n = model.weights.n_heads + 1, len(run.prompts)  # its heads, and its MLP
    (rows,) = deque(patched_streams(model, run, z, mlps, start=lowest), maxlen=1)  # what leaves the last layer
    unpatched = logit_differences(run, pairs).expand(lowest, a_layer, n)
    patched = torch.cat((unpatched, patched_logit_differences(model, rows, pairs).view(-1, a_layer, n)))
    return torch.cat((patched[:, :-1].flatten(0, 1), patched[:, -1]))


@torch.no_grad()
def patched_streams(
    model: Model, run: CachedRun, z: Z, mlps: MLPs | None = None, *, start: int = 0, below: Rows | None = None
) -> Iterator[Rows]:
    """The patched last rows that leave each layer from `start` up: those of the layers below, one layer further, then a
    head each (and the MLP, if mlps are given), for all n prompts. below: what enters `start`, by the same weights."""
    rows = run.final[:0] if below is None else below
    position = torch.arange(run.tokens.shape[1])
    for i in range(start, model.weights.n_layers):
        block, layer = model.weights.blocks[i], run.layers[i]
        change = einsum(z[:, i] - layer.z, block.attn.W_O, "b n h, n h d -> n b d")
        change = block.after_attn.moved(block.attn.write(layer.z), change)
        before = (position < run.last[:, None]) & block.attn.within_window(run.last, position)
        further = rows + block.write_heads(gathered(block, Past(layer.keys, layer.values, before, run.last), rows))
        middle = torch.cat((further, (layer.middle + change).flatten(0, 1)))
        entered = torch.cat((rows, run.entered(i).repeat(len(change), 1)))
        rows = middle + block.write_mlp(entered, middle)
        if mlps is not None:
            rows = torch.cat((rows, layer.middle + mlps[:, i]))
        yield rows


def patched_logit_differences(model: Model, rows: Rows, pairs: Pairs) -> Float[Tensor, "copy n"]:
    """Logit differences of patched rows that left the last layer."""
    return read_logit_differences(model, model.weights.norm_final(rows).view(-1, len(pairs), rows.shape[1]), pairs)


def read_logit_differences(model: Model, final: Float[Tensor, "*b n d_model"], pairs: Pairs) -> Float[Tensor, "*b n"]:
    """First token's logit minus the second's, of a normalised stream."""
    directions = model.weights.W_U[:, pairs[:, 0]] - model.weights.W_U[:, pairs[:, 1]]
    return (final * directions.T).sum(-1)
