"""Shared models. The real model is loaded, never skipped; tiny random models of both families are seeded."""

import os
from collections.abc import Sequence

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for the model hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as `make test`: with more, rounding may cost a training a step

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from lib import models
from lib.facts import Case, load_cases
from lib.models import Model
from lib.recall import trainable
from lib.weights import view


def wrap(module: PreTrainedModel, tokenizer) -> Model:
    module = module.eval().requires_grad_(False)
    parameters = sum(p.numel() for p in module.parameters())
    return Model("tiny", "random", "none", "0" * 64, parameters, module, tokenizer, view(module))


def plain_logits(model: Model, prompts: Sequence[str]) -> torch.Tensor:
    """Hugging Face's own logits of the token after each prompt, one prompt at a time."""
    with torch.no_grad():
        return torch.cat([model.module(torch.tensor([model.token_ids(p)])).logits[:, -1] for p in prompts])


@pytest.fixture(scope="session")
def smollm2() -> Model:
    return models.load("smollm2")


@pytest.fixture(scope="session")
def organism() -> Model:
    return models.load("organism")


@pytest.fixture(scope="session")
def case(organism: Model) -> Case:
    """The organism's first case, as training takes it."""
    return trainable(organism, load_cases("organism")[0])


def tiny_gpt2(seed: int = 0, **options: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 64, "vocab_size": 49152, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **options}))


def tiny_llama(seed: int = 0, **options: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    sizes = {"intermediate_size": 48, "vocab_size": 49152, "max_position_embeddings": 64, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**{**heads, **sizes, **options}))


def tiny_gemma3(seed: int = 0, **options: object) -> Gemma3ForCausalLM:
    """Of whose three layers the second one is full, the others see four tokens."""
    torch.manual_seed(seed)
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 32}
    sizes = {"intermediate_size": 48, "vocab_size": 49152, "max_position_embeddings": 64, "initializer_range": 0.3}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    own = {"head_dim": 12, "query_pre_attn_scalar": 24, "sliding_window": 4, "layer_types": kinds}
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**heads, **sizes, **own, **options}))


@pytest.fixture(scope="session", params=["gpt2", "llama", "llama with biases", "gemma3"])
def tiny(request: pytest.FixtureRequest, smollm2: Model) -> Model:
    """A random model of either family, with SmolLM2's tokenizer. Biases are drawn at random too: at zero, as they
    start, a forgotten bias would go unnoticed."""
    model = {
        "gpt2": tiny_gpt2,
        "llama": tiny_llama,
        "llama with biases": lambda: tiny_llama(attention_bias=True, mlp_bias=True, head_dim=12),
        "gemma3": tiny_gemma3,
    }[request.param]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") or "norm" in name or "ln_" in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return wrap(model, smollm2.tokenizer)


@pytest.fixture(scope="session")
def tiny_gpt2_model(smollm2: Model) -> Model:
    return wrap(tiny_gpt2(), smollm2.tokenizer)


@pytest.fixture(scope="module")
def full_gpt2(smollm2: Model) -> Model:
    """GPT-2 small with random weights: of full size, so that rounding is as large as in GPT-2."""
    torch.manual_seed(0)
    return wrap(GPT2LMHeadModel(GPT2Config(initializer_range=0.05)), smollm2.tokenizer)
