"""Shared models. The real model is loaded, never skipped; tiny random models of every family are seeded."""

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
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lib import models
from lib.checkpoints import fetching
from lib.facts import Case, load_cases
from lib.models import Model, beginning
from lib.recall import trainable
from lib.weights import view


def wrap(module: PreTrainedModel, tokenizer) -> Model:
    module = module.eval().requires_grad_(False)
    parameters = sum(p.numel() for p in module.parameters())
    return Model("tiny", "random", "none", "0" * 64, parameters, module, tokenizer, view(module), beginning(tokenizer))


def plain_logits(model: Model, prompts: Sequence[str]) -> torch.Tensor:
    """Hugging Face's own logits of the token after each prompt, one prompt at a time."""
    with torch.no_grad():
        return torch.cat([model.module(torch.tensor([model.token_ids(p)])).logits[:, -1] for p in prompts])


@pytest.fixture(scope="session")
def smollm2() -> Model:
    return models.load("smollm2")


@pytest.fixture(scope="session")
def gemma3() -> Model:
    """Fetched where its terms are accepted, as CI accepts them; elsewhere nobody may accept them for who runs this."""
    if os.environ.get("ACCEPT_GEMMA_TERMS") != "1" and not (fetching.cache_folder() / "gemma3-v1").exists():
        pytest.skip("the terms of Gemma are not accepted: ACCEPT_GEMMA_TERMS=1 runs these tests")
    return models.load("gemma3")


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


HEADS = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
SIZES = HEADS | {"vocab_size": 49152, "max_position_embeddings": 64, "initializer_range": 0.3}
GROUPED = SIZES | {"num_key_value_heads": 2}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]  # of three layers: two see few tokens
SLIDING = {"layer_types": KINDS, "sliding_window": 4}


def tiny_llama(seed: int = 0, **options: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**GROUPED, **options}))


def tiny_gemma3(seed: int = 0, **options: object) -> Gemma3ForCausalLM:
    torch.manual_seed(seed)
    own = {"num_key_value_heads": 1, "head_dim": 12, "query_pre_attn_scalar": 24, **SLIDING}
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**SIZES, **own, **options}))


def tiny_gpt_neox(seed: int = 0, **options: object) -> GPTNeoXForCausalLM:
    """A quarter of each head turns; nothing is tied."""
    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**SIZES, "rotary_pct": 0.25, "tie_word_embeddings": False, **options}))


TINY = {
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "llama with biases": lambda: tiny_llama(attention_bias=True, mlp_bias=True, head_dim=12),
    "gemma3": tiny_gemma3,
    "gpt_neox": tiny_gpt_neox,
    "gpt_neox, one after the other": lambda: tiny_gpt_neox(use_parallel_residual=False),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, head_dim=12, sliding_window=4)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED, **SLIDING, use_sliding_window=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=12, attention_bias=True)),
}


def drawn(name: str, tokenizer) -> Model:
    """A random model of TINY. Gains and biases are drawn at random too: at one and zero, as they start, a forgotten one
    would go unnoticed."""
    torch.manual_seed(0)
    model, generator = TINY[name](), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part, p in model.named_parameters():
            if part.endswith("bias") or "norm" in part or "ln_" in part:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return wrap(model, tokenizer)


@pytest.fixture(scope="module", params=list(TINY)[:5])
def tiny(request: pytest.FixtureRequest, smollm2: Model) -> Model:
    """A random model of each kind of computation, with SmolLM2's tokenizer; test_families has the rest. Each module's
    own: nothing is kept that another one asked of it."""
    return drawn(request.param, smollm2.tokenizer)


@pytest.fixture(scope="session")
def tiny_gpt2_model(smollm2: Model) -> Model:
    return wrap(tiny_gpt2(), smollm2.tokenizer)


@pytest.fixture(scope="module")
def full_gpt2(smollm2: Model) -> Model:
    """GPT-2 small with random weights: of full size, so that rounding is as large as in GPT-2."""
    torch.manual_seed(0)
    return wrap(GPT2LMHeadModel(GPT2Config(initializer_range=0.05)), smollm2.tokenizer)
