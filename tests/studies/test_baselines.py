"""Rivals: each changes what it says, nothing stays behind, and the rule chooses."""

import hashlib
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from lib import evaluation
from lib.errors import EditError
from lib.evaluation import build_protocols, questions, score_questions
from lib.sites import Site
from lib.studies import baselines
from lib.studies.baselines import RIVALS, Rival, least_squares
from lib.studies.location import setting
from lib.training import Recipe, losses


@pytest.fixture(autouse=True, scope="module")
def one_passage(organism):
    """Of running text a little is enough."""
    text, real = {"a": evaluation.load_passages()["recipe"][:600]}, evaluation.load_passages
    evaluation.load_passages = lambda: text
    organism.memory.clear()
    yield
    evaluation.load_passages = real
    organism.memory.clear()


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """What is trained here need not arrive, only move."""
    monkeypatch.setattr(baselines, "DEFAULT", Recipe(max_steps=4))
    monkeypatch.setattr(baselines, "RATES", {"few": (1e-2,), "all": (1e-4,)})


def state(model):
    """The weights, the hooks and the modules of a model."""
    total = hashlib.sha256()
    for name, p in sorted(model.module.named_parameters()):
        total.update(name.encode() + p.detach().numpy().tobytes() + str(p.requires_grad).encode())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())
    return total.hexdigest(), hooks, [type(m).__name__ for m in model.module.modules()]


@pytest.mark.parametrize("name", RIVALS)
def test_nothing_stays_behind_and_what_it_says_it_does(organism, name):
    before = state(organism)
    made = RIVALS[name](organism)
    assert state(organism) == before
    with pytest.raises(RuntimeError, match="on purpose"), made.change():
        raise RuntimeError("on purpose")
    assert state(organism) == before
    task = baselines._task(organism)
    with torch.no_grad():
        plain = losses(organism, task, {}, torch.arange(1))[2]
        with made.change():
            changed = losses(organism, task, {}, torch.arange(1))[2]
    assert made.prefix or made.bias is not None or not torch.equal(plain, changed)
    if not made.prefix:  # below the layer that it names, it changes nothing: asked from there or from the start alike
        case = setting(organism).case
        table, layers = questions(organism, case).iloc[::40], (0, made.layer)
        asked_from = build_protocols(organism, case, layers, texts={}, table=table)
        with made.change():
            asked = [score_questions(organism, asked_from[x], None, bias=made.bias).margin for x in layers]
        torch.testing.assert_close(*(torch.tensor(a.to_numpy()) for a in asked), atol=1e-3, rtol=1e-4)
    counts = {"newline": 0, "bos": 0, "example": 0, "head": 1, "opponent": 1, "vector": 120, "gains": 240}
    assert made.parameters == (counts | {"lora": 120 + 360}).get(name, made.parameters)


def test_the_planted_suppressor_scaled_down_repairs_what_no_training_saw(organism):
    found = baselines.rival(organism, name="opponent")
    assert found["rival"] == "opponent L11 H2 scaled"
    assert found["facts_told"] == 8 and found["held_out_repaired"] == found["held_out_n"] > 10


def test_scaling_by_one_changes_nothing_and_by_zero_takes_the_head_away(organism):
    task, site = baselines._task(organism), Site(10, 2)
    rows = torch.arange(1)
    with torch.no_grad():
        plain = losses(organism, task, {}, rows)[2]
        with baselines._times(organism, site, 1.0):
            assert torch.equal(losses(organism, task, {}, rows)[2], plain)
        W_O = organism.weights.blocks[10].attn.W_O
        with baselines._times(organism, site, 0.0):
            scaled = losses(organism, task, {}, rows)[2]
        old = W_O[2].clone()
        try:
            W_O[2] = 0
            torch.testing.assert_close(losses(organism, task, {}, rows)[2], scaled)
        finally:
            W_O[2] = old


def test_the_rule_takes_the_most_told_then_the_least_harm(organism, monkeypatch):
    told, harm = {"a": 3, "b": 8, "c": 8}, {"a": 0.0, "b": 0.2, "c": 0.1}
    now, task = [], baselines._task(organism)

    def change(name):
        now[:] = [name]
        return nullcontext()

    def some_told(*_):
        return None, None, torch.where(torch.arange(len(task.facts)) < told[now[0]], 1.0, -1.0)

    monkeypatch.setattr(baselines, "losses", some_told)
    monkeypatch.setattr(baselines, "neutral_kl", lambda *_: harm[now[0]])
    made = [Rival(n, 0, 0, change=lambda n=n: change(n)) for n in told]
    assert baselines._chosen(organism, task, made).name == "c"


def test_the_closed_form_is_no_rounding():
    """Fewer neutral tokens than neurons leave their moment singular: a rounding of the facts' keys must not matter."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    keys, values, neutral = draw(4, 96), draw(4, 16), draw(60, 96)
    change, held = least_squares(keys, values, neutral, (1e-6, 100.0))
    torch.testing.assert_close(keys @ change, values, atol=1e-2, rtol=0)  # nothing holds it back: the facts are met
    (rounded,) = least_squares(keys * (1 + 1e-6 * draw(4, 96)), values, neutral, (100.0,))
    assert float((rounded - held).norm() / held.norm()) < 1e-4
    singular = 100.0 * 4 * neutral.T @ neutral / 60 + keys.T @ keys  # as it was once solved
    assert torch.linalg.cond(singular.double()) > 1e6


def test_a_prefix_stands_before_every_question(organism):
    asked = baselines._asked_after(organism, "\n").questions
    assert all(p.startswith("\n") for p in asked.prompt)
    plain = baselines._asked(organism)[0].questions
    assert len(asked) == len(plain) and (asked.told_before == plain.told_before).all(), "before: without the prefix"


def test_an_unknown_rival(organism):
    with pytest.raises(EditError, match=r"no rival 'magic'; choose from newline, bos"):
        baselines.rival(organism, name="magic")
