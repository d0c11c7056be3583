"""How large a model may be: Llama shapes with random weights, in the precision that the memory at hand allows."""

from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, LlamaForCausalLM

from lib.checkpoints import fetching
from lib.models import Model, memory_at_hand, precision_that_fits
from lib.trace import capture, logit_trace
from lib.weights import check_view, view
from tests.bench.measure import give_back, timed

# hidden, MLP, layers, heads, key/value heads; the vocabulary is SmolLM2's throughout
SHAPES = {
    "SmolLM2-135M": (576, 1536, 30, 9, 3),
    "SmolLM2-360M": (960, 2560, 32, 15, 5),
    "SmolLM2-1.7B": (2048, 8192, 24, 32, 32),
    "Llama-3.2-3B": (3072, 8192, 28, 24, 8),
    "Llama-2-7B": (4096, 11008, 32, 32, 32),
}
PROMPTS = 8


def measure_all(like: Model) -> list[dict[str, Any]]:
    """A row a shape: parameters, gigabytes in both precisions; and if bf16 leaves a third of the memory at hand free,
    what it was loaded in, and seconds and completeness error of a trace of 8 prompts."""
    return [_one(name, shape, like) for name, shape in tqdm(SHAPES.items(), desc="sizes")]


@torch.no_grad()
def _one(name: str, shape: tuple[int, ...], like: Model) -> dict[str, Any]:
    give_back()  # the memory of the model before
    hidden, mlp, layers, heads, kv = shape
    config = AutoConfig.from_pretrained(
        fetching.fetch("smollm2"),
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=hidden // heads,
    )
    with torch.device("meta"):
        parameters = LlamaForCausalLM(config).num_parameters()
    at_hand = memory_at_hand(torch.get_default_device())
    row = {
        "shape": name,
        "parameters": parameters,
        "fp32_gb": parameters * 4e-9,
        "bf16_gb": parameters * 2e-9,
        "at_hand_gb": at_hand * 1e-9,
    }
    if parameters * 2 > at_hand * 2 / 3:
        return row
    dtype, found = precision_that_fits(4 * parameters, at_hand), {}
    _, grown = timed(lambda: found.update(_traced(name, config, dtype, like)))
    return row | found | {"precision": str(dtype).removeprefix("torch."), "peak_gb": grown and grown / 1000}


def _traced(name: str, config: Any, dtype: torch.dtype, like: Model) -> dict[str, Any]:
    """A model of a shape with random weights: seconds and error of a trace."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    one = Model(name, "random", "none", "0" * 64, model.num_parameters(), model, like.tokenizer, view(model))
    check_view(model, one.weights, one.encode(["The capital of France is"])[0])
    texts, error = ["The capital of France is"] * PROMPTS, []

    def trace() -> None:
        error.append(logit_trace(one, capture(one, texts), torch.zeros(PROMPTS, 1, dtype=torch.long)).error)

    seconds, _ = timed(trace)
    return {"seconds": seconds, "error": error[0]}
