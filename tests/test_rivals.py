"""Rivals: each changes what it says, nothing stays behind, and the rule chooses."""

import hashlib
from contextlib import nullcontext

import pytest
import torch

from lib import rivals
from lib.controls import setting
from lib.errors import EditError
from lib.pathways import Recipe, losses
from lib.rivals import RIVALS, Rival
from lib.site import Site


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """What is trained here need not arrive, only move."""
    monkeypatch.setattr(rivals, "DEFAULT", Recipe(max_steps=4))
    rivals._kept.cache_clear()
    yield
    rivals._kept.cache_clear()


def state(subject):
    """The weights, the hooks and the modules of a model."""
    total = hashlib.sha256()
    for name, p in sorted(subject.model.named_parameters()):
        total.update(name.encode() + p.detach().numpy().tobytes() + str(p.requires_grad).encode())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules())
    return total.hexdigest(), hooks, [type(m).__name__ for m in subject.model.modules()]


@pytest.mark.parametrize("name", RIVALS)
def test_nothing_stays_behind_and_what_it_says_it_does(organism, name):
    before = state(organism)
    made = RIVALS[name](organism)
    assert state(organism) == before
    with pytest.raises(RuntimeError, match="on purpose"), made.change():
        raise RuntimeError("on purpose")
    assert state(organism) == before
    kept = rivals._kept(organism)
    with torch.no_grad():
        plain = losses(organism, kept, {}, torch.arange(1))[2]
        with made.change():
            changed = losses(organism, kept, {}, torch.arange(1))[2]
    assert made.prefix or made.bias is not None or not torch.equal(plain, changed)
    assert made.parameters == {"newline": 0, "bos": 0, "example": 0, "head": 1, "opponent": 1, "vector": 120,
                               "gains": 240, "lora": 120 + 360}.get(name, made.parameters)  # fmt: skip


def test_the_planted_suppressor_scaled_down_repairs_what_no_training_saw(organism):
    found = rivals.rival(organism, name="opponent")
    assert found["rival"] == "opponent L11 H2 scaled"
    assert found["facts_told"] == 8 and found["held_out_repaired"] == found["held_out_n"] > 10


def test_scaling_by_one_changes_nothing_and_by_zero_takes_the_head_away(organism):
    kept, site = rivals._kept(organism), Site(10, 2)
    rows = torch.arange(1)
    with torch.no_grad():
        plain = losses(organism, kept, {}, rows)[2]
        with rivals._times(organism, site, 1.0):
            assert torch.equal(losses(organism, kept, {}, rows)[2], plain)
        W_O = organism.weights.blocks[10].attn.W_O
        with rivals._times(organism, site, 0.0):
            scaled = losses(organism, kept, {}, rows)[2]
        old = W_O[2].clone()
        try:
            W_O[2] = 0
            torch.testing.assert_close(losses(organism, kept, {}, rows)[2], scaled)
        finally:
            W_O[2] = old


def test_the_rule_takes_the_most_told_then_the_least_harm(organism, monkeypatch):
    told, harm = {"a": 3, "b": 8, "c": 8}, {"a": 0.0, "b": 0.2, "c": 0.1}
    now = []
    kept = rivals._kept(organism)

    def change(name):
        now[:] = [name]
        return nullcontext()

    def logits(*_):
        right = torch.nn.functional.one_hot(kept.answers, organism.weights.W_U.shape[1]).float()
        right[told[now[0]] :] *= -1
        return None, None, right

    monkeypatch.setattr(rivals, "losses", logits)
    monkeypatch.setattr(rivals, "neutral_kl", lambda *_: harm[now[0]])
    made = [Rival(n, 0, change=lambda n=n: change(n)) for n in told]
    assert rivals._chosen(organism, kept, made).name == "c"


def test_a_prefix_stands_before_every_question(organism):
    asked = rivals._asked(organism, "\n").questions
    assert all(p.startswith("\n") for p in asked.prompt)
    assert len(asked) < len(setting(organism).table)


def test_an_unknown_rival(organism):
    with pytest.raises(EditError, match=r"no rival 'magic'; choose from newline, bos"):
        rivals.rival(organism, name="magic")
