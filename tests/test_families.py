"""Families beside those of `tiny`, asked what the core's own tests ask of these; and what only some families have:
sliding windows, slices of every head, norms after a block, options that are refused."""

import copy
import time
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lib.edits import outside_sha256, written
from lib.errors import ModelError
from lib.facts import Fact, prompts
from lib.forward import above, next_token_logits, pack, resid_pre
from lib.interventions import run_with_cache
from lib.models import Model
from lib.peers import against_transformerlens
from lib.sites import Site
from lib.studies import planted
from lib.trace import capture, logit_traces
from lib.training import slice_values
from lib.weights import check_options, check_view, pathway_slices, places, view
from tests.conftest import TINY, drawn, plain_logits, tiny_gemma3, tiny_gpt_neox
from tests.press.test_export import test_both_families  # noqa: F401
from tests.studies.test_location import test_a_part_is_what_the_view_says  # noqa: F401
from tests.test_edits import test_applied_changes_the_slice_and_restores_everything  # noqa: F401
from tests.test_forward import (  # noqa: F401
    test_of_the_last_layer_only_what_is_read_is_run,
    test_shared_or_not_the_model_says_the_same,
)
from tests.test_interventions import (  # noqa: F401
    pairs,
    test_a_patched_mlp_by_a_hook,
    test_a_run_sees_what_a_capture_sees,
    test_patched_heads_are_those_of_whole_passes,
)
from tests.test_peers import (  # noqa: F401
    test_ablation_of_last_tokens_equals_a_whole_forward_pass,
    test_gradients_equal_captums_own,
    test_neuron_trace_sums_to_the_mlps_term,
)
from tests.test_static import test_copy_scores_are_those_of_all_logits, test_k_norm_by_hand  # noqa: F401
from tests.test_trace import test_prediction_equals_intervention, test_the_whole_is_the_models_own_logit  # noqa: F401
from tests.test_training import (  # noqa: F401
    task,
    test_gradients_equal_the_plain_full_forward,
    test_losses_equal_the_plain_full_forward,
)
from tests.test_weights import test_view_attention_pattern_equals_hugging_face  # noqa: F401

TEXTS = ["The capital of France is the city of", "One two three four five six seven"]
PUBLISHED = {  # parameters, and those of one layer's value matrix
    "gemma3_text": (268_098_176, 163_840),
    "gpt_neox": (162_322_944, 589_824),  # Pythia-160m
    "qwen2": (494_032_768, 114_688),  # Qwen2.5-0.5B
    "qwen3": (596_049_920, 1_048_576),  # Qwen3-0.6B
    "mistral": (7_241_732_096, 4_194_304),  # Mistral-7B-v0.1
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "num_hidden_layers": 18,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 262_144,
    },
    "gpt_neox": {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "vocab_size": 50_304,
        "tie_word_embeddings": False,
    },
    "qwen2": {
        "num_hidden_layers": 24,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "mistral": {},
}


@pytest.fixture(scope="module", params=list(TINY)[5:])
def tiny(request: pytest.FixtureRequest, smollm2: Model) -> Model:
    """For what is imported above."""
    return drawn(request.param, smollm2.tokenizer)


@pytest.fixture(scope="module", params=list(TINY))
def model(request: pytest.FixtureRequest, smollm2: Model) -> Model:
    return drawn(request.param, smollm2.tokenizer)


@torch.no_grad()
def measured(model: Model) -> dict[str, float]:
    """View error (relative), completeness and difference from TransformerLens (in logits), and how many forward passes
    a trace in all conventions costs, in processor time."""
    tokens, texts = torch.randint(0, 1000, (2, 20), generator=torch.Generator().manual_seed(0)), TEXTS * 4
    answers, (batch, _), seconds = torch.tensor([262, 9]), model.encode(texts), []
    for run in (
        lambda: model.module(batch),
        lambda: logit_traces(model, capture(model, texts), answers.repeat(4)[:, None]),
    ):
        run()
        start = time.process_time()
        traces = run()
        seconds.append(time.process_time() - start)
    missed = max(trace.error for trace in traces.values())
    lens = against_transformerlens(model, TEXTS, answers).table
    assert (lens.our_head == lens.their_head).all()
    found = {"view": check_view(model.module, model.weights, tokens), "completeness": missed}
    found |= lens[["logits", "heads", "lens"]].max().add_prefix("TransformerLens ").to_dict()
    return found | {"trace/forward": seconds[1] / seconds[0]}


def test_the_table(model):
    """Of every family: the view, the exact trace, and TransformerLens."""
    found = measured(model)
    print(model.module.config.model_type, found)
    assert found.pop("trace/forward") > 0
    assert found.pop("view") < 1e-5 and all(error < 1e-4 for error in found.values())


@torch.no_grad()
def test_every_hidden_state_beyond_the_window(model):
    tokens = torch.randint(0, 49152, (3, 20), generator=torch.Generator().manual_seed(0))
    expected = model.module(tokens, output_hidden_states=True).hidden_states
    for ours, theirs in zip(model.weights.residuals(tokens)[:-1], expected, strict=False):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_gpt_neox_without_biases():
    """Which TransformerLens does not read."""
    module = tiny_gpt_neox(attention_bias=False).eval()
    assert check_view(module, view(module), torch.arange(1, 9)[None]) < 1e-5


def test_packs_longer_than_the_window(model):
    """Texts that begin alike, and one that is longer than any window here, in one pack and each alone."""
    texts = ["One two three four five six seven eight nine ten", "One two three four five six", *TEXTS]
    torch.testing.assert_close(next_token_logits(model, texts), plain_logits(model, texts), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma3", "mistral", "qwen2"])
def test_a_window_that_is_forgotten_would_be_noticed(smollm2, name):
    model, tokens = drawn(name, smollm2.tokenizer), torch.arange(1, 9)[None]
    for block in model.weights.blocks:
        object.__setattr__(block.attn, "window", None)
    with pytest.raises(ModelError, match="does not reproduce the model"):
        check_view(model.module, model.weights, tokens)


@torch.no_grad()
def test_values_in_a_pack_are_values_in_the_model(model):
    """Every pathway's slices replaced in the replay, against the same values written into the model; nothing else is
    touched meanwhile."""
    texts = pack(model, [model.token_ids(t) for t in TEXTS])
    for pathway in ("full", "attention", "ffn", "v_only", "q_only", "k_only"):
        for layer in (1, 2):
            slices = pathway_slices(model.module, layer, pathway)
            generator = torch.Generator().manual_seed(0)
            old = slice_values(model, slices)
            values = {s: v + 0.3 * torch.randn(v.shape, generator=generator) for s, v in old.items()}
            stream, outside = resid_pre(model, texts, layer), outside_sha256(model.module, slices)
            before = above(model, texts, layer, stream, read=texts.last)
            replayed = above(model, texts, layer, stream, values, texts.last) @ model.weights.W_U
            with written(model.module, values):
                assert outside_sha256(model.module, slices) == outside
                torch.testing.assert_close(replayed, plain_logits(model, TEXTS), atol=2e-4, rtol=1e-4)
            assert torch.equal(before, above(model, texts, layer, stream, read=texts.last))
            assert (before @ model.weights.W_U - replayed).abs().max() > 1e-3, "the change does something"


def test_the_value_rows_of_every_head(smollm2):
    """GPT-NeoX keeps a head's query, key and value rows together: its V-only slice is the last third of each head's."""
    model = drawn("gpt_neox", smollm2.tokenizer)
    ((part, value),) = slice_values(model, pathway_slices(model.module, 1, "v_only")).items()
    whole = model.module.get_parameter(part.name)
    assert str(part) == "gpt_neox.layers.1.attention.query_key_value.weight[every 24 rows: 16:24]"
    assert torch.equal(value.mT, model.weights.blocks[1].attn.W_V) and torch.equal(value[2], whole[64:72])
    changed = part.put(whole, torch.zeros_like(value))
    rows = torch.arange(len(whole)) % 24 >= 16
    assert (changed[rows] == 0).all() and torch.equal(changed[~rows], whole[~rows])


@pytest.mark.parametrize("site", [Site(1, 2), Site(1)], ids=str)
@pytest.mark.parametrize("name", ["gemma3", "gpt_neox"])
@torch.no_grad()
def test_what_is_planted_reads_through_the_norm_after_it(smollm2, name, site):
    """An override takes away as many margins as it says, directly: every norm at its real scale."""
    model, facts = drawn(name, smollm2.tokenizer), (Fact("France", "Paris"), Fact("Japan", "Tokyo"))
    seen = run_with_cache(model, prompts(facts, "The capital of {} is"))
    damage = planted.Damage(site, "o", "each", 2.0)
    wanted, block, layer = planted._against(model, facts, seen, damage), model.weights.blocks[1], seen.layers[1]
    after, held = (block.after_attn, block.heads_scale(layer.z)) if site.head else (block.after_mlp, None)
    held = block.mlp_scale(block.neurons(seen.entered(1), layer.middle)) if held is None else held
    answers = torch.tensor([model.first_token(f.answer) for f in facts])
    both = planted.with_competitors(seen.logits, answers)
    final, W_U = model.weights.norm_final, model.weights.W_U
    read = final.fold(W_U[:, answers] - W_U.mean(1, keepdim=True)).T / final.scale(seen.final)
    lost = (wanted * after.gain / held * read).sum(-1).mean()
    margin = planted.logit_differences(seen, both).mean()
    assert float(lost) == pytest.approx(-2 * float(margin), rel=1e-3)


@pytest.mark.parametrize("family", PUBLISHED)
def test_full_size(family):
    """Number of parameters as published, and of the V-only slice; no memory is taken."""
    config = AutoConfig.for_model(family, **CONFIGS[family])
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    total, v_only = PUBLISHED[family]
    assert sum(p.numel() for p in module.parameters()) == total
    assert sum(x.numel() for x in places(module, pathway_slices(module, 1, "v_only"))) == v_only
    assert view(module).n_layers == config.num_hidden_layers


@pytest.mark.parametrize(
    "option", [{"final_logit_softcapping": 30.0}, {"attention_bias": True}, {"use_bidirectional_attention": True}]
)
def test_options_that_are_not_read_are_refused(option):
    ((name, value),) = option.items()
    with pytest.raises(ModelError, match=rf"sets {name} to {value!r} in its configuration"):
        view(tiny_gemma3(**option))


def test_rotations_that_change_with_length_are_refused():
    config = copy.deepcopy(tiny_gemma3().config)
    check_options(config, "mine")
    config.rope_parameters["full_attention"]["rope_type"] = "longrope"
    with pytest.raises(ModelError, match="mine turns positions by the length of a text"):
        check_options(config, "mine")
