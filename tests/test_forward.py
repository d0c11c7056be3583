"""Packs: whatever they share, each text is read as if it stood alone. Losses over the vocabulary, from one reading of
it: worked out by hand; PyTorch's own, gradients too."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import forward
from lib.errors import DataError
from lib.forward import above, log_normalisers, next_token_logits, pack, packs, reference, resid_pre
from lib.trace import hooked
from lib.training import slice_values
from lib.weights import pathway_slices
from tests.conftest import plain_logits

TEXTS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=8)


def sees(texts) -> list[list[int]]:
    """Rows that each row may look at."""
    return [row.nonzero()[:, 0].tolist() for row in texts.sees]


@pytest.mark.parametrize("share", [False, True])
@settings(max_examples=60, deadline=None)
@given(lists=TEXTS)
def test_each_text_is_found_in_its_pack(organism, share, lists):
    """Read back from its last token, by what that may look at: its own tokens, at their own positions."""
    texts = pack(organism, lists, share=share)
    looks = sees(texts)
    for text, last in zip(lists, texts.last.tolist(), strict=True):
        assert texts.tokens[looks[last]].tolist() == text
        assert texts.position[looks[last]].tolist() == list(range(len(text)))
    assert len(set(texts.last.tolist())) == len(lists), "every text has a last token of its own"
    assert all(last not in looks[row] for last in texts.last.tolist() for row in range(len(looks)) if row != last)
    assert share or len(texts.tokens) == sum(map(len, lists))


def test_beginnings_are_run_once(organism):
    lists = [[5, 6, 7, 8], [5, 6, 9, 8], [5, 6, 7, 8], [5]]
    texts = pack(organism, lists, share=True)
    assert texts.tokens.tolist() == [5, 6, 7, 8, 9, 8, 8, 5]
    assert texts.before == (-1, 0, 1, 2, 1, 4, 2, -1) and texts.last.tolist() == [3, 5, 6, 7]


@settings(max_examples=60, deadline=None)
@given(lists=TEXTS, room=st.integers(1, 12))
def test_packs_keep_to_their_room_and_order(organism, lists, room):
    made = list(packs(organism, lists, room, share=True))
    back = [p.tokens[rows].tolist() for p in made for rows in (sees(p)[last] for last in p.last.tolist())]
    assert back == lists
    assert all(len(p.tokens) <= room or len(p.last) == 1 for p in made)


def test_shared_or_not_the_model_says_the_same(tiny):
    """Prompts of a template, one the beginning of another, one twice: against each alone through the model itself."""
    prompts = [f"The capital of{rest}" for rest in (" France is", "", " Peru is", " France is")] + ["Peru"]
    alone = plain_logits(tiny, prompts)
    torch.testing.assert_close(next_token_logits(tiny, prompts), alone, atol=1e-4, rtol=1e-4)
    ids = [tiny.token_ids(p) for p in prompts]
    for share in (False, True):
        texts = pack(tiny, ids, share=share)
        for layer in range(3):
            final = above(tiny, texts, layer, resid_pre(tiny, texts, layer))[texts.last] @ tiny.weights.W_U
            torch.testing.assert_close(final, alone, atol=1e-4, rtol=1e-4)


def test_nothing_to_run(tiny):
    for texts in ([], [[1], []]):
        with pytest.raises(DataError, match="there is nothing to run"):
            list(packs(tiny, texts, share=True))
    with pytest.raises(DataError, match=r"65 tokens; tiny reads 64"):
        next_token_logits(tiny, [" the" * 65])


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("share", [False, True])
def test_of_the_last_layer_only_what_is_read_is_run(tiny, layer, share):
    """Rows read, in any order and number, with a layer's values changed: the rows of the whole run, and its gradients;
    also where the changed layer is the last one itself."""
    texts = pack(tiny, [tiny.token_ids(p) for p in ("The capital of France", "The capital of", "It is")], share=share)
    read, stream = torch.tensor([4, 0, 2, 2]), resid_pre(tiny, texts, layer)
    (part,) = pathway_slices(tiny.module, layer, "v_only")
    start = slice_values(tiny, (part,))[part]
    changed = start + 0.1 * torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for rows in (read, None):
        leaf = changed.clone().requires_grad_()
        calls: list[int] = []
        with hooked(after={tiny.weights.blocks[-1].module: lambda out, calls=calls: calls.append(1)}):
            final = above(tiny, texts, layer, stream, {part: leaf}, rows)
        assert len(calls) == (rows is None or layer == 2), "the last layer as a whole"
        final = final[read] if rows is None else final
        final.square().sum().backward()
        found.append((final.detach(), leaf.grad))
    for some, whole in zip(*found, strict=True):
        torch.testing.assert_close(some, whole, atol=1e-5, rtol=1e-4)


def test_without_values_hooks_of_the_last_layer_are_heard(tiny):
    """What changes the model by hooks gives no values: then the last layer's own modules run."""
    texts = pack(tiny, [tiny.token_ids("The capital of France")])
    stream = resid_pre(tiny, texts, 1)
    before = above(tiny, texts, 1, stream, None, texts.last)
    with hooked(after={tiny.weights.blocks[-1].mlp_written: lambda out: 2 * out}):
        assert not torch.equal(above(tiny, texts, 1, stream, None, texts.last), before)
    assert torch.equal(above(tiny, texts, 1, stream, {}, texts.last), before)


N, D, VOCAB = 5, 7, 101  # a vocabulary that no chunk divides


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(forward, "CHUNK", 16)


def draw(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCAB, D, generator=generator)
    return torch.randn(N, D, generator=generator), weight.T  # as a model keeps it: (vocab, d) in memory


def test_by_hand():
    """Two tokens with logits 0 and log 3: log_z log 4, said with shares 1/4 and 3/4."""
    W_U = torch.tensor([[0.0, math.log(3)]])
    found = reference(torch.ones(1, 1), W_U)
    assert float(found.log_z) == pytest.approx(math.log(4))
    assert float(found.mean_unembedding) == pytest.approx(0.75 * math.log(3))
    log_z, other = log_normalisers(torch.ones(1, 1), W_U, torch.tensor([1]))
    assert float(log_z) == pytest.approx(math.log(4)) and float(other) == 0
    # from shares 1/4, 3/4 to halves: KL = 1/4 log 1/2 + 3/4 log 3/2
    halves = torch.zeros(1, 1)
    kl = float(found.divergence(halves, log_normalisers(halves, W_U)[0]))
    assert kl == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_cross_entropy_margin_and_divergence_are_the_plain_ones(scale):
    """Values and gradients to fp32's rounding, also where one token has all probability (scale 30)."""
    x, W_U = draw()
    y, tokens = draw(1)[0] * scale, torch.tensor([0, 15, 16, 100, 50])
    ours, plain = (x * scale).requires_grad_(), (x * scale).requires_grad_()
    log_z, other = log_normalisers(ours, W_U, tokens)
    cross_entropy = log_z - (ours * W_U[:, tokens].T).sum(-1)
    kl = reference(y, W_U).divergence(ours, log_z)
    logits = plain @ W_U
    expected = F.cross_entropy(logits, tokens, reduction="none")
    expected_kl = F.kl_div(logits.log_softmax(-1), (y @ W_U).log_softmax(-1), log_target=True, reduction="none").sum(-1)
    tight = {"rtol": 1e-4, "atol": 1e-5 * max(1.0, scale)}
    torch.testing.assert_close(cross_entropy, expected, **tight)
    torch.testing.assert_close(kl, expected_kl, **tight)
    torch.testing.assert_close(other, logits.detach().scatter(1, tokens[:, None], float("-inf")).amax(1))
    (cross_entropy + 2 * kl).sum().backward()
    (expected + 2 * expected_kl).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_a_small_divergence_is_right_to_what_is_promised(scale):
    """Of neighbouring streams, against fp64: within some 1e-5 nats, with logits up to 60."""
    x, W_U = draw()
    x, y = x * scale, x * scale + 1e-3 * draw(1)[0]
    exact, now = ((z.double() @ W_U.double()).log_softmax(-1) for z in (y, x))
    kl = (exact.exp() * (exact - now)).sum(-1)
    found = reference(y, W_U).divergence(x, log_normalisers(x, W_U)[0])
    assert float(kl.max()) > 1e-7 and float((found - kl).abs().max()) < 3e-5


def test_a_model_in_bf16_is_summed_in_fp32():
    """Its gradient comes back in its own precision."""
    x, W_U = (t.bfloat16() for t in draw())
    x.requires_grad_()
    log_z, other = log_normalisers(x, W_U, torch.arange(N))
    assert log_z.dtype == other.dtype == torch.float32
    torch.testing.assert_close(log_z, (x.float() @ W_U.float()).logsumexp(-1), atol=1e-5, rtol=1e-5)
    log_z.sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_only_the_first_rows_have_a_token_apart():
    x, W_U = draw()
    best = (x @ W_U).argmax(1)
    log_z, other = log_normalisers(x, W_U, best[:2])
    assert log_z.shape == (N,) and other.shape == (2,)
    assert (other < (x @ W_U).amax(1)[:2]).all(), "the best token is set apart, so another one is the largest"
    assert log_normalisers(x, W_U)[1].shape == (0,)


def test_no_gradient_is_made_where_none_is_asked(monkeypatch):
    """The mean unembedding costs as much as the logits; without a gradient it is left out."""
    asked, own = [], forward._swept
    monkeypatch.setattr(forward, "_swept", lambda *a, mean: asked.append(mean) or own(*a, mean=mean))
    x, W_U = draw()
    log_normalisers(x, W_U)
    log_normalisers(x.requires_grad_(), W_U)
    assert asked == [False, True]


@pytest.mark.model
def test_on_the_real_unembedding(smollm2):
    """SmolLM2's own streams, 49,152 tokens: the same losses to 1e-5, whose logits reach 20."""
    texts = pack(smollm2, [smollm2.token_ids("The capital of France is"), smollm2.token_ids("Two and two make")])
    final, W_U = above(smollm2, texts, 0, resid_pre(smollm2, texts, 0)), smollm2.weights.W_U
    log_z, _ = log_normalisers(final, W_U)
    torch.testing.assert_close(log_z, (final @ W_U).logsumexp(-1), atol=1e-5, rtol=1e-6)
    shares = (final @ W_U).softmax(-1)
    torch.testing.assert_close(reference(final, W_U).mean_unembedding, shares @ W_U.T, atol=1e-5, rtol=1e-4)


@settings(max_examples=20, deadline=None)
@given(ways=st.integers(1, 3), first=st.integers(0, 1), seed=st.integers(0, 99))
def test_losses_of_several_ways_are_those_of_whole_logits(ways, first, seed):
    """PyTorch's own, with more tokens than are taken at a time; the bias is of all ways but the first ones."""
    generator, n = torch.Generator().manual_seed(seed), forward.CHUNK + 7
    finals, W_U = torch.randn(ways, 4, 5, generator=generator) * 4, torch.randn(n, 5, generator=generator).T
    bias, tokens = torch.randn(n, generator=generator) * 3, torch.randint(n, (4,), generator=generator)
    logits = (finals @ W_U).double()
    logits[first:] += bias
    logs = logits.log_softmax(-1)
    nll, kl = forward.beside(finals, tokens, W_U, bias, first=first)
    torch.testing.assert_close(nll.double(), -logs[:, range(4), tokens], rtol=1e-5, atol=1e-4)
    divergence = F.kl_div(logs, logs[:1].expand_as(logs), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl.double(), divergence, rtol=1e-4, atol=1e-4)
