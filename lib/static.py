"""Input-free diagnostics of every attention head (the source page, "Static diagnostics").

Nothing here runs the model on a text. Token embeddings go through weights, one head at a time:

    1. QK overlap      do W_Q and W_K read the same residual dimensions?
    2. K-norm          which token types does a layer's key matrix answer loudest?
    3. roles           what each head's query seeks, its key advertises, its value channel does
    4. relation map    which heads' OV circuits turn a country into its capital

Conventions: row vectors (x @ W). The norm before attention is applied with its gain; positions, rotations and the
biases of Q, K, V are left out, because they belong to no token. Embeddings are those of layer 1: in deeper layers
they are off the distribution that the head reads, which is the price of using no input, and `enrich` is the
smallest step towards it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.stats import hypergeom
from torch import Tensor
from tqdm.auto import tqdm

from lib.errors import DataError
from lib.facts import Fact, load_mapping
from lib.files import DATA
from lib.models import Model
from lib.recall import first_tokens
from lib.sites import Site
from lib.statistics import ByHead
from lib.weights import Unembedding, Vectors, Weights

Answers = Int[Tensor, " answer"]  # their first tokens
Types = dict[str, list[int]]  # token type -> ids of its words
PART = 1024  # tokens of the vocabulary by which answers are judged at a time (`_in_top`)
TINY = 1e-30  # a variance that no living head has: a dead one's logits are 0, not 0 / 0
LEAST_WORDS = 5  # of a token type: a mean of fewer says nothing
TOP = 10  # of the tokens that a head promotes: the relation map asks whether the answer is one of them


def top_dimensions(d_model: int) -> int:
    """How many residual dimensions QK overlap takes: the paper's 100 of GPT-2's 768, and never more than a sixth."""
    return min(100, d_model // 6)


@torch.no_grad()
def qk_overlap(weights: Weights, *, folded: bool = True) -> ByHead:
    """Share of a head's top-k residual dimensions, by row norm, that W_Q and W_K have in common (0 to 1).
    folded: with the norm's gain multiplied in, as the head really reads. k = `top_dimensions`. Source page,
    "QK overlap (top-100 dimension intersection)"; grouped query heads are compared with the key head they share."""
    rows = []
    for block in weights.blocks:
        gain = block.norm_attn.gain[:, None] if folded else 1.0
        attn, k = block.attn, top_dimensions(weights.d_model)
        norms = [(gain * W).norm(dim=-1) for W in (attn.W_Q, attn.per_head(attn.W_K))]
        q_top, k_top = (torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.topk(k).indices, True) for x in norms)
        rows.append((q_top & k_top).sum(-1) / k)
    return torch.stack(rows)


def qk_overlap_chance(d_model: int) -> tuple[float, float, float]:
    """Mean, and the ends of the central 95 %, of the overlap of two random choices (hypergeometric)."""
    k = top_dimensions(d_model)
    law = hypergeom(d_model, k, k)
    low, high = law.interval(0.95)
    return float(law.mean() / k), float(low / k), float(high / k)


def load_token_types(model: Model, path: Path | None = None) -> Types:
    """Those words of each type that the tokenizer holds as one token. Words get a leading space; punctuation and word
    pieces do not. The organism brings its own list. Raises DataError where a type keeps fewer than 5."""
    if path is None:
        path = DATA / ("organism/token_types.yaml" if model.plain_name == "organism" else "token_types.yaml")
    types = {}
    for name, words in load_mapping(path, list).items():
        tokens = model.pieces if name in ("punctuation", "word_piece") else model.word
        ids = [tokens(str(word)) for word in words]
        types[name] = sorted({row[0] for row in ids if len(row) == 1})
        if (n := len(types[name])) < LEAST_WORDS:
            raise DataError(f"{path}: only {n} words of {name!r} are one token for {model.name}; add more.")
    return types


@torch.no_grad()
def k_norms_by_head(weights: Weights, token_ids: Sequence[int]) -> Float[Tensor, "n_layers n_kv_heads token"]:
    """Norm of `norm(e) W_K` of every key head, for each token's embedding e, after a norm of keys if there is one."""
    e, keys = weights.embeddings(list(token_ids)), []
    for block in weights.blocks:
        keys.append(block.attn.norm_K(einsum(block.norm_attn(e), block.attn.W_K, "t d, n d h -> n t h")))
    return torch.stack([k.norm(dim=-1) for k in keys])


def k_norm_table(weights: Weights, types: Types, *, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """One row a layer and type: mean K-norm, its bootstrap 95 % interval over words, n, and top_share: how often the
    type is the loudest of its layer when all types' words are resampled."""
    rng = np.random.default_rng(seed)
    means, resampled = [], []
    for ids in types.values():
        norms = k_norms_by_head(weights, ids).mean(1).cpu().numpy()  # (layer, word)
        draws = rng.integers(len(ids), size=(resamples, len(ids)))
        means.append(norms.mean(-1))
        resampled.append(norms[:, draws].mean(-1))
    boot = np.stack(resampled, 1)  # (layer, type, resample)
    low, high = np.quantile(boot, (0.025, 0.975), axis=-1)
    is_loudest = boot.argmax(1)[:, None] == np.arange(len(types))[:, None]  # (layer, type, resample)
    table = pd.DataFrame(product(range(weights.n_layers), types), columns=["layer", "type"])
    sizes, numbers = [*map(len, types.values())] * weights.n_layers, (np.stack(means, 1), low, high)
    table["mean"], table["low"], table["high"] = (x.ravel() for x in numbers)
    return table.assign(n=sizes, top_share=is_loudest.mean(-1).ravel())


def loudness_spread(table: pd.DataFrame) -> float:
    """By how much the loudest type exceeds the quietest, in the median layer (a share)."""
    layers = table.groupby("layer")["mean"]
    return float((layers.max() / layers.min() - 1).median())


def loudest_type_by_layer(table: pd.DataFrame) -> list[str]:
    """The type with the largest mean K-norm in each layer of a `k_norm_table`."""
    return table.loc[table.groupby("layer")["mean"].idxmax()].sort_values("layer")["type"].tolist()


@torch.no_grad()
def enrich(weights: Weights, e: Vectors) -> Vectors:
    """Embeddings with the first MLP's output added, as if the token stood alone and no head had moved anything."""
    return e + weights.blocks[0].write_mlp(e, e)


@dataclass(frozen=True)
class RelationMap:
    """hits[layer, head, subject, answer]: the answer's first token is among the head's TOP for that subject.
    The diagonal is the relation; off it lies the null. Scores are shares of subjects, 0 to 1."""

    hits: Bool[Tensor, "n_layers n_heads subject answer"]

    @property
    def score(self) -> ByHead:
        return self.hits.diagonal(dim1=-2, dim2=-1).float().mean(-1)

    def null(self, *, permutations: int = 1000, seed: int = 0) -> Float[Tensor, "permutation n_layers n_heads"]:
        """Scores with the answers permuted among the subjects."""
        generator, n = torch.Generator().manual_seed(seed), self.hits.shape[-1]
        hits, subjects = self.hits.float(), torch.arange(n)
        orders = [torch.randperm(n, generator=generator, device="cpu") for _ in range(permutations)]
        return torch.stack([hits[..., subjects, order].mean(-1) for order in orders])

    def largest(self, **options: int) -> Float[Tensor, " permutation"]:
        """The best head's score in each permutation of `null`."""
        return self.null(**options).flatten(1).amax(-1)

    def p_values(self, **options: int) -> ByHead:
        """One-sided, corrected for the number of heads by the permutation distribution of the largest score."""
        return join([self], **options).p

    def table(self, **options: int) -> pd.DataFrame:
        """All heads, best first: site, score, p (family-wise)."""
        table = pd.DataFrame(product(*map(range, self.score.shape)), columns=["layer", "head"])
        table.insert(0, "site", [str(Site(*at)) for at in zip(table.layer, table["head"], strict=True)])
        table["score"], table["p"] = (x.flatten().tolist() for x in (self.score, self.p_values(**options)))
        return table.sort_values("score", ascending=False, kind="stable")


@dataclass(frozen=True)
class JointMap:
    """Several relation maps read as one: each head's best score, and its p corrected for all heads and all maps. What a
    diagnosis may quote without choosing the map that flatters it."""

    score: ByHead
    p: ByHead

    def rank(self, site: Site) -> int:
        return int((self.score > self.score[site.layer, site.head]).sum()) + 1


def join(maps: Iterable[RelationMap], **options: int) -> JointMap:
    """The maps as one: each head's best score of them, against the best of all heads in all maps, permuted alike."""
    maps = list(maps)
    score = torch.stack([m.score for m in maps]).amax(0)
    largest = torch.stack([m.largest(**options) for m in maps]).amax(0)
    return JointMap(score, (1 + (largest[:, None, None] >= score).sum(0)) / (1 + len(largest)))


def relation_numbers(name: str, relation: RelationMap, *, seed: int = 0) -> dict[str, Any]:
    """What chapter 1 quotes of one map: its best head, how many heads beat the null, and the null."""
    table = relation.table(seed=seed)
    return {
        f"relation_best_{name}": table.site.iloc[0],
        f"relation_best_{name}_score": (table.score.iloc[0], ".0%"),
        f"relation_significant_{name}": int((table.p <= 0.05).sum()),
        f"relation_null_{name}": (relation.largest(seed=seed).quantile(0.95), ".1%"),
    }


@torch.no_grad()
def subject_embeddings(model: Model, facts: Sequence[Fact]) -> dict[str, Float[Tensor, "subject d_model"]]:
    """Each subject's embedding, of its last token: `raw`, and `enriched` by the first MLP."""
    raw = model.weights.embeddings([model.word(f.subject)[-1] for f in facts])
    return {"raw": raw, "enriched": enrich(model.weights, raw)}


@torch.no_grad()
def unembedding_hits(model: Model, facts: Sequence[Fact]) -> int:
    """How many answers the unembedding alone puts among the TOP of a subject's raw or enriched embedding, with no head
    in between: what the relation map would find if embeddings already held the relation."""
    vocabulary, answers = _outliers_first(model.weights, first_tokens(model, facts))
    hits = [_in_top(e, vocabulary, answers).diagonal() for e in subject_embeddings(model, facts).values()]
    return int(torch.stack(hits).any(0).sum())


@torch.no_grad()
def relation_maps(
    model: Model, facts: Sequence[Fact], *, layers: Sequence[int] | None = None, progress: str | None = None
) -> dict[str, RelationMap]:
    """Push each subject's embedding, `raw` and `enriched` by the first MLP, through a head's norm, W_V, W_O and the
    unembedding (final gain folded in), and ask whether the answer is among the TOP promoted tokens of the whole
    vocabulary. A subject of several tokens is read at its last one. Compare MAPS (Elhelo and Geva 2025). layers:
    0-based; all, if not given."""
    weights, hits = model.weights, []
    vocabulary, answers = _outliers_first(weights, first_tokens(model, facts))
    e = torch.cat([*subject_embeddings(model, facts).values()])
    chosen = range(weights.n_layers) if layers is None else layers
    for block in tqdm([weights.blocks[i] for i in chosen], desc=progress, disable=progress is None, leave=False):
        v = einsum(block.norm_attn(e), block.attn.per_head(block.attn.W_V), "s d, n d h -> n s h")
        out = v @ block.W_O
        hits.append(_in_top(out.flatten(0, 1), vocabulary, answers).unflatten(0, out.shape[:2]))
    by_raw, by_enriched = torch.stack(hits).split(len(facts), dim=2)  # (layer, head, subject, answer)
    return {"raw": RelationMap(by_raw), "enriched": RelationMap(by_enriched)}


# Thresholds of the roles, fixed before any table was made; chapter 1 says them in words
EFFECT = 0.5  # standard deviations over words by which a type stands above the mean word
ROLE_P = 0.01  # of the permutation tests, for each head
COPY = 1.0  # standard deviations of the vocabulary's logits by which a word's own logit lies above or below them
RELATION = 0.1  # share of subjects whose answer a head promotes


@torch.no_grad()
def head_roles(
    model: Model, types: Types, maps: list[RelationMap], *, layers: Sequence[int] | None = None, **options: int
) -> pd.DataFrame:
    """One row a head of the layers (0-based, all if not given), with the numbers behind three labels.

    seeks       the type whose keys get the highest mean attention score from the average query, `none` unless its
                mean lies EFFECT standard deviations above the mean word and permuted type labels do that with ROLE_P
    advertises  the same for the norm of the head's key
    value       copies / suppresses: a word's own logit through the OV circuit, in standard deviations of all the
                vocabulary's logits, is at least +COPY / at most -COPY on average, and with ROLE_P lies on the same
                side of other words' logits; maps relation: the score of a relation map (raw or enriched, whichever is
                higher) is at least RELATION and beats its null, even if the head also copies; neither otherwise

    options: permutations and seed, of all three.
    """
    weights, names = model.weights, list(types)
    words = [token for ids in types.values() for token in ids]
    labels = np.repeat(np.arange(len(types)), [len(ids) for ids in types.values()])
    shuffles, signs = _permuted(labels, **options)
    moments, tables = _unembedding_moments(weights), []
    for layer in range(weights.n_layers) if layers is None else layers:
        block = weights.blocks[layer]
        x, attn = block.norm_attn(weights.embeddings(words)), block.attn
        per_head = (attn.W_Q, attn.per_head(attn.W_K), attn.per_head(attn.W_V))
        q, k, v = (einsum(x, W, "t d, n d h -> n t h") for W in per_head)
        q, k = attn.norm_Q(q), attn.norm_K(k)
        sought = einsum(q.mean(1), k, "n h, n t h -> n t") / attn.score_scale
        columns: dict[str, Any] = {"layer": layer, "head": np.arange(weights.n_heads)}
        columns |= _type_columns("seeks", sought, names, labels, shuffles)
        columns |= _type_columns("advertises", k.norm(dim=-1), names, labels, shuffles)
        columns |= _copy_columns(v, block.W_O, words, moments, signs)
        tables.append(pd.DataFrame(columns))
    return _with_value_roles(pd.concat(tables, ignore_index=True), maps, **options)


def _permuted(labels: NDArray, permutations: int = 1000, seed: int = 0) -> tuple[NDArray, NDArray]:
    """Indicators of permuted labels, scaled to means: (permutation, type, word); random signs: (permutation, word)."""
    rng = np.random.default_rng(seed)
    indicator = (labels == np.arange(labels.max() + 1)[:, None]).astype(np.float32)
    indicator /= indicator.sum(1, keepdims=True)
    shuffles = np.stack([indicator[:, rng.permutation(len(labels))] for _ in range(permutations)])
    return shuffles, np.random.default_rng(seed).choice([-1.0, 1.0], size=(permutations, len(labels)))


def _type_columns(label: str, values: Tensor, names: list[str], labels: NDArray, shuffles: NDArray) -> dict[str, Any]:
    """Of each head (a row of values, one a word): the type with the highest mean, `none` where it does not stand out;
    its height above the mean word in standard deviations; and the share of permutations whose best type is as high."""
    z = values.cpu().numpy()
    z = (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)
    means = np.stack([np.bincount(labels, row) for row in z]) / np.bincount(labels)
    null, effect = _product(shuffles, z.astype(np.float32).T).max(1), means.max(1)  # (permutation, head)
    p = (1 + (null >= effect).sum(0)) / (1 + len(null))
    named = np.where((effect >= EFFECT) & (p <= ROLE_P), np.array(names)[means.argmax(1)], "none")
    return {label: named.tolist(), f"{label}_effect": effect, f"{label}_p": p}


def _with_value_roles(table: pd.DataFrame, maps: Sequence[RelationMap], **options: int) -> pd.DataFrame:
    """The table with each head's name, its higher relation score with its p, and its value channel's label."""
    heads = table.layer.tolist(), table["head"].tolist()
    score, p = (torch.stack(x) for x in ([m.score for m in maps], [m.p_values(**options) for m in maps]))
    best = score.argmax(0, keepdim=True)
    table["relation_score"], table["relation_p"] = (x.gather(0, best)[0][heads].tolist() for x in (score, p))
    relates = (table.relation_score >= RELATION) & (table.relation_p <= ROLE_P)
    copies = (table.copy_p <= ROLE_P) & (table.copy_score.abs() >= COPY) & (table.copy_score * table.gap > 0)
    named = np.where(table.copy_score > 0, "copies", "suppresses")
    role = np.select([relates, copies], ["maps relation", named], "neither")
    table.insert(0, "site", [str(Site(*at)) for at in zip(*heads, strict=True)])
    table.insert(table.columns.get_loc("copy_score"), "value", role.tolist())
    return table.drop(columns="gap")


def _unembedding_moments(weights: Weights) -> tuple[Unembedding, Tensor, Tensor]:
    """The folded unembedding, its mean and its covariance: enough to standardise the logits of any direction."""
    W_U = weights.norm_final.fold(weights.W_U)
    mean = W_U.mean(1)
    centred = W_U - mean[:, None]
    return W_U, mean, centred @ centred.T / W_U.shape[1]


def _copy_scores(v: Tensor, W_O: Tensor, ids: list[int], moments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Standardised logit of each word's own token, and the mean of the other words' tokens, through an OV circuit, all
    of it in the d_head dimensions of the value channel. v: (head, word, d_head); both results: (head, word)."""
    W_U, mean, covariance = moments
    variance = einsum(v @ (W_O @ covariance @ W_O.mT), v, "n t h, n t h -> n t").clamp_min(TINY)
    z = (v @ (W_O @ W_U[:, ids]) - v @ (W_O @ mean)[..., None]) / variance.sqrt()[..., None]
    same = z.diagonal(dim1=-2, dim2=-1)
    return same, (z.sum(-1) - same) / (len(ids) - 1)


def _copy_columns(
    v: Tensor, W_O: Tensor, ids: list[int], moments: tuple[Tensor, ...], signs: NDArray
) -> dict[str, Any]:
    """Of each head, on average over words: the standardised logit of the word's own token; how far it lies above those
    of the other words; and the p of that, a two-sided sign-flip test."""
    same, others = _copy_scores(v, W_O, ids, moments)
    gap = (same - others).cpu().numpy()  # (head, word)
    extreme = np.abs(_product(signs, gap.T.astype(float))) >= np.abs(gap.sum(1))  # (permutation, head)
    p = (1 + extreme.sum(0)) / (1 + len(signs))
    return {"copy_score": [float(row.mean()) for row in same], "copy_p": p, "gap": gap.sum(1)}


def _product(a: NDArray, b: NDArray) -> NDArray:
    """a @ b by PyTorch: NumPy's threads would go on waiting for work where PyTorch's have some."""
    return (torch.from_numpy(a) @ torch.from_numpy(np.ascontiguousarray(b))).numpy()


def _outliers_first(weights: Weights, answers: Answers) -> tuple[Unembedding, Answers]:
    """The folded unembedding, the answers' tokens first and then the others, those farthest from the mean token first,
    because a direction's top tokens are mostly among these; and where the answers now stand in it. Part by part: it is
    the only copy of an unembedding that may be the largest part of a model."""
    fold, W_U = weights.norm_final.fold, weights.W_U
    mean, ordered = fold(W_U.mean(1, keepdim=True)), torch.empty(W_U.T.shape, dtype=W_U.dtype)
    distance = torch.cat([(fold(part) - mean).norm(dim=0) for part in W_U.split(PART, 1)])
    order = distance.index_fill(0, answers, float("inf")).argsort(descending=True)
    for rows, tokens in zip(ordered.split(PART), order.split(PART), strict=True):
        rows.copy_(fold(W_U[:, tokens]).T)
    return ordered.T, order.argsort()[answers]


def _in_top(x: Vectors, vocabulary: Unembedding, answers: Answers) -> Bool[Tensor, "row answer"]:
    """Whether each answer is among the TOP tokens that each row promotes. The TOP-th best of a part of the vocabulary
    is never above that of all of it, so a row is out, and asked no further, once a part has put all its answers out.
    answers: where they stand, in the first part."""
    first, *others = vocabulary.split(max(PART, len(answers)), dim=1)
    logits = x @ first
    own, best = logits[:, answers], logits.topk(TOP).values
    for part in others:
        left = (own >= best[:, -1:]).any(-1)
        best[left] = torch.cat((best[left], x[left] @ part), 1).topk(TOP).values
    return (own >= best[:, -1:]) & x.any(-1, keepdim=True)  # a dead head ties everywhere
