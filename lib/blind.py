"""Diagnose a model that one knows nothing about: which component makes a template fail where others tell?

Given are a subject, facts, and the texts of a failing template and of control templates; no more (`look`). Of every
fact that a control tells and the failing template does not, it gathers for each component (heads and MLPs)

    push      its direct contribution to answer minus competitor at the last position, under every template
    writes    its contribution to the answer minus the mean contribution to the other facts' answers
    effect    how much of answer minus competitor comes back when it does what it does under the controls (`patching`)

and, from the weights alone,

    maps      what each head's OV circuit writes of the right answer from the subject's embedding
    loud      how loudly its output matrix can speak of these answers, against other words

A rule turns that into a site and a failure kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.diagnosis import components
from lib.facts import Fact, prompts
from lib.patching import patched_margins
from lib.site import Site
from lib.static import enrich
from lib.subjects import Subject
from lib.trace import Capture, capture, logit_trace, subject_attention

PATCHED = 6  # facts that are patched: the costly part


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
    push: Float[Tensor, "template fact component"]
    writes: Float[Tensor, "template fact component"]
    margin: Float[Tensor, "template fact"]
    attention: Float[Tensor, "template fact n_layers n_heads"]
    effect: Float[Tensor, "component patched"]
    maps: Float[Tensor, "n_layers n_heads"]
    loud: Float[Tensor, " component"]

    def control(self, values: Float[Tensor, "template fact *c"]) -> Float[Tensor, "fact *c"]:
        """Mean over the control templates that tell a fact."""
        return _control_mean(values[1:], self.told[1:])


def _control_mean(values: Float[Tensor, "control fact *c"], told: Bool[Tensor, "control fact"]) -> Tensor:
    weight = told.float().view(*told.shape, *[1] * (values.dim() - 2))
    return (values * weight).sum(0) / weight.sum(0)


def take(seen: Capture, rows: Sequence[int]) -> Capture:
    """Some prompts of a capture."""
    at = torch.tensor(list(rows), dtype=torch.long)
    whole = None if seen.everywhere is None else seen.everywhere[at]
    parts = (seen.tokens, seen.last, seen.stream, seen.z, seen.mlps, seen.logits)
    return Capture(tuple(seen.prompts[i] for i in rows), *(x[at] for x in parts), whole)


def see(subject: Subject, facts: Sequence[Fact], templates: Sequence[str]) -> list[Capture]:
    """A capture of all facts for each template."""
    return [capture(subject, prompts(facts, t), everywhere=True) for t in templates]


def told_by(seen: Sequence[Capture], answers: Int[Tensor, " fact"]) -> Bool[Tensor, "template fact"]:
    return torch.stack([s.logits.argmax(-1) == answers for s in seen])


@torch.no_grad()
def look(
    subject: Subject, facts: Sequence[Fact], failing: str, controls: Sequence[str], seen: list[Capture] | None = None
) -> Look | None:
    """All evidence; None where no fact is known and not told."""
    seen = seen or see(subject, facts, [failing, *controls])
    answers = first_tokens(subject, facts)
    told = told_by(seen, answers)
    rows = (~told[0] & told[1:].any(0)).nonzero()[:, 0].tolist()
    if not rows:
        return None
    chosen, own = [take(s, rows) for s in seen], answers[rows]
    pairs = torch.stack((own, strongest_wrong(chosen[0].logits, own)), 1)
    traced = [_trace(subject, s, pairs, answers.unique()) for s in chosen]
    push, writes, margin = (torch.stack(x) for x in zip(*traced, strict=True))
    some, names = tuple(facts[i] for i in rows), [facts[i].subject for i in rows]
    z, mlps = (_control_mean(torch.stack([getattr(s, x) for s in chosen[1:]]), told[1:, rows]) for x in ("z", "mlps"))
    first = range(min(PATCHED, len(rows)))
    patched = patched_margins(subject, take(chosen[0], first), z[first], mlps[first], pairs[first])
    return Look(
        tuple(facts), some, components(subject), told, told[:, rows], push, writes, margin,
        torch.stack([subject_attention(subject, s, names) for s in chosen]), patched - margin[0, first],
        maps(subject, facts), loudness(subject, answers),
    )  # fmt: skip


def first_tokens(subject: Subject, facts: Sequence[Fact]) -> Int[Tensor, " fact"]:
    return torch.tensor([subject.first_token(f.answer) for f in facts])


def strongest_wrong(logits: Float[Tensor, "n vocab"], answers: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    return logits.scatter(1, answers[:, None], float("-inf")).argmax(1)


def _trace(
    subject: Subject, seen: Capture, pairs: Int[Tensor, "n 2"], bank: Int[Tensor, " b"]
) -> tuple[Tensor, Tensor, Tensor]:
    """push and writes (fact, component) and the margin (fact) of one template."""
    answers = logit_trace(subject, seen, bank[None].expand(len(pairs), -1))
    flat = torch.cat((answers.heads.flatten(2), answers.mlps), -1)
    own = flat[(bank[None] == pairs[:, :1]).nonzero(as_tuple=True)]
    margin = logit_trace(subject, seen, pairs).difference()
    push = torch.cat((margin.heads.flatten(2), margin.mlps), -1)[:, 0]
    return push, own - (flat.sum(1) - own) / max(1, len(bank) - 1), margin.model[:, 0]


# From the weights alone


@torch.no_grad()
def maps(subject: Subject, facts: Sequence[Fact]) -> Float[Tensor, "n_layers n_heads"]:
    """Each head's OV circuit on the subjects' embeddings (enriched by the first MLP): what it writes of the own
    answer, minus the mean of the other answers, in standard deviations over all pairs of subject and answer."""
    weights = subject.weights
    e = enrich(weights, weights.W_E[[subject.token_ids(f" {f.subject}")[-1] for f in facts]])
    W_U = weights.norm_final.fold(weights.W_U[:, first_tokens(subject, facts)])
    out = []
    for block in weights.blocks:
        v = einsum(block.norm_attn(e), block.attn.per_head(block.attn.W_V), "s d, n d h -> n s h")
        says = v @ (block.attn.W_O @ W_U)
        says = says - says.mean(-2, keepdim=True)  # what is said whatever the subject names nobody's capital
        out.append(says.diagonal(dim1=-2, dim2=-1).mean(-1) / says.std((-2, -1)))
    return torch.stack(out)


@torch.no_grad()
def loudness(subject: Subject, answers: Int[Tensor, " fact"], *, words: int = 256) -> Float[Tensor, " component"]:
    """How loudly a component's output matrix can speak of the answers together, against other words: the norm of its
    product with the answers' mean unembedding (the vocabulary's mean taken off), over the mean such norm of as many
    words drawn evenly from the vocabulary. Logarithm, in robust standard deviations over the components of its kind."""
    weights = subject.weights
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
