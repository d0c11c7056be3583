"""Diagnose a model that one knows nothing about: which component makes a template fail where others tell?

Given are a subject, facts, and the texts of a failing template and of control templates; no more (`look`). Of every
fact that a control tells and the failing template does not, it gathers for each component (heads and MLPs)

    push      its direct contribution to answer minus competitor at the last position, under every template
    writes    its contribution to the answer minus the mean contribution to the other facts' answers
    effect    how much of answer minus competitor comes back when it does what it does under the controls (`patching`)

and, from the weights alone,

    maps      what each head's OV circuit writes of the right answer from the subject's embedding
    loud      how loudly its output matrix can speak of these answers, against other words

A rule turns that into a site and a failure kind. `dynamic`, from what the prompts show:

    1. A component's fault is how far its push falls below its lowest push under any control that tells the fact, plus
       its effect. A template that merely differs lowers some pushes too; the controls show by how much templates
       differ. An MLP's effect counts no more than its fall: what it passes on is not its own doing.
    2. The site is the component with the largest fault.
    3. `not retrieved`: a head that looks at the subject under the controls, and that no longer writes the answers as
       the heads that write most do, or acts through others more than by itself. Otherwise `overridden`.

`static`, from the weights: the loudest component of the upper two thirds, if it is loud enough, is a suppressor,
unless it is a head that maps the relation. If there is none: the head that maps it best, not retrieved.
`joined`: of the components whose faults come close to the largest, one that the weights back is taken first.
"""

from __future__ import annotations

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
from lib.sites import Site
from lib.static import enrich
from lib.trace import components, subject_attention

PATCHED = 5  # facts that are patched, in the upper two thirds of the layers: the costly part
READS = 0.25  # attention to the subject of a head that looks at it
WRITES = 0.25  # of the strongest head's writing: a head that writes
LOST = 0.15  # of its fall: writing lost
LOUD = 5.0  # robust standard deviations of a suppressor that the weights show
MAPS = 0.5  # standard deviations of a head that maps the relation
CLOSE = 0.8  # of the largest fault


@dataclass(frozen=True)
class Named:
    """What a rule names: the component at fault and the failure kind."""

    site: Site
    kind: str


@dataclass(frozen=True)
class Look:
    """The evidence. Template 0 is the failing one, then the controls. facts: those that fail, of all `asked`."""

    asked: tuple[Fact, ...]
    facts: tuple[Fact, ...]
    sites: tuple[Site, ...]
    all_told: Bool[Tensor, "template asked"]
    told: Bool[Tensor, "template fact"]
    difference: Float[Tensor, "template fact component"]
    attribution: Float[Tensor, "template fact component"]
    margin: Float[Tensor, "template fact"]
    attention: Float[Tensor, "template fact n_layers n_heads"]
    effect: Float[Tensor, "component patched"]
    maps: Float[Tensor, "n_layers n_heads"]
    loud: Float[Tensor, " component"]

    def control(self, values: Float[Tensor, "template fact ..."]) -> Float[Tensor, "fact ..."]:
        """Mean over the control templates that tell a fact."""
        return control_mean(values[1:], self.told[1:])


def see(model: Model, facts: Sequence[Fact], templates: Sequence[str]) -> list[CachedRun]:
    """A run over all facts for each template."""
    return [run_with_cache(model, prompts(facts, t)) for t in templates]


def told_by(seen: Sequence[CachedRun], answers: Int[Tensor, " fact"]) -> Bool[Tensor, "template fact"]:
    return torch.stack([s.logits.argmax(-1) == answers for s in seen])


def look(model: Model, facts: Sequence[Fact], failing: str, controls: Sequence[str]) -> Look | None:
    """All evidence; None where no fact is known and not told."""
    return look_at(model, facts, see(model, facts, [failing, *controls]))


@torch.no_grad()
def look_at(model: Model, facts: Sequence[Fact], seen: Sequence[CachedRun]) -> Look | None:
    """The same from the subject's own runs (`see`), where they are at hand."""
    answers, weights = first_tokens(model, facts), model.weights
    told = told_by(seen, answers)
    rows = (~told[0] & told[1:].any(0)).nonzero()[:, 0].tolist()
    if not rows:
        return None
    chosen, own, some = [s.take(rows) for s in seen], answers[rows], tuple(facts[i] for i in rows)
    pairs = torch.stack((own, strongest_wrong(chosen[0].logits, own)), 1)
    traced = [contributions(model, s.capture(), pairs, answers.unique()) for s in chosen]
    difference, attribution = (torch.stack([getattr(t, x) for t in traced]) for x in ("difference", "attribution"))
    margin = torch.stack([logit_differences(s, pairs) for s in chosen])
    attention = torch.stack(
        [subject_attention(model, s.patterns, s.prompts, [f.subject for f in some]) for s in chosen]
    )
    first, lowest = range(min(PATCHED, len(rows))), weights.n_layers // 3
    z, mlps = (control_mean(torch.stack([getattr(s, x) for s in chosen[1:]]), told[1:, rows]) for x in ("z", "mlps"))
    back = patch_components(model, chosen[0].take(first), z[first], mlps[first], pairs[first], lowest=lowest)
    return Look(
        tuple(facts),
        some,
        components(model),
        told,
        told[:, rows],
        difference,
        attribution,
        margin,
        attention,
        back - margin[0, first],
        maps(model, facts),
        loudness(model, answers),
    )


def first_tokens(model: Model, facts: Sequence[Fact]) -> Int[Tensor, " fact"]:
    return torch.tensor([model.first_token(f.answer) for f in facts])


def strongest_wrong(logits: Float[Tensor, "n vocab"], answers: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    return logits.scatter(1, answers[:, None], float("-inf")).argmax(1)


# From the weights alone


@torch.no_grad()
def maps(model: Model, facts: Sequence[Fact]) -> Float[Tensor, "n_layers n_heads"]:
    """Each head's OV circuit on the subjects' embeddings (enriched by the first MLP): what it writes of the own
    answer, minus the mean of the other answers, in standard deviations over all pairs of subject and answer."""
    weights = model.weights
    e = enrich(weights, weights.W_E[[model.token_ids(f" {f.subject}")[-1] for f in facts]])
    W_U = weights.norm_final.fold(weights.W_U[:, first_tokens(model, facts)])
    out = []
    for block in weights.blocks:
        v = einsum(block.norm_attn(e), block.attn.per_head(block.attn.W_V), "s d, n d h -> n s h")
        says = v @ (block.attn.W_O @ W_U)
        says = says - says.mean(-2, keepdim=True)  # what is said whatever the subject names nobody's capital
        out.append(says.diagonal(dim1=-2, dim2=-1).mean(-1) / says.std((-2, -1)))
    return torch.stack(out)


@torch.no_grad()
def loudness(model: Model, answers: Int[Tensor, " fact"], *, words: int = 64) -> Float[Tensor, " component"]:
    """How loudly a component's output matrix can speak of the answers together, against other words: the norm of its
    product with the answers' mean unembedding (the vocabulary's mean taken off), over the mean such norm of as many
    words drawn evenly from the vocabulary. Logarithm, in robust standard deviations over the components of its kind."""
    weights = model.weights
    every = torch.linspace(0, weights.W_U.shape[1] - 1, words).long()
    columns = weights.W_U[:, torch.cat((answers, every))] - weights.W_U.mean(1, keepdim=True)
    columns = weights.norm_final.fold(columns)
    own = torch.cat((columns[:, : len(answers)].mean(1, keepdim=True), columns[:, len(answers) :]), 1)
    own = own / own.norm(dim=0)
    heads = torch.stack([b.attn.W_O for b in weights.blocks]).flatten(0, 1)
    mlps = torch.stack([b.mlp.W_out for b in weights.blocks])
    return torch.cat([_robust((x @ own).norm(dim=1)) for x in (heads, mlps)])


def _robust(norms: Float[Tensor, "component word"]) -> Float[Tensor, " component"]:
    ratio = (norms[:, 0] / norms[:, 1:].mean(1)).log()
    middle = ratio.median()
    return (ratio - middle) / (1.4826 * (ratio - middle).abs().median())


# Rules


def fall(look: Look) -> Float[Tensor, " component"]:
    """How much less each component pushes in the failing prompt than under the controls, on average."""
    return (look.control(look.difference) - look.difference[0]).mean(0)


def excess(look: Look) -> Float[Tensor, " component"]:
    """How far each component's push falls below its lowest under any control that tells the fact, on average."""
    untold = ~look.told[1:, :, None]
    return (look.difference[1:].masked_fill(untold, float("inf")).amin(0) - look.difference[0]).mean(0)


def faults(look: Look) -> Float[Tensor, " component"]:
    """Step 1."""
    own, effect = excess(look), look.effect.mean(1)
    mlp = torch.tensor([site.mlp for site in look.sites])
    return own + torch.where(mlp, torch.minimum(own, effect), effect)


def kind_at(look: Look, component: int) -> str:
    """Step 3."""
    if look.sites[component].mlp:
        return OVERRIDDEN
    control, heads = look.control(look.attribution).mean(0), look.maps.numel()
    fell = float(fall(look)[component])
    lost = float(control[component] - look.attribution[0].mean(0)[component])
    reads = float(look.control(look.attention).mean(0).flatten()[component]) >= READS
    wrote = float(control[component]) >= WRITES * float(control[:heads].max()) and lost >= LOST * fell
    through_others = fell < float(look.effect[component].mean()) / 2
    return NOT_RETRIEVED if reads and (wrote or through_others) else OVERRIDDEN


def dynamic(look: Look) -> Named:
    return _named(look, int(faults(look).argmax()))


def suppressors(look: Look) -> Float[Tensor, " component"]:
    """loud, where a component can be a suppressor by its weights: in the upper two thirds, and no head that maps."""
    layers, loud = look.maps.shape[0], look.loud.clone()
    loud[: look.maps.numel()][look.maps.flatten() >= MAPS] = 0
    loud[torch.tensor([site.layer < layers // 3 for site in look.sites])] = 0
    return loud


def static(look: Look) -> Named:
    loud = suppressors(look)
    if float(loud.max()) >= LOUD:
        return Named(look.sites[int(loud.argmax())], OVERRIDDEN)
    return Named(look.sites[int(look.maps.argmax())], NOT_RETRIEVED)


def joined(look: Look) -> Named:
    fault, heads = faults(look), look.maps.numel()
    backed = suppressors(look) >= LOUD
    backed[:heads] |= look.maps.flatten() >= MAPS
    close = fault >= CLOSE * fault.max()
    return _named(look, int((fault * close * (1 + backed.float())).argmax()))


def book(look: Look) -> Named:
    """The rule of chapter 2 (`diagnosis.decide`): the suppressor, or the knowledge head where there is none."""
    values = (look.attribution, look.difference, look.margin)
    control, failing = Contributions(*map(look.control, values)), Contributions(*(x[0] for x in values))
    verdict = decide(look.sites, control, failing)
    return Named(verdict.suppressor or verdict.knowledge_head, verdict.failure_kind)


def knowledge_head(look: Look) -> Site:
    """The head that writes most under the controls."""
    return look.sites[int(look.control(look.attribution).mean(0)[: look.maps.numel()].argmax())]


def _named(look: Look, component: int) -> Named:
    return Named(look.sites[component], kind_at(look, component))


# simple rules name a site; the failure kind is then read off it as in step 3
RULES: dict[str, Callable[[Look], Named]] = {
    "joined": joined,
    "dynamic alone": dynamic,
    "static alone": static,
    "chapter 2": book,
    "most negative attribution": lambda look: _named(look, int(look.difference[0].mean(0).argmin())),
    "largest fall": lambda look: _named(look, int(fall(look).argmax())),
    "largest patching effect": lambda look: _named(look, int(look.effect.mean(1).argmax())),
}


def blind(model: Model, facts: Sequence[Fact], failing: str, controls: Sequence[str]) -> dict[str, Named]:
    """What every rule names, given nothing but a subject, facts and the texts of templates. Raises DataError where no
    fact is known and not told."""
    found = look(model, facts, failing, controls)
    if found is None:
        raise DataError(f"under {failing!r} no fact fails that a control tells: there is nothing to diagnose.")
    return {name: rule(found) for name, rule in RULES.items()}
