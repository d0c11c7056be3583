"""Packs: whatever they share, each text is read as if it stood alone."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import DataError
from lib.forward import above, next_token_logits, pack, packs, resid_pre
from lib.training import slice_values
from lib.weights import pathway_slices

TEXTS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=8)


def sees(texts) -> list[list[int]]:
    """Rows that each row may look at."""
    return [row.nonzero()[:, 0].tolist() for row in texts.mask()[0, 0] == 0]


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
    prompts = [
        "The capital of France is",
        "The capital of",
        "The capital of Peru is",
        "Peru",
        "The capital of France is",
    ]
    alone = torch.cat([tiny.module(tiny.encode([p])[0]).logits[:, -1] for p in prompts])
    torch.testing.assert_close(next_token_logits(tiny, prompts), alone, atol=1e-4, rtol=1e-4)
    ids = [tiny.token_ids(p) for p in prompts]
    for share in (False, True):
        texts = pack(tiny, ids, share=share)
        final = above(tiny, texts, 1, resid_pre(tiny, texts, 1))[texts.last] @ tiny.weights.W_U
        torch.testing.assert_close(final, alone, atol=1e-4, rtol=1e-4)


@contextmanager
def counting(module):
    """A list that grows by one with each call of a module."""
    calls: list[int] = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


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
        with counting(tiny.weights.blocks[-1].module) as calls:
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
    hook = tiny.weights.blocks[-1].mlp_out.register_forward_hook(lambda module, args, out: 2 * out)
    try:
        assert not torch.equal(above(tiny, texts, 1, stream, None, texts.last), before)
    finally:
        hook.remove()
    assert torch.equal(above(tiny, texts, 1, stream, {}, texts.last), before)
