"""Training from the kept stream equals training through the whole model, and touches its slice alone."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lib import edits, training
from lib.edits import applied, outside_sha256, written
from lib.errors import DataError, EditError
from lib.facts import Case, Fact, load_cases, load_facts, load_templates, prompts
from lib.training import Recipe, losses, neutral_kl, slice_values, task_at, train
from lib.weights import OF_A_LAYER, pathway_slices

CASE = Case("c", "c", load_facts("eight"), (), "subject_first", ("of_is",))
QUICK = Recipe(rates=(0.03, 0.1), max_steps=40, margin=0.5, kl_weight=1.0, windows=2, positions=4)
LAYER = 1


@pytest.fixture(scope="module")
def task(tiny):
    return task_at(tiny, CASE, LAYER, QUICK)


def plain_base(model, task):
    """The untouched model's log-probabilities at the compared positions of all windows."""
    return (task.untouched.final @ model.weights.W_U).log_softmax(-1)


def plain_losses(model, task, rows, base):
    """The same two losses, by a full forward pass of the model as it stands."""
    windows = torch.tensor(task.windows)[rows]
    texts = prompts(task.facts, task.template)
    tokens, last = model.encode(texts)
    logits = model.module(tokens).logits[torch.arange(len(last)), last]
    now = model.module(windows).logits[:, task.recipe.read].log_softmax(-1)
    kl = F.kl_div(now, base[rows], log_target=True, reduction="none").sum(-1).mean()
    return F.cross_entropy(logits, task.answers), kl


def test_losses_equal_the_plain_full_forward(tiny, task):
    """The kept stream against the whole model with the edit in place: same losses to 1e-5, for every pathway."""
    rows, generator = torch.tensor([0, 3]), torch.Generator().manual_seed(0)
    base = tiny.module(torch.tensor(task.windows)[rows]).logits[:, QUICK.read].log_softmax(-1)
    known = plain_base(tiny, task)
    torch.testing.assert_close(known[rows], base, atol=1e-4, rtol=1e-4)
    for pathway in OF_A_LAYER:
        values = slice_values(tiny, pathway_slices(tiny.module, LAYER, pathway))
        values = {s: v + 0.02 * torch.randn(v.shape, generator=generator) for s, v in values.items()}
        cross_entropy, kl, _ = losses(tiny, task, values, rows)
        with written(tiny.module, values):
            plain, plain_kl = plain_losses(tiny, task, rows, known)
        assert float(cross_entropy) == pytest.approx(float(plain), abs=1e-5)
        assert float(kl) == pytest.approx(float(plain_kl), abs=1e-5)


@pytest.mark.parametrize("pathway", ["v_only", "full"])
def test_gradients_equal_the_plain_full_forward(tiny, task, pathway):
    """The same for the gradients: through functional_call, and through the model's own parameters."""
    rows, slices = torch.tensor([0, 1]), pathway_slices(tiny.module, LAYER, pathway)
    leaves = {s: v.requires_grad_() for s, v in slice_values(tiny, slices).items()}
    sum(losses(tiny, task, leaves, rows)[:2]).backward()
    parameters = dict(tiny.module.named_parameters())
    tiny.module.requires_grad_(True)
    sum(plain_losses(tiny, task, rows, plain_base(tiny, task))).backward()
    for part, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, part.of(parameters[part.name].grad), atol=1e-5, rtol=1e-3)
    tiny.module.zero_grad()
    tiny.module.requires_grad_(False)


@pytest.mark.parametrize("pathway", ["v_only", "full"])
def test_training_tells_the_facts_and_leaves_the_model_alone(tiny, task, pathway):
    before = outside_sha256(tiny.module, ())
    run = train(tiny, task, pathway, rate=0.03)
    assert outside_sha256(tiny.module, ()) == before, "the model itself is never written to"
    first, last = run.history.iloc[0], run.history.iloc[-1]
    assert last.cross_entropy < first.cross_entropy
    assert run.reached == (last.min_margin >= QUICK.margin)
    # what the training loop saw is what the edited model says
    assert sum(run.edit.told_after) == last.told
    assert run.kl == pytest.approx(neutral_kl(tiny, task, run.edit.values)) == run.edit.recipe["neutral_kl"]


def test_gpt2_v_slice_is_the_last_third_and_nothing_else(tiny_gpt2_model):
    """A masked gradient under an optimiser with momentum or weight decay would move the fused columns of Q and K."""
    d = tiny_gpt2_model.weights.d_model
    run = train(tiny_gpt2_model, task_at(tiny_gpt2_model, CASE, LAYER, QUICK), "v_only", rate=0.03)
    (part,) = run.edit.values
    assert (part.name, part.start, part.stop) == (f"transformer.h.{LAYER}.attn.c_attn.weight", 2 * d, 3 * d)
    before = {name: tensor.clone() for name, tensor in tiny_gpt2_model.module.state_dict().items()}
    with applied(tiny_gpt2_model, run.edit):
        after = tiny_gpt2_model.module.state_dict()
        assert {name for name in after if not torch.equal(after[name], before[name])} == {part.name}
        same = (after[part.name] == before[part.name]).all(0)
        assert same[: 2 * d].all() and not same[2 * d :].any()


def test_same_seed_same_edit(tiny, task):
    first, same, other = (train(tiny, task, "v_only", rate=0.03, seed=s).edit.values for s in (4, 4, 5))
    assert all(torch.equal(first[s], same[s]) for s in first)
    assert not all(torch.equal(first[s], other[s]) for s in first)


def test_windows_that_choose_are_not_trained_on(tiny, task):
    """The KL that chooses is read on windows which the training draws from cannot contain."""
    assert 0 < task.n_training < len(task.windows)
    training, others = task.window_streams.split((task.n_training, len(task.windows) - task.n_training))
    poisoned = replace(task, window_streams=torch.cat((training, torch.full_like(others, 9))))
    one, two = train(tiny, task, "v_only", rate=0.03), train(tiny, poisoned, "v_only", rate=0.03)
    assert all(torch.equal(one.edit.values[s], two.edit.values[s]) for s in one.edit.values)
    assert one.kl != two.kl


@pytest.mark.parametrize("factor, steps", [(float("nan"), 3), (5.0, QUICK.max_steps)])
def test_a_diverging_run_is_a_failure_and_no_edit(tiny, task, monkeypatch, factor, steps):
    """A loss that stops being a number ends the run at once; one that only grows ends it at the limit. Neither is an
    edit, and neither is saved."""
    calls = []

    def worse(*args):
        cross_entropy, kl, margins = losses(*args)
        calls.append(1)
        return cross_entropy * (factor if len(calls) > steps else 1), kl, margins * 0

    monkeypatch.setattr(training, "losses", worse)
    run = train(tiny, task, "v_only", rate=0.03)
    assert run.diverged and run.edit is None and not run.reached and run.kl != run.kl
    assert run.steps == steps


def test_an_interrupted_training_leaves_nothing(tiny, task, monkeypatch, tmp_path):
    """Ctrl-C midway: the model is untouched, no file is written, and the next run gives the usual edit."""
    before, calls = outside_sha256(tiny.module, ()), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return losses(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "losses", interrupted)
        edits.save(train(tiny, task, "v_only", rate=0.03).edit, tmp_path / "v.safetensors")
    assert outside_sha256(tiny.module, ()) == before and not list(tmp_path.iterdir())
    assert train(tiny, task, "v_only", rate=0.03).edit is not None


def test_bad_recipes_layers_and_facts(tiny):
    with pytest.raises(EditError, match="max_steps; steps, windows and rates must be positive"):
        Recipe(max_steps=0)
    with pytest.raises(EditError, match="at least one rate"):
        Recipe(rates=())
    with pytest.raises(EditError, match="32 tokens cannot be read at 7 even positions"):
        Recipe(positions=7)
    with pytest.raises(EditError, match="no layer index 3: tiny has 3, from 0"):
        task_at(tiny, CASE, 3, QUICK)
    with pytest.raises(DataError, match="no fact to train on"):
        task_at(tiny, replace(CASE, facts=()), LAYER, QUICK)
    echo = (Fact("France", "Paris"), Fact("Mexico", "Mexico City"))
    with pytest.raises(DataError, match=r"Mexico -> Mexico City cannot be trained .* ' Mexico' \(echo\); leave it out"):
        task_at(tiny, replace(CASE, facts=echo), LAYER, QUICK)


@pytest.mark.model
def test_v_only_tells_all_eight_on_smollm2(smollm2):
    """The paper's central claim, on this book's model: 110,592 parameters of one layer, 2/8 -> 8/8."""
    assert load_templates()["subject_first"] == "{}'s capital city is"
    slices = pathway_slices(smollm2.module, 23, "v_only")
    before = outside_sha256(smollm2.module, slices)
    run = train(smollm2, task_at(smollm2, load_cases("smollm2")[0], 23), "v_only", rate=3e-3)
    assert sum(run.edit.told_before) == 2 and sum(run.edit.told_after) == 8 and run.reached
    assert run.edit.parameters == 110_592
    with applied(smollm2, run.edit):
        assert outside_sha256(smollm2.module, slices) == before
