"""One view of a transformer's weights for every family that the book reads.

Everything is written for row vectors, `y = x @ W`, as in TransformerLens: W_Q, W_K and W_V are
`[head, d_model, d_head]`, W_O is `[head, d_head, d_model]`, W_U is `[d_model, vocab]`. Nothing is folded,
centred or copied: each tensor is a view of the model's own parameter. GPT-2's fused `c_attn` is split in
thirds; Llama's grouped key and value heads keep their number (`n_kv_heads`), and `Attention.per_head`
repeats them where each query head needs its own.

A new model family needs a `Layout` and a builder here, and nothing elsewhere.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from lib.errors import ModelError

PAPER = ("full", "attention", "ffn", "v_only")  # the source page's four pathways
OF_A_LAYER = (*PAPER, "q_only", "k_only")
SINKS = ("sink_kv", "sink_token")  # of one more position before every text (`lib.sinks`)
PATHWAYS = (*OF_A_LAYER, *SINKS)
Vectors = Float[Tensor, "*b d_model"]  # of the residual stream
Unembedding = Float[Tensor, "d_model vocab"]  # of all tokens, or a part of them
Heads = Float[Tensor, "b n_heads t d_head"]  # a vector of every head at every position
Patterns = Float[Tensor, "b n_heads t t"]  # (query, key)


@dataclass(frozen=True)
class Norm:
    """LayerNorm (`centred`, with bias) or RMSNorm. weight and bias: `[d_model]`. offset: what the gain exceeds the
    weight by, 1 in Gemma."""

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"] | None
    eps: float
    centred: bool
    offset: float = 0.0

    @property
    def gain(self) -> Float[Tensor, " d_model"]:
        return self.weight + self.offset if self.offset else self.weight

    def centre(self, x: Vectors) -> Vectors:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: Vectors) -> Float[Tensor, "*b 1"]:
        """What the norm divides x by: the root mean square of the (centred) vector."""
        return (self.centre(x).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def __call__(self, x: Vectors) -> Vectors:
        return _plus(self.centre(x) / self.scale(x) * self.gain, self.bias)

    def fold(self, W: Float[Tensor, "*h d_model k"]) -> Float[Tensor, "*h d_model k"]:
        """The matrix F with `norm(x) @ W == x / scale(x) @ F + bias @ W`: gain multiplied in, rows centred
        where the norm centres (centring is symmetric, so it may act on the matrix instead of on x)."""
        W = self.gain[:, None] * W
        return W - W.mean(-2, keepdim=True) if self.centred else W

    def moved(self, x: Vectors, change: Vectors) -> Vectors:
        """By how much what leaves the norm changes with what enters it."""
        return self(x + change) - self(x)


class NoNorm:
    """Stands where a family has no norm."""

    gain = 1.0

    def scale(self, x: Vectors) -> float:
        return 1.0

    def __call__(self, x: Vectors) -> Vectors:
        return x

    def moved(self, x: Vectors, change: Vectors) -> Vectors:
        return change


NO_NORM = NoNorm()


@dataclass(frozen=True)
class FixedSink:
    """A learned key (not rotated) and value of one layer, put for those of the token at one index of every text."""

    index: int
    key: Float[Tensor, "n_kv_heads d_head"]
    value: Float[Tensor, "n_kv_heads d_head"]


@dataclass(frozen=True)
class Attention:
    """Heads of one block. `rotary(x, position_ids) -> cos, sin` is the model's own, None for GPT-2; it may turn
    only the first dimensions of a head. score_scale: what scores are divided by. norm_Q, norm_K: of each query and key.
    window: how many positions a token sees, itself among them; None: all."""

    W_Q: Float[Tensor, "n_heads d_model d_head"]
    W_K: Float[Tensor, "n_kv_heads d_model d_head"]
    W_V: Float[Tensor, "n_kv_heads d_model d_head"]
    W_O: Float[Tensor, "n_heads d_head d_model"]
    b_Q: Float[Tensor, "n_heads d_head"] | None
    b_K: Float[Tensor, "n_kv_heads d_head"] | None
    b_V: Float[Tensor, "n_kv_heads d_head"] | None
    b_O: Float[Tensor, " d_model"] | None
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    score_scale: float
    norm_Q: Norm | NoNorm = NO_NORM
    norm_K: Norm | NoNorm = NO_NORM
    window: int | None = None
    sink: FixedSink | None = None

    def per_head(self, kv: Float[Tensor, "..."], *, batched: bool = False) -> Float[Tensor, "..."]:
        """A key or value tensor (`[n_kv_heads, ...]`, or `[b, n_kv_heads, ...]` where batched) repeated so that query
        head h reads key/value head `h // group`: `[n_heads, ...]`, or `[b, n_heads, ...]`."""
        b, group = "b " if batched else "", self.W_Q.shape[0] // self.W_K.shape[0]
        return repeat(kv, f"{b}kv ... -> {b}(kv group) ...", group=group)

    def queries(self, x: Vectors) -> Float[Tensor, "*b n_heads t d_head"]:
        """Queries of every position, not rotated. x: the normalised residual stream, as in all that follows."""
        return self.norm_Q(_project(x, self.W_Q, self.b_Q))

    def keys(self, x: Vectors) -> Float[Tensor, "*b n_kv_heads t d_head"]:
        """Keys of every position, not rotated."""
        return self.norm_K(self.keys_before_norm(x))

    def keys_before_norm(self, x: Vectors) -> Float[Tensor, "*b n_kv_heads t d_head"]:
        return _project(x, self.W_K, self.b_K)

    def values(self, x: Vectors) -> Float[Tensor, "*b n_kv_heads t d_head"]:
        return _project(x, self.W_V, self.b_V)

    def looked_at(self, x: Vectors, position: Int[Tensor, " t"]) -> tuple[Tensor, Tensor]:
        """Keys (not rotated) and values of every position, `[*b, n_kv_heads, t, d_head]`, with a learned sink's in its
        place. position: of each token in its own text."""
        k, v = self.keys(x), self.values(x)
        if self.sink is None:
            return k, v
        at = (position == self.sink.index)[:, None]
        return torch.where(at, self.sink.key[:, None], k), torch.where(at, self.sink.value[:, None], v)

    def rotated(self, x: Float[Tensor, "*b t d_head"], position: Int[Tensor, " t"]) -> Float[Tensor, "*b t d_head"]:
        """Queries or keys, rotated to their positions where the family does so."""
        if self.rotary is None:
            return x
        cos, sin = self.rotary(x, position[None])
        x, rest = x.split((n := cos.shape[-1], x.shape[-1] - n), dim=-1)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((x * cos[0] + torch.cat((-second, first), dim=-1) * sin[0], rest), -1)

    def pattern(self, x: Float[Tensor, "b t d_model"]) -> Patterns:
        """Causal attention probabilities (query, key)."""
        return self.attend(x)[0]

    def attend(self, x: Float[Tensor, "b t d_model"]) -> tuple[Patterns, Heads, Float[Tensor, "b n_kv_heads t d_head"]]:
        """`pattern`, the keys that it comes from, rotated, one for each query head, and the values."""
        position = torch.arange(x.shape[1], device=x.device)
        k, v = self.looked_at(x, position)
        q, k = self.rotated(self.queries(x), position), self.per_head(self.rotated(k, position), batched=True)
        scores = einsum(q, k, "b n q h, b n k h -> b n q k") / self.score_scale
        sees = self.within_window(position, position) & (position <= position[:, None])
        return scores.masked_fill(~sees, float("-inf")).softmax(-1), k, v

    def within_window(self, query: Int[Tensor, " q"], key: Int[Tensor, " *k"]) -> Bool[Tensor, "q k"]:
        """Whether a key's position lies near enough to a query's, if it lies before it."""
        return query[:, None] - key < (torch.inf if self.window is None else self.window)

    def mix(self, pattern: Patterns, v: Float[Tensor, "b n_kv_heads t d_head"]) -> Heads:
        """z: what each head gathers at each position, before W_O."""
        return einsum(pattern, self.per_head(v, batched=True), "b n q k, b n k h -> b n q h")

    def __call__(self, x: Float[Tensor, "b t d_model"]) -> Float[Tensor, "b t d_model"]:
        pattern, _, v = self.attend(x)
        return self.write(self.mix(pattern, v).transpose(1, 2))

    def write(self, z: Float[Tensor, "*b n_heads d_head"]) -> Vectors:
        """What the heads of each position write together, with the output bias."""
        return _plus(z.flatten(-2) @ self.W_O.flatten(0, 1), self.b_O)


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

    def neurons(self, x: Vectors) -> Float[Tensor, "*b d_mlp"]:
        """What W_out reads: each neuron's activation, after the gate where there is one."""
        pre = _plus(x @ self.W_in, self.b_in)
        return self.act(pre) if self.W_gate is None else self.act(_plus(x @ self.W_gate, self.b_gate)) * pre

    def __call__(self, x: Vectors) -> Vectors:
        return self.write(self.neurons(x))

    def write(self, neurons: Float[Tensor, "*b d_mlp"]) -> Vectors:
        """What the neurons write together, with the output bias."""
        return _plus(neurons @ self.W_out, self.b_out)


@dataclass(frozen=True)
class Block:
    """One layer, and the modules whose input or output a hook reads: `heads_out` (the output projection of attention;
    its input is every head's z), `mlp_out` (the last linear of the MLP; its input is the neurons), `mlp_written` (its
    output is what the MLP adds to the stream: `mlp_out`, or the norm after it). after_attn, after_mlp: norms of what
    attention and the MLP add (Gemma). parallel: the MLP reads what entered the block, not what attention made of it.

    A norm after attention makes what a head writes depend on the others. Frozen at its real scale, it is linear: head h
    adds `z[h] @ W_O[h] / after_attn.scale(attn.write(z))`, and the same with neurons (`heads_scale`, `mlp_scale`)."""

    norm_attn: Norm
    attn: Attention
    norm_mlp: Norm
    mlp: MLP
    module: nn.Module
    heads_out: nn.Module
    mlp_out: nn.Module
    mlp_written: nn.Module
    after_attn: Norm | NoNorm = NO_NORM
    after_mlp: Norm | NoNorm = NO_NORM
    parallel: bool = False

    @property
    def W_O(self) -> Float[Tensor, "n_heads d_head d_model"]:
        """What each head can write into the stream, with the gain of a norm after attention, without its scale."""
        return self.attn.W_O * self.after_attn.gain

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """What each neuron can write into the stream, likewise."""
        return self.mlp.W_out * self.after_mlp.gain

    def heads_scale(self, z: Float[Tensor, "*b n_heads d_head"]) -> Float[Tensor, "*b 1"] | float:
        """What the norm after attention divides by, 1 where there is none."""
        return self.after_attn.scale(self.attn.write(z))

    def mlp_scale(self, neurons: Float[Tensor, "*b d_mlp"]) -> Float[Tensor, "*b 1"] | float:
        """What the norm after the MLP divides by, 1 where there is none."""
        return self.after_mlp.scale(self.mlp.write(neurons))

    def write_heads(self, z: Float[Tensor, "*b n_heads d_head"]) -> Vectors:
        """What the heads of each position add to the stream together."""
        return self.after_attn(self.attn.write(z))

    def neurons(self, entered: Vectors, middle: Vectors) -> Float[Tensor, "*b d_mlp"]:
        """The MLP's neurons, from the stream that entered the block and from that after attention."""
        return self.mlp.neurons(self.norm_mlp(entered if self.parallel else middle))

    def write_neurons(self, neurons: Float[Tensor, "*b d_mlp"]) -> Vectors:
        """What the MLP adds to the stream with these neurons."""
        return self.after_mlp(self.mlp.write(neurons))

    def write_mlp(self, entered: Vectors, middle: Vectors) -> Vectors:
        """What the MLP adds to the stream, from the streams that `neurons` takes."""
        return self.write_neurons(self.neurons(entered, middle))

    def bias(self) -> Float[Tensor, " d_model"]:
        """What the block adds to every position whatever the input: the two output biases (zero in Llama, and
        wherever a norm follows)."""
        zero = torch.zeros_like(self.norm_attn.gain)
        return sum((b for b in (self.attn.b_O, self.mlp.b_out) if b is not None), zero)


@dataclass
class Sink:
    """One more token, whose id is the vocabulary's size. row: its embedding, not scaled. rows: where it is in what the
    model's modules are reading (`lib.sinks`)."""

    row: Float[Tensor, " d_model"]
    rows: Bool[Tensor, "b t"] | None = None


@dataclass(frozen=True)
class Layout:
    """Where a family keeps the parameters of a block. blocks: what their names begin with, before the layer's number.
    attention: what the names of attention's begin with, within the block, where the MLP's begin with `mlp.`. matrices:
    the names of W_Q, W_K, W_V, W_O and W_out within the block (some may share one, fused along its last axis). gains:
    of its two norms. input_first: a matrix is kept as (in, out), like Conv1D's, not as (out, in), like nn.Linear's."""

    blocks: str
    attention: str
    matrices: dict[str, str]
    gains: tuple[str, str]
    input_first: bool

    def prefix(self, layer: int) -> str:
        """What the names of a layer's (0-based) parameters begin with."""
        return f"{self.blocks}.{layer}."

    def name(self, layer: int, matrix: str) -> str:
        """The parameter that holds a matrix of a layer (0-based)."""
        return self.prefix(layer) + self.matrices[matrix]


@dataclass(frozen=True)
class Weights:
    """The whole model. W_pos is None where positions are rotary. embed_scale: what embeddings are multiplied by.
    sink: one more token, learned."""

    layout: Layout
    W_E: Float[Tensor, "vocab d_model"]
    W_pos: Float[Tensor, "context d_model"] | None
    blocks: tuple[Block, ...]
    norm_final: Norm
    norm_final_module: nn.Module
    W_U: Unembedding
    context: int
    embed_scale: float = 1.0
    sink: Sink | None = None

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

    def embed(self, tokens: Int[Tensor, "*b t"], position: Int[Tensor, " t"] | None = None) -> Vectors:
        """The residual stream that enters the first block. position: of each token, if they do not simply count."""
        words = self.embeddings(tokens)
        if self.W_pos is None:
            return words
        return words + (self.W_pos[: tokens.shape[-1]] if position is None else self.W_pos[position])

    def embeddings(self, tokens: Int[Tensor, "*b"] | Sequence[int]) -> Vectors:
        """What tokens are to the first block wherever they stand."""
        if self.sink is None:
            return self.W_E[tokens] * self.embed_scale
        tokens, end = torch.as_tensor(tokens, device=self.W_E.device), len(self.W_E)
        words = self.W_E[tokens.clamp(max=end - 1)]
        return torch.where((tokens == end)[..., None], self.sink.row, words) * self.embed_scale

    def residuals(self, tokens: Int[Tensor, "b t"]) -> list[Float[Tensor, "b t d_model"]]:
        """The residual stream before each block and after the last, computed from this view alone."""
        stream = [self.embed(tokens)]
        for block in self.blocks:
            middle = stream[-1] + block.after_attn(block.attn(block.norm_attn(stream[-1])))
            stream.append(middle + block.write_mlp(stream[-1], middle))
        return stream


def view(model: PreTrainedModel) -> Weights:
    """The view of a loaded model. Raises ModelError as `check_family` and `check_options` do."""
    where = model.config.name_or_path or "this model"
    check_family(model.config.model_type, where)
    check_options(model.config, where)
    return _BUILDERS[model.config.model_type](model)


def check_family(family: str | None, where: str) -> None:
    """Raises ModelError for one that has no builder."""
    if family not in _BUILDERS:
        raise ModelError(
            f"{where} is of the family {family!r}; the book reads {', '.join(sorted(_BUILDERS))}. "
            "Choose a model of one of them, or add a builder to lib/weights.py."
        )


# Options that change what is computed, and the only value that the view reads; those that only one family has so.
_READ_AS: dict[str, Any] = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
_READ_AS |= {"add_cross_attention": False, "use_bidirectional_attention": False}
_READ_AS |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}
_READ_AS_IN = {"gemma3_text": {"attention_bias": False}}


def check_options(config: Any, where: str) -> None:
    """Raises ModelError for a configuration with an option that the view does not read."""
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *rope.values()):  # of all layers, or of each kind of them
        if isinstance(kind, dict) and kind.get("rope_type") == "longrope":
            raise ModelError(
                f"{where} turns positions by the length of a text (longrope), and here texts of all lengths are run "
                "together; choose a model with fixed rotations."
            )
    for name, read in (_READ_AS | _READ_AS_IN.get(config.model_type, {})).items():
        if (value := getattr(config, name, read)) != read:
            raise ModelError(
                f"{where} sets {name} to {value!r} in its configuration, and lib/weights.py reads only {read!r}; "
                "choose a model without it."
            )


@torch.no_grad()
def check_view(model: PreTrainedModel, weights: Weights, tokens: Int[Tensor, "b t"]) -> float:
    """Largest difference between the view's hidden states and last logits and the model's own, relative to the largest
    value of that state, on the tokens and, in fp32, on two rows of random ones. Raises ModelError above a tolerance:
    then Q, K, V, O or the MLP are misread. It is 1e-4 in fp32, where rounding over 30 layers stays under 1e-5; a wrong
    slice, bias or rotation gives 1e-1 or more. In bf16 it is eight roundings, and random tokens, whose states rounding
    alone moves by 1e-1, are not asked. A value that is no number never passes."""
    tolerance, size = max(1e-4, 8 * torch.finfo(weights.W_E.dtype).eps), (2, min(24, weights.context))
    texts = [tokens]
    if weights.W_E.dtype == torch.float32:
        generator = torch.Generator("cpu").manual_seed(0)
        texts.append(torch.randint(len(weights.W_E), size, generator=generator, device="cpu").to(tokens.device))
    errors = torch.stack([_view_errors(model, weights, text) for text in texts]).amax(0)
    worst = int(errors.argmax())  # NaN, if there is one
    if not (errors <= tolerance).all():
        state = f"hidden state {worst} of {len(errors) - 2}" if worst < len(errors) - 1 else "logits"
        raise ModelError(
            f"the weight view does not reproduce the model: relative error {float(errors[worst]):.2g} in the {state} "
            f"(allowed {tolerance:g}). Its configuration uses something that lib/weights.py does not read; this model "
            "cannot be studied yet."
        )
    return float(errors[worst])


def _view_errors(model: PreTrainedModel, weights: Weights, tokens: Int[Tensor, "b t"]) -> Float[Tensor, " n"]:
    """Of each hidden state, and of the logits after the last token."""
    expected = model(tokens, output_hidden_states=True, use_cache=False, logits_to_keep=1)
    stream = weights.residuals(tokens)
    stream[-1] = weights.norm_final(stream[-1])  # Hugging Face reports the last state after the final norm
    pairs = zip([*stream, stream[-1][:, -1:] @ weights.W_U], [*expected.hidden_states, expected.logits], strict=True)
    return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).float()


@dataclass(frozen=True)
class Slice:
    """A named parameter, or columns `start:stop` of its last axis, or rows `start:stop` of `every` so many of its first
    axis (of a tensor that is fused head by head): then its values are `[group, row, ...]`."""

    name: str
    start: int | None = None
    stop: int | None = None
    every: int | None = None

    def __str__(self) -> str:
        rows = "..., " if self.every is None else f"every {self.every} rows: "
        return self.name if self.start is None else f"{self.name}[{rows}{self.start}:{self.stop}]"

    def fits(self, parameter: Tensor) -> bool:
        """Whether a parameter has this place."""
        groups = self.every is None or (self.every > 0 and len(parameter) % self.every == 0)
        width = parameter.shape[-1] if self.every is None else self.every
        return groups and (self.start is None or 0 <= self.start < (self.stop or 0) <= width)

    def of(self, parameter: Tensor) -> Tensor:
        if self.every is not None:
            return parameter.unflatten(0, (-1, self.every))[:, self.start : self.stop]
        return parameter if self.start is None else parameter[..., self.start : self.stop]

    def put(self, parameter: Tensor, value: Tensor) -> Tensor:
        """The parameter with the value in this place, as a new tensor, differentiable in the value."""
        if self.start is None:
            return value
        if self.every is not None:
            groups = parameter.unflatten(0, (-1, self.every))
            return torch.cat((groups[:, : self.start], value, groups[:, self.stop :]), 1).flatten(0, 1)
        return torch.cat((parameter[..., : self.start], value, parameter[..., self.stop :]), -1)


SINK_SLICES = {"sink_token": (Slice("sink.row"),), "sink_kv": (Slice("sink.keys"), Slice("sink.values"))}


def pathway_slices(model: PreTrainedModel, layer: int, pathway: str) -> tuple[Slice, ...]:
    """What a pathway may change in one layer (0-based). full: the block with its norms; attention: Q, K, V, O
    and their biases; ffn: the MLP; v_only, q_only, k_only: one weight matrix, without bias. sink_kv, sink_token: of no
    layer, and no parameters of the model (`lib.sinks`).
    For GPT-2 the matrix is a third of the fused `c_attn.weight`, for GPT-NeoX a third of each head's rows of a fused
    one. Raises ValueError for other names or layers."""
    if pathway not in PATHWAYS:
        raise ValueError(f"unknown pathway {pathway!r}; choose from {', '.join(PATHWAYS)}")
    weights, parameters = view(model), dict(model.named_parameters())
    if not 0 <= layer < weights.n_layers:
        raise ValueError(f"no layer {layer}, counted from 0: the model has L1 to L{weights.n_layers}")
    layout, prefix = weights.layout, weights.layout.prefix(layer)
    if pathway in SINKS:
        return SINK_SLICES[pathway]
    groups = {"full": prefix, "attention": prefix + layout.attention, "ffn": prefix + "mlp."}
    if pathway in groups:
        return tuple(Slice(name) for name in parameters if name.startswith(groups[pathway]))
    matrix = f"W_{pathway[0].upper()}"
    name, seen = layout.name(layer, matrix), getattr(weights.blocks[layer].attn, matrix)
    if seen.numel() == parameters[name].numel():
        return (Slice(name),)
    start, rows = seen.storage_offset() - parameters[name].storage_offset(), len(parameters[name])
    if layout.input_first:  # of a fused matrix: in its first row
        return (Slice(name, start, start + seen.numel() // rows),)
    first, every = start // weights.d_model, seen.stride(0) // weights.d_model
    return (Slice(name, first, first + weights.d_head, every),)


def part_masks(
    model: PreTrainedModel, layer: int, part: str, picked: Sequence[int]
) -> tuple[str, dict[Slice, Bool[Tensor, "*shape"]]]:
    """A part of a layer (0-based): the pathway that holds it, and which entries of that pathway's slices it is. part:
    `head` (query heads: what W_Q and W_O have of them), `values` (columns of W_V, counted over all key/value heads) or
    `neurons` (rows of W_out). Raises ValueError for other words."""
    weights, parameters, index = view(model), dict(model.named_parameters()), torch.tensor(picked)
    attn, column = weights.blocks[layer].attn, (index // weights.d_head, slice(None), index % weights.d_head)
    parts: dict[str, tuple[str, dict[str, tuple[Tensor, Any]]]] = {
        "head": ("attention", {"W_Q": (attn.W_Q, index), "W_O": (attn.W_O, index)}),
        "values": ("v_only", {"W_V": (attn.W_V, column)}),
        "neurons": ("ffn", {"W_out": (weights.blocks[layer].mlp.W_out, index)}),
    }
    if part not in parts:
        raise ValueError(f"unknown part {part!r}; choose from {', '.join(parts)}")
    pathway, entries = parts[part]
    slices = pathway_slices(model, layer, pathway)
    masks = {s.name: torch.zeros_like(parameters[s.name], dtype=torch.bool) for s in slices}
    for matrix, (seen, where) in entries.items():
        name = weights.layout.name(layer, matrix)
        start = seen.storage_offset() - parameters[name].storage_offset()
        masks[name].as_strided(seen.shape, seen.stride(), start)[where] = True  # the same view, of the mask
    return pathway, {s: s.of(masks[s.name]) for s in slices}


def places(model: PreTrainedModel, slices: Iterable[Slice]) -> list[Tensor]:
    """Where the slices are: the model's own parameters, or views of their columns."""
    parameters = dict(model.named_parameters())
    return [part.of(parameters[part.name]) for part in slices]


def _project(x: Vectors, W: Float[Tensor, "n d h"], b: Float[Tensor, "n h"] | None) -> Float[Tensor, "*b n t h"]:
    return _plus(einsum(x, W, "... t d, n d h -> ... n t h"), None if b is None else b[:, None])


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


def _norm(module: Any, offset: float = 0.0) -> Norm:
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    return Norm(module.weight, getattr(module, "bias", None), eps, isinstance(module, nn.LayerNorm), offset)


_GPT2 = Layout(
    blocks="transformer.h",
    attention="attn.",
    matrices={f"W_{x}": "attn.c_attn.weight" for x in "QKV"}
    | {"W_O": "attn.c_proj.weight", "W_out": "mlp.c_proj.weight"},
    gains=("ln_1.weight", "ln_2.weight"),
    input_first=True,
)


def _gpt2(model: Any) -> Weights:
    c, base = model.config, model.transformer

    def block(m: Any) -> Block:
        W_Q, W_K, W_V = rearrange(m.attn.c_attn.weight, "d (qkv n h) -> qkv n d h", qkv=3, n=c.n_head)
        b_Q, b_K, b_V = rearrange(m.attn.c_attn.bias, "(qkv n h) -> qkv n h", qkv=3, n=c.n_head)
        W_O = rearrange(m.attn.c_proj.weight, "(n h) d -> n h d", n=c.n_head)
        attn = Attention(W_Q, W_K, W_V, W_O, b_Q, b_K, b_V, m.attn.c_proj.bias, None, W_Q.shape[-1] ** 0.5)
        W_in, b_in, W_out, b_out = (getattr(p, x) for p in (m.mlp.c_fc, m.mlp.c_proj) for x in ("weight", "bias"))
        mlp = MLP(W_in, W_out, b_in, b_out, W_gate=None, b_gate=None, act=ACT2FN[c.activation_function])
        return Block(_norm(m.ln_1), attn, _norm(m.ln_2), mlp, m, m.attn.c_proj, m.mlp.c_proj, m.mlp.c_proj)

    blocks, W_U = tuple(map(block, base.h)), model.lm_head.weight.T
    W_E, W_pos, norm = base.wte.weight, base.wpe.weight, base.ln_f
    return Weights(_GPT2, W_E, W_pos, blocks, _norm(norm), norm, W_U, c.n_positions)


_LLAMA = Layout(
    blocks="model.layers",
    attention="self_attn.",
    matrices={f"W_{x.upper()}": f"self_attn.{x}_proj.weight" for x in "qkvo"} | {"W_out": "mlp.down_proj.weight"},
    gains=("input_layernorm.weight", "post_attention_layernorm.weight"),
    input_first=False,
)

_GEMMA3 = replace(_LLAMA, gains=("input_layernorm.weight", "pre_feedforward_layernorm.weight"))


def _attention(a: Any, config: Any, rotary: Any, window: int | None, offset: float = 0.0) -> Attention:
    """Of a family that keeps Q, K, V and O apart. offset: of the norms of queries and keys, where there are any."""

    def heads(linear: nn.Linear, n: int) -> tuple[Tensor, Tensor | None]:
        W = rearrange(linear.weight, "(n h) d -> n d h", n=n)
        return W, None if linear.bias is None else linear.bias.view(n, -1)

    n, n_kv = config.num_attention_heads, config.num_key_value_heads
    (W_Q, b_Q), (W_K, b_K), (W_V, b_V) = heads(a.q_proj, n), heads(a.k_proj, n_kv), heads(a.v_proj, n_kv)
    W_O = rearrange(a.o_proj.weight, "d (n h) -> n h d", n=n)
    scale = getattr(config, "query_pre_attn_scalar", W_Q.shape[-1]) ** 0.5
    norm_Q, norm_K = (_norm(getattr(a, x), offset) if hasattr(a, x) else NO_NORM for x in ("q_norm", "k_norm"))
    return Attention(W_Q, W_K, W_V, W_O, b_Q, b_K, b_V, a.o_proj.bias, rotary, scale, norm_Q, norm_K, window)


def _gated(m: Any) -> MLP:
    up, down, gate = m.up_proj, m.down_proj, m.gate_proj
    return MLP(up.weight.T, down.weight.T, up.bias, down.bias, gate.weight.T, gate.bias, m.act_fn)


def _llama(model: Any) -> Weights:
    """Also Mistral, Qwen2 and Qwen3: theirs are a window of attention, biases, and norms of queries and keys."""
    c, base = model.config, model.model

    def block(m: Any) -> Block:
        a, down = m.self_attn, m.mlp.down_proj
        window = a.sliding_window if hasattr(a, "sliding_window") else getattr(c, "sliding_window", None)
        attn, norms = _attention(a, c, base.rotary_emb, window), (m.input_layernorm, m.post_attention_layernorm)
        return Block(_norm(norms[0]), attn, _norm(norms[1]), _gated(m.mlp), m, a.o_proj, down, down)

    blocks, W_E, W_U, norm = tuple(map(block, base.layers)), base.embed_tokens.weight, model.lm_head.weight.T, base.norm
    return Weights(_LLAMA, W_E, None, blocks, _norm(norm), norm, W_U, c.max_position_embeddings)


def _gemma3(model: Any) -> Weights:
    c, base = model.config, model.model
    rotary = {kind: partial(base.rotary_emb, layer_type=kind) for kind in set(c.layer_types)}

    def block(m: Any) -> Block:
        a, last = m.self_attn, m.post_feedforward_layernorm
        attn, norms = _attention(a, c, rotary[a.layer_type], a.sliding_window, offset=1.0), [m.input_layernorm]
        norms += [m.pre_feedforward_layernorm, m.post_attention_layernorm, last]
        before, between, after_attn, after_mlp = (_norm(norm, offset=1.0) for norm in norms)
        mlp, outputs = _gated(m.mlp), (a.o_proj, m.mlp.down_proj, last)
        return Block(before, attn, between, mlp, m, *outputs, after_attn, after_mlp)

    blocks, E, W_U, norm = tuple(map(block, base.layers)), base.embed_tokens, model.lm_head.weight.T, base.norm
    scale = float(torch.tensor(E.scalar_embed_scale, dtype=E.weight.dtype))  # as the model rounds it
    context, final = c.max_position_embeddings, _norm(norm, offset=1.0)
    return Weights(_GEMMA3, E.weight, None, blocks, final, norm, W_U, context, scale)


_GPT_NEOX = Layout(
    blocks="gpt_neox.layers",
    attention="attention.",
    matrices={f"W_{x}": "attention.query_key_value.weight" for x in "QKV"}
    | {"W_O": "attention.dense.weight", "W_out": "mlp.dense_4h_to_h.weight"},
    gains=("input_layernorm.weight", "post_attention_layernorm.weight"),
    input_first=False,
)


def _gpt_neox(model: Any) -> Weights:
    """Queries, keys and values of a head lie together, and the MLP may read what attention reads."""
    c, base, n = model.config, model.gpt_neox, model.config.num_attention_heads

    def block(m: Any) -> Block:
        fused, out, mlp = m.attention.query_key_value, m.attention.dense, m.mlp
        W_Q, W_K, W_V = rearrange(fused.weight, "(n qkv h) d -> qkv n d h", n=n, qkv=3)
        no_bias, split = (None, None, None), "(n qkv h) -> qkv n h"
        b_Q, b_K, b_V = no_bias if fused.bias is None else rearrange(fused.bias, split, n=n, qkv=3)
        W_O, scale = rearrange(out.weight, "d (n h) -> n h d", n=n), W_Q.shape[-1] ** 0.5
        attn = Attention(W_Q, W_K, W_V, W_O, b_Q, b_K, b_V, out.bias, base.rotary_emb, scale)
        up, down = mlp.dense_h_to_4h, mlp.dense_4h_to_h
        mlp = MLP(up.weight.T, down.weight.T, up.bias, down.bias, W_gate=None, b_gate=None, act=mlp.act)
        norms, modules = (_norm(m.input_layernorm), _norm(m.post_attention_layernorm)), (m, out, down, down)
        return Block(norms[0], attn, norms[1], mlp, *modules, parallel=c.use_parallel_residual)

    blocks, norm, W_U = tuple(map(block, base.layers)), base.final_layer_norm, model.get_output_embeddings().weight.T
    return Weights(_GPT_NEOX, base.embed_in.weight, None, blocks, _norm(norm), norm, W_U, c.max_position_embeddings)


_BUILDERS = {"gpt2": _gpt2, "gemma3_text": _gemma3, "gpt_neox": _gpt_neox}
_BUILDERS |= dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _llama)
