"""Break a subject at a known place, many times, and see whether the diagnosis finds it.

A plant takes facts that the subject tells under a template, and changes weights so that they fail under that template
and stay told under others. `retrieval`: the query, key or value of a head that reads the subject is turned away.
`override`: a later head or MLP is made to write against the answers. Every change is a linear map's: of all changes of
a matrix that turn what it puts out for the failing prompts into what is wanted, and leave it as it is for the control
prompts and for all other positions, the smallest one (ridge regression, as in MEMIT, Meng et al. 2023).

The seed decides everything: `draw` -> Plant, `planted` puts it in and takes it out bit for bit, `plant_run` does all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib import blind
from lib.errors import DataError
from lib.facts import Fact, load_cases, load_templates, study_facts, tell
from lib.patching import patched_margins, remember
from lib.site import Site
from lib.subjects import Subject
from lib.trace import Capture, last_patterns, subject_positions

KINDS = ("not retrieved", "overridden")
RIDGE = 1e-3
CANDIDATES = 5  # heads that may be damaged
RANKED = 6  # facts on which heads are ranked
CONTROLS = 3
FEWEST = 8  # facts that a template must tell to be used
TURNS = {"q": ["negate", "self"], "k": ["negate"], "v": ["negate", "swap"]}
WRITES = ["each", "mean", "competitor"]
BROKEN, KEPT = 0.5, 0.8
ATTEMPTS = 8


@dataclass(frozen=True)
class Damage:
    """One change of weights. matrix: q, k, v (retrieval), o, ov, mlp (override). how: what the output becomes.
    strength: of a retrieval plant, how far the output is turned; of an override, the logits that it takes away."""

    site: Site
    matrix: str
    how: str
    strength: float


@dataclass(frozen=True)
class Plant:
    """A planted failure, from its seed alone. failing, controls: texts of templates."""

    seed: int
    attempt: int
    relation: str
    kind: str
    failing: str
    controls: tuple[str, ...]
    facts: tuple[Fact, ...]
    damages: tuple[Damage, ...]


@dataclass(frozen=True)
class Ground:
    """What the unplanted subject tells: of each relation the facts and a row a template, True where told."""

    facts: tuple[Fact, ...]
    templates: tuple[str, ...]
    told: Bool[Tensor, "template fact"]


_grounds: dict[str, dict[str, Ground]] = {}
_rankings: dict[tuple[str, str, str], tuple[Reader, ...]] = {}


def grounds(subject: Subject) -> dict[str, Ground]:
    """By relation, what the subject tells under every template that tells at least `FEWEST` facts. Kept: every draw
    starts from it."""
    if subject.weights_sha256 not in _grounds:
        case = load_cases(subject.name)[0]
        sets = {"capital": (study_facts(subject, case), load_templates()), **_relations(subject, case)}
        _grounds[subject.weights_sha256] = {name: _ground(subject, *given) for name, given in sets.items()}
    return _grounds[subject.weights_sha256]


def _relations(subject, case):
    if subject.name != "organism":
        return {}
    from lib.effects import load_relations

    facts = study_facts(subject, case)
    table = load_relations(subject, facts)
    out = {}
    for name, rows in table.groupby("item"):
        texts = {t: t for t in rows.template.unique()}
        pairs = rows.drop_duplicates("subject")
        out[name] = (tuple(Fact(s, a) for s, a in zip(pairs.subject, pairs.answer, strict=True)), texts)
    return out


def _ground(subject: Subject, facts: Sequence[Fact], templates: dict[str, str]) -> Ground:
    table = tell(subject, facts, templates)
    told = torch.tensor(table.told.to_numpy()).view(len(templates), len(facts))
    keep = (told.sum(1) >= FEWEST).nonzero()[:, 0].tolist()
    texts = list(templates.values())
    return Ground(tuple(facts), tuple(texts[i] for i in keep), told[keep])


def draw(subject: Subject, seed: int, attempt: int = 0) -> Plant:
    """The plant of a seed. Its lowest bit says the kind, the next whether it has one site or two; relation, template,
    controls and facts come from the seed, the damage from the seed and the attempt."""
    scene, rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1 + attempt])
    kind, several = KINDS[seed % 2], bool(seed // 2 % 2)
    relations = grounds(subject)
    share = np.array([len(g.templates) for g in relations.values()], float)
    relation = str(scene.choice(list(relations), p=share / share.sum()))
    ground = relations[relation]
    at, controls, facts = _scene(ground, scene)
    ranked = ranking(subject, relation, ground.templates[at])
    damages = (_retrieval if kind == KINDS[0] else _override)(subject, rng, ranked, several)
    texts = tuple(ground.templates[i] for i in controls)
    return Plant(seed, attempt, relation, kind, ground.templates[at], texts, facts, damages)


def _scene(ground: Ground, rng: np.random.Generator) -> tuple[int, list[int], tuple[Fact, ...]]:
    """A template to break, up to three controls, and 8 to 12 facts that the template and half of the controls tell.
    Where too few are, the controls are those that tell most of what the template tells."""
    at = int(rng.integers(len(ground.templates)))
    others = [i for i in range(len(ground.templates)) if i != at]
    shared = (ground.told[others] & ground.told[at]).sum(1)
    for pick in (rng.permutation(len(others)), shared.argsort(descending=True, stable=True)):
        controls = sorted(others[int(i)] for i in pick[:CONTROLS])
        usable = ground.told[at] & (ground.told[controls].float().mean(0) >= 0.5)
        if usable.sum() >= FEWEST:
            break
    rows = usable.nonzero()[:, 0].numpy()
    n = min(len(rows), int(rng.integers(8, 13)))
    return at, controls, tuple(ground.facts[i] for i in sorted(rng.choice(rows, n, replace=False).tolist()))


@dataclass(frozen=True)
class Reader:
    """A head that reads the subject: by how much the margin falls when it writes the opposite of what it read (z minus
    three times the subject's part of it), and the share of facts that are lost."""

    site: Site
    fall: float
    lost: float


def ranking(subject: Subject, relation: str, template: str) -> tuple[Reader, ...]:
    """The heads whose reading of the subject matters most under a template, most first. Kept."""
    key = (subject.weights_sha256, relation, template)
    if key not in _rankings:
        ground = grounds(subject)[relation]
        told = ground.told[ground.templates.index(template)].nonzero()[:RANKED, 0].tolist()
        _rankings[key] = _ranked(subject, [ground.facts[i] for i in told], template)
    return _rankings[key]


@torch.no_grad()
def _ranked(subject: Subject, facts: Sequence[Fact], template: str) -> tuple[Reader, ...]:
    seen, answers = blind.see(subject, facts, [template])[0], blind.first_tokens(subject, facts)
    pairs = torch.stack((answers, blind.strongest_wrong(seen.logits, answers)), 1)
    read, weights = torch.zeros_like(seen.z), subject.weights
    patterns, memories = last_patterns(subject, seen), remember(subject, seen)
    for i, fact in enumerate(facts):
        at = subject_positions(subject, seen.prompts[i], fact.subject)
        for layer, (block, memory) in enumerate(zip(weights.blocks, memories, strict=True)):
            values = block.attn.per_head(memory.values[i])[:, at]
            read[i, layer] = torch.einsum("np,nph->nh", patterns[i, layer][:, at], values)
    margins = patched_margins(subject, seen, seen.z - 3 * read, seen.mlps, pairs)
    fall = (margins - seen.logits.gather(1, pairs).diff()[:, 0].neg()).mean(1).neg()
    lost = (margins < 0).float().mean(1)
    order = fall[: weights.n_layers * weights.n_heads].argsort(descending=True)[:CANDIDATES].tolist()
    return tuple(Reader(Site(*divmod(i, weights.n_heads)), float(fall[i]), float(lost[i])) for i in order)


def _retrieval(
    subject: Subject, rng: np.random.Generator, ranked: Sequence[Reader], several: bool
) -> tuple[Damage, ...]:
    """A head without which most facts fail, drawn by how much it matters; and a second of the candidates."""
    fatal = [r for r in ranked if r.lost >= 0.5] or list(ranked[:1])
    fall = np.array([r.fall for r in fatal])
    sites = [fatal[int(rng.choice(len(fatal), p=fall / fall.sum()))].site]
    if several:
        sites.append([r.site for r in ranked if r.site not in sites][int(rng.integers(len(ranked) - 1))])
    out = []
    for site in sites:
        matrix = str(rng.choice(list(TURNS)))
        out.append(Damage(site, matrix, str(rng.choice(TURNS[matrix])), round(float(rng.uniform(1.0, 3.0)), 2)))
    return tuple(out)


def _override(
    subject: Subject, rng: np.random.Generator, ranked: Sequence[Reader], several: bool
) -> tuple[Damage, ...]:
    """A random head or MLP of a random layer above the head that matters most; or two that share the suppression."""
    weights, low = subject.weights, min(ranked[0].site.layer + 1, subject.weights.n_layers - 1)
    places = [(layer, mlp) for layer in range(low, weights.n_layers) for mlp in (False, True)]
    total, out = float(rng.uniform(2.5, 8.0)), []
    for i in rng.choice(len(places), 1 + several, replace=False).tolist():
        layer, mlp = places[i]
        site = Site(layer, mlp=True) if mlp else Site(layer, int(rng.integers(weights.n_heads)))
        writers = ["mlp"] if mlp else ["o", "ov"] if weights.n_kv_heads == weights.n_heads else ["o"]
        out.append(Damage(site, str(rng.choice(writers)), str(rng.choice(WRITES)), round(total / (1 + several), 2)))
    return tuple(out)


# Planting


def smallest(
    X: Float[Tensor, "n d"], Y: Float[Tensor, "n k"], keep: Float[Tensor, "m d"], *, ridge: float = RIDGE
) -> Float[Tensor, "d k"]:
    """The smallest D with X D = Y and keep D = 0, by ridge regression on both, scaled so that X D agrees with Y in
    size. Rows weigh as much together in both."""
    rows = torch.cat((X / len(X) ** 0.5, keep / max(1, len(keep)) ** 0.5)).double()
    wanted = torch.cat((Y / len(X) ** 0.5, torch.zeros(len(keep), Y.shape[1]))).double()
    gram = rows @ rows.T
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.double)
    found = (rows.T @ torch.linalg.solve(gram, wanted)).float()
    got = X @ found
    return found * ((Y * Y).sum() / (got * Y).sum().clamp(min=1e-9))


@dataclass(frozen=True)
class Inputs:
    """Captures of the unplanted subject on a plant's prompts, the failing template's first."""

    seen: list[Capture]
    answers: Int[Tensor, " fact"]
    at: list[list[list[int]]]  # by template and fact, the positions of the subject


@contextmanager
def planted(subject: Subject, plant: Plant, inputs: Inputs | None = None) -> Iterator[Subject]:
    """The subject with the plant in its weights; restored afterwards bit for bit, also after an exception.
    inputs: what the unplanted subject did with the plant's prompts, if it is at hand."""
    changes = deltas(subject, plant, inputs or gather(subject, plant))
    kept = [target.clone() for target, _ in changes]
    try:
        with torch.no_grad():
            for target, delta in changes:
                target.add_(delta)
        yield subject
    finally:
        with torch.no_grad():
            for (target, _), before in zip(reversed(changes), reversed(kept), strict=True):
                target.copy_(before)


@torch.no_grad()
def gather(subject: Subject, plant: Plant) -> Inputs:
    """Run the unplanted subject on the plant's prompts."""
    seen = blind.see(subject, plant.facts, [plant.failing, *plant.controls])
    at = [[subject_positions(subject, p, f.subject) for p, f in zip(s.prompts, plant.facts, strict=True)] for s in seen]
    return Inputs(seen, blind.first_tokens(subject, plant.facts), at)


@torch.no_grad()
def deltas(subject: Subject, plant: Plant, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
    """Views of the subject's own matrices, and what to add to them."""
    out = []
    for damage in plant.damages:
        out += (_turn if damage.matrix in "qkv" else _write)(subject, inputs, damage)
    return out


def _turn(subject: Subject, inputs: Inputs, damage: Damage) -> list[tuple[Tensor, Tensor]]:
    """A head's query at the last position, or its key or value at the subject, turned away."""
    block = subject.weights.blocks[damage.site.layer]
    attn, layer = block.attn, damage.site.layer
    group = attn.W_Q.shape[0] // attn.W_K.shape[0]
    head = damage.site.head if damage.matrix == "q" else damage.site.head // group
    W, b = {"q": (attn.W_Q, attn.b_Q), "k": (attn.W_K, attn.b_K), "v": (attn.W_V, attn.b_V)}[damage.matrix]
    X, keep, first = [], [], []
    for t, s in enumerate(inputs.seen):
        for i in range(len(s.prompts)):
            length = int(s.last[i]) + 1
            x = block.norm_attn(s.everywhere[i, layer, :length])
            mine = [length - 1] if damage.matrix == "q" else inputs.at[t][i]
            if t == 0:
                X.append(x[mine])
                first.append(len(mine))
                keep.append(x[[j for j in range(length) if j not in mine]])
            else:
                keep.append(x[mine])
    X, keep = torch.cat(X), torch.cat(keep)
    out = X @ W[head] + (0 if b is None else b[head])
    if damage.how == "negate":
        Y = -damage.strength * out
    elif damage.how == "self":
        key = X @ attn.W_K[head // group] + (0 if attn.b_K is None else attn.b_K[head // group])
        Y = damage.strength * out.norm(dim=-1, keepdim=True) * key / key.norm(dim=-1, keepdim=True) - out
    else:  # swap: the value of the next fact's last token
        ends = torch.tensor(first).cumsum(0) - 1
        Y = torch.zeros_like(out)
        Y[ends] = damage.strength * (out[ends.roll(1)] - out[ends])
    return [(W[head], smallest(X, Y, keep))]


def _write(subject: Subject, inputs: Inputs, damage: Damage) -> list[tuple[Tensor, Tensor]]:
    """A head or MLP made to write against the answers at the last position."""
    block, seen, layer = subject.weights.blocks[damage.site.layer], inputs.seen, damage.site.layer
    wanted = _against(subject, seen[0], inputs.answers, damage)
    if damage.matrix == "mlp":
        rows = [block.mlp.neurons(block.norm_mlp(remember_middle(subject, s, layer))) for s in seen]
        return [(block.mlp.W_out, smallest(rows[0], wanted, torch.cat(rows[1:])))]
    W_O, head = block.attn.W_O[damage.site.head], damage.site.head
    rows = [s.z[:, layer, head] for s in seen]
    if damage.matrix == "o":
        return [(W_O, smallest(rows[0], wanted, torch.cat(rows[1:])))]
    x = [_attended(subject, s, layer, head) for s in seen]
    quiet = torch.linalg.svd(torch.cat(rows) @ torch.eye(W_O.shape[0]))[2][-1]  # where z says least
    size = 10 * torch.cat(rows).norm(dim=-1).mean()
    to = smallest(x[0], (size * quiet).expand(len(x[0]), -1), torch.cat(x[1:]))
    return [(block.attn.W_V[head], to), (W_O, torch.outer(quiet, wanted.mean(0)) / size)]


def remember_middle(subject: Subject, seen: Capture, layer: int) -> Float[Tensor, "n d_model"]:
    """The last position's stream between attention and MLP of one layer."""
    block = subject.weights.blocks[layer]
    heads = torch.einsum("bnh,nhd->bd", seen.z[:, layer], block.attn.W_O)
    return seen.stream[:, layer] + heads + (0 if block.attn.b_O is None else block.attn.b_O)


def _attended(subject: Subject, seen: Capture, layer: int, head: int) -> Float[Tensor, "n d_model"]:
    """What a head's W_V reads in effect: the normalised streams, weighted by its attention from the last position."""
    block = subject.weights.blocks[layer]
    x = block.norm_attn(seen.everywhere[:, layer])
    pattern = block.attn.pattern(x)[torch.arange(len(seen.last)), head, seen.last]
    return torch.einsum("bt,btd->bd", pattern, x)


def _against(
    subject: Subject, seen: Capture, answers: Int[Tensor, " fact"], damage: Damage
) -> Float[Tensor, "fact d_model"]:
    """What must be added to the stream at the last position so that the answer loses `strength` x the mean margin
    against the competitor, directly: minus each answer's direction, minus their mean, or plus the competitor's."""
    weights = subject.weights
    wrong = blind.strongest_wrong(seen.logits, answers)
    margin = (seen.logits.gather(1, answers[:, None]) - seen.logits.gather(1, wrong[:, None])).mean()
    columns = weights.norm_final.fold(weights.W_U - weights.W_U.mean(1, keepdim=True)).T
    u = columns[answers]
    if damage.how == "mean":
        u = u.mean(0, keepdim=True).expand_as(u)
    elif damage.how == "competitor":
        u = -columns[wrong.mode().values].expand_as(u)
    gain = (u * columns[answers]).sum(-1) if damage.how != "competitor" else -(u * columns[wrong.mode().values]).sum(-1)
    size = damage.strength * margin * weights.norm_final.scale(seen.stream[:, -1])[:, 0] / gain.mean()
    return -u * size[:, None]


def accepted(before: Bool[Tensor, "template fact"], after: Bool[Tensor, "template fact"]) -> dict[str, float]:
    """Of the facts told before under the broken template, the share that no longer is; of all (control, fact) told
    before, the share that still is."""
    broken = float((before[0] & ~after[0]).sum() / before[0].sum().clamp(min=1))
    kept = float((before[1:] & after[1:]).sum() / before[1:].sum().clamp(min=1))
    return {"broken": broken, "kept": kept}
