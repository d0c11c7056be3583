"""Run a model again from one layer up, for many texts at once.

Editing or training one layer leaves everything below it as it was. So the stream that enters the layer is computed
once (`resid_pre`), and only what lies above is run again (`above`).

Texts are packed into one row without padding: each token keeps the position it has in its own text, and a mask keeps
the texts blind to each other. With short texts a forward pass spends its time reading weights from memory; a pack
reads each weight once for all of them. And prompts that a template makes begin alike: what stands before the country is
the same in all, sees only itself, and is run once.

Where only last tokens change, only they are run again (`ends`): nobody stands after a last token, so no other token
can notice. And where an edit's values are tried (`above`), the last layer is run only for what is read of it.

Losses over the vocabulary take one reading of the unembedding. With few rows, a product with W_U spends its time
fetching W_U from memory, and a loss needs it twice: for the logits, and for the gradient. But both need only a sum over
the vocabulary, which can be taken a few thousand tokens at a time while these are at hand (Milakov and Gimelshein 2018;
in attention, Dao et al. 2022):

    log_z(x) = log sum_v exp(x . W_U[:, v])        grad log_z(x) = sum_v p_v(x) W_U[:, v], the mean unembedding

Any loss over the vocabulary follows from it. Cross-entropy of a token is `log_z(x) - x . W_U[:, token]`;
and the divergence of the distribution at x from that at y is how far `log_z` lies above its tangent at y (a Bregman
divergence), so that of y three small things must be kept (`Reference`), not a number for each token:

    KL(y || x) = log_z(x) - log_z(y) - (x - y) . grad log_z(y)

It is a small difference of large numbers: rounding leaves some 1e-5 nats a position, of either sign, and less in a
mean. Sums are in fp32, whatever the model is read in.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import functional_call
from tqdm.auto import tqdm

from lib.errors import DataError
from lib.models import Model
from lib.weights import Attention, Block, Slice, Unembedding

Stream = Float[Tensor, "t d_model"]  # of all tokens of a pack
Streams = dict[int, Stream]  # before each of some layers
Values = dict[Slice, Tensor] | None  # put for a layer's own, which are not written to
Which = Int[Tensor, " n"] | None  # rows of a pack
Bias = Float[Tensor, " vocab"] | None  # added to all logits
Rows = Float[Tensor, "m d_model"]  # of m tokens: of last ones in as many versions as there are, or of any
ROOM = 512  # tokens in a pack: attention's cost grows with its square, and beyond a few hundred nothing is gained
_Places = dict[tuple[int, int, int, int], int]  # token, position, row of the token before, own text or -1: its row


@dataclass(frozen=True)
class Pack:
    """Texts in one row of t tokens. position: of each token in its own text. before: row of the token before it in its
    text, -1 at a start. last: row of each text's last token."""

    tokens: Int[Tensor, " t"]
    position: Int[Tensor, " t"]
    before: tuple[int, ...]
    last: Int[Tensor, " text"]

    @cached_property
    def sees(self) -> Bool[Tensor, "t t"]:
        """Where each token may look: back, within its text."""
        sees = np.eye(len(self.before), dtype=bool)
        for row, before in enumerate(self.before):
            if before >= 0:
                sees[row] |= sees[before]
        return torch.tensor(sees)

    def sees_in(self, attn: Attention) -> Bool[Tensor, "t t"]:
        """Where each token may look in a layer, whose attention may reach back only so far."""
        return self.sees if attn.window is None else self.sees & attn.within_window(self.position, self.position)

    def mask(self, attn: Attention) -> Float[Tensor, "1 1 t t"]:
        """0 where a token may look in a layer, the lowest number elsewhere."""
        return torch.zeros(self.sees.shape).masked_fill(~self.sees_in(attn), torch.finfo(torch.float32).min)[None, None]


def pack(model: Model, texts: Sequence[Sequence[int]], *, share: bool = False) -> Pack:
    """All texts, token lists, in one pack. share, errors: as of `packs`."""
    (whole,) = packs(model, texts, room=sum(map(len, texts)), share=share)
    return whole


def packs(model: Model, texts: Sequence[Sequence[int]], room: int = ROOM, *, share: bool = False) -> Iterator[Pack]:
    """The texts in their order, in as many packs as needed, each of at most `room` tokens (or of one text). share:
    those that begin alike share these tokens; each keeps a last token of its own, so that what is read or changed there
    is its own. Raises DataError for no text, an empty one, or one longer than the model reads."""
    if not texts or not all(texts):
        raise DataError("there is nothing to run: no text was given, or one without a token.")
    if (longest := max(map(len, texts))) > model.weights.context:
        raise DataError(f"a text has {longest} tokens; {model.name} reads {model.weights.context}. Shorten it.")
    rows, last = _Places(), list[int]()
    for i, text in enumerate(texts):
        filled, end = len(rows), _placed(rows, i, text, share)
        if last and len(rows) > room:
            yield _made(list(rows)[:filled], last)
            rows, last = _Places(), []
            end = _placed(rows, i, text, share)
        last.append(end)
    yield _made(list(rows), last)


def _placed(rows: _Places, i: int, text: Sequence[int], share: bool) -> int:
    """Put text i into a pack in the making, and give back the row of its last token."""
    row = -1
    for position, token in enumerate(text):
        shared = share and position < len(text) - 1
        row = rows.setdefault((token, position, row, -1 if shared else i), len(rows))
    return row


def _made(rows: Sequence[tuple[int, ...]], last: Sequence[int]) -> Pack:
    tokens, position, before, _ = zip(*rows, strict=True)
    return Pack(torch.tensor(tokens), torch.tensor(position), before, torch.tensor(last))


@torch.no_grad()
def next_token_logits(model: Model, prompts: Sequence[str], *, progress: str | None = None) -> Float[Tensor, "n vocab"]:
    """Logits of the token after each prompt, in fp32: a row a prompt, each as long as the vocabulary. Raises DataError
    as `logits_by_pack` does."""
    logits = torch.empty(len(prompts), model.weights.W_U.shape[1])
    for at, part in logits_by_pack(model, prompts, progress=progress):
        logits[at] = part
    return logits


@torch.no_grad()
def logits_by_pack(
    model: Model, prompts: Sequence[str], *, progress: str | None = None
) -> Iterator[tuple[Int[Tensor, " part"], Float[Tensor, "part vocab"]]]:
    """`next_token_logits` in parts, with the prompts that each is of. Prompts that begin alike are run together once.
    progress: a label for a bar. Raises DataError for an empty or too long prompt, or for none."""
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    whole = list(packs(model, [model.token_ids(prompts[i]) for i in order], share=True))
    places = torch.tensor(order).split([len(texts.last) for texts in whole])
    bar = tqdm(whole, desc=progress, disable=progress is None or len(whole) < 2, leave=False)
    for texts, at in zip(bar, places, strict=True):
        final = above(model, texts, 0, resid_pre(model, texts, 0))[texts.last]
        yield at, (final @ model.weights.W_U).float()


@torch.no_grad()
def resid_pre(model: Model, texts: Pack, layer: int) -> Stream:
    """The residual stream before a layer (0-based)."""
    return streams(model, texts, [layer])[layer]


@torch.no_grad()
def streams(model: Model, texts: Pack, layers: Iterable[int]) -> Streams:
    """The residual stream before each of some layers, in one pass; before the layer that would follow the last one, it
    is the final stream, not yet normalised."""
    reached, stream, out = 0, model.weights.embed(texts.tokens, texts.position), {}
    for layer in sorted(set(layers)):
        stream = out[layer] = _blocks(model, texts, stream, range(reached, layer))
        reached = layer
    return out


def above(model: Model, texts: Pack, layer: int, stream: Stream, values: Values = None, read: Which = None) -> Rows:
    """The final residual stream, normalised, from the stream that enters a layer; differentiable in both. read: the
    rows that are wanted, in this order; all, if not given. With values, or a sink, the last layer is run for these
    alone, by the view of its weights: changes of these in place are seen; hooks, adapters and modules put for its own
    are not."""
    norm, end = model.weights.norm_final_module, model.weights.n_layers - 1
    if read is None or not (values or model.weights.sink) or layer == end:
        final = norm(_blocks(model, texts, stream, range(layer, end + 1), values))
        return final if read is None else final[read]
    stream = _blocks(model, texts, stream, range(layer, end), values)
    (last,) = ends(model, texts, {end: stream}, stream[read], end, read)
    return norm(last.stream)


def resid_post(model: Model, texts: Pack, stream: Stream, layer: int) -> Stream:
    """The stream after one layer, from the stream before it."""
    return _blocks(model, texts, stream, range(layer, layer + 1))


@dataclass(frozen=True)
class Past:
    """What n tokens look back on in one layer (the last ones of texts, or any in the last layer): keys (rotated) and
    values, in a row for each text or in one row for all. before: those before each of the n. position: of the n."""

    keys: Float[Tensor, "row n_kv t d_head"]
    values: Float[Tensor, "row n_kv t d_head"]
    before: Bool[Tensor, "n t"]
    position: Int[Tensor, " n"]


def past(block: Block, texts: Pack, stream: Stream, at: Which = None) -> Past:
    """What the tokens in the rows `at` of a pack, or its last ones, look back on. stream: what enters the block."""
    x, attn, at = block.norm_attn(stream), block.attn, texts.last if at is None else at
    keys, values = attn.looked_at(x, texts.position)
    before = texts.sees_in(attn)[at].scatter(1, at[:, None], False)
    return Past(attn.rotated(keys, texts.position)[None], values[None], before, texts.position[at])


def gathered(block: Block, past: Past, rows: Rows) -> Float[Tensor, "m n_heads d_head"]:
    """z of last tokens from what they look back on. rows: all n texts in their order, once for each version of them."""
    n_texts, (row, n_kv) = len(past.position), past.keys.shape[:2]  # row: n_texts, or 1 for all of them
    x, attn, position = block.norm_attn(rows), block.attn, past.position.repeat(len(rows) // n_texts)
    q, k, v = attn.rotated(attn.queries(x), position), attn.rotated(attn.keys(x), position), attn.values(x)
    q, k, v = (rearrange(y, "(kv g) (c row) h -> c row kv g h", kv=n_kv, row=row) for y in (q, k, v))
    scores = einsum(q, past.keys, "c row kv g h, row kv t h -> c row kv g t")
    self_score = einsum(q, k[..., 0, :], "c row kv g h, c row kv h -> c row kv g")
    before = rearrange(past.before.repeat(len(rows) // n_texts, 1), "(c row) t -> c row 1 1 t", row=row)
    scores = torch.cat((scores.masked_fill(~before, float("-inf")), self_score[..., None]), -1)
    pattern = (scores / attn.score_scale).softmax(-1)
    z = einsum(pattern[..., :-1], past.values, "c row kv g t, row kv t h -> c row kv g h")
    return rearrange(z + pattern[..., -1:] * v, "c row kv g h -> (c row) (kv g) h")


@dataclass(frozen=True)
class End:
    """What a layer did with last tokens; `entered` is what entered it, `stream` what leaves it."""

    entered: Rows
    z: Float[Tensor, "m n_heads d_head"]
    middle: Rows  # the stream between attention and MLP
    neurons: Float[Tensor, "m d_mlp"]
    stream: Rows


def ends(model: Model, texts: Pack, before: Streams, rows: Rows, start: int, at: Which = None) -> Iterator[End]:
    """Last tokens in layer `start`, in the next, and so on, from what they are on entering `start`. before: the streams
    that enter these layers, of all tokens. rows: as in `gathered`; differentiable in them. at: as in `past`; other
    tokens than the last ones only from the last layer, for in any other, later ones look back on them."""
    for layer in range(start, model.weights.n_layers):
        block = model.weights.blocks[layer]
        z = gathered(block, past(block, texts, before[layer], at), rows)
        middle = rows + block.write_heads(z)
        neurons = block.neurons(rows, middle)
        entered, rows = rows, middle + block.write_neurons(neurons)
        yield End(entered, z, middle, neurons, rows)


def _blocks(model: Model, texts: Pack, stream: Stream, layers: range, values: Values = None) -> Stream:
    """The model's own blocks; the first one with the values in place."""
    weights, stream = model.weights, stream[None]
    if weights.sink is not None:
        weights.sink.rows = (texts.tokens == len(weights.W_E))[None]
    kinds = {(a.window, a.rotary): a for a in (weights.blocks[i].attn for i in layers)}
    extras = {kind: _extra(texts, stream, attn) for kind, attn in kinds.items()}
    for layer in layers:
        module, attn, prefix = weights.blocks[layer].module, weights.blocks[layer].attn, weights.layout.prefix(layer)
        extra = extras[attn.window, attn.rotary]
        if values and layer == layers.start:
            names = {part: part.name.removeprefix(prefix) for part in values}
            changed = {name: part.put(module.get_parameter(name), values[part]) for part, name in names.items()}
            out = functional_call(module, changed, (stream,), extra)
        else:
            out = module(stream, **extra)
        stream = out[0] if isinstance(out, tuple) else out
    return stream[0]


def _extra(texts: Pack, stream: Tensor, attn: Attention) -> dict[str, Any]:
    """What a model hands to a layer beside the stream."""
    rotated = {} if attn.rotary is None else {"position_embeddings": attn.rotary(stream, texts.position[None])}
    return {"attention_mask": texts.mask(attn), **rotated}


CHUNK = 2048  # tokens of the vocabulary at a time: their part of W_U stays in a processor's cache


@dataclass(frozen=True)
class Reference:
    """A distribution over the vocabulary at each of some positions, as far as a divergence from it needs it: the final
    stream (normalised), the log-normaliser there, and the mean unembedding."""

    final: Float[Tensor, "*n d_model"]
    log_z: Float[Tensor, "*n"]
    mean_unembedding: Float[Tensor, "*n d_model"]

    def divergence(self, final: Float[Tensor, "*n d_model"], log_z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """KL(this || the distribution at `final`, whose log-normaliser is log_z), in nats; not clamped at zero."""
        return log_z - self.log_z - ((final - self.final) * self.mean_unembedding).sum(-1)

    def __getitem__(self, rows: Any) -> "Reference":
        return Reference(self.final[rows], self.log_z[rows], self.mean_unembedding[rows])


def reference(final: Rows, W_U: Unembedding) -> Reference:
    """The distributions at n final streams (normalised)."""
    log_z, mean, _ = _swept(final, W_U, None, mean=True)
    return Reference(final.detach(), log_z, mean)


def log_normalisers(final: Rows, W_U: Unembedding, apart: Int[Tensor, " k"] | None = None) -> tuple[Tensor, Tensor]:
    """The log-normaliser of each final stream (normalised) (m), differentiable in it, once. apart: a token for each
    of the first k rows; for these also the largest logit of any other token (k), not differentiable."""
    log_z, mean, other = _swept(final, W_U, apart, mean=final.requires_grad and torch.is_grad_enabled())
    return log_z + ((final - final.detach()) * mean).sum(-1), other  # adds 0, whose gradient is the mean


@torch.no_grad()
def _swept(final: Tensor, W_U: Tensor, apart: Tensor | None, *, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-normalisers; mean unembeddings, zero unless asked for; the largest logits of tokens not set apart."""
    final, start = final.float(), 0
    top, total = torch.full((len(final),), float("-inf")), torch.zeros(len(final))
    weighed, other = torch.zeros_like(final), top[: 0 if apart is None else len(apart)]
    for part in W_U.T.split(CHUNK):
        part = part.float()
        logits = final @ part.T
        if apart is not None:
            is_apart = torch.arange(start, start + len(part)) == apart[:, None]
            other = torch.maximum(other, logits[: len(apart)].masked_fill(is_apart, float("-inf")).amax(1))
        new = torch.maximum(top, logits.amax(1))
        shrunk, share = (top - new).exp(), (logits - new[:, None]).exp()
        total = total * shrunk + share.sum(1)  # relative to the largest logit so far: logarithms would add up rounding
        if mean:
            weighed = torch.addmm(weighed * shrunk[:, None], share, part)
        top, start = new, start + len(part)
    return top + total.log(), weighed / total[:, None], other


@torch.no_grad()
def beside(
    finals: Float[Tensor, "way n d_model"], tokens: Int[Tensor, " n"], W_U: Unembedding, bias: Bias, *, first: int
) -> tuple[Float[Tensor, "way n"], Float[Tensor, "way n"]]:
    """Cross-entropy of tokens at n final streams (normalised) in several ways, and KL(the first way || each), in nats.
    bias: added to the logits of all ways but the `first` ones. The KL is the mean, as the first way weighs it, of the
    differences of logits, less the normalisers': accurate where it is far below 1e-5."""
    finals, start, right = finals.float(), 0, (finals * W_U.T[tokens]).sum(-1).float()
    top, total, apart = torch.full(right.shape, float("-inf")), torch.zeros(right.shape), torch.zeros(right.shape)
    for part in W_U.T.split(CHUNK // 4):  # there are many rows
        logits = finals @ part.float().T
        if bias is not None:
            logits[first:] += bias[start : start + len(part)]
        new = torch.maximum(top, logits.amax(-1))
        shrunk, share = (top - new).exp(), (logits - new[..., None]).exp()
        total = total * shrunk + share.sum(-1)
        apart = apart * shrunk[0] + (share[0] * (logits[0] - logits)).sum(-1)
        top, start = new, start + len(part)
    if bias is not None:
        right[first:] += bias[tokens]
    log_z = top + total.log()
    return log_z - right, (apart / total[0] - log_z[0] + log_z).clamp(min=0)
