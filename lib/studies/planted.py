"""Break a model at a known place, many times, and see whether the diagnosis finds it.

A plant takes facts that the model tells under a template, and changes weights so that they fail under that template
and stay told under others. `retrieval`: the query, key or value of a head that reads the subject is turned away.
`override`: a later head or MLP is made to write against the answers. Every change is a linear map's: of all changes of
a matrix that turn what it puts out for the failing prompts into what is wanted, and leave it as it is for the control
prompts and for all other positions, the smallest one (ridge regression, as in MEMIT, Meng et al. 2023).

The seed decides everything: `draw` -> Plant, `applied` puts it in and takes it out bit for bit, `plant_run` does all.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.diagnosis import NOT_RETRIEVED, OVERRIDDEN, NoFailure
from lib.edits import restored
from lib.errors import DataError
from lib.evaluation import load_relations
from lib.facts import Fact, load_cases, load_templates, prompts
from lib.forward import above, pack, resid_pre
from lib.interventions import CachedRun, logit_differences, patch_components, rerun_from, run_with_cache
from lib.models import Model
from lib.recall import first_tokens, study_facts
from lib.sites import Site
from lib.studies import experiment, localisation, once_a_model
from lib.studies.knowledge_path import answers_once
from lib.studies.localisation import Look, Named, told_by, with_competitors
from lib.trace import subject_positions
from lib.training import slice_values
from lib.weights import pathway_slices

DESIGN = range(0, 1000)  # seeds on which rules and thresholds were chosen
SCORED = range(1000, 1108)  # seeds on which they are judged, once
SCENE, DAMAGE, RANDOM_LAYER = 0, 1, 99  # streams of a seed's random numbers; that of a damage is DAMAGE + its attempt
KINDS = (NOT_RETRIEVED, OVERRIDDEN)

FEWEST, MOST = 8, 12  # facts of a plant; a template must tell the fewest to be used
CONTROLS = 3  # templates of a plant; each fact is told by half of them
RANKED = 6  # facts on which heads are ranked
CANDIDATES = 5  # heads that may be damaged
OPPOSITE = 3  # times what a head read is taken off what it says: more than its contrary, so that it shows
FATAL = 0.5  # of the facts are lost without a head worth damaging
TURNS = {"q": ["negate", "self"], "k": ["negate"], "v": ["negate", "swap"]}  # retrieval: matrix, and what becomes of it
TURNED = (0.7, 3.0)  # how far: 1 takes the output away, 2 reverses it
AGAINST = ["each", "mean", "competitor"]  # override: in which direction
WEIGHT = (1.2, 8.0)  # of the mean margin, what an override takes away; drawn evenly in its logarithm

RIDGE = 1e-5  # of the mean squared norm of the inputs
SIGNAL = 10  # mean norms of what a head says: a signal that stands out in the direction in which it says least
BROKEN, KEPT = 0.5, 0.8  # a plant counts if it breaks so much of what the template told, and keeps so much elsewhere
ATTEMPTS = 8  # damages drawn for a seed, at most

RATE, STEPS = 3e-3, 60  # of a repair, by Adam
SPARE = 0.5  # logits by which a repaired fact is told: then a repair stops


@dataclass(frozen=True)
class Damage:
    """One change of weights. matrix: q, k, v (retrieval), o, ov, mlp (override). how: what the output becomes.
    strength: of a retrieval plant, how far the output is turned; of an override, the margins that it takes away."""

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

    @property
    def lowest(self) -> int:
        """The lowest layer that it changes (0-based)."""
        return min(d.site.layer for d in self.damages)


@once_a_model
def grounds(model: Model) -> dict[str, pd.DataFrame]:
    """By relation, what the unplanted model tells: a row a template (by its text) that tells at least `FEWEST` facts, a
    column a fact. Raises NoFailure where there is no relation with two such templates that begin differently."""
    usable = {}
    for relation, (facts, texts) in fact_sets(model).items():
        told = answers_once(model, facts, {text: text for text in texts}).told.to_numpy().reshape(len(texts), -1)
        table = pd.DataFrame(told, index=texts, columns=facts)[told.sum(1) >= FEWEST]
        if table.index.str.split("{}", regex=False).str[0].nunique() > 1:
            usable[relation] = table
    if not usable:
        raise NoFailure(
            f"{model.name} tells {FEWEST} facts under too few templates: there is nothing to break. Choose a "
            "model that tells more, or give it facts that it knows."
        )
    return usable


def fact_sets(model: Model) -> dict[str, tuple[list[Fact], list[str]]]:
    """By relation, facts and templates that a plant may use: countries and their capitals, neither held out nor of the
    case; and the organism's other relations, which a head of their own knows."""
    capitals = study_facts(model, load_cases(model.name)[0])
    sets = {"capital": (list(capitals), list(load_templates().values()))}
    if model.plain_name == "organism":
        for relation, rows in load_relations(model, capitals).groupby("item"):
            pairs = rows.drop_duplicates("subject")[["subject", "answer"]]
            sets[str(relation)] = ([Fact(*pair) for pair in pairs.to_numpy()], list(rows.template.unique()))
    return sets


def draw(model: Model, seed: int, attempt: int = 0) -> Plant:
    """The plant of a seed. Its lowest bit says the kind, the next whether it has one site or two; relation, template,
    controls and facts come from the seed, the damage from the seed and the attempt. Raises DataError."""
    if seed < 0 or attempt < 0:
        raise DataError(f"seed {seed}, attempt {attempt}: neither may be negative.")
    scene, rng = np.random.default_rng([seed, SCENE]), np.random.default_rng([seed, DAMAGE + attempt])
    kind, several = KINDS[seed % 2], bool(seed // 2 % 2)
    relations = grounds(model)
    share = np.array([len(told) for told in relations.values()], float)
    relation = str(scene.choice(list(relations), p=share / share.sum()))
    failing, controls, facts = _scene(relations[relation], scene)
    readers = ranking(model, relation, failing)
    damages = (_retrieval if kind == NOT_RETRIEVED else _override)(model, rng, readers, several)
    return Plant(seed, attempt, relation, kind, failing, controls, facts, damages)


def _scene(told: pd.DataFrame, rng: np.random.Generator) -> tuple[str, tuple[str, ...], tuple[Fact, ...]]:
    """A template to break, up to three controls, and 8 to 12 facts that the template and half of the controls tell.
    Where too few are, the controls are those that tell most of what the template tells. A control differs in what
    stands before the subject: up to there, prompts that begin alike are the same, and no change tells them apart."""
    failing, before = int(rng.integers(len(told))), told.index.str.split("{}", regex=False).str[0]
    others, tells = told[before != before[failing]], told.iloc[failing].to_numpy()
    shared = (others & tells).sum(axis=1).to_numpy()
    for order in (rng.permutation(len(others)), (-shared).argsort(kind="stable")):
        controls = others.iloc[sorted(order[:CONTROLS])]
        (usable,) = (tells & (controls.mean() >= 0.5)).to_numpy().nonzero()
        if len(usable) >= FEWEST:
            break
    n = min(len(usable), int(rng.integers(FEWEST, MOST + 1)))
    chosen = sorted(rng.choice(usable, n, replace=False))
    return told.index[failing], tuple(controls.index), tuple(told.columns[chosen])


@once_a_model
@torch.no_grad()
def ranking(model: Model, relation: str, template: str) -> pd.DataFrame:
    """The heads whose reading of the subject matters most under a template, most first. fall: by how much the margin
    falls when a head writes the opposite of what it read (z minus three times the subject's part of it); lost: the
    share of facts that are lost."""
    weights, told = model.weights, grounds(model)[relation].loc[template]
    facts = list(told.index[told][:RANKED])
    seen = run_with_cache(model, prompts(facts, template))
    pairs = with_competitors(seen.logits, first_tokens(model, facts))
    read = torch.zeros_like(seen.z)
    for i, fact in enumerate(facts):
        places = subject_positions(model, seen.prompts[i], fact.subject)
        for number, (block, layer) in enumerate(zip(weights.blocks, seen.layers, strict=True)):
            values = block.attn.per_head(layer.values[i])[:, places]
            read[i, number] = torch.einsum("np,nph->nh", layer.pattern[i][:, places], values)
    z, lowest = seen.z - OPPOSITE * read, weights.n_layers // localisation.LOWER
    after = patch_components(model, seen, z, seen.mlps, pairs, lowest=lowest)[: weights.n_layers * weights.n_heads]
    fall, lost = (logit_differences(seen, pairs) - after).mean(1), (after < 0).float().mean(1)
    order = fall.argsort(descending=True)[:CANDIDATES]
    sites = [Site(*divmod(i, weights.n_heads)) for i in order.tolist()]
    return pd.DataFrame({"site": sites, "fall": fall[order].tolist(), "lost": lost[order].tolist()})


def _retrieval(model: Model, rng: np.random.Generator, readers: pd.DataFrame, several: bool) -> tuple[Damage, ...]:
    """A head without which most facts fail, drawn by how much it matters; and a second of the candidates."""
    fatal = readers[readers.lost >= FATAL] if (readers.lost >= FATAL).any() else readers[:1]
    share = fatal.fall.to_numpy() / fatal.fall.to_numpy().sum()
    sites = [fatal.site.iloc[int(rng.choice(len(fatal), p=share))]]
    if several:
        sites.append([site for site in readers.site if site not in sites][int(rng.integers(len(readers) - 1))])
    damages = []
    for site in sites:
        matrix = str(rng.choice(list(TURNS)))
        damages.append(Damage(site, matrix, str(rng.choice(TURNS[matrix])), round(float(rng.uniform(*TURNED)), 2)))
    return tuple(damages)


def _override(model: Model, rng: np.random.Generator, readers: pd.DataFrame, several: bool) -> tuple[Damage, ...]:
    """A random head or MLP of a random layer above the head that matters most; or two that share the suppression."""
    weights, low = model.weights, min(readers.site[0].layer + 1, model.weights.n_layers - 1)
    places = [(layer, mlp) for layer in range(low, weights.n_layers) for mlp in (False, True)]
    strength = float(np.exp(rng.uniform(*np.log(WEIGHT)))) / (1 + several)
    damages = []
    for i in rng.choice(len(places), 1 + several, replace=False).tolist():
        layer, mlp = places[i]
        site = Site(layer, mlp=True) if mlp else Site(layer, int(rng.integers(weights.n_heads)))
        matrices = ["mlp"] if mlp else ["o", "ov"] if weights.n_kv_heads == weights.n_heads else ["o"]
        damages.append(Damage(site, str(rng.choice(matrices)), str(rng.choice(AGAINST)), round(strength, 2)))
    return tuple(damages)


# Planting


def smallest(X: Float[Tensor, "n d"], Y: Float[Tensor, "n k"], keep: Float[Tensor, "m d"]) -> Float[Tensor, "d k"]:
    """The smallest D with X D = Y and keep D = 0, by ridge regression on both, scaled so that X D agrees with Y in
    size. Rows weigh as much together in both."""
    rows = torch.cat((X / len(X) ** 0.5, keep / max(1, len(keep)) ** 0.5)).double()
    wanted = torch.cat((Y / len(X) ** 0.5, torch.zeros(len(keep), Y.shape[1]))).double()
    gram = rows @ rows.T
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.double)
    D = (rows.T @ torch.linalg.solve(gram, wanted)).float()
    reached = X @ D
    return D * ((Y * Y).sum() / (reached * Y).sum().clamp(min=1e-9))


def run_on(model: Model, plant: Plant) -> list[CachedRun]:
    """Runs of the model on the plant's prompts, of the failing template first."""
    return [run_with_cache(model, prompts(plant.facts, template)) for template in (plant.failing, *plant.controls)]


@contextmanager
def applied(model: Model, plant: Plant, runs: Sequence[CachedRun] | None = None) -> Iterator[Model]:
    """The model with the plant in its weights; restored afterwards bit for bit, also after an exception.
    runs: the unplanted model's (`run_on`), if they are at hand."""
    with torch.no_grad():
        runs = runs or run_on(model, plant)
        by_damage = [(_turn if d.matrix in TURNS else _write)(model, plant.facts, runs, d) for d in plant.damages]
    changes = list(chain.from_iterable(by_damage))
    with restored([matrix for matrix, _ in changes]):
        with torch.no_grad():
            for matrix, delta in changes:
                matrix.add_(delta)
        yield model


Change = tuple[Tensor, Tensor]  # a view of one of the model's own matrices, and what to add to it


def _turn(model: Model, facts: Sequence[Fact], runs: Sequence[CachedRun], damage: Damage) -> list[Change]:
    """A head's query at the last position, or its key or value at the subject, turned away: multiplied by 1 - strength
    (`negate`); the query made the position's own key (`self`); the value moved towards the next fact's (`swap`)."""
    attn, strength, head = model.weights.blocks[damage.site.layer].attn, damage.strength, damage.site.head or 0
    kv_head = head // (len(attn.W_Q) // len(attn.W_K))
    maps = {"q": (attn.W_Q, attn.b_Q, head), "k": (attn.W_K, attn.b_K, kv_head), "v": (attn.W_V, attn.b_V, kv_head)}
    (W, b, index), W_K, b_K = maps[damage.matrix], attn.W_K[kv_head], attn.b_K
    X, keep, ends = _inputs(model, facts, runs, damage)
    output = X @ W[index] + (0 if b is None else b[index])
    Y = -strength * output
    if damage.how == "self":
        key = X @ W_K + (0 if b_K is None else b_K[kv_head])
        Y = strength * output.norm(dim=-1, keepdim=True) * key / key.norm(dim=-1, keepdim=True) - output
    elif damage.how == "swap":
        Y = torch.zeros_like(output)
        Y[ends] = strength * (output[ends.roll(1)] - output[ends])
    return [(W[index], smallest(X, Y, keep))]


def _inputs(
    model: Model, facts: Sequence[Fact], runs: Sequence[CachedRun], damage: Damage
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"], Int[Tensor, " fact"]]:
    """The normalised streams of the failing prompts at the places that the damage concerns; those that must be left
    alone, the same of the controls and all other positions of the failing prompts; and the last row of each fact."""
    X, keep = list[Tensor](), list[Tensor]()
    for seen in runs:
        for i, (prompt, fact, last) in enumerate(zip(seen.prompts, facts, seen.last.tolist(), strict=True)):
            stream = seen.layers[damage.site.layer].stream[i, : last + 1]
            x = model.weights.blocks[damage.site.layer].norm_attn(stream)
            chosen = [last] if damage.matrix == "q" else subject_positions(model, prompt, fact.subject)
            if seen is runs[0]:
                X.append(x[chosen])
                chosen = [j for j in range(last + 1) if j not in chosen]
            keep.append(x[chosen])
    return torch.cat(X), torch.cat(keep), torch.tensor([len(x) for x in X]).cumsum(0) - 1


def _write(model: Model, facts: Sequence[Fact], runs: Sequence[CachedRun], damage: Damage) -> list[Change]:
    """A head or MLP made to write against the answers at the last position."""
    block, head = model.weights.blocks[damage.site.layer], damage.site.head
    layers = [r.layers[damage.site.layer] for r in runs]
    wanted = _against(model, facts, runs[0], damage)
    if head is None:
        neurons = [block.neurons(r.entered(damage.site.layer), x.middle) for r, x in zip(runs, layers, strict=True)]
        return [(block.mlp.W_out, smallest(neurons[0], wanted, torch.cat(neurons[1:])))]
    W_O, z = block.attn.W_O[head], [layer.z[:, head] for layer in layers]
    if damage.matrix == "o":
        return [(W_O, smallest(z[0], wanted, torch.cat(z[1:])))]
    # what W_V reads in effect: the normalised streams, weighted by the head's attention from the last position
    x = [torch.einsum("bt,btd->bd", layer.pattern[:, head], block.norm_attn(layer.stream)) for layer in layers]
    every = torch.cat(z)
    quiet = torch.linalg.svd(every)[2][-1]  # the direction of z in which the head says least: it becomes the signal
    size = SIGNAL * every.norm(dim=-1).mean()
    signal = smallest(x[0], (size * quiet).expand(len(x[0]), -1), torch.cat(x[1:]))
    return [(block.attn.W_V[head], signal), (W_O, torch.outer(quiet, wanted.mean(0)) / size)]


def _against(model: Model, facts: Sequence[Fact], seen: CachedRun, damage: Damage) -> Float[Tensor, "fact d_model"]:
    """What must be added to the stream at the last position so that the answer loses `strength` x the mean margin
    against the competitor, directly: minus each answer's direction, minus their mean, or plus the competitor's."""
    weights, answers, at = model.weights, first_tokens(model, facts), damage.site.layer
    block, layer = weights.blocks[at], seen.layers[at]
    pairs = with_competitors(seen.logits, answers)
    competitor = pairs[:, 1].mode().values.expand_as(answers)
    columns = weights.W_U[:, torch.cat((answers, competitor))] - weights.W_U.mean(1, keepdim=True)
    after = block.after_mlp if damage.site.head is None else block.after_attn  # read through it, at its real scale
    right, rival = (weights.norm_final.fold(columns).T * after.gain).chunk(2)
    u = {"each": right, "mean": right.mean(0, keepdim=True).expand_as(right), "competitor": -rival}[damage.how]
    gain = (u * (-rival if damage.how == "competitor" else right)).sum(-1)
    is_mlp, neurons = damage.site.head is None, block.neurons(seen.entered(at), layer.middle)
    held = block.mlp_scale(neurons) if is_mlp else block.heads_scale(layer.z)
    margin, scale = logit_differences(seen, pairs).mean(), weights.norm_final.scale(seen.final) * held
    return -u * (damage.strength * margin * scale / gain.mean())


def accepted(before: Bool[Tensor, "template fact"], after: Bool[Tensor, "template fact"]) -> tuple[float, float, bool]:
    """Of the facts told before under the broken template, the share that no longer is; of all that the controls told,
    the share that they still tell; and whether that makes a failure of the template and of nothing else."""
    broken = float((before[0] & ~after[0]).sum() / before[0].sum().clamp(min=1))
    kept = float((before[1:] & after[1:]).sum() / before[1:].sum().clamp(min=1))
    return broken, kept, broken >= BROKEN and kept >= KEPT


def truth(model: Model, plant: Plant) -> tuple[Site, ...]:
    """All sites that may be named. A changed key or value is that of every head which shares it."""
    sites: list[Site] = []
    for damage in plant.damages:
        layer, head = damage.site.layer, damage.site.head
        group = model.weights.n_heads // model.weights.n_kv_heads if damage.matrix in "kv" else 1
        sites += [damage.site] if head is None else [Site(layer, head // group * group + i) for i in range(group)]
    return tuple(dict.fromkeys(sites))


# The experiment


@experiment
def plant_run(model: Model, *, seed: int, repair: bool = False) -> dict[str, Any]:
    """One planted failure, diagnosed by every rule without a look at the plant: flat values, the same at every call.
    Damage that does not break the template, or breaks others, is drawn again, `ATTEMPTS` times at most."""
    runs: list[CachedRun] = []
    for attempt in range(ATTEMPTS):
        plant = draw(model, seed, attempt)
        runs, answers = runs or run_on(model, plant), first_tokens(model, plant.facts)
        with applied(model, plant, runs):
            damaged = [rerun_from(model, before, plant.lowest) for before in runs]
            broken, kept, good = accepted(told_by(runs, answers), told_by(damaged, answers))
            look = localisation.look(model, plant.facts, damaged) if good else None
            if look is None:
                continue
            row = _describe(model, plant, look) | {"broken": broken, "kept": kept}
            named = {name: rule(look) for name, rule in localisation.RULES.items()}
            for name, verdict in named.items():
                row |= {f"{name}: {key}": value for key, value in score(model, plant, verdict).items()}
            return row | (_repairs(model, plant, look, named["joined"]) if repair else {})
    return {"model": model.name, "accepted": False, "rejected": ATTEMPTS}


def _describe(model: Model, plant: Plant, look: Look) -> dict[str, Any]:
    sites, kept = truth(model, plant), ("relation", "kind", "failing")
    row = {"model": model.name, "accepted": True, "rejected": plant.attempt}
    row |= {name: getattr(plant, name) for name in kept} | {"controls": list(plant.controls)}
    row |= {"facts": [f.subject for f in plant.facts], "untold": len(look.facts), "sites": len(plant.damages)}
    row |= {"damage": " + ".join(map(str, plant.damages)), "truth": ", ".join(map(str, sites))}
    layers = {site.layer for site in sites}
    return row | {"chance_site": len(sites) / len(look.sites), "chance_layer": len(layers) / model.weights.n_layers}


def from_row(model: Model, row: Mapping[str, Any]) -> Plant:
    """The plant that a row of a table of runs tells of, without drawing it again."""
    by_subject = {f.subject: f for f in fact_sets(model)[row["relation"]][0]}
    parts = [text.rsplit(" ", 3) for text in row["damage"].split(" + ")]
    return Plant(
        **{name: row[name] for name in ("seed", "relation", "kind", "failing")},
        attempt=row["rejected"],
        controls=tuple(row["controls"]),
        facts=tuple(by_subject[name] for name in row["facts"]),
        damages=tuple(Damage(Site.parse(site), matrix, how, float(s)) for site, matrix, how, s in parts),
    )


def score(model: Model, plant: Plant, verdict: Named) -> dict[str, Any]:
    """A verdict against the truth: kind; distance in layers to the nearest site of the plant; site."""
    sites = truth(model, plant)
    off = min(abs(verdict.site.layer - site.layer) for site in sites)
    right = {"kind": verdict.kind == plant.kind, "off": off, "site": verdict.site in sites}
    return {"named": str(verdict.site), "says": verdict.kind, **right}


def _repairs(model: Model, plant: Plant, look: Look, verdict: Named) -> dict[str, Any]:
    """Train the layer that the diagnosis names; the knowledge head's layer, as the source page prescribes; and a layer
    drawn at random from all others: how many untold facts are told, and what the controls still tell."""
    layer, pathway = verdict.site.layer, "ffn" if verdict.site.mlp else "attention"
    written = look.control(look.attribution).mean(0)[: look.heads]
    knowledge = look.sites[int(written.argmax())].layer  # the head that writes most under the controls
    others = [i for i in range(model.weights.n_layers) if i != layer]
    drawn = int(np.random.default_rng([plant.seed, RANDOM_LAYER]).choice(others))
    tries = {"named": (layer, pathway), "knowledge": (knowledge, "attention"), "random": (drawn, pathway)}
    outcomes = {place: retrain(model, look, plant, *place) for place in dict.fromkeys(tries.values())}
    return {f"repair {name}: {key}": value for name, place in tries.items() for key, value in outcomes[place].items()}


def retrain(model: Model, look: Look, plant: Plant, layer: int, pathway: str) -> dict[str, float]:
    """Train one slice (Adam, cross-entropy of the answers under the failing template) until every untold fact is told
    with half a logit to spare, or `STEPS`. layer, from 1; told: how many are told then; kept: of what the controls
    told, the share that they still tell."""
    answers = first_tokens(model, look.facts)
    values = slice_values(model, pathway_slices(model.module, layer, pathway))

    def readout(templates: Sequence[str]) -> Callable[[], Tensor]:
        """Logits (prompt, vocab) with the values as they are; what lies below the layer is run once."""
        texts = pack(model, [model.token_ids(p) for t in templates for p in prompts(look.facts, t)])
        stream = resid_pre(model, texts, layer)
        return lambda: above(model, texts, layer, stream, values, texts.last) @ model.weights.W_U

    logits_of = readout([plant.failing])
    optimiser = torch.optim.Adam([v.requires_grad_() for v in values.values()], lr=RATE)
    for step in range(STEPS + 1):
        logits = logits_of()
        spare = -logits.detach().gather(1, with_competitors(logits.detach(), answers)).diff()[:, 0]
        if step == STEPS or float(spare.min()) >= SPARE:
            break
        optimiser.zero_grad()
        F.cross_entropy(logits, answers).backward()
        optimiser.step()
    with torch.no_grad():
        logits = readout(plant.controls)()
    told = (logits.argmax(-1).view(len(plant.controls), -1) == answers) & look.told[1:]
    return {"layer": layer + 1, "told": int((spare > 0).sum()), "kept": float(told.sum() / look.told[1:].sum())}
