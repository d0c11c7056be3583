"""One view of a transformer's weights for the GPT-2 and the Llama family.

Everything is written for row vectors, `y = x @ W`, as in TransformerLens: W_Q, W_K and W_V are
`[head, d_model, d_head]`, W_O is `[head, d_head, d_model]`, W_U is `[d_model, vocab]`. Nothing is folded,
centred or copied: each tensor is a view of the model's own parameter. GPT-2's fused `c_attn` is split in
thirds; Llama's grouped key and value heads keep their number (`n_kv_heads`), and `Attention.per_head`
repeats them where each query head needs its own.

A new model family needs a builder here, and nothing elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from lib.errors import ModelError

PATHWAYS = ("full", "attention", "ffn", "v_only", "q_only", "k_only")


@dataclass(frozen=True)
class Norm:
    """LayerNorm (`centred`, with bias) or RMSNorm. gain and bias: `[d_model]`."""

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"] | None
    eps: float
    centred: bool

    def centre(self, x: Float[Tensor, "*b d_model"]) -> Float[Tensor, "*b d_model"]:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: Float[Tensor, "*b d_model"]) -> Float[Tensor, "*b 1"]:
        """What the norm divides x by: the root mean square of the (centred) vector."""
        return (self.centre(x).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def __call__(self, x: Float[Tensor, "*b d_model"]) -> Float[Tensor, "*b d_model"]:
        y = self.centre(x) / self.scale(x) * self.gain
        return y if self.bias is None else y + self.bias

    def fold(self, W: Float[Tensor, "*h d_model k"]) -> Float[Tensor, "*h d_model k"]:
        """The matrix F with `norm(x) @ W == x / scale(x) @ F + bias @ W`: gain multiplied in, rows centred
        where the norm centres (centring is symmetric, so it may act on the matrix instead of on x)."""
        W = self.gain[:, None] * W
        return W - W.mean(-2, keepdim=True) if self.centred else W


@dataclass(frozen=True)
class Attention:
    """Heads of one block. `rotary(x, position_ids) -> cos, sin` is the model's own, None for GPT-2."""

    W_Q: Float[Tensor, "n_heads d_model d_head"]
    W_K: Float[Tensor, "n_kv_heads d_model d_head"]
    W_V: Float[Tensor, "n_kv_heads d_model d_head"]
    W_O: Float[Tensor, "n_heads d_head d_model"]
    b_Q: Float[Tensor, "n_heads d_head"] | None
    b_K: Float[Tensor, "n_kv_heads d_head"] | None
    b_V: Float[Tensor, "n_kv_heads d_head"] | None
    b_O: Float[Tensor, " d_model"] | None
    rotary: nn.Module | None

    def per_head(self, kv: Float[Tensor, n_kv_heads * rest]) -> Float[Tensor, n_heads * rest]:  # noqa: F821
        """A key or value tensor repeated so that query head h reads key/value head `h // group`."""
        return repeat(kv, "kv ... -> (kv group) ...", group=self.W_Q.shape[0] // self.W_K.shape[0])

    def queries_keys(
        self, x: Float[Tensor, "b t d_model"]
    ) -> tuple[Float[Tensor, "b n_heads t d_head"], Float[Tensor, "b n_heads t d_head"]]:
        """Queries and keys of every position, rotated to their positions where the family does so."""
        q, k = (
            _add_bias(einsum(x, W, "b t d, n d h -> b n t h"), b)
            for W, b in ((self.W_Q, self.b_Q), (self.W_K, self.b_K))
        )
        position = torch.arange(x.shape[1], device=x.device)
        q, k = self.rotated(q, position), self.rotated(k, position)
        return q, repeat(k, "b kv t h -> b (kv group) t h", group=q.shape[1] // k.shape[1])

    def rotated(self, x: Float[Tensor, "*b t d_head"], position: Int[Tensor, " t"]) -> Float[Tensor, "*b t d_head"]:
        """Queries or keys, rotated to their positions where the family does so."""
        if self.rotary is None:
            return x
        cos, sin = self.rotary(x, position[None])
        return x * cos[0] + _rotate_half(x) * sin[0]

    def pattern(self, x: Float[Tensor, "b t d_model"]) -> Float[Tensor, "b n_heads t t"]:
        """Causal attention probabilities (query, key) for the normalised residual stream x."""
        q, k = self.queries_keys(x)
        scores = einsum(q, k, "b n q h, b n k h -> b n q k") / self.W_Q.shape[-1] ** 0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        return scores.masked_fill(future, float("-inf")).softmax(-1)

    def values(self, x: Float[Tensor, "b t d_model"]) -> Float[Tensor, "b n_heads t d_head"]:
        """Values of every position, repeated so that each query head has its own."""
        v = _add_bias(einsum(x, self.W_V, "b t d, n d h -> b n t h"), self.b_V)
        return repeat(v, "b kv t h -> b (kv group) t h", group=self.W_Q.shape[0] // v.shape[1])

    def mixed(self, x: Float[Tensor, "b t d_model"]) -> Float[Tensor, "b n_heads t d_head"]:
        """z: what each head gathers at each position, before W_O."""
        return einsum(self.pattern(x), self.values(x), "b n q k, b n k h -> b n q h")

    def __call__(self, x: Float[Tensor, "b t d_model"]) -> Float[Tensor, "b t d_model"]:
        return self.out(self.mixed(x))

    def out(self, z: Float[Tensor, "b n_heads t d_head"]) -> Float[Tensor, "b t d_model"]:
        """What the heads write together, with the output bias."""
        return self.write(z.transpose(1, 2))

    def write(self, z: Float[Tensor, "*b n_heads d_head"]) -> Float[Tensor, "*b d_model"]:
        """`out`, the heads of each position side by side."""
        out = z.flatten(-2) @ self.W_O.flatten(0, 1)
        return out if self.b_O is None else out + self.b_O


@dataclass(frozen=True)
class MLP:
    """`act(x W_in + b_in) W_out + b_out` (GPT-2) or `(act(x W_gate) * x W_in) W_out` (Llama)."""

    W_in: Float[Tensor, "d_model d_mlp"]
    W_out: Float[Tensor, "d_mlp d_model"]
    b_in: Float[Tensor, " d_mlp"] | None
    b_out: Float[Tensor, " d_model"] | None
    W_gate: Float[Tensor, "d_model d_mlp"] | None
    b_gate: Float[Tensor, " d_mlp"] | None
    act: Callable[[Tensor], Tensor]

    def neurons(self, x: Float[Tensor, "*b d_model"]) -> Float[Tensor, "*b d_mlp"]:
        """What W_out reads: each neuron's activation, after the gate where there is one."""
        pre = x @ self.W_in if self.b_in is None else x @ self.W_in + self.b_in
        if self.W_gate is None:
            return self.act(pre)
        return self.act(x @ self.W_gate if self.b_gate is None else x @ self.W_gate + self.b_gate) * pre

    def __call__(self, x: Float[Tensor, "*b d_model"]) -> Float[Tensor, "*b d_model"]:
        return self.write(self.neurons(x))

    def write(self, neurons: Float[Tensor, "*b d_mlp"]) -> Float[Tensor, "*b d_model"]:
        """What the neurons write together, with the output bias."""
        out = neurons @ self.W_out
        return out if self.b_out is None else out + self.b_out


@dataclass(frozen=True)
class Block:
    """One layer, and the modules whose input or output a hook reads: `heads_out` (the output projection of
    attention; its input is every head's z), `mlp_out` (the last linear of the MLP; its input is the neurons)."""

    norm_attn: Norm
    attn: Attention
    norm_mlp: Norm
    mlp: MLP
    module: nn.Module
    heads_out: nn.Module
    mlp_out: nn.Module

    def bias(self) -> Float[Tensor, " d_model"]:
        """What the block adds to every position whatever the input: the two output biases (zero in Llama)."""
        zero = torch.zeros_like(self.norm_attn.gain)
        return sum((b for b in (self.attn.b_O, self.mlp.b_out) if b is not None), zero)


@dataclass(frozen=True)
class Weights:
    """The whole model. W_pos is None where positions are rotary."""

    family: str
    prefix: str  # of a block's parameters: f"{prefix}.{layer}."
    W_E: Float[Tensor, "vocab d_model"]
    W_pos: Float[Tensor, "context d_model"] | None
    blocks: tuple[Block, ...]
    norm_final: Norm
    norm_final_module: nn.Module
    W_U: Float[Tensor, "d_model vocab"]
    context: int

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def n_heads(self) -> int:
        return self.blocks[0].attn.W_Q.shape[0]

    @property
    def n_kv_heads(self) -> int:
        return self.blocks[0].attn.W_K.shape[0]

    @property
    def d_model(self) -> int:
        return self.W_E.shape[1]

    @property
    def d_head(self) -> int:
        return self.blocks[0].attn.W_Q.shape[-1]

    def embed(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t d_model"]:
        x = self.W_E[tokens]
        return x if self.W_pos is None else x + self.W_pos[: tokens.shape[1]]

    def block_inputs(self, x: Float[Tensor, "b t d_model"], position: Int[Tensor, " t"]) -> dict[str, Any]:
        """What a block's own module needs beside the stream: the rotations of the positions, where it rotates."""
        rotary = self.blocks[0].attn.rotary
        return {} if rotary is None else {"position_embeddings": rotary(x, position[None])}

    def residuals(self, tokens: Int[Tensor, "b t"]) -> list[Float[Tensor, "b t d_model"]]:
        """The residual stream before each block and after the last, computed from this view alone."""
        stream = [self.embed(tokens)]
        for block in self.blocks:
            middle = stream[-1] + block.attn(block.norm_attn(stream[-1]))
            stream.append(middle + block.mlp(block.norm_mlp(middle)))
        return stream


def view(model: PreTrainedModel) -> Weights:
    """The view of a loaded model. Raises ModelError for a family that has no builder."""
    family = model.config.model_type
    check_family(family, model.config.name_or_path or "this model")
    return _BUILDERS[family](model)


def check_family(family: str | None, where: str) -> None:
    if family not in _BUILDERS:
        raise ModelError(
            f"{where} is of the family {family!r}; the book reads {' and '.join(sorted(_BUILDERS))}. "
            "Choose a model of one of them, or add a builder to lib/weights.py."
        )


@torch.no_grad()
def check_view(
    model: PreTrainedModel, weights: Weights, tokens: Int[Tensor, "b t"], tolerance: float | None = None
) -> float:
    """Largest difference between the view's hidden states and the model's own, relative to the largest
    activation of that layer. Raises ModelError above the tolerance: then Q, K, V, O or the MLP are misread.
    Tolerance, if not given: 1e-3 in fp32, where rounding over 30 layers stays near 1e-5, and eight roundings in bf16; a
    wrong slice, bias or rotation gives 1e-1 or more."""
    tolerance = tolerance or max(1e-3, 8 * torch.finfo(weights.W_E.dtype).eps)
    own = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    mine = weights.residuals(tokens)
    mine[-1] = weights.norm_final(mine[-1])  # Hugging Face reports the last state after the final norm
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(mine, own, strict=True)]
    if not max(errors) <= tolerance:
        worst = max(range(len(errors)), key=errors.__getitem__)
        raise ModelError(
            f"the weight view does not reproduce the model: relative error {errors[worst]:.2g} in the hidden state "
            f"{worst} of {len(errors) - 1} (allowed {tolerance:g}). Its configuration uses something that "
            "lib/weights.py does not read; this model cannot be a subject yet."
        )
    return max(errors)


@dataclass(frozen=True)
class Slice:
    """A named parameter, or columns `start:stop` of its last axis."""

    name: str
    start: int | None = None
    stop: int | None = None

    def __str__(self) -> str:
        return self.name if self.start is None else f"{self.name}[..., {self.start}:{self.stop}]"

    def of(self, parameter: Tensor) -> Tensor:
        return parameter if self.start is None else parameter[..., self.start : self.stop]


def pathway_slices(model: PreTrainedModel, layer: int, pathway: str) -> tuple[Slice, ...]:
    """What a pathway may change in one layer (0-based). full: the block with its norms; attention: Q, K, V, O
    and their biases; ffn: the MLP; v_only, q_only, k_only: one weight matrix, without bias.
    For GPT-2 the matrix is a third of the fused `c_attn.weight`. Raises ValueError for other names or layers."""
    if pathway not in PATHWAYS:
        raise ValueError(f"unknown pathway {pathway!r}; choose from {', '.join(PATHWAYS)}")
    weights = view(model)
    if not 0 <= layer < weights.n_layers:
        raise ValueError(f"no layer {layer}, counted from 0: the model has L1 to L{weights.n_layers}")
    prefix, (attn, ffn, fused) = f"{weights.prefix}.{layer}.", _PARTS[weights.family]
    if pathway in ("full", "attention", "ffn"):
        part = {"full": "", "attention": attn, "ffn": ffn}[pathway]
        return tuple(Slice(n) for n, _ in model.named_parameters() if n.startswith(prefix + part))
    letter = pathway[0]
    if not fused:
        return (Slice(f"{prefix}{attn}{letter}_proj.weight"),)
    d, third = weights.d_model, "qkv".index(letter)
    return (Slice(f"{prefix}{attn}{fused}", third * d, (third + 1) * d),)


def part_masks(
    model: PreTrainedModel, layer: int, part: str, picked: Sequence[int]
) -> tuple[str, dict[Slice, Bool[Tensor, "*shape"]]]:
    """A part of a layer (0-based): the pathway that holds it, and which entries of that pathway's slices it is. part:
    `head` (query heads: what W_Q and W_O have of them), `values` (columns of W_V, counted over all key/value heads) or
    `neurons` (rows of W_out). Raises ValueError for other words."""
    pathways = {"head": "attention", "values": "v_only", "neurons": "ffn"}
    if part not in pathways:
        raise ValueError(f"unknown part {part!r}; choose from {', '.join(pathways)}")
    weights, parameters = view(model), dict(model.named_parameters())
    slices, index = pathway_slices(model, layer, pathways[part]), torch.tensor(picked)
    masks = {s: torch.zeros_like(s.of(parameters[s.name]), dtype=torch.bool) for s in slices}
    by_end = {s.name.split(".", 3)[-1]: mask for s, mask in masks.items()}  # name within the block
    width, gpt2 = weights.d_head, weights.family == "gpt2"
    if part == "head":
        rows = (index[:, None] * width + torch.arange(width)).flatten()
        _mark(by_end["attn.c_attn.weight" if gpt2 else "self_attn.q_proj.weight"], rows, gpt2)
        _mark(by_end["attn.c_proj.weight" if gpt2 else "self_attn.o_proj.weight"], rows, not gpt2)
    else:
        (mask,) = (
            masks.values() if part == "values" else (by_end["mlp.c_proj.weight" if gpt2 else "mlp.down_proj.weight"],)
        )
        _mark(mask, index, gpt2 == (part == "values"))
    return pathways[part], masks


def _mark(mask: Bool[Tensor, "a b"], index: Int[Tensor, " n"], columns: bool) -> None:
    """GPT-2 keeps its matrices as (in, out), Llama as (out, in)."""
    if columns:
        mask[:, index] = True
    else:
        mask[index] = True


def count_parameters(model: PreTrainedModel, slices: tuple[Slice, ...]) -> int:
    parameters = dict(model.named_parameters())
    return sum(s.of(parameters[s.name]).numel() for s in slices)


_PARTS = {"gpt2": ("attn.", "mlp.", "c_attn.weight"), "llama": ("self_attn.", "mlp.", None)}


def _add_bias(x: Float[Tensor, "b n t h"], bias: Float[Tensor, "n h"] | None) -> Float[Tensor, "b n t h"]:
    return x if bias is None else x + bias[:, None]


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _norm(module: Any) -> Norm:
    bias = getattr(module, "bias", None)
    eps = module.eps if isinstance(module, nn.LayerNorm) else module.variance_epsilon
    return Norm(module.weight, bias, eps, centred=isinstance(module, nn.LayerNorm))


def _gpt2(model: Any) -> Weights:
    def block(m: Any) -> Block:
        n = model.config.n_head
        W_Q, W_K, W_V = rearrange(m.attn.c_attn.weight, "d (qkv n h) -> qkv n d h", qkv=3, n=n)
        b_Q, b_K, b_V = rearrange(m.attn.c_attn.bias, "(qkv n h) -> qkv n h", qkv=3, n=n)
        W_O = rearrange(m.attn.c_proj.weight, "(n h) d -> n h d", n=n)
        attn = Attention(W_Q, W_K, W_V, W_O, b_Q, b_K, b_V, m.attn.c_proj.bias, rotary=None)
        mlp = MLP(
            m.mlp.c_fc.weight,
            m.mlp.c_proj.weight,
            m.mlp.c_fc.bias,
            m.mlp.c_proj.bias,
            W_gate=None,
            b_gate=None,
            act=ACT2FN[model.config.activation_function],
        )
        return Block(_norm(m.ln_1), attn, _norm(m.ln_2), mlp, m, m.attn.c_proj, m.mlp.c_proj)

    t = model.transformer
    return Weights(
        "gpt2",
        "transformer.h",
        t.wte.weight,
        t.wpe.weight,
        tuple(map(block, t.h)),
        _norm(t.ln_f),
        t.ln_f,
        model.lm_head.weight.T,
        model.config.n_positions,
    )


def _llama(model: Any) -> Weights:
    c, base = model.config, model.model

    def block(m: Any) -> Block:
        a, n, kv = m.self_attn, c.num_attention_heads, c.num_key_value_heads
        heads = [
            (rearrange(p.weight, "(n h) d -> n d h", n=k), None if p.bias is None else p.bias.view(k, -1))
            for p, k in ((a.q_proj, n), (a.k_proj, kv), (a.v_proj, kv))
        ]
        (W_Q, b_Q), (W_K, b_K), (W_V, b_V) = heads
        W_O = rearrange(a.o_proj.weight, "d (n h) -> n h d", n=n)
        attn = Attention(W_Q, W_K, W_V, W_O, b_Q, b_K, b_V, a.o_proj.bias, base.rotary_emb)
        mlp = MLP(
            m.mlp.up_proj.weight.T,
            m.mlp.down_proj.weight.T,
            m.mlp.up_proj.bias,
            m.mlp.down_proj.bias,
            m.mlp.gate_proj.weight.T,
            m.mlp.gate_proj.bias,
            ACT2FN[c.hidden_act],
        )
        norms = _norm(m.input_layernorm), _norm(m.post_attention_layernorm)
        return Block(norms[0], attn, norms[1], mlp, m, a.o_proj, m.mlp.down_proj)

    return Weights(
        "llama",
        "model.layers",
        base.embed_tokens.weight,
        None,
        tuple(map(block, base.layers)),
        _norm(base.norm),
        base.norm,
        model.lm_head.weight.T,
        c.max_position_embeddings,
    )


_BUILDERS = {"gpt2": _gpt2, "llama": _llama}
