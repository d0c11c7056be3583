"""Localisation: which component makes a template fail where others tell, in a model that one knows nothing about?

Given are a model, facts, and the texts of a failing template and of control templates; no more (`blind`). `look`
gathers evidence on every fact that a control tells and the failing template does not. A rule turns that into a site and
a failure kind. `dynamic alone`, from what the prompts show:

    1. A component's fault is how far its difference falls below its lowest under any control that tells the fact, plus
       its effect. A template that merely differs lowers some differences too; the controls show by how much templates
       differ. An MLP's effect counts no more than its fall: what it passes on is not its own doing.
    2. The site is the component with the largest fault.
    3. `not retrieved`: a head that looks at the subject under the controls, and that no longer writes the answers as
       the heads that write most do, or acts through others more than by itself. Otherwise `overridden`.

`static alone`, from the weights: the loudest component of the upper two thirds, if it is loud enough, is a suppressor,
unless it is a head that maps the relation. If there is none: the head that maps it best, not retrieved.
`joined`: of the components whose faults come close to the largest, one that the weights back is taken first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.diagnosis import NOT_RETRIEVED, OVERRIDDEN, Contributions, contributions, control_mean, decide
from lib.errors import DataError
from lib.facts import Fact, prompts
from lib.interventions import CachedRun, logit_differences, patch_components, run_with_cache
from lib.models import Model
from lib.recall import first_tokens
from lib.sites import Site
from lib.static import subject_embeddings
from lib.trace import components, subject_attention

LOWER = 3  # the lowest third of the layers is neither patched nor suspected: there is little of the answer yet
PATCHED = 5  # facts that are patched: the costly part
READS = 0.25  # attention to the subject of a head that looks at it
WRITES = 0.25  # of the strongest head's attribution: a head that writes
LOST = 0.15  # of the fall of its difference: attribution lost
DIRECT = 0.5  # of its effect: a component whose difference falls by less acts through others
LOUD = 5.0  # robust standard deviations of a suppressor that the weights show
MAPS = 0.5  # standard deviations of a head that maps the relation
CLOSE = 0.8  # of the largest fault
WORDS = 64  # of the vocabulary, drawn evenly: what loudness is measured against
MAD = 1.4826  # a normal distribution's standard deviation over its median absolute deviation


@dataclass(frozen=True)
class Named:
    """What a rule names: the component at fault and the failure kind."""

    site: Site
    kind: str


@dataclass(frozen=True)
class Look:
    """The evidence on the facts that fail. Template 0 is the failing one, then the controls. Of each component (heads,
    then MLPs) `contributions` at the last position, and by activation patching its effect: how much of the margin,
    answer minus competitor, comes back when it does what it does under the controls. `maps` and `loudness` are of the
    weights alone."""

    facts: tuple[Fact, ...]
    sites: tuple[Site, ...]
    told: Bool[Tensor, "template fact"]
    difference: Float[Tensor, "template fact component"]  # part of the margin
    attribution: Float[Tensor, "template fact component"]  # to the answer, minus the mean to the other facts' answers
    margin: Float[Tensor, "template fact"]
    attention: Float[Tensor, "template fact n_layers n_heads"]  # to the subject's tokens
    effect: Float[Tensor, "component patched"]
    maps: Float[Tensor, "n_layers n_heads"]
    loudness: Float[Tensor, " component"]

    def control(self, values: Float[Tensor, "template fact ..."]) -> Float[Tensor, "fact ..."]:
        """Mean over the control templates that tell a fact."""
        return control_mean(values[1:], self.told[1:])

    @property
    def heads(self) -> int:
        """How many of the components are heads: the first ones."""
        return self.maps.numel()


def told_by(runs: Sequence[CachedRun], answers: Int[Tensor, " fact"]) -> Bool[Tensor, "template fact"]:
    """Where the answer's first token is the top one."""
    return torch.stack([r.logits.argmax(-1) == answers for r in runs])


@torch.no_grad()
def look(model: Model, facts: Sequence[Fact], runs: Sequence[CachedRun]) -> Look | None:
    """All evidence, from the model's own runs of all facts under the failing template and then under each control;
    None where no fact is known and not told."""
    answers = first_tokens(model, facts)
    told = told_by(runs, answers)
    rows = (~told[0] & told[1:].any(0)).nonzero()[:, 0].tolist()
    if not rows:
        return None
    told, failing = told[:, rows], tuple(facts[i] for i in rows)
    chosen, subjects = [r.take(rows) for r in runs], [f.subject for f in failing]
    pairs = with_competitors(chosen[0].logits, answers[rows])
    traced = [contributions(model, r.capture(), pairs, answers.unique()) for r in chosen]
    margin = torch.stack([logit_differences(r, pairs) for r in chosen])
    first, lowest = range(min(PATCHED, len(rows))), model.weights.n_layers // LOWER
    z, mlps = (control_mean(torch.stack([getattr(r, part) for r in chosen[1:]]), told[1:]) for part in ("z", "mlps"))
    back = patch_components(model, chosen[0].take(first), z[first], mlps[first], pairs[first], lowest=lowest)
    return Look(
        facts=failing,
        sites=components(model),
        told=told,
        difference=torch.stack([t.difference for t in traced]),
        attribution=torch.stack([t.attribution for t in traced]),
        margin=margin,
        attention=torch.stack([subject_attention(model, r.patterns, r.prompts, subjects) for r in chosen]),
        effect=back - margin[0, first],
        maps=maps(model, facts),
        loudness=loudness(model, answers),
    )


def with_competitors(logits: Float[Tensor, "n vocab"], answers: Int[Tensor, " n"]) -> Int[Tensor, "n 2"]:
    """Each answer and its competitor: the token that is on top where the answer is not counted."""
    return torch.stack((answers, logits.scatter(1, answers[:, None], float("-inf")).argmax(1)), 1)


# From the weights alone


@torch.no_grad()
def maps(model: Model, facts: Sequence[Fact]) -> Float[Tensor, "n_layers n_heads"]:
    """Each head's OV circuit on the subjects' embeddings (enriched by the first MLP): what it writes of the right
    answer, minus the mean of the other answers, in standard deviations over all pairs of subject and answer."""
    weights = model.weights
    e = subject_embeddings(model, facts)["enriched"]
    W_U = weights.norm_final.fold(weights.W_U[:, first_tokens(model, facts)])
    scores = []
    for block in weights.blocks:
        v = einsum(block.norm_attn(e), block.attn.per_head(block.attn.W_V), "s d, n d h -> n s h")
        written = v @ (block.W_O @ W_U)  # (head, subject, answer)
        written = written - written.mean(-2, keepdim=True)  # what is written whichever the subject answers for none
        scores.append(written.diagonal(dim1=-2, dim2=-1).mean(-1) / written.std((-2, -1)))
    return torch.stack(scores)


@torch.no_grad()
def loudness(model: Model, answers: Int[Tensor, " fact"]) -> Float[Tensor, " component"]:
    """How loudly a component's output matrix can speak of the answers together, against other words: the norm of its
    product with the answers' mean unembedding (the vocabulary's mean taken off), over the mean such norm of words drawn
    evenly from the vocabulary. Logarithm, in robust standard deviations over the components of its kind."""
    weights, n = model.weights, len(answers)
    every = torch.linspace(0, weights.W_U.shape[1] - 1, WORDS).long()
    columns = weights.norm_final.fold(weights.W_U[:, torch.cat((answers, every))] - weights.W_U.mean(1, keepdim=True))
    directions = torch.cat((columns[:, :n].mean(1, keepdim=True), columns[:, n:]), 1)  # (d_model, 1 + WORDS)
    directions = directions / directions.norm(dim=0)
    heads = torch.stack([b.W_O for b in weights.blocks]).flatten(0, 1)
    parts = []
    for outputs in (heads, torch.stack([b.W_out for b in weights.blocks])):
        norms = (outputs @ directions).norm(dim=1)
        ratio = (norms[:, 0] / norms[:, 1:].mean(1)).log()
        off = ratio - ratio.median()
        parts.append(off / (MAD * off.abs().median()))
    return torch.cat(parts)


# Rules


def fall(look: Look) -> Float[Tensor, " component"]:
    """How much smaller each component's difference is in the failing prompt than under the controls, on average."""
    return (look.control(look.difference) - look.difference[0]).mean(0)


def excess(look: Look) -> Float[Tensor, " component"]:
    """How far each component's difference falls below its lowest under any control that tells the fact, on average."""
    untold = ~look.told[1:, :, None]
    return (look.difference[1:].masked_fill(untold, float("inf")).amin(0) - look.difference[0]).mean(0)


def faults(look: Look) -> Float[Tensor, " component"]:
    """Step 1."""
    fell, effect = excess(look), look.effect.mean(1)
    return fell + torch.cat((effect[: look.heads], torch.minimum(fell, effect)[look.heads :]))


def named(look: Look, scores: Float[Tensor, " component"]) -> Named:
    """Step 3 at the component that scores highest."""
    component, written = int(scores.argmax()), look.control(look.attribution).mean(0)
    site = look.sites[component]
    if site.mlp:
        return Named(site, OVERRIDDEN)
    fell = float(fall(look)[component])
    unwritten = float(written[component] - look.attribution[0].mean(0)[component])
    reads = float(look.control(look.attention).mean(0).flatten()[component]) >= READS
    wrote = float(written[component]) >= WRITES * float(written[: look.heads].max()) and unwritten >= LOST * fell
    through_others = fell < DIRECT * float(look.effect[component].mean())
    return Named(site, NOT_RETRIEVED if reads and (wrote or through_others) else OVERRIDDEN)


def suppressors(look: Look) -> Float[Tensor, " component"]:
    """Loudness, where a component can be a suppressor by its weights: in the upper two thirds, and no head that maps;
    0 elsewhere."""
    lowest = len(look.maps) // LOWER
    low = torch.tensor([site.layer < lowest for site in look.sites])
    low[: look.heads] |= look.maps.flatten() >= MAPS
    return look.loudness.masked_fill(low, 0)


def static(look: Look) -> Named:
    """From the weights alone."""
    loud = suppressors(look)
    if float(loud.max()) >= LOUD:
        return Named(look.sites[int(loud.argmax())], OVERRIDDEN)
    return Named(look.sites[int(look.maps.argmax())], NOT_RETRIEVED)


def joined(look: Look) -> Named:
    """Both: faults close to the largest count double where the weights back them, the others not at all."""
    fault, backed = faults(look), suppressors(look) >= LOUD
    backed[: look.heads] |= look.maps.flatten() >= MAPS
    close = fault >= CLOSE * fault.max()
    return named(look, fault * close * (1 + backed.float()))


def book(look: Look) -> Named:
    """The rule of chapter 2 (`diagnosis.decide`): the suppressor, or the knowledge head where there is none."""
    parts = (look.attribution, look.difference, look.margin)
    control, failing = Contributions(*map(look.control, parts)), Contributions(*(part[0] for part in parts))
    verdict = decide(look.sites, control, failing)
    return Named(verdict.suppressor or verdict.knowledge_head, verdict.failure_kind)


# simple rules name a site; the failure kind is then read off it as in step 3
RULES: dict[str, Callable[[Look], Named]] = {
    "joined": joined,
    "dynamic alone": lambda look: named(look, faults(look)),
    "static alone": static,
    "chapter 2": book,
    "most negative attribution": lambda look: named(look, -look.difference[0].mean(0)),
    "largest fall": lambda look: named(look, fall(look)),
    "largest patching effect": lambda look: named(look, look.effect.mean(1)),
}


def blind(model: Model, facts: Sequence[Fact], failing: str, controls: Sequence[str]) -> dict[str, Named]:
    """What every rule names, given nothing but a model, facts and the texts of templates. Raises DataError where no
    fact is known and not told."""
    seen = look(model, facts, [run_with_cache(model, prompts(facts, template)) for template in (failing, *controls)])
    if seen is None:
        raise DataError(f"under {failing!r} no fact fails that a control tells: there is nothing to diagnose.")
    return {name: rule(seen) for name, rule in RULES.items()}
