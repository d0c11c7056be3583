"""How the cost of a trace grows: with prompts, their length, layers and model size; beside a plain forward pass."""

from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from lib import models
from lib.checkpoints import fetching
from lib.models import Model
from lib.trace import capture, logit_traces
from lib.weights import view
from tests.bench.measure import timed

PROMPTS, LENGTHS, LAYERS = (1, 2, 4, 8, 16, 32, 64), (4, 8, 16, 32, 64, 128, 256), (3, 6, 12, 18, 24, 30)
ROUNDS = 3


def measure_all(model: Model) -> list[dict[str, Any]]:
    """A row a point: what grows, where it stands, the model, seconds of the trace and of the forward pass."""
    return [
        {"grows": grows, "at": at, "model": one.name, "parameters": one.parameters, **_point(one, n, length)}
        for grows, at, one, n, length in tqdm(list(_points(model)), desc="growth")
    ]


def _points(model: Model) -> Iterator[tuple[str, int, Model, int, int]]:
    yield from (("prompts", n, model, n, 8) for n in PROMPTS)
    yield from (("tokens a prompt", t, model, 8, t) for t in LENGTHS)
    for layers in LAYERS:
        config = AutoConfig.from_pretrained(fetching.fetch("smollm2"), num_hidden_layers=layers)
        yield "layers", layers, _random(LlamaForCausalLM(config), model, f"random, {layers} layers"), 8, 8
    for one in (models.load("organism"), _random(GPT2LMHeadModel(GPT2Config()), model, "random GPT-2"), model):
        yield "parameters", one.parameters, one, 8, 8


def _random(model: PreTrainedModel, like: Model, name: str) -> Model:
    model = model.eval().requires_grad_(False)
    parameters = sum(p.numel() for p in model.parameters())
    return Model(name, "random", "none", "0" * 64, parameters, model, like.tokenizer, view(model))


@torch.no_grad()
def _point(model: Model, prompts: int, length: int) -> dict[str, float]:
    """Medians of a few rounds in turn. The prompts are one word over and over."""
    word = next(w for w in (" the", " of", " is") if len(model.token_ids(w * 2)) == 2)
    texts, answers = [word * length] * prompts, torch.zeros(prompts, 1, dtype=torch.long)
    tokens, _ = model.encode(texts)

    def trace() -> Tensor:
        return logit_traces(model, capture(model, texts), answers)["scaled"].heads

    def forward() -> Tensor:
        return model.module(tokens, use_cache=False).logits

    trace(), forward()
    seconds = [(timed(trace)[0], timed(forward)[0]) for _ in range(ROUNDS)]
    return {"trace_s": median(s[0] for s in seconds), "forward_s": median(s[1] for s in seconds)}
