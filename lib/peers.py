"""The same questions asked of other people's tools (the source page's "cross-validation").

    Captum          gradient x activation of every MLP neuron, against this book's trace of the same neurons
    TransformerLens logits, logit lens and per-head contributions, against ours

A trace multiplies a neuron's activation with what it writes on the straight way to the logit; a gradient takes every
detour through later layers. Every agreement is held against a control that should show none: another prompt's neurons,
or a neighbouring layer's (`studies.cross_validation`, with what interventions say of the same parts).
"""

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from lib.errors import DataError
from lib.forward import ends, packs, streams
from lib.interventions import Part
from lib.models import Model
from lib.sites import Site
from lib.trace import capture, logit_direction, logit_trace

TOOLS = ("captum", "transformer-lens")
Tokens = Int[Tensor, " prompt"]
Curves = Float[Tensor, "prompt n_layers+1"]
BATCH = 8
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
    batches = list(packs(model, [model.token_ids(t) for t in texts], share=True))
    tokens = targets.split([len(batch.last) for batch in batches])
    for batch, token in tqdm(list(zip(batches, tokens, strict=True)), desc=progress, disable=progress is None):
        before = streams(model, batch, range(low, weights.n_layers))
        above = list(ends(model, batch, before, before[low][batch.last].requires_grad_(), low))
        neurons, final = [above[i - low].neurons for i in layers], above[-1].stream
        logits = (weights.norm_final(final) * weights.W_U[:, token].T).sum(-1)
        slopes = torch.stack(torch.autograd.grad(logits.sum(), neurons), 1)
        active, read = torch.stack(neurons, 1).detach(), logit_direction(model, final.detach(), token)
        gradients.append(active * slopes)
        parts = [Part(Site(i)).read(weights.blocks[i], above[i - low], read).detach() for i in layers]
        traces.append(active * torch.stack(parts, 1))
    return NeuronAttributions(tuple(layers), torch.cat(traces), torch.cat(gradients))


def captum_attributions(
    model: Model, texts: Sequence[str], targets: Tokens, layers: Sequence[int]
) -> Float[Tensor, "prompt layer d_mlp"]:
    """Gradient x activation by Captum itself: a full forward and backward pass for each batch of prompts."""
    from captum.attr import LayerGradientXActivation

    modules = [model.weights.blocks[i].mlp_out for i in layers]
    out = []
    for start in tqdm(range(0, len(texts), BATCH), desc="Captum"):
        tokens, last = model.encode(texts[start : start + BATCH])
        rows, target = torch.arange(len(last)), targets[start : start + BATCH]

        def answer(embedded: Tensor, last: Tensor = last, rows: Tensor = rows, target: Tensor = target) -> Tensor:
            return model.module(inputs_embeds=embedded, use_cache=False).logits[rows, last, target]

        embedded = model.module.get_input_embeddings()(tokens).requires_grad_()
        layerwise = LayerGradientXActivation(answer, modules).attribute(embedded, attribute_to_layer_input=True)
        at_last = [x.view(*tokens.shape, -1)[rows, last].detach() for x in layerwise]  # their graph may go
        out.append(torch.stack(at_last, 1))
    return torch.cat(out)


def agreement(one: Float[Tensor, "prompt d_mlp"], other: Float[Tensor, "prompt d_mlp"]) -> pd.DataFrame:
    """A row a prompt: do both name the same top neuron, how many of their top five do they share, and Spearman's rank
    correlation over all neurons."""
    ours, theirs = one.topk(TOP, -1).indices, other.topk(TOP, -1).indices
    ranks = (x.argsort(-1).argsort(-1).float() for x in (one, other))
    a, b = (rank - rank.mean(-1, keepdim=True) for rank in ranks)
    rho = torch.cosine_similarity(a, b, dim=-1)
    shared = (ours[:, :, None] == theirs[:, None]).any(-1).sum(-1)
    columns = {"top1": ours[:, 0] == theirs[:, 0], "top5": shared / TOP, "rho": rho}
    return pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})


def top_neurons(model: Model, texts: Sequence[str], answers: Tokens, layer: int, k: int = 1) -> list[int]:
    """The k neurons of a layer that write most of the answers on average, in their order in the layer."""
    return sorted(attribute_neurons(model, texts, answers, [layer]).trace[:, 0].mean(0).topk(k).indices.tolist())


def bridge(model: Model):
    """The model as TransformerLens' TransformerBridge. It replaces modules of the model that it is given: a copy."""
    from transformer_lens.model_bridge import TransformerBridge

    with tempfile.TemporaryDirectory() as folder:
        module = copy.deepcopy(model.module)
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
    """One prompt after the other through both libraries, answers[i] being the answer to texts[i]."""
    lens, weights, rows, curves = bridge(model), model.weights, [], []
    layers, columns = range(weights.n_layers), ["prompt", "logits", "heads", "lens", "our_head", "their_head"]
    W_O = torch.stack([b.attn.W_O.view(weights.n_heads, -1, weights.d_model) for b in lens.blocks])
    for i, text in enumerate(tqdm(texts, desc="TransformerLens")):
        seen = capture(model, [text])
        ours = logit_trace(model, seen, answers[i].view(1, 1)).heads[0, 0]
        our_lens = (weights.norm_final(seen.stream[0]) @ weights.W_U)[:, answers]
        logits, cache = lens.run_with_cache(torch.tensor([model.token_ids(text)]), prepend_bos=False)
        z = torch.stack([cache[f"blocks.{j}.attn.hook_z"][0, -1] for j in layers])
        last = cache[f"blocks.{layers[-1]}.hook_resid_post"][0, -1]
        written = torch.einsum("lnh,lnhd->lnd", z.reshape(W_O.shape[:3]), W_O)
        after = zip((b.after_attn for b in weights.blocks), written, strict=True)
        written = torch.stack([x * norm.gain / norm.scale(x.sum(0)) for norm, x in after])
        theirs = written @ logit_direction(model, last[None], answers[i : i + 1])[0]
        stream = torch.stack([*(cache[f"blocks.{j}.hook_resid_pre"][0, -1] for j in layers), last])
        their_lens = lens.unembed(lens.ln_final(stream[None]))[0][:, answers]
        lenses, others = (our_lens, their_lens), max(1, len(answers) - 1)
        curves.append([x[:, i] - (x.sum(1) - x[:, i]) / others for x in lenses])
        pairs = (seen.logits[0], logits[0, -1]), (ours, theirs), lenses
        strongest = (str(Site(*divmod(int(heads.argmax()), weights.n_heads))) for heads in (ours, theirs))
        rows.append((text, *(float((a - b).abs().max()) for a, b in pairs), *strongest))
    ours, theirs = (torch.stack(c) for c in zip(*curves, strict=True))
    return Lenses(pd.DataFrame(rows, columns=columns), ours, theirs)


def routing_layer(curves: Curves) -> int:
    """The layer (0-based) over which the mean curve rises most: where the lens sees this answer, rather than other
    answers of its kind, appear."""
    return int(curves.mean(0).diff().argmax())
