"""The weight view against the models it views."""

import pytest
import torch

from lib.errors import ModelError
from lib.weights import MLP, OF_A_LAYER, Norm, Slice, check_view, pathway_slices, places, view
from tests.conftest import tiny_gpt2, tiny_llama

DESIGN = {  # how many parameters each pathway has
    "gpt2": {"full": 7_087_872, "attention": 2_362_368, "ffn": 4_722_432, "v_only": 589_824},
    "smollm2": {"full": 3_540_096, "attention": 884_736, "ffn": 2_654_208, "v_only": 110_592},
}


def count_parameters(model, slices) -> int:
    return sum(x.numel() for x in places(model, slices))


def test_gpt2_parameter_counts(full_gpt2):
    assert full_gpt2.parameters == 124_439_808
    for pathway, n in DESIGN["gpt2"].items():
        assert count_parameters(full_gpt2.module, pathway_slices(full_gpt2.module, 9, pathway)) == n


@pytest.mark.model
def test_smollm2_parameter_counts(smollm2):
    for pathway, n in DESIGN["smollm2"].items():
        assert count_parameters(smollm2.module, pathway_slices(smollm2.module, 23, pathway)) == n


def test_gpt2_v_slice_is_the_last_third_and_is_what_the_view_calls_w_v(full_gpt2):
    (v,) = pathway_slices(full_gpt2.module, 9, "v_only")
    assert v == Slice("transformer.h.9.attn.c_attn.weight", 1536, 2304)
    matrix = v.of(full_gpt2.module.get_parameter(v.name))
    heads = full_gpt2.weights.blocks[9].attn.W_V  # (12, 768, 64)
    assert torch.equal(matrix.unflatten(-1, (12, 64)).movedim(1, 0), heads)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_each_pathway_stays_in_its_layer(make):
    model = make()
    for pathway in OF_A_LAYER:
        slices = pathway_slices(model, 1, pathway)
        assert slices and all(".1." in s.name for s in slices)
    with pytest.raises(ValueError, match="choose from full, attention"):
        pathway_slices(model, 1, "values")
    for layer in (-1, 3):
        for pathway in OF_A_LAYER:
            with pytest.raises(ValueError, match=rf"no layer {layer}, counted from 0: the model has L1 to L3"):
                pathway_slices(model, layer, pathway)


def test_the_view_reproduces_hidden_states(tiny):
    tokens = torch.randint(0, 49152, (3, 11), generator=torch.Generator().manual_seed(0))
    assert check_view(tiny.module, tiny.weights, tokens) < 1e-5


def test_the_view_reproduces_full_size_gpt2(full_gpt2):
    assert check_view(full_gpt2.module, full_gpt2.weights, torch.randint(0, 50257, (2, 12))) < 1e-5


def test_a_view_of_other_weights_is_noticed():
    """The self-check must be able to fail: the same architecture with one head's values exchanged; a NaN in any layer,
    which no comparison with a maximum would show."""
    model, tokens = tiny_llama().eval(), torch.arange(1, 9)[None]
    weights = view(model)
    with torch.no_grad():
        attn = weights.blocks[1].attn
        object.__setattr__(attn, "W_V", attn.W_V.flip(0))
        with pytest.raises(ModelError, match="does not reproduce the model: relative error"):
            check_view(model, weights, tokens)
        weights = view(model)
        for layer in (0, 2):
            value = weights.blocks[layer].mlp.W_out[0, 0].clone()
            weights.blocks[layer].mlp.W_out[0, 0] = float("nan")
            with pytest.raises(ModelError, match=rf"relative error nan in the hidden state {layer + 1} of 3"):
                check_view(model, weights, tokens)
            weights.blocks[layer].mlp.W_out[0, 0] = value
    check_view(model, weights, tokens)


def test_view_attention_pattern_equals_hugging_face(tiny):
    tokens = torch.randint(0, 49152, (2, 9), generator=torch.Generator().manual_seed(2))
    tiny.module.set_attn_implementation("eager")
    theirs = tiny.module(tokens, output_attentions=True).attentions
    stream = tiny.weights.residuals(tokens)
    for block, x, theirs_here in zip(tiny.weights.blocks, stream, theirs, strict=False):
        torch.testing.assert_close(block.attn.pattern(block.norm_attn(x)), theirs_here, atol=1e-5, rtol=1e-4)


def test_norm_by_hand():
    x = torch.tensor([3.0, 4.0, 0.0, 1.0])
    layer = Norm(torch.tensor([1.0, 2.0, 1.0, 1.0]), torch.ones(4), 0.0, centred=True)
    # mean 2, centred (1, 2, -2, -1), root mean square sqrt(10 / 4)
    expected = torch.tensor([1.0, 4.0, -2.0, -1.0]) / 2.5**0.5 + 1
    torch.testing.assert_close(layer(x), expected)
    rms = Norm(torch.ones(4), None, 0.0, centred=False)
    torch.testing.assert_close(rms(x), x / 6.5**0.5)  # (9 + 16 + 0 + 1) / 4 = 6.5


@pytest.mark.parametrize("centred", [True, False])
def test_folding_a_norm_into_a_matrix_changes_nothing(centred):
    g = torch.Generator().manual_seed(0)
    norm = Norm(torch.randn(8, generator=g), torch.randn(8, generator=g), 1e-5, centred)
    x, W = torch.randn(5, 8, generator=g), torch.randn(8, 3, generator=g)
    torch.testing.assert_close(norm(x) @ W, x / norm.scale(x) @ norm.fold(W) + norm.bias @ W)


def test_gated_mlp_by_hand():
    one = torch.ones(1, 1)
    mlp = MLP(W_in=3 * one, W_out=2 * one, b_in=None, b_out=None, W_gate=-one, b_gate=None, act=torch.relu)
    assert mlp(torch.tensor([[-5.0]])).item() == 2 * (5 * -15)  # gate relu(5), value -15
    assert mlp(torch.tensor([[5.0]])).item() == 0  # the gate is shut


def test_grouped_heads_read_their_own_key_head():
    attn = view(tiny_llama()).blocks[0].attn  # 4 heads, 2 key/value heads
    repeated, batched = attn.per_head(attn.W_K), attn.per_head(attn.W_K[None], batched=True)
    assert all(torch.equal(repeated[h], attn.W_K[h // 2]) for h in range(4))
    assert torch.equal(batched[0], repeated)
