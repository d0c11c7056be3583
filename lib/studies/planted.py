"""Break a subject at a known place, many times, and see whether the diagnosis finds it.

A plant takes facts that the subject tells under a template, and changes weights so that they fail under that template
and stay told under others. `retrieval`: the query, key or value of a head that reads the subject is turned away.
`override`: a later head or MLP is made to write against the answers. Every change is a linear map's: of all changes of
a matrix that turn what it puts out for the failing prompts into what is wanted, and leave it as it is for the control
prompts and for all other positions, the smallest one (ridge regression, as in MEMIT, Meng et al. 2023).

The seed decides everything: `draw` -> Plant, `planted` puts it in and takes it out bit for bit, `plant_run` does all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.errors import DataError
from lib.evaluation import load_relations
from lib.facts import Fact, load_cases, load_templates, prompts
from lib.forward import above, entering, pack
from lib.interventions import CachedRun, logit_differences, patch_components, rerun_from
from lib.models import Model
from lib.recall import study_facts, tell
from lib.sites import Site
from lib.studies import experiment, localisation
from lib.trace import subject_positions
from lib.training import slice_values
from lib.weights import Block, Slice, pathway_slices

DESIGN = range(0, 1000)  # seeds on which rules and thresholds were chosen
SCORED = range(1000, 1108)  # seeds on which they are judged, once
KINDS = (localisation.NOT_RETRIEVED, localisation.OVERRIDDEN)
RIDGE = 1e-5
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

    def __str__(self) -> str:
        return f"{self.site} {self.matrix} {self.how} {self.strength:g}"


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


def grounds(model: Model) -> dict[str, Ground]:
    """By relation, what the subject tells under every template that tells at least `FEWEST` facts. Kept: every draw
    starts from it."""
    if model.weights_sha256 not in _grounds:
        found = {name: _ground(model, *given) for name, given in fact_sets(model).items()}
        found = {name: g for name, g in found.items() if len({t.split("{}")[0] for t in g.templates}) > 1}
        if not found:
            raise DataError(
                f"{model.name} tells {FEWEST} facts under too few templates: there is nothing to break. Choose a "
                "subject that tells more, or give it facts that it knows."
            )
        _grounds[model.weights_sha256] = found
    return _grounds[model.weights_sha256]


def fact_sets(model: Model) -> dict[str, tuple[tuple[Fact, ...], dict[str, str]]]:
    """By relation, facts and templates that a plant may use: countries and their capitals, neither held out nor of the
    case; and the organism's other relations, which a head of their own knows."""
    capitals = study_facts(model, load_cases(model.name)[0])
    out = {"capital": (capitals, load_templates())}
    if model.name == "organism":
        for name, rows in load_relations(model, capitals).groupby("item"):
            pairs = rows.drop_duplicates("subject")
            facts = tuple(Fact(s, a) for s, a in zip(pairs.subject, pairs.answer, strict=True))
            out[str(name)] = (facts, {t: t for t in rows.template.unique()})
    return out


def _ground(model: Model, facts: Sequence[Fact], templates: dict[str, str]) -> Ground:
    table = tell(model, facts, templates)
    told = torch.tensor(table.told.to_numpy()).view(len(templates), len(facts))
    keep = (told.sum(1) >= FEWEST).nonzero()[:, 0].tolist()
    texts = list(templates.values())
    return Ground(tuple(facts), tuple(texts[i] for i in keep), told[keep])


def draw(model: Model, seed: int, attempt: int = 0) -> Plant:
    """The plant of a seed. Its lowest bit says the kind, the next whether it has one site or two; relation, template,
    controls and facts come from the seed, the damage from the seed and the attempt. Raises DataError."""
    if seed < 0 or attempt < 0:
        raise DataError(f"seed {seed}, attempt {attempt}: neither may be negative.")
    scene, rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1 + attempt])
    kind, several = KINDS[seed % 2], bool(seed // 2 % 2)
    relations = grounds(model)
    share = np.array([len(g.templates) for g in relations.values()], float)
    relation = str(scene.choice(list(relations), p=share / share.sum()))
    ground = relations[relation]
    at, controls, facts = _scene(ground, scene)
    ranked = ranking(model, relation, ground.templates[at])
    damages = (_retrieval if kind == KINDS[0] else _override)(model, rng, ranked, several)
    texts = tuple(ground.templates[i] for i in controls)
    return Plant(seed, attempt, relation, kind, ground.templates[at], texts, facts, damages)


def _scene(ground: Ground, rng: np.random.Generator) -> tuple[int, list[int], tuple[Fact, ...]]:
    """A template to break, up to three controls, and 8 to 12 facts that the template and half of the controls tell.
    Where too few are, the controls are those that tell most of what the template tells. A control differs in what
    stands before the subject: up to there, prompts that begin alike are the same, and no change tells them apart."""
    at = int(rng.integers(len(ground.templates)))
    start = [t.split("{}")[0] for t in ground.templates]
    others = [i for i in range(len(ground.templates)) if start[i] != start[at]]
    shared = (ground.told[others] & ground.told[at]).sum(1)
    for pick in (rng.permutation(len(others)), shared.argsort(descending=True, stable=True)):
        controls = sorted(others[int(i)] for i in pick[:CONTROLS])
        usable = ground.told[at] & (ground.told[controls].float().mean(0) >= 0.5)
        if usable.sum() >= FEWEST:
            break
    rows = usable.nonzero()[:, 0].cpu().numpy()
    n = min(len(rows), int(rng.integers(8, 13)))
    return at, controls, tuple(ground.facts[i] for i in sorted(rng.choice(rows, n, replace=False).tolist()))


@dataclass(frozen=True)
class Reader:
    """A head that reads the subject: by how much the margin falls when it writes the opposite of what it read (z minus
    three times the subject's part of it), and the share of facts that are lost."""

    site: Site
    fall: float
    lost: float


def ranking(model: Model, relation: str, template: str) -> tuple[Reader, ...]:
    """The heads whose reading of the subject matters most under a template, most first. Kept."""
    key = (model.weights_sha256, relation, template)
    if key not in _rankings:
        ground = grounds(model)[relation]
        told = ground.told[ground.templates.index(template)].nonzero()[:RANKED, 0].tolist()
        _rankings[key] = _ranked(model, [ground.facts[i] for i in told], template)
    return _rankings[key]


@torch.no_grad()
def _ranked(model: Model, facts: Sequence[Fact], template: str) -> tuple[Reader, ...]:
    seen, answers = localisation.see(model, facts, [template])[0], localisation.first_tokens(model, facts)
    pairs = torch.stack((answers, localisation.strongest_wrong(seen.logits, answers)), 1)
    read, weights = torch.zeros_like(seen.z), model.weights
    for i, fact in enumerate(facts):
        at = subject_positions(model, seen.prompts[i], fact.subject)
        for layer, (block, done) in enumerate(zip(weights.blocks, seen.layers, strict=True)):
            values = block.attn.per_head(done.values[i])[:, at]
            read[i, layer] = torch.einsum("np,nph->nh", done.pattern[i][:, at], values)
    after = patch_components(model, seen, seen.z - 3 * read, seen.mlps, pairs, lowest=weights.n_layers // 3)
    after = after[: weights.n_layers * weights.n_heads]
    fall, lost = (logit_differences(seen, pairs) - after).mean(1), (after < 0).float().mean(1)
    order = fall.argsort(descending=True)[:CANDIDATES].tolist()
    return tuple(Reader(Site(*divmod(i, weights.n_heads)), float(fall[i]), float(lost[i])) for i in order)


def _retrieval(model: Model, rng: np.random.Generator, ranked: Sequence[Reader], several: bool) -> tuple[Damage, ...]:
    """A head without which most facts fail, drawn by how much it matters; and a second of the candidates."""
    fatal = [r for r in ranked if r.lost >= 0.5] or list(ranked[:1])
    fall = np.array([r.fall for r in fatal])
    sites = [fatal[int(rng.choice(len(fatal), p=fall / fall.sum()))].site]
    if several:
        sites.append([r.site for r in ranked if r.site not in sites][int(rng.integers(len(ranked) - 1))])
    out = []
    for site in sites:
        matrix = str(rng.choice(list(TURNS)))
        out.append(Damage(site, matrix, str(rng.choice(TURNS[matrix])), round(float(rng.uniform(0.7, 3.0)), 2)))
    return tuple(out)


def _override(model: Model, rng: np.random.Generator, ranked: Sequence[Reader], several: bool) -> tuple[Damage, ...]:
    """A random head or MLP of a random layer above the head that matters most; or two that share the suppression."""
    weights, low = model.weights, min(ranked[0].site.layer + 1, model.weights.n_layers - 1)
    places = [(layer, mlp) for layer in range(low, weights.n_layers) for mlp in (False, True)]
    total, out = float(np.exp(rng.uniform(np.log(1.2), np.log(8.0)))), []
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

    seen: list[CachedRun]
    answers: Int[Tensor, " fact"]
    at: list[list[list[int]]]  # by template and fact, the positions of the subject


@contextmanager
def planted(model: Model, plant: Plant, inputs: Inputs | None = None) -> Iterator[Model]:
    """The subject with the plant in its weights; restored afterwards bit for bit, also after an exception.
    inputs: what the unplanted subject did with the plant's prompts, if it is at hand."""
    changes = deltas(model, plant, inputs or gather(model, plant))
    kept = [target.clone() for target, _ in changes]
    try:
        with torch.no_grad():
            for target, delta in changes:
                target.add_(delta)
        yield model
    finally:
        with torch.no_grad():
            for (target, _), before in zip(reversed(changes), reversed(kept), strict=True):
                target.copy_(before)


@torch.no_grad()
def gather(model: Model, plant: Plant) -> Inputs:
    """Run the unplanted subject on the plant's prompts."""
    seen = localisation.see(model, plant.facts, [plant.failing, *plant.controls])
    at = [[subject_positions(model, p, f.subject) for p, f in zip(s.prompts, plant.facts, strict=True)] for s in seen]
    return Inputs(seen, localisation.first_tokens(model, plant.facts), at)


def lowest(plant: Plant) -> int:
    """The lowest layer that the plant changes (0-based)."""
    return min(d.site.layer for d in plant.damages)


@torch.no_grad()
def deltas(model: Model, plant: Plant, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
    """Views of the subject's own matrices, and what to add to them."""
    out = []
    for damage in plant.damages:
        out += (_turn if damage.matrix in "qkv" else _write)(model, inputs, damage)
    return out


def _turn(model: Model, inputs: Inputs, damage: Damage) -> list[tuple[Tensor, Tensor]]:
    """A head's query at the last position, or its key or value at the subject, turned away: multiplied by 1 - strength
    (`negate`); the query made the position's own key (`self`); the value moved towards the next fact's (`swap`)."""
    block, layer = model.weights.blocks[damage.site.layer], damage.site.layer
    attn, strength = block.attn, damage.strength
    own = damage.site.head or 0
    shared = own // (len(attn.W_Q) // len(attn.W_K))
    head, W, b = {"q": (own, attn.W_Q, attn.b_Q), "k": (shared, attn.W_K, attn.b_K), "v": (shared, attn.W_V, attn.b_V)}[
        damage.matrix
    ]
    X, keep, ends = _places(block, layer, inputs, subject_too=damage.matrix != "q")
    out = X @ W[head] + (0 if b is None else b[head])
    Y = -strength * out
    if damage.how == "self":
        key = X @ attn.W_K[shared] + (0 if attn.b_K is None else attn.b_K[shared])
        Y = strength * out.norm(dim=-1, keepdim=True) * key / key.norm(dim=-1, keepdim=True) - out
    elif damage.how == "swap":
        Y = torch.zeros_like(out)
        Y[ends] = strength * (out[ends.roll(1)] - out[ends])
    return [(W[head], smallest(X, Y, keep))]


def _places(
    block: Block, layer: int, inputs: Inputs, *, subject_too: bool
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"], Int[Tensor, " fact"]]:
    """The normalised streams of the failing prompts at the last position (or at the subject); those that must be left
    alone, the same of the controls and all other positions of the failing prompts; and the last row of each fact."""
    X, keep, counts = [], [], []
    for t, seen in enumerate(inputs.seen):
        for i, last in enumerate(seen.last.tolist()):
            x = block.norm_attn(seen.layers[layer].stream[i, : last + 1])
            mine = inputs.at[t][i] if subject_too else [last]
            if t == 0:
                X.append(x[mine])
                counts.append(len(mine))
                keep.append(x[[j for j in range(last + 1) if j not in mine]])
            else:
                keep.append(x[mine])
    return torch.cat(X), torch.cat(keep), torch.tensor(counts).cumsum(0) - 1


def _write(model: Model, inputs: Inputs, damage: Damage) -> list[tuple[Tensor, Tensor]]:
    """A head or MLP made to write against the answers at the last position."""
    layer, block, seen = damage.site.layer, model.weights.blocks[damage.site.layer], inputs.seen
    wanted = _against(model, seen[0], inputs.answers, damage)
    if damage.site.head is None:
        neurons = [block.mlp.neurons(block.norm_mlp(s.layers[layer].middle)) for s in seen]
        return [(block.mlp.W_out, smallest(neurons[0], wanted, torch.cat(neurons[1:])))]
    head, W_O = damage.site.head, block.attn.W_O[damage.site.head]
    z = [s.layers[layer].z[:, head] for s in seen]
    if damage.matrix == "o":
        return [(W_O, smallest(z[0], wanted, torch.cat(z[1:])))]
    x, every = [_attended(model, s, layer, head) for s in seen], torch.cat(z)
    quiet = torch.linalg.svd(every)[2][-1]  # the direction of z in which the head says least: it becomes the signal
    size = 10 * every.norm(dim=-1).mean()
    signal = smallest(x[0], (size * quiet).expand(len(x[0]), -1), torch.cat(x[1:]))
    return [(block.attn.W_V[head], signal), (W_O, torch.outer(quiet, wanted.mean(0)) / size)]


def _attended(model: Model, seen: CachedRun, layer: int, head: int) -> Float[Tensor, "n d_model"]:
    """What a head's W_V reads in effect: the normalised streams, weighted by its attention from the last position."""
    block = model.weights.blocks[layer]
    done = seen.layers[layer]
    return torch.einsum("bt,btd->bd", done.pattern[:, head], block.norm_attn(done.stream))


def _against(
    model: Model, seen: CachedRun, answers: Int[Tensor, " fact"], damage: Damage
) -> Float[Tensor, "fact d_model"]:
    """What must be added to the stream at the last position so that the answer loses `strength` x the mean margin
    against the competitor, directly: minus each answer's direction, minus their mean, or plus the competitor's."""
    weights = model.weights
    wrong = localisation.strongest_wrong(seen.logits, answers)
    margin = (seen.logits.gather(1, answers[:, None]) - seen.logits.gather(1, wrong[:, None])).mean()
    rival = wrong.mode().values.expand_as(answers)
    columns = weights.W_U[:, torch.cat((answers, rival))] - weights.W_U.mean(1, keepdim=True)
    own, its = weights.norm_final.fold(columns).T.chunk(2)
    u = {"each": own, "mean": own.mean(0, keepdim=True).expand_as(own), "competitor": -its}[damage.how]
    gain = (u * (-its if damage.how == "competitor" else own)).sum(-1)
    size = damage.strength * margin * weights.norm_final.scale(seen.final)[:, 0] / gain.mean()
    return -u * size[:, None]


def accepted(before: Bool[Tensor, "template fact"], after: Bool[Tensor, "template fact"]) -> tuple[float, float, bool]:
    """Of the facts told before under the broken template, the share that no longer is; of all that the controls told,
    the share that they still tell; and whether that makes a failure of the template and of nothing else."""
    broken = float((before[0] & ~after[0]).sum() / before[0].sum().clamp(min=1))
    kept = float((before[1:] & after[1:]).sum() / before[1:].sum().clamp(min=1))
    return broken, kept, broken >= BROKEN and kept >= KEPT


def truth(model: Model, plant: Plant) -> tuple[Site, ...]:
    """All sites that may be named. A changed key or value is that of every head which shares it."""
    weights = model.weights
    group, out = weights.n_heads // weights.n_kv_heads, []
    for damage in plant.damages:
        site = damage.site
        shared = damage.matrix in "kv" and site.head is not None
        first = 0 if site.head is None else site.head // group * group
        out += [Site(site.layer, first + i) for i in range(group)] if shared else [site]
    return tuple(dict.fromkeys(out))


# The experiment


@experiment
def plant_run(model: Model, *, seed: int, repair: bool = False) -> dict[str, Any]:
    """One planted failure, diagnosed by every rule without a look at the plant: flat values, the same at every call.
    Damage that does not break the template, or breaks others, is drawn again, `ATTEMPTS` times at most."""
    inputs: Inputs | None = None
    for attempt in range(ATTEMPTS):
        plant = draw(model, seed, attempt)
        inputs = inputs or gather(model, plant)
        with planted(model, plant, inputs):
            seen = [rerun_from(model, before, lowest(plant)) for before in inputs.seen]
            after = localisation.told_by(seen, inputs.answers)
            broken, kept, good = accepted(localisation.told_by(inputs.seen, inputs.answers), after)
            found = localisation.look_at(model, plant.facts, seen) if good else None
            if found is None:
                continue
            row = _describe(model, plant, found) | {"broken": broken, "kept": kept}
            named = {name: rule(found) for name, rule in localisation.RULES.items()}
            for name, verdict in named.items():
                row |= {f"{name}: {key}": value for key, value in score(model, plant, verdict).items()}
            return row | (_repairs(model, plant, found, named["joined"]) if repair else {})
    return {"model": model.name, "accepted": False, "rejected": ATTEMPTS}


def _describe(model: Model, plant: Plant, found: localisation.Look) -> dict[str, Any]:
    sites = truth(model, plant)
    return {
        "model": model.name,
        "accepted": True,
        "rejected": plant.attempt,
        "relation": plant.relation,
        "failing": plant.failing,
        "controls": list(plant.controls),
        "facts": [f.subject for f in plant.facts],
        "untold": len(found.facts),
        "kind": plant.kind,
        "sites": len(plant.damages),
        "damage": " + ".join(map(str, plant.damages)),
        "truth": ", ".join(map(str, sites)),
        "margin_control": float(found.control(found.margin).mean()),
        "margin_failing": float(found.margin[0].mean()),
        "chance_site": len(sites) / len(found.sites),
        "chance_layer": len({s.layer for s in sites}) / model.weights.n_layers,
    }


def from_row(model: Model, row: Mapping[str, Any]) -> Plant:
    """The plant that a row of a table of runs tells of, without drawing it again."""
    known = {f.subject: f for f in fact_sets(model)[row["relation"]][0]}
    damages = []
    for text in row["damage"].split(" + "):
        place, matrix, how, strength = text.rsplit(" ", 3)
        damages.append(Damage(Site.parse(place), matrix, how, float(strength)))
    return Plant(
        row["seed"],
        row["rejected"],
        row["relation"],
        row["kind"],
        row["failing"],
        tuple(row["controls"]),
        tuple(known[name] for name in row["facts"]),
        tuple(damages),
    )


def score(model: Model, plant: Plant, verdict: localisation.Named) -> dict[str, Any]:
    """A verdict against the truth: kind; distance in layers to the nearest site of the plant; site. strict: one of the
    very heads or MLPs that were damaged, not of those that share a key or value with it."""
    sites = truth(model, plant)
    return {
        "named": str(verdict.site),
        "says": verdict.kind,
        "kind": verdict.kind == plant.kind,
        "off": min(abs(verdict.site.layer - s.layer) for s in sites),
        "site": verdict.site in sites,
        "strict": verdict.site in [d.site for d in plant.damages],
    }


def _repairs(model: Model, plant: Plant, found: localisation.Look, verdict: localisation.Named) -> dict[str, Any]:
    """Train the layer that the diagnosis names; the knowledge head's layer, as the source page prescribes; and a layer
    drawn at random from all others: how many untold facts are told, and what the controls still tell."""
    other = [i for i in range(model.weights.n_layers) if i != verdict.site.layer]
    drawn = int(np.random.default_rng([plant.seed, 99]).choice(other))
    pathway = "ffn" if verdict.site.mlp else "attention"
    tries = {
        "named": (verdict.site.layer, pathway),
        "knowledge": (localisation.knowledge_head(found).layer, "attention"),
        "random": (drawn, pathway),
    }
    done = {place: retrain(model, found, plant, *place) for place in dict.fromkeys(tries.values())}
    out: dict[str, Any] = {}
    for name, (layer, part) in tries.items():
        told, kept = done[layer, part]
        out |= {f"repair {name}: layer": layer + 1, f"repair {name}: told": told, f"repair {name}: kept": kept}
    return out


def retrain(
    model: Model,
    found: localisation.Look,
    plant: Plant,
    layer: int,
    pathway: str,
    *,
    rate: float = 3e-3,
    steps: int = 60,
) -> tuple[int, float]:
    """Train one slice (Adam, cross-entropy of the answers under the failing template) until every untold fact is told
    with half a logit to spare, or `steps`. How many are told then; and of what the controls told, the share they still
    tell."""
    answers = localisation.first_tokens(model, found.facts)
    texts = pack(model, [model.token_ids(p) for p in prompts(found.facts, plant.failing)])
    stream, W_U = entering(model, texts, layer), model.weights.W_U
    values = slice_values(model, pathway_slices(model.module, layer, pathway))
    optimiser = torch.optim.Adam([v.requires_grad_() for v in values.values()], lr=rate)
    for step in range(steps + 1):
        logits = above(model, texts, layer, stream, values, texts.last) @ W_U
        least = _least(logits.detach(), answers)
        if step == steps or float(least.min()) >= 0.5:
            break
        optimiser.zero_grad()
        F.cross_entropy(logits, answers).backward()
        optimiser.step()
    return int((least > 0).sum()), _kept(model, found, plant, layer, values)


@torch.no_grad()
def _kept(model: Model, found: localisation.Look, plant: Plant, layer: int, values: dict[Slice, Tensor]) -> float:
    """Of what the controls told of the untold facts, the share that they tell with the values in place."""
    answers = localisation.first_tokens(model, found.facts)
    lines = [model.token_ids(p) for t in plant.controls for p in prompts(found.facts, t)]
    texts = pack(model, lines)
    final = above(model, texts, layer, entering(model, texts, layer), values, texts.last)
    told = (final @ model.weights.W_U).argmax(-1).view(len(plant.controls), -1) == answers
    return float((told & found.told[1:]).sum() / found.told[1:].sum())


def _least(logits: Float[Tensor, "fact vocab"], answers: Int[Tensor, " fact"]) -> Float[Tensor, " fact"]:
    """The answer's logit minus the strongest wrong token's."""
    wrong = localisation.strongest_wrong(logits, answers)
    return (logits.gather(1, answers[:, None]) - logits.gather(1, wrong[:, None]))[:, 0]
