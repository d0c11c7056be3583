"""A first position that is nobody's subject: one learned token before every text.

A model makes the first position of a text its attention sink (Xiao et al. 2023; Sun et al. 2024): a subject that stands
there is read badly. Two pathways give the model one more position there, after what its tokenizer puts itself:

    sink_token  its embedding is learned, as one row of the vocabulary (prompt tuning, Lester et al. 2021, of length 1)
    sink_kv     its key and value in every layer are learned (prefix tuning, Li and Liang 2021, of length 1, without its
                network); what the token is otherwise no other position can notice

Both start from what a line break is at that place, so before any training they are the prefix of chapter 2 that costs
nothing. No parameter of the model is changed, or moved. `standing` gives a model that reads every text so; it has one
more token id, the vocabulary's size, and the logits that it had.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lib.errors import EditError
from lib.forward import pack, streams
from lib.models import Model
from lib.weights import SINK_SLICES, FixedSink, Sink, Slice, Weights, pathway_slices

TEXT = "\n"  # what a sink starts from
ROW, (KEYS, VALUES) = SINK_SLICES["sink_token"][0], SINK_SLICES["sink_kv"]


def shapes(weights: Weights, pathway: str) -> dict[Slice, tuple[int, ...]]:
    """Of what is learned: a row, or a key and a value of every layer (not rotated, before any norm of keys)."""
    if pathway == "sink_token":
        return {ROW: (weights.d_model,)}
    size = (weights.n_layers, weights.n_kv_heads, weights.d_head)
    return {KEYS: size, VALUES: size}


def check(model: Model, values: dict[Slice, Tensor]) -> None:
    """Raises EditError for values of another model's size, and for a model that has a sink already."""
    if model.weights.sink is not None:
        raise EditError(f"{model.name} has a sink before every text already; take that one away first.")
    pathway = next(name for name, slices in SINK_SLICES.items() if set(slices) & set(values))
    for part, shape in shapes(model.weights, pathway).items():
        if part in values and tuple(values[part].shape) != shape:
            has = f"{part} has the shape {tuple(values[part].shape)}, and {model.name} takes {shape}"
            raise EditError(f"{has}; the edit is of another model, or was altered.")


@torch.no_grad()
def ordinary(model: Model, pathway: str, text: str = TEXT) -> dict[Slice, Tensor]:
    """The values of an ordinary token in the sink's place, the last one of a text: what is said after it is then what
    is said after that prefix."""
    token, weights = model.pieces(text)[-1], model.weights
    if pathway == "sink_token":
        return {ROW: weights.W_E[token].detach().clone()}
    before = streams(model, pack(model, [[*model.bos, token]]), range(weights.n_layers))
    layers = [(block.attn, block.norm_attn(before[i][-1:])) for i, block in enumerate(weights.blocks)]
    keys = torch.stack([attn.keys_before_norm(x)[:, 0] for attn, x in layers])
    return {KEYS: keys, VALUES: torch.stack([attn.values(x)[:, 0] for attn, x in layers])}


@contextmanager
def standing(model: Model, values: dict[Slice, Tensor], *, middle: bool = False) -> Iterator[Model]:
    """The model with a sink before every text, differentiable in the values; while the context lasts, also its module
    reads the sink's token. middle: a learned row stands in the middle of every text instead, and is no sink: a control.
    Raises EditError as `check` does, before anything is done, and for a key and value in the middle."""
    check(model, values)
    if middle and KEYS in values:
        raise EditError("a learned key and value stand before every text; only a learned row can stand in its middle.")
    weights, width = model.weights, model.weights.d_model
    sink = Sink(values.get(ROW, torch.zeros(width, dtype=weights.W_E.dtype, device=model.device)))
    blocks, handles = weights.blocks, _embedding_hooks(model, sink)
    if KEYS in values:
        kv = list(zip(values[KEYS], values[VALUES], strict=True))
        fixed = [
            FixedSink(len(model.bos), b.attn.norm_K(k[:, None])[:, 0], v) for b, (k, v) in zip(blocks, kv, strict=True)
        ]
        blocks = tuple(replace(b, attn=replace(b.attn, sink=f)) for b, f in zip(blocks, fixed, strict=True))
        handles += [h for layer, pair in enumerate(kv) for h in _projection_hooks(model, layer, pair, sink)]
    total = hashlib.sha256((model.weights_sha256 + "middle" * middle).encode())
    for value in values.values():
        total.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    bos = (*model.bos, len(weights.W_E))
    try:
        own = replace(weights, blocks=blocks, sink=sink)
        yield replace(model, weights=own, bos=bos, middle=middle, weights_sha256=total.hexdigest())
    finally:
        for handle in handles:
            handle.remove()


def _embedding_hooks(model: Model, sink: Sink) -> list[Any]:
    """The module's embedding takes the sink's id; it remembers where that stood."""
    module, end, scale = model.module.get_input_embeddings(), len(model.weights.W_E), model.weights.embed_scale

    def enters(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        sink.rows = args[0] == end
        return (args[0].clamp(max=end - 1), *args[1:])

    def leaves(_: nn.Module, __: tuple, out: Tensor) -> Tensor:
        return out if sink.rows is None else torch.where(sink.rows[..., None], sink.row * scale, out)

    return [module.register_forward_pre_hook(enters), module.register_forward_hook(leaves)]


def _projection_hooks(model: Model, layer: int, pair: tuple[Tensor, Tensor], sink: Sink) -> list[Any]:
    """A layer's projections to keys and values give the learned ones where the sink stands. pair: `[n_kv, d_head]`."""
    if (key := ("projections", layer)) not in model.memory:  # to find them takes longer than a step of training
        parts = [pathway_slices(model.module, layer, f"{x}_only")[0] for x in "kv"]
        model.memory[key] = [_features(model, part) for part in parts]
    found = zip(model.memory[key], pair, strict=True)
    return [m.register_forward_hook(_putting(which, learned.flatten(), sink)) for (m, which), learned in found]


def _features(model: Model, part: Slice) -> tuple[nn.Module, Bool[Tensor, " features"]]:
    """A projection, and which of its output features a slice of its weight makes."""
    made = torch.zeros_like(model.module.get_parameter(part.name), dtype=torch.bool)
    part.of(made)[:] = True
    module = model.module.get_submodule(part.name.removesuffix(".weight"))
    return module, made[0] if model.weights.layout.input_first else made[:, 0]


def _putting(which: Bool[Tensor, " features"], learned: Float[Tensor, " picked"], sink: Sink) -> Callable[..., Tensor]:
    def leaves(_: nn.Module, __: tuple, out: Tensor) -> Tensor:
        at = torch.zeros(out.shape[:-1], dtype=torch.bool) if sink.rows is None else sink.rows
        full = torch.zeros(len(which), dtype=out.dtype, device=out.device).index_put((which,), learned)
        return torch.where(at.to(out.device)[..., None] & which, full, out)

    return leaves
