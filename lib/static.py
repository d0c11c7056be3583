"""Input-free diagnostics of every attention head (design, section 4; the source page, "Static diagnostics").

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

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from lib.sites import Site
from lib.weights import Weights

PART = 4096  # tokens of the vocabulary that most answers are judged by; exact all the same (`_in_top_of`)


def top_dimensions(d_model: int) -> int:
    """How many residual dimensions QK overlap takes: the paper's 100 of GPT-2's 768, and never more than a sixth,
    so that small models are not compared on most of their dimensions."""
    return min(100, d_model // 6)


@torch.no_grad()
def qk_overlap(weights: Weights, *, folded: bool = True) -> Float[Tensor, "n_layers n_heads"]:
    """Share of a head's top-k residual dimensions, by row norm, that W_Q and W_K have in common (0 to 1).
    folded: with the norm's gain multiplied in, as the head really reads. k = `top_dimensions`. Source page,
    "QK overlap (top-100 dimension intersection)"; grouped query heads are compared with the key head they share."""
    rows = []
    for block in weights.blocks:
        gain = block.norm_attn.gain[:, None] if folded else 1.0
        attn, k = block.attn, top_dimensions(weights.d_model)
        q, key = (gain * W for W in (attn.W_Q, attn.per_head(attn.W_K)))
        q_top, k_top = (_top_mask(W.norm(dim=-1), k) for W in (q, key))
        rows.append((q_top & k_top).sum(-1) / k)
    return torch.stack(rows)


def qk_overlap_chance(d_model: int, level: float = 0.95) -> tuple[float, float, float]:
    """Mean, and the ends of the central band, of the overlap of two random choices (hypergeometric)."""
    k = top_dimensions(d_model)
    law = hypergeom(d_model, k, k)
    low, high = law.interval(level)
    return float(law.mean() / k), float(low / k), float(high / k)


def load_token_types(model: Model, path: Path | None = None) -> dict[str, list[int]]:
    """Token type -> ids of its words that the tokenizer holds as one token. Words get a leading space; punctuation
    and word pieces do not. The organism brings its own list. Raises DataError where a type keeps fewer than 5."""
    if path is None:
        path = DATA / ("organism/token_types.yaml" if model.name == "organism" else "token_types.yaml")
    types = {}
    for name, words in load_mapping(path).items():
        space = "" if name in ("punctuation", "word_piece") else " "
        ids = [model.token_ids(space + str(word)) for word in words]
        types[name] = sorted({row[0] for row in ids if len(row) == 1})
        if len(types[name]) < 5:
            raise DataError(
                f"{path}: only {len(types[name])} words of {name!r} are one token for {model.name}; add more."
            )
    return types


@torch.no_grad()
def k_norms_by_head(weights: Weights, token_ids: Sequence[int]) -> Float[Tensor, "n_layers n_kv_heads token"]:
    """Norm of `norm(e) W_K` of every key head, for each token's embedding e."""
    e = weights.W_E[list(token_ids)]
    return torch.stack([einsum(b.norm_attn(e), b.attn.W_K, "t d, n d h -> n t h").norm(dim=-1) for b in weights.blocks])


def k_norms(weights: Weights, token_ids: Sequence[int]) -> Float[Tensor, "n_layers token"]:
    """`k_norms_by_head`, averaged over the layer's key heads."""
    return k_norms_by_head(weights, token_ids).mean(1)


def k_norm_table(
    weights: Weights, types: dict[str, list[int]], *, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """One row a layer and type: mean K-norm, its bootstrap 95 % interval over words, n, and top_share: how often the
    type is the loudest of its layer when all types' words are resampled."""
    rng = np.random.default_rng(seed)
    names = list(types)
    boot = []
    means = {}
    for name in names:
        norms = k_norms(weights, types[name]).cpu().numpy()
        draws = rng.integers(norms.shape[1], size=(resamples, norms.shape[1]))
        boot.append(norms[:, draws].mean(-1))  # (layer, resample)
        means[name] = norms.mean(-1)
    stacked = np.stack(boot)  # (type, layer, resample)
    top = stacked.argmax(0)
    rows = [
        (
            layer,
            name,
            means[name][layer],
            *np.quantile(stacked[i, layer], (0.025, 0.975)),
            len(types[name]),
            (top[layer] == i).mean(),
        )
        for layer in range(weights.n_layers)
        for i, name in enumerate(names)
    ]
    return pd.DataFrame(rows, columns=["layer", "type", "mean", "low", "high", "n", "top_share"])


def loudness_spread(table: pd.DataFrame) -> float:
    """By how much the loudest type exceeds the quietest, in the median layer (a share)."""
    layers = table.groupby("layer")["mean"]
    return float((layers.max() / layers.min() - 1).median())


def loudest_type_by_layer(table: pd.DataFrame) -> list[str]:
    """The type with the largest mean K-norm in each layer of a `k_norm_table`."""
    return table.loc[table.groupby("layer")["mean"].idxmax()].sort_values("layer")["type"].tolist()


@torch.no_grad()
def enrich(weights: Weights, e: Float[Tensor, "b d_model"]) -> Float[Tensor, "b d_model"]:
    """Embeddings with the first MLP's output added, as if the token stood alone and no head had moved anything."""
    block = weights.blocks[0]
    return e + block.mlp(block.norm_mlp(e))


@dataclass(frozen=True)
class RelationMap:
    """hits[layer, head, subject, answer]: the answer's first token is among the head's top k for that subject.
    The diagonal is the relation; off it lies the null. Scores are shares of subjects, 0 to 1."""

    hits: Bool[Tensor, "n_layers n_heads subject answer"]
    k: int

    @property
    def score(self) -> Float[Tensor, "n_layers n_heads"]:
        return self.hits.diagonal(dim1=-2, dim2=-1).float().mean(-1)

    def null(self, *, permutations: int = 1000, seed: int = 0) -> Float[Tensor, "permutation n_layers n_heads"]:
        """Scores with the answers permuted among the subjects."""
        generator = torch.Generator().manual_seed(seed)
        n = self.hits.shape[-1]
        hits = self.hits.float()
        index = torch.arange(n)
        return torch.stack(
            [
                hits[..., index, torch.randperm(n, generator=generator, device="cpu")].mean(-1)
                for _ in range(permutations)
            ]
        )

    def p_values(self, **options: int) -> Float[Tensor, "n_layers n_heads"]:
        """One-sided, corrected for the number of heads by the permutation distribution of the largest score."""
        largest = self.null(**options).flatten(1).max(-1).values
        return (1 + (largest[:, None, None] >= self.score).sum(0)) / (1 + len(largest))

    def table(self, **options: int) -> pd.DataFrame:
        """All heads, best first: site, score, p (family-wise)."""
        p = self.p_values(**options)
        rows = [
            (str(Site(layer, head)), layer, head, float(self.score[layer, head]), float(p[layer, head]))
            for layer in range(self.score.shape[0])
            for head in range(self.score.shape[1])
        ]
        return pd.DataFrame(rows, columns=["site", "layer", "head", "score", "p"]).sort_values(
            "score", ascending=False, kind="stable"
        )


@dataclass(frozen=True)
class JointMap:
    """Several relation maps read as one: each head's best score, its p corrected for all heads and all maps, and its
    rank by score. What a diagnosis may quote without choosing the map that flatters it."""

    score: Float[Tensor, "n_layers n_heads"]
    p: Float[Tensor, "n_layers n_heads"]

    def rank(self, site: Site) -> int:
        return int((self.score > self.score[site.layer, site.head]).sum()) + 1


def join(maps: Iterable[RelationMap], *, permutations: int = 1000, seed: int = 0) -> JointMap:
    maps = list(maps)
    score = torch.stack([m.score for m in maps]).amax(0)
    nulls = [m.null(permutations=permutations, seed=seed).flatten(1).amax(-1) for m in maps]
    largest = torch.stack(nulls).amax(0)
    return JointMap(score, (1 + (largest[:, None, None] >= score).sum(0)) / (1 + len(largest)))


@torch.no_grad()
def unembedding_hits(model: Model, facts: Sequence[Fact], *, k: int = 10) -> int:
    """How many answers the unembedding alone puts among the top k of a subject's raw or enriched embedding, with no
    head in between: what the relation map would find if embeddings already held the relation."""
    weights = model.weights
    raw = weights.W_E[[model.token_ids(f" {f.subject}")[-1] for f in facts]]
    answers = torch.tensor([model.first_token(f.answer) for f in facts])
    W_U = weights.norm_final.fold(weights.W_U)
    hits = [_in_top(e @ W_U, answers, k).diagonal() for e in (raw, enrich(weights, raw))]
    return int((hits[0] | hits[1]).sum())


def report_relation(report: Callable[..., None], name: str, relation: RelationMap, *, seed: int = 0) -> None:
    """The numbers of one map that chapter 1 quotes: its best head, how many heads beat the null, and the null."""
    table = relation.table(seed=seed)
    report(f"relation_best_{name}", table.site.iloc[0])
    report(f"relation_best_{name}_score", table.score.iloc[0], ".0%")
    report(f"relation_significant_{name}", int((table.p <= 0.05).sum()))
    report(f"relation_null_{name}", relation.null(seed=seed).flatten(1).max(-1).values.quantile(0.95), ".1%")


@torch.no_grad()
def relation_maps(
    model: Model,
    facts: Sequence[Fact],
    *,
    k: int = 10,
    layers: Sequence[int] | None = None,
    progress: str | None = None,
) -> dict[str, RelationMap]:
    """Push each subject's embedding, `raw` and `enriched` by the first MLP, through a head's norm, W_V, W_O and the
    unembedding (final gain folded in), and ask whether the answer is among the k most promoted tokens of the whole
    vocabulary. A subject of several tokens is read at its last one. Source: design, section 4; compare MAPS
    (Elhelo and Geva). layers: only these (0-based), all if not given."""
    weights, n = model.weights, len(facts)
    raw = weights.W_E[[model.token_ids(f" {f.subject}")[-1] for f in facts]]
    e = torch.cat((raw, enrich(weights, raw)))
    answers = torch.tensor([model.first_token(f.answer) for f in facts])
    W_U = weights.norm_final.fold(weights.W_U)
    part = W_U[:, :: max(1, W_U.shape[1] // PART)].contiguous()
    hits = []
    chosen = range(weights.n_layers) if layers is None else layers
    for block in tqdm([weights.blocks[i] for i in chosen], desc=progress, disable=progress is None, leave=False):
        v = einsum(block.norm_attn(e), block.attn.per_head(block.attn.W_V), "s d, n d h -> n s h")
        if len(e) <= weights.d_head:  # few subjects: few of them reach an answer, and only they are unembedded
            out = v @ block.attn.W_O
            hits.append(_in_top_of(out.flatten(0, 1), W_U, part, answers, k).unflatten(0, out.shape[:2]))
        else:  # many: W_O W_U first, which they share, and which has only d_head rows
            heads = zip(v, block.attn.W_O, strict=True)
            hits.append(torch.stack([_in_top(x @ (W_O @ W_U), answers, k) for x, W_O in heads]))
    both = torch.stack(hits)
    return {"raw": RelationMap(both[:, :, :n], k), "enriched": RelationMap(both[:, :, n:], k)}


@dataclass(frozen=True)
class RoleRules:
    """Thresholds of the roles, stated once. effect: in standard deviations over words; p: permutation, per head."""

    effect: float = 0.5
    p: float = 0.01
    copy: float = 1.0
    relation: float = 0.1


@torch.no_grad()
def head_roles(
    model: Model,
    types: dict[str, list[int]],
    maps: Sequence[RelationMap],
    *,
    rules: RoleRules = RoleRules(),
    permutations: int = 1000,
    seed: int = 0,
    layers: Sequence[int] | None = None,
) -> pd.DataFrame:
    """One row a head of the layers (0-based, all if not given), with the numbers behind three labels.

    seeks       the type whose keys get the highest mean attention score from the average query, `none` unless its
                mean lies `effect` standard deviations above the mean word and permuted type labels do that with p
    advertises  the same for the norm of the head's key
    value       copies / suppresses: a word's own logit through the OV circuit, in standard deviations of all the
                vocabulary's logits, is at least +copy / at most -copy on average, and with p lies on the same side of
                other words' logits; maps relation: the score of a relation map (raw or enriched, whichever is higher)
                is at least `relation` and beats its null; neither otherwise. A head that maps a relation is called
                so even if it also copies.
    """
    weights = model.weights
    ids = [i for group in types.values() for i in group]
    labels = np.repeat(np.arange(len(types)), [len(group) for group in types.values()])
    e = weights.W_E[ids]
    names = list(types)
    relation = torch.stack([m.score for m in maps])
    relation_p = torch.stack([m.p_values(permutations=permutations, seed=seed) for m in maps])
    moments = _unembedding_moments(weights)
    shuffles = _shuffled(labels, permutations, seed)
    rows = []
    for layer in range(weights.n_layers) if layers is None else layers:
        block = weights.blocks[layer]
        x, attn = block.norm_attn(e), block.attn
        q, k, v = (
            einsum(x, W, "t d, n d h -> n t h") for W in (attn.W_Q, attn.per_head(attn.W_K), attn.per_head(attn.W_V))
        )
        scores = einsum(q.mean(1), k, "n h, n t h -> n t") / weights.d_head**0.5
        own, other = _copy_scores(v, attn.W_O, ids, moments)
        sought = _best_types(scores.cpu().numpy(), labels, shuffles)
        called = _best_types(k.norm(dim=-1).cpu().numpy(), labels, shuffles)
        gap = own - other
        copy_p = _copy_p(gap, permutations, seed)
        for head, ((seek, seek_d, seek_p), (call, call_d, call_p)) in enumerate(zip(sought, called, strict=True)):
            which = int(relation[:, layer, head].argmax())
            share = float(relation[which, layer, head])
            share_p = float(relation_p[which, layer, head])
            copy = float(own[head].mean())
            rows.append(
                {
                    "site": str(Site(layer, head)),
                    "layer": layer,
                    "head": head,
                    "seeks": names[seek] if seek_d >= rules.effect and seek_p <= rules.p else "none",
                    "seeks_effect": seek_d,
                    "seeks_p": seek_p,
                    "advertises": names[call] if call_d >= rules.effect and call_p <= rules.p else "none",
                    "advertises_effect": call_d,
                    "advertises_p": call_p,
                    "value": _value_role(copy, float(gap[head].mean()), copy_p[head], share, share_p, rules),
                    "copy_score": copy,
                    "copy_p": copy_p[head],
                    "relation_score": share,
                    "relation_p": share_p,
                }
            )
    return pd.DataFrame(rows)


def _value_role(copy: float, gap: float, copy_p: float, share: float, share_p: float, rules: RoleRules) -> str:
    if share >= rules.relation and share_p <= rules.p:
        return "maps relation"
    if copy_p <= rules.p and abs(copy) >= rules.copy and copy * gap > 0:
        return "copies" if copy > 0 else "suppresses"
    return "neither"


def _shuffled(labels: NDArray, permutations: int, seed: int) -> NDArray:
    """Indicator matrices of permuted type labels, scaled to means: (permutation, type, word)."""
    rng = np.random.default_rng(seed)
    indicator = (labels == np.arange(labels.max() + 1)[:, None]).astype(np.float32)
    indicator /= indicator.sum(1, keepdims=True)
    return np.stack([indicator[:, rng.permutation(len(labels))] for _ in range(permutations)])


def _best_types(values: NDArray, labels: NDArray, shuffles: NDArray) -> list[tuple[int, float, float]]:
    """Of each head (a row of values, one a word): the type with the highest mean, its height above the mean word in
    standard deviations, and the share of permutations whose best type is as high."""
    z = (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)
    means = np.stack([np.bincount(labels, row) for row in z]) / np.bincount(labels)
    null = _product(shuffles, z.astype(np.float32).T).max(1)  # (permutation, head)
    p = (1 + (null >= means.max(1)).sum(0)) / (1 + len(null))
    return list(zip(means.argmax(1).tolist(), means.max(1).tolist(), p.tolist(), strict=True))


def _unembedding_moments(weights: Weights) -> tuple[Float[Tensor, "d_model vocab"], Tensor, Tensor]:
    """The folded unembedding, its mean over the vocabulary and its covariance: enough to standardise the logits of
    any direction without computing all of them."""
    W_U = weights.norm_final.fold(weights.W_U)
    mean = W_U.mean(1)
    centred = W_U - mean[:, None]
    return W_U, mean, centred @ centred.T / W_U.shape[1]


def _copy_scores(
    v: Float[Tensor, "head token d_head"],
    W_O: Float[Tensor, "head d_head d_model"],
    ids: list[int],
    moments: tuple[Tensor, Tensor, Tensor],
) -> tuple[Float[Tensor, "head token"], Float[Tensor, "head token"]]:
    """Standardised logit of each word's own token, and the mean of the other words' tokens, through an OV circuit, all
    of it in the d_head dimensions of the value channel."""
    W_U, mean, covariance = moments
    variance = einsum(v @ (W_O @ covariance @ W_O.mT), v, "n t h, n t h -> n t")
    z = (v @ (W_O @ W_U[:, ids]) - v @ (W_O @ mean)[..., None]) / variance.clamp_min(1e-30).sqrt()[..., None]
    own = z.diagonal(dim1=-2, dim2=-1)
    return own, ((z.sum(-1) - own) / (len(ids) - 1))


def _copy_p(difference: Float[Tensor, "head token"], permutations: int, seed: int) -> list[float]:
    """Of each head: two-sided sign-flip test that own and other logits differ on average."""
    rng = np.random.default_rng(seed)
    d = difference.cpu().numpy()
    signs = rng.choice([-1.0, 1.0], size=(permutations, d.shape[1]))
    extreme = np.abs(_product(signs, d.T.astype(float))) >= np.abs(d.sum(1))  # (permutation, head)
    return ((1 + extreme.sum(0)) / (1 + permutations)).tolist()


def _product(a: NDArray, b: NDArray) -> NDArray:
    """a @ b by PyTorch: NumPy's threads would go on waiting for work where PyTorch's have some."""
    return (torch.from_numpy(a) @ torch.from_numpy(np.ascontiguousarray(b))).numpy()


def _top_mask(norms: Float[Tensor, "n d_model"], k: int) -> Bool[Tensor, "n d_model"]:
    mask = torch.zeros_like(norms, dtype=torch.bool)
    return mask.scatter(-1, norms.topk(k, dim=-1).indices, True)


def _in_top_of(
    x: Float[Tensor, "row d_model"],
    W_U: Float[Tensor, "d_model vocab"],
    part: Float[Tensor, "d_model some"],
    answers: Int[Tensor, " answer"],
    k: int,
) -> Bool[Tensor, "row answer"]:
    """`_in_top` of x @ W_U. The k-th best of a part of the vocabulary is never above the k-th best of all of it, so an
    answer that falls short of it there is out, and a row without any other needs no more; the slack is for rounding."""
    reach = (x @ part).topk(k, dim=-1).values[:, -1:]
    left = (x @ W_U[:, answers] >= reach - 0.01 * reach.abs()).any(-1)
    hits = torch.zeros(len(x), len(answers), dtype=torch.bool)
    hits[left] = _in_top(x[left] @ W_U, answers, k)
    return hits


def _in_top(
    logits: Float[Tensor, "*head subject vocab"], answers: Int[Tensor, " answer"], k: int
) -> Bool[Tensor, "*head subject answer"]:
    threshold = logits.topk(k, dim=-1).values[..., -1:]
    says_something = logits.amax(-1, keepdim=True) > logits.amin(-1, keepdim=True)  # a dead head ties everywhere
    return (logits[..., answers] >= threshold) & says_something
