"""The exact logit trace of one input (the source page, "Knowledge path").

At the last position, before the final norm, the residual stream is a sum:

    x = embed + sum(heads) + sum(MLPs) + sum(biases)

so a token's logit is a sum too, once the final norm's scale is frozen at the value it really has. Three conventions:

    raw      term . W_U[t]                     no norm; its sum is not a logit of the model
    scaled   exact: the terms sum to the model's own logit
    centred  exact, minus the mean over the vocabulary: what a term does for this token rather than for all

`capture` runs the model's own forward pass once; everything else is arithmetic on what it saw: direct logit
attribution, as in Elhage et al. (2021). `hooked` is how this and every other room looks into a forward pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from lib.errors import CompletenessError, DataError
from lib.models import Model
from lib.sites import Site
from lib.weights import Block

Vectors = Float[Tensor, "text d_model"]  # of the residual stream
Tokens = Int[Tensor, "b n"]  # whose logits are traced, n for each prompt
Convention = Literal["raw", "scaled", "centred"]
CONVENTIONS: tuple[Convention, ...] = ("raw", "scaled", "centred")
TOLERANCE = 1e-3  # logits: fp32 rounding over a few hundred terms of size 10 stays below it, a term left out does not
ROUNDINGS = 8  # of the largest partial sum, allowed to a precision below fp32
BATCH = 16  # prompts traced at a time


@dataclass(frozen=True)
class Capture:
    """What one forward pass showed of each prompt (padded on the right) at one position, its last."""

    prompts: tuple[str, ...]
    tokens: Int[Tensor, "b t"]
    last: Int[Tensor, " b"]
    stream: Float[Tensor, "b n_layers+1 d_model"]  # before each block, and before the final norm
    z: Float[Tensor, "b n_layers n_heads d_head"]
    mlps: Float[Tensor, "b n_layers d_model"]  # with the output bias
    logits: Float[Tensor, "b vocab"]


Hook = Callable[[Tensor], Tensor | None]
Hooks = Mapping[nn.Module, Hook] | None


@contextmanager
def hooked(*, before: Hooks = None, after: Hooks = None) -> Iterator[None]:
    """While the context lasts, a hook sees what enters a module (before) or leaves it (after). Where it returns a
    tensor, the model goes on with that. All hooks are gone afterwards, also after an exception."""

    def enters(hook: Hook, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        name = "hidden_states"  # what transformers calls the stream where it is passed by name
        changed = hook(args[0] if args else kwargs[name])
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {name: changed})

    def leaves(hook: Hook, module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        if not isinstance(output, tuple):
            return hook(output)
        changed = hook(output[0])
        return None if changed is None else (changed, *output[1:])

    with ExitStack() as handles:
        for module, hook in (before or {}).items():
            handles.enter_context(module.register_forward_pre_hook(partial(enters, hook), with_kwargs=True))
        for module, hook in (after or {}).items():
            handles.enter_context(module.register_forward_hook(partial(leaves, hook)))
        yield


@torch.no_grad()
def capture(model: Model, prompts: Sequence[str], *, at: Int[Tensor, " b"] | None = None) -> Capture:
    """One forward pass over a batch of prompts. at: the position that is looked at in each, instead of the last.
    Raises DataError for an empty or too long prompt."""
    tokens, last = model.encode(prompts)
    last = last if at is None else at
    read, place = last.unique(return_inverse=True)  # the only positions that are unembedded
    rows, blocks = torch.arange(len(prompts)), model.weights.blocks
    seen: dict[str, list[Tensor]] = {"stream": [], "z": [], "mlps": []}

    def keep(name: str) -> Hook:
        return lambda x: seen[name].append(x[rows, last])

    before = dict.fromkeys([*(b.module for b in blocks), model.weights.norm_final_module], keep("stream"))
    before |= dict.fromkeys((b.heads_out for b in blocks), keep("z"))
    with hooked(before=before, after=dict.fromkeys((b.mlp_written for b in blocks), keep("mlps"))):
        logits = model.module(tokens, use_cache=False, logits_to_keep=read).logits[rows, place]
    stream, z, mlps = (torch.stack(values, 1) for values in seen.values())
    z = rearrange(z, "b l (n h) -> b l n h", n=model.weights.n_heads)
    return Capture(tuple(prompts), tokens, last, stream, z, mlps, logits)


@dataclass(frozen=True)
class LogitTrace:
    """Contributions to the logits of n tokens for each prompt. `constant` is the final norm's own bias."""

    convention: Convention
    tokens: Tokens
    embed: Float[Tensor, "b n"]
    heads: Float[Tensor, "b n n_layers n_heads"]
    mlps: Float[Tensor, "b n n_layers"]
    biases: Float[Tensor, "b n n_layers"]
    constant: Float[Tensor, "b n"]
    total: Float[Tensor, "b n"]  # what the terms must sum to, from the model's own forward pass

    @property
    def cumulative(self) -> Float[Tensor, "b n n_layers+1"]:
        """The sum of all terms up to each layer: after the embedding, after layer 1, and so on."""
        layers = self.heads.sum(-1) + self.mlps + self.biases
        start = (self.embed + self.constant)[..., None]
        return torch.cat((start, start + layers.cumsum(-1)), -1)

    @property
    def error(self) -> float:
        """Largest absolute difference between the sum of the terms and the model's own value."""
        return float((self.cumulative[..., -1] - self.total).abs().max())

    def difference(self) -> "LogitTrace":
        """The first token's contributions minus the second's, kept as a trace of one token (answer - competitor)."""
        terms = {k: x[:, :1] - x[:, 1:2] for k, x in vars(self).items() if k not in ("convention", "tokens")}
        return replace(self, tokens=self.tokens[:, :1], **terms)


def logit_trace(model: Model, seen: Capture, tokens: Tokens, convention: Convention = "scaled") -> LogitTrace:
    """Every term's contribution to the logits of the given tokens (one row a prompt). Raises CompletenessError if
    the terms miss the model's own logit by more than TOLERANCE (`raw`: times the largest term, which no norm tames)
    and by more than ROUNDINGS of the precision."""
    return logit_traces(model, seen, tokens, (convention,))[convention]


@torch.no_grad()
def logit_traces(
    model: Model, seen: Capture, tokens: Tokens, conventions: Sequence[Convention] = CONVENTIONS
) -> dict[Convention, LogitTrace]:
    """`logit_trace` in several conventions, which differ only in the direction that every term is read along: what a
    head writes into the stream is computed once."""
    blocks, traces = model.weights.blocks, {}
    layers = zip(seen.z.unbind(1), blocks, strict=True)
    written = torch.stack([_written(b, z) for z, b in layers], 1)  # (b, layer, head, d)
    bias = torch.stack([b.bias() for b in blocks])
    mlp_bias = torch.stack([torch.zeros_like(b.bias()) if b.mlp.b_out is None else b.mlp.b_out for b in blocks])
    for convention in conventions:
        directions, constant, total = _readout(model, seen, tokens, convention)
        traces[convention] = trace = LogitTrace(
            convention=convention,
            tokens=tokens,
            embed=einsum(seen.stream[:, 0], directions, "b d, b k d -> b k"),
            heads=einsum(written, directions, "b l n d, b k d -> b k l n"),
            mlps=einsum(seen.mlps - mlp_bias, directions, "b l d, b k d -> b k l"),
            biases=einsum(bias, directions, "l d, b k d -> b k l"),
            constant=constant,
            total=total,
        )
        largest = float(trace.mlps.abs().max()) if convention == "raw" else 1.0
        rounding = ROUNDINGS * torch.finfo(written.dtype).eps * float(trace.cumulative.abs().max())
        allowed = max(TOLERANCE * max(1.0, largest), rounding)
        if not trace.error <= allowed:
            raise CompletenessError(
                f"the {convention} trace of {seen.prompts[0]!r} and {len(seen.prompts) - 1} more misses the model's "
                f"own logits by {trace.error:.2g} (allowed {allowed:.2g}); load the model in fp32, and check "
                "lib/weights.py."
            )
    return traces


def _written(block: Block, z: Float[Tensor, "b n_heads d_head"]) -> Float[Tensor, "b n_heads d_model"]:
    """What each head adds to the stream, a norm after attention frozen at its real scale."""
    each, together = einsum(z, block.W_O, "b n h, n h d -> b n d"), block.attn.write(z)
    return each / block.after_attn.scale(together[:, None])


def _readout(
    model: Model, seen: Capture, tokens: Tokens, convention: Convention
) -> tuple[Float[Tensor, "b n d_model"], Float[Tensor, "b n"], Float[Tensor, "b n"]]:
    """The residual direction that each token's logit reads in a convention, the part of the logit that no term
    carries, and what all terms must sum to."""
    weights, norm, final = model.weights, model.weights.norm_final, seen.stream[:, -1]
    columns = weights.W_U[:, tokens]  # (d_model, b, n)
    constant = torch.zeros(tokens.shape, device=tokens.device)
    if convention == "raw":
        directions = rearrange(columns, "d b n -> b n d")
        return directions, constant, einsum(final, directions, "b d, b k d -> b k")
    total = seen.logits.gather(1, tokens)
    if convention == "centred":
        columns = columns - weights.W_U.mean(1)[:, None, None]
        total = total - seen.logits.mean(1, keepdim=True)
    if norm.bias is not None:
        constant = einsum(norm.bias, columns, "d, d b n -> b n")
    folded = norm.fold(rearrange(columns, "d b n -> d (b n)"))
    return rearrange(folded, "d (b n) -> b n d", b=len(tokens)) / norm.scale(final)[:, :, None], constant, total


def logit_direction(model: Model, final: Vectors, tokens: Int[Tensor, " text"]) -> Vectors:
    """The residual direction that each token's logit reads (`scaled`). final: the last stream, before the norm."""
    return before_norm(model, final, model.weights.W_U[:, tokens].T)


def before_norm(model: Model, final: Vectors, read: Vectors) -> Vectors:
    """A direction of the normalised stream as one of the stream itself, the norm frozen at each text's own scale."""
    norm = model.weights.norm_final
    return norm.fold(read.T).T / norm.scale(final)


@torch.no_grad()
def logit_lens(
    model: Model, seen: Capture, tokens: Tokens
) -> tuple[Float[Tensor, "b n_layers+1 n"], Int[Tensor, "b n_layers+1 n"]]:
    """Log-probability and rank (1 is the top) of the tokens if the stream were read out after each layer, each
    layer with its own norm scale (nostalgebraist 2020). Early layers are read in a basis they may not use: the lens
    is biased (Belrose et al. 2023)."""
    weights = model.weights
    logits = weights.norm_final(seen.stream) @ weights.W_U
    chosen = logits.gather(-1, tokens[:, None].expand(-1, logits.shape[1], -1))
    ranks = torch.stack([(logits > c[..., None]).sum(-1) + 1 for c in chosen.unbind(-1)], -1)
    return chosen - logits.logsumexp(-1, keepdim=True), ranks


def subject_positions(model: Model, prompt: str, name: str) -> list[int]:
    """Positions of the tokens that spell the fact's subject in a prompt. Raises DataError if it is not there."""
    start = prompt.find(name)
    if start < 0:
        raise DataError(f"{name!r} does not stand in the prompt {prompt!r}.")
    offsets = model.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    placed = model.begun([-1 - i for i in range(len(offsets))])
    return [placed.index(-1 - i) for i, (a, b) in enumerate(offsets) if a < start + len(name) and b > start]


def subject_attention(
    model: Model, patterns: Float[Tensor, "b n_layers n_heads t"], prompts: Sequence[str], names: Sequence[str]
) -> Float[Tensor, "b n_layers n_heads"]:
    """Attention from the last token to the tokens of each prompt's subject, summed over them (0 to 1). patterns: from
    each prompt's last token to every position (`interventions.run_with_cache`)."""
    places = [subject_positions(model, prompt, name) for prompt, name in zip(prompts, names, strict=True)]
    return torch.stack([pattern[..., place].sum(-1) for pattern, place in zip(patterns, places, strict=True)])


def subject_stream_norm(model: Model, prompts: Sequence[str], names: Sequence[str]) -> Float[Tensor, "b n_layers+1"]:
    """Norm of the residual stream at the last token of each prompt's subject, before each layer and after the last."""
    at = torch.tensor([subject_positions(model, p, n)[-1] for p, n in zip(prompts, names, strict=True)])
    return capture(model, prompts, at=at).stream.norm(dim=-1)


def components(model: Model) -> tuple[Site, ...]:
    """All heads, layer by layer, then all MLPs: the order of every component vector."""
    layers, heads = range(model.weights.n_layers), range(model.weights.n_heads)
    return (*(Site(layer, head) for layer in layers for head in heads), *(Site(layer, mlp=True) for layer in layers))
