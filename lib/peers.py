"""The same questions asked of other people's tools (the source page's "cross-validation").

    Captum          gradient x activation of every MLP neuron, against this book's trace of the same neurons
    TransformerLens logits, logit lens and per-head contributions, against ours

A trace multiplies a neuron's activation with what it writes on the straight way to the logit; a gradient takes every
detour through later layers. Every agreement is held against a control that should show none: another prompt's neurons,
or a neighbouring layer's (`studies.cross_validation`, with what interventions say of the same parts).
"""

import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from lib.errors import DataError
from lib.forward import Pack, Streams, ends, packs, resid_post, resid_pre
from lib.interventions import Part
from lib.models import Model
from lib.sites import Site
from lib.trace import capture, logit_direction, logit_trace

TOOLS = ("captum", "transformer-lens")
Tokens = Int[Tensor, " prompt"]
Curves = Float[Tensor, "prompt n_layers+1"]
BATCH = 16  # prompts at a time, in other people's tools
TOP = 5  # neurons compared as a set


def require_tools() -> dict[str, str]:
    """The versions of the tools that this chapter is about. Raises DataError for one that is not installed: a
    cross-validation without the other side is none, and must not look like one."""
    try:
        return {name: version(name) for name in TOOLS}
    except PackageNotFoundError as error:
        raise DataError(
            f"{error.name} is not installed, so nothing can be checked against it; install it with "
            "`pip install -r requirements.txt` and run the chapter again."
        ) from error


@dataclass(frozen=True)
class NeuronAttributions:
    """For each prompt and each of a few layers: the trace's contribution of every neuron to the target's logit, and
    gradient x activation of the same neurons, at the last position."""

    layers: tuple[int, ...]
    trace: Float[Tensor, "prompt layer d_mlp"]
    gradient: Float[Tensor, "prompt layer d_mlp"]


def attribute_neurons(
    model: Model, texts: Sequence[str], targets: Tokens, layers: Sequence[int], *, progress: str | None = None
) -> NeuronAttributions:
    """Both attributions from one pass. The gradient is taken through last tokens alone, because what a last token's
    neurons write only last tokens read: Captum's own numbers, at a fraction of its cost (`captum_attributions`)."""
    low, weights, traces, gradients = min(layers), model.weights, [], []
    order = torch.tensor(sorted(range(len(texts)), key=texts.__getitem__))  # those that begin alike, together
    batches = list(packs(model, [model.token_ids(texts[i]) for i in order], share=True))
    tokens = targets[order].split([len(batch.last) for batch in batches])
    for batch, token in tqdm(list(zip(batches, tokens, strict=True)), desc=progress, disable=progress is None):
        before = _looked_back_on(model, batch, low)
        above = list(ends(model, batch, before, before[low][batch.last].requires_grad_(), low))
        neurons, final = [above[i - low].neurons for i in layers], above[-1].stream
        logits = (weights.norm_final(final) * weights.W_U[:, token].T).sum(-1)
        slopes = torch.stack(torch.autograd.grad(logits.sum(), neurons), 1)
        active, read = torch.stack(neurons, 1).detach(), logit_direction(model, final.detach(), token)
        gradients.append(active * slopes)
        parts = [Part(Site(i)).read(weights.blocks[i], above[i - low], read).detach() for i in layers]
        traces.append(active * torch.stack(parts, 1))
    back = order.argsort()
    return NeuronAttributions(tuple(layers), torch.cat(traces)[back], torch.cat(gradients)[back])


@torch.no_grad()
def _looked_back_on(model: Model, batch: Pack, low: int) -> Streams:
    """The streams that enter the layers from `low` up; above it without last tokens (zeros stand for them), on which
    nothing looks back and which `ends` runs anyway."""
    before = {low: resid_pre(model, batch, low)}
    earlier = torch.ones(len(batch.before), dtype=torch.bool).index_fill(0, batch.last, False)
    place, rows = earlier.cumsum(0) - 1, earlier.nonzero()[:, 0]
    looked_at = tuple(int(place[row]) if row >= 0 else -1 for row in (batch.before[i] for i in rows.tolist()))
    rest, stream = Pack(batch.tokens[rows], batch.position[rows], looked_at, rows[:0]), before[low][rows]
    for layer in range(low, model.weights.n_layers - 1):
        stream = resid_post(model, rest, stream, layer)
        before[layer + 1] = torch.zeros_like(before[low]).index_copy(0, rows, stream)
    return before


def captum_attributions(
    model: Model, texts: Sequence[str], targets: Tokens, layers: Sequence[int]
) -> Float[Tensor, "prompt layer d_mlp"]:
    """Gradient x activation by Captum itself: a full forward and backward pass for each batch of prompts."""
    from captum.attr import LayerGradientXActivation

    modules, width = [model.weights.blocks[i].mlp_out for i in layers], model.weights.blocks[0].mlp.W_out.shape[0]
    out = torch.empty(len(texts), len(layers), width)
    for at, tokens in tqdm(list(_equally_long(model, texts)), desc="Captum"):

        def answer(embedded: Tensor, at: Tensor = at) -> Tensor:
            logits = model.module(inputs_embeds=embedded, use_cache=False, logits_to_keep=1).logits[:, 0]
            return logits.gather(1, targets[at, None])[:, 0]

        embedded = model.module.get_input_embeddings()(tokens).requires_grad_()
        layerwise = LayerGradientXActivation(answer, modules).attribute(embedded, attribute_to_layer_input=True)
        out[at] = torch.stack([x.view(*tokens.shape, -1)[:, -1].detach() for x in layerwise], 1)  # their graph may go
    return out


def _equally_long(model: Model, texts: Sequence[str]) -> Iterator[tuple[Int[Tensor, " b"], Int[Tensor, "b t"]]]:
    """Batches of texts of as many tokens, so that none is padded: which they are, and their tokens."""
    ids = [model.token_ids(t) for t in texts]
    for length in sorted({len(row) for row in ids}):
        for at in torch.tensor([i for i, row in enumerate(ids) if len(row) == length]).split(BATCH):
            yield at, torch.tensor([ids[i] for i in at])


def ranked(values: Float[Tensor, "prompt d_mlp"]) -> Float[Tensor, "prompt d_mlp"]:
    """Each neuron's rank among those of its prompt, from 0 for the smallest value."""
    ranks = torch.arange(values.shape[-1], dtype=values.dtype).expand_as(values)
    return torch.empty_like(values).scatter(-1, values.argsort(-1), ranks)


def agreement(one: Float[Tensor, "prompt d_mlp"], other: Float[Tensor, "prompt d_mlp"]) -> pd.DataFrame:
    """A row a prompt: do both name the same top neuron, how many of their top five do they share, and Spearman's rank
    correlation over all neurons. one, other: as `ranked`."""
    ours, theirs = one.topk(TOP, -1).indices, other.topk(TOP, -1).indices
    a, b = (ranks - ranks.mean(-1, keepdim=True) for ranks in (one, other))
    rho = torch.cosine_similarity(a, b, dim=-1)
    shared = (ours[:, :, None] == theirs[:, None]).any(-1).sum(-1)
    columns = {"top1": ours[:, 0] == theirs[:, 0], "top5": shared / TOP, "rho": rho}
    return pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})


def top_neurons(model: Model, texts: Sequence[str], answers: Tokens, layer: int, k: int = 1) -> list[int]:
    """The k neurons of a layer that write most of the answers on average, in their order in the layer."""
    return sorted(attribute_neurons(model, texts, answers, [layer]).trace[:, 0].mean(0).topk(k).indices.tolist())


def bridge(model: Model):
    """The model as TransformerLens' TransformerBridge. It replaces modules of the model that it is given: of these it
    gets copies, which share the model's parameters."""
    from transformer_lens.model_bridge import TransformerBridge

    shared = {id(tensor): tensor for tensor in (*model.module.parameters(), *model.module.buffers())}
    with tempfile.TemporaryDirectory() as folder:
        module = copy.deepcopy(model.module, shared)
        module.config.architectures = [type(module).__name__]  # by which it is recognised; GGUF files do not say it
        module.config.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        return TransformerBridge.boot_transformers(folder, hf_model=module, tokenizer=model.tokenizer)


@dataclass(frozen=True)
class Lenses:
    """This book's and TransformerLens' view of the same prompts. table: a row a prompt with the largest differences of
    the logits, of all heads' contributions to the answer's logit, and of the lens' logits; and the head that writes
    most of the answer by each. The curves: the logit lens by layer, answer minus the mean of the other answers."""

    table: pd.DataFrame
    ours: Curves
    theirs: Curves


@torch.no_grad()
def against_transformerlens(model: Model, texts: Sequence[str], answers: Tokens) -> Lenses:
    """The prompts through both libraries, answers[i] being the answer to texts[i]."""
    lens, weights, tables, curves = bridge(model), model.weights, [], []
    for at, tokens in tqdm(list(_equally_long(model, texts)), desc="TransformerLens"):
        seen = capture(model, [texts[i] for i in at])
        ours = logit_trace(model, seen, answers[at, None]).heads[:, 0]
        our_lens = weights.norm_final(seen.stream) @ weights.W_U[:, answers]  # (prompt, layer, answer)
        logits, theirs, stream = _through(lens, model, tokens, answers[at])
        their_lens = lens.unembed(lens.ln_final(stream))[..., answers]
        lenses, others = (our_lens, their_lens), max(1, len(answers) - 1)
        own = [x.gather(-1, at[:, None, None].expand(*x.shape[:2], 1))[..., 0] for x in lenses]
        curves.append(torch.stack([x - (lens.sum(-1) - x) / others for x, lens in zip(own, lenses, strict=True)], 1))
        pairs = {"logits": (seen.logits, logits), "heads": (ours, theirs), "lens": lenses}
        columns = {name: (a - b).abs().flatten(1).amax(1).tolist() for name, (a, b) in pairs.items()}
        for name, heads in (("our_head", ours), ("their_head", theirs)):
            columns[name] = [str(Site(*divmod(i, weights.n_heads))) for i in heads.flatten(1).argmax(1).tolist()]
        tables.append(pd.DataFrame({"prompt": seen.prompts, **columns}, index=at.tolist()))
    table = pd.concat(tables)
    ours, theirs = torch.cat(curves)[torch.tensor(table.index).argsort()].unbind(1)
    return Lenses(table.sort_index(), ours, theirs)


def _through(lens: Any, model: Model, tokens: Tensor, answers: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """What TransformerLens says at the last position: logits (prompt, vocab), each head's contribution to the answer's
    logit (prompt, layer, head), and the residual stream before each layer and after the last (prompt, layer, d_model).
    """
    layers, weights = range(model.weights.n_layers), model.weights
    z_names, last = [f"blocks.{i}.attn.hook_z" for i in layers], f"blocks.{layers[-1]}.hook_resid_post"
    names = [*(f"blocks.{i}.hook_resid_pre" for i in layers), last]
    logits, cache = lens.run_with_cache(tokens, prepend_bos=False, names_filter=[*z_names, *names])
    z = torch.stack([cache[name][:, -1].view(len(tokens), weights.n_heads, -1) for name in z_names], 1)
    W_O = torch.stack([b.attn.W_O.view(weights.n_heads, -1, weights.d_model) for b in lens.blocks])
    directions = logit_direction(model, cache[last][:, -1], answers)
    layerwise = einsum(z, W_O, "b l n h, l n h d -> l b n d").unbind()
    after = zip((b.after_attn for b in weights.blocks), layerwise, strict=True)
    written = torch.stack([x * norm.gain / norm.scale(x.sum(1, keepdim=True)) for norm, x in after], 1)
    heads = torch.einsum("b l n d, b d -> b l n", written, directions)
    return logits[:, -1], heads, torch.stack([cache[name][:, -1] for name in names], 1)


def routing_layer(curves: Curves) -> int:
    """The layer (0-based) over which the mean curve rises most: where the lens sees this answer, rather than other
    answers of its kind, appear."""
    return int(curves.mean(0).diff().argmax())
