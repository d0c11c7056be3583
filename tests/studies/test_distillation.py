"""Self-distillation that should carry over: who may be seen, what is learned, what the rule chooses."""

from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch

from lib import recall, training, weights
from lib.edits import applied, outside_sha256
from lib.errors import DataError, EditError
from lib.facts import Case, Fact, load_cases, load_templates, prompts
from lib.recall import tell
from lib.studies import distillation
from lib.studies.distillation import Config, Parts, choose, fit_countries, learn, lesson, objective_parts

QUICK = Config(layer=5, steps=20, batch=16)


@pytest.fixture(scope="module")
def taught(organism, case):
    return lesson(organism, case, fit_countries(case), [], "in_is")


@pytest.fixture(scope="module")
def learned(organism, taught):
    return learn(organism, taught, QUICK)


def test_fit_countries_are_the_case_s_own_and_the_fit_part():
    """By hand: one own fact, one of each split; a fact that is both counts once."""
    large = (*(Fact(s, "x", s) for s in ("fit", "selection", "held_out", "eight")), Fact("own", "y", "fit"))
    case = Case("c", "c", (Fact("own", "y"),), large, "of_is", ("in_is",))
    assert [f.subject for f in fit_countries(case)] == ["own", "fit"]


def test_what_was_answered_is_not_asked_again(organism, case, monkeypatch):
    """By template, prefix and fact; the answers are those of `tell`, in the order of the facts."""
    text, asked = "Of {}, the capital is", list[str]()
    plain = recall.next_token_logits
    monkeypatch.setattr(recall, "next_token_logits", lambda m, p, **k: asked.extend(p) or plain(m, p, **k))
    facts = case.facts[:4]
    distillation.tell_once(organism, facts[1:3], text)
    found = distillation.tell_once(organism, facts, text)
    assert asked == prompts([*facts[1:3], facts[0], facts[3]], text)
    monkeypatch.undo()
    whole = tell(organism, facts, {"": text})
    pd.testing.assert_frame_equal(found, whole, rtol=1e-3)
    other = distillation.tell_once(organism, facts[:1], text, prefix="As is known. ")
    assert other.prompt[0] != whole.prompt[0] and other.prob[0] != whole.prob[0]


def test_no_prompt_of_another_split_is_in_a_lesson(smollm2, organism, case, taught):
    """Neither of the organism's lesson nor of the real one: no held-out or selection country under any template."""
    real = load_cases("smollm2")[0]
    names = distillation.load_places(smollm2, real)
    names += [f.subject for f in fit_countries(real)]
    pupils = {tuple(smollm2.token_ids(f"{name}'s capital city is")) for name in names}
    for model, of, seen in (
        (organism, case, {*map(tuple, taught.texts.pupils + taught.texts.others)}),
        (smollm2, real, pupils),
    ):
        barred = [f for f in of.large if f.split in ("held_out", "selection")]
        asked = {tuple(model.token_ids(p)) for t in load_templates().values() for p in prompts(barred, t)}
        assert barred and not asked & seen


def test_places_name_no_country_of_selection_or_held_out(smollm2):
    """Not even as a part: "Western Sahara" would teach what "Sahara" is."""
    real = load_cases("smollm2")[0]
    barred = [f.subject.lower() for f in real.large if f.split in ("held_out", "selection")]
    names = [n.lower() for n in distillation.load_places(smollm2, real)]
    assert len(names) == len(set(names)) > 200
    assert not [(n, b) for n in names for b in barred if n in b or b in n]


@pytest.mark.parametrize("split", ["held_out", "selection"])
def test_a_fact_of_another_split_is_refused(organism, case, split):
    leaked = (*fit_countries(case), next(f for f in case.large if f.split == split))
    with pytest.raises(DataError, match=f"of the split '{split}'; training sees fit countries only"):
        lesson(organism, case, leaked, [], "in_is")
    with pytest.raises(DataError, match="no fit country"):
        lesson(organism, case, (), [], "in_is")


def test_a_place_that_is_a_fact_s_subject_is_refused(smollm2, case):
    taken = replace(case, large=(*case.large, Fact("Bavaria", "Munich", "held_out")))
    with pytest.raises(DataError, match="names Bavaria, which is a fact's subject"):
        distillation.load_places(smollm2, taken)


def test_choosing_sees_no_held_out_country(organism, case, learned, monkeypatch):
    """Every question that `cost` asks, of whatever kind, is of no held-out country."""
    asked, effects, ask = [], distillation.evaluation, distillation.evaluation.score_questions
    monkeypatch.setattr(effects, "score_questions", lambda s, p, e: asked.append(p.questions) or ask(s, p, e))
    organism.memory.clear()
    distillation.cost(organism, case, learned[0])
    held = {f.subject for f in case.large if f.split == "held_out"}
    assert held and len(asked) == 2
    for questions in asked:
        assert set(questions[questions.set == "large"].split) == {"selection"}
        assert not held & set(questions.subject)


def test_cost_is_what_the_whole_protocol_says(organism, case, learned):
    """The short way, with the untouched model asked once from the first layer, against chapter 4's own protocol."""
    effects, chosen = distillation.evaluation, distillation.without_held_out(organism, case)
    protocol = effects.build_protocol(organism, chosen, learned[0].layer, texts=distillation.choosing_texts(organism))
    measured = effects.measure(organism, protocol, {"edit": learned[0]})
    row = effects.generalisation(measured, chosen).query("split == 'selection'").iloc[0]
    lost = effects.outcomes(measured, chosen).set_index("what").lost
    found = distillation.cost(organism, case, learned[0])
    assert (found["untold"], found["repaired"]) == (row.untold, row.repaired) and row.repaired > 0
    assert (found["capability_lost"], found["working_lost"]) == (lost["capability"], lost["working templates"])
    assert found["ratio"] == pytest.approx(effects.perplexity(measured).ratio[0], rel=1e-5)


def test_a_teacher_that_is_the_pupil_teaches_nothing(organism, case, taught):
    """With the failing template itself as teacher, each part of the objective but the answers' is zero on the
    untouched model; with another, the pupils' part is not."""
    alike_case = replace(case, controls=(case.template, *case.controls))
    same = lesson(organism, alike_case, fit_countries(case), [], case.template)
    rows = Parts(torch.arange(8), torch.arange(4), torch.arange(2))
    for which, alike in ((same, True), (taught, False)):
        groups = [distillation._with_streams(organism, texts, 3) for texts in which.texts]
        with torch.no_grad():
            logits = distillation._forward(organism, 3, groups, rows, {})
        pupils, _, others, neutral = (float(x) for x in objective_parts(which, logits, rows).values())
        assert (abs(pupils) < 1e-4) is alike
        assert abs(others) < 1e-4 and abs(neutral) < 1e-4


def test_only_the_slice_changes_and_the_planted_failure_is_repaired(organism, case, taught, learned):
    """A planted failure of routing: what is learned from the fit countries makes the selection countries told too."""
    (edit, history), chosen = learned, distillation.without_held_out(organism, case)
    slices = tuple(edit.values)
    text = {case.template: load_templates()[case.template]}
    before, outside = tell(organism, chosen.large, text).told, outside_sha256(organism.module, slices)
    with applied(organism, edit):
        after = tell(organism, chosen.large, text).told
        assert outside_sha256(organism.module, slices) == outside
    assert before.sum() <= 2 and after.sum() >= 0.9 * len(after)
    assert sum(edit.told_after) > sum(edit.told_before)
    assert history.pupils.iloc[-1] < history.pupils.iloc[0]
    assert "self-distillation from in_is" in edit.recipe["objective"]
    assert {f.split for f in edit.facts} <= {"fit", "eight", ""}


def test_same_seed_same_edit(organism, taught):
    one, two, other = (learn(organism, taught, replace(QUICK, steps=2), seed=s)[0].values for s in (3, 3, 4))
    assert all(torch.equal(one[s], two[s]) for s in one)
    assert not all(torch.equal(one[s], other[s]) for s in one)


def test_a_low_rank_change_starts_at_none_and_has_that_rank(organism, taught):
    before = training.slice_values(organism, weights.pathway_slices(organism.module, 5, "full"))
    values = distillation.change(before, 2, torch.Generator().manual_seed(0))[1]()
    assert all(torch.equal(values[s], before[s]) for s in before)
    after = learn(organism, taught, replace(QUICK, rank=2, rate=1e-2, steps=3))[0].values
    for s, v in before.items():
        right = torch.linalg.matrix_rank(after[s] - v, atol=1e-4) == 2 if v.ndim == 2 else torch.equal(after[s], v)
        assert right, s


def test_the_rule_by_hand():
    """The most repaired among the harmless; ties by log-probability; a fall of perplexity is a change too."""
    table = pd.DataFrame({"repaired": [9, 9, 9, 9, 4, 4], "log_probability": [-1.0, -1.0, -1.0, -1.0, -3.0, -2.0]})
    table["ratio"] = [1.02, 0.98, 1.0, 1.0, 1.0, 1.0]
    table = table.assign(capability_lost=[0, 0, 1, 0, 0, 0], working_lost=[0, 0, 0, 1, 0, 0])
    assert distillation.harmless(table).tolist() == [False, False, False, False, True, True]
    assert choose(table) == 5
    assert choose(table.iloc[:3]) == 0  # none is harmless: the first of the best
    with pytest.raises(EditError, match="no configuration"):
        choose(table.iloc[:0])


def test_the_teacher_is_chosen_on_known_fit_facts(organism, case):
    found = distillation.teachers(organism, case)
    assert found.log_probability.is_monotonic_decreasing and set(found.context) == {*case.controls, "worked examples"}
    assert found.context[0] != "worked examples"  # the organism was never shown two sentences in a row
    assert (found.told <= found.n).all() and found.n.nunique() == 1


def test_bad_configurations(organism, taught):
    for wrong, said in (({"steps": 0}, r"cannot train \(steps\)"), ({"truth": 1.5}, "rank, rate, truth or places")):
        with pytest.raises(EditError, match=said):
            Config(layer=1, **wrong)
    with pytest.raises(EditError, match="no layer index 12: organism has 12"):
        learn(organism, taught, Config(layer=12))
    with pytest.raises(EditError, match=r"the loss of .* is (nan|inf) after"):
        learn(organism, taught, Config(layer=2, rate=1e30, steps=5))
    assert asdict(QUICK)["pathway"] == "full"
