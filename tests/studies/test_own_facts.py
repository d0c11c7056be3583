"""Facts of one's own: what is found agrees with the book's own rule, controls and repairs follow theirs, and what
cannot be asked is refused."""

import json
from dataclasses import replace

import pandas as pd
import pytest

from lib.errors import DataError, EditError
from lib.facts import Fact, OpenFact, load_cases, load_facts, load_templates, split_of
from lib.recall import known_and_told, scorable, tell
from lib.studies import own_controls, own_facts, own_repairs


@pytest.fixture(scope="module")
def asked(organism):
    case, text = load_cases("organism")[0], load_templates()
    return load_facts("organism_countries"), text[case.template], [text[c] for c in case.controls[:2]]


@pytest.fixture(scope="module")
def findings(organism, asked):
    return own_facts.diagnose(organism, *asked)


@pytest.fixture(scope="module")
def repaired(findings):
    return own_repairs.repair(findings, "full")


def test_what_is_told_and_known_is_what_recall_says(organism, asked, findings):
    facts, template, controls = asked
    names = {"f": template, **{str(i): text for i, text in enumerate(controls)}}
    case = load_cases("organism")[0]
    like = type(case)("", "", (), (), "f", ("0", "1"))
    expected = known_and_told(tell(organism, scorable(organism, facts), names), like).set_index("subject")
    found = findings.states.set_index("subject")
    assert found.told.tolist() == expected.told.tolist() and found.known.tolist() == expected.known.tolist()
    assert findings.left_out == "2 shared, 2 odd split" and len(found) == len(facts) - 4
    assert findings.asked.told.iloc[0] == found.told.sum() and findings.asked.n.tolist() == [len(found)] * 3


def test_a_planted_fault_has_no_cause_before_the_text(findings):
    """It lies in weights; the table says so, and where it is seen."""
    assert findings.verdict and findings.cause.name == "none found"
    assert dict(findings.rows())["at the cause"].startswith("no cause was found; a sink may")
    said = dict(findings.rows())
    assert (
        said["failure kind"] == findings.verdict.failure_kind
        and str(findings.verdict.knowledge_head) in said["seen at"]
    )
    assert "known, not told" in str(findings) and said["confidence"].startswith(findings.diagnosis.confidence)
    assert json.loads(json.dumps(findings.as_json(), default=str))["model"] == "organism"


def test_the_held_out_part_is_not_looked_at_before_the_repair(findings):
    traced = {f.subject for f in findings.diagnosis.evidence.facts}
    held = set(findings.states[findings.states.split == "held_out"].subject)
    assert traced and held and not traced & held


def test_a_repair_trains_fit_facts_and_asks_the_others(organism, findings, repaired):
    held = findings.failed[findings.failed.split == "held_out"]
    counts, edit = repaired.counts, repaired.edit
    assert {f.split for f in edit.facts} == {"fit"} and counts["untold"] == len(held) == len(repaired.held)
    assert counts["told_after"] > counts["told_before"] and counts["repaired"] == repaired.held.told.sum()
    assert f"{counts['repaired']} of {len(held)} held-out facts" in str(repaired)
    effects = repaired.effects.set_index("what")
    assert (effects.before - effects.lost + effects.gained).equals(effects.after)
    told_before = findings.states[findings.states.told & ~findings.states.subject.isin([f.subject for f in edit.facts])]
    assert effects.before["other facts, told before"] == len(told_before)
    assert repaired.perplexity["ratio_low"] < repaired.perplexity["ratio"] < repaired.perplexity["ratio_high"]


def test_a_sink_is_trained_by_the_same_call(organism, asked, monkeypatch):
    """One rate and few steps: that it runs, and says that it did not reach its goal."""
    monkeypatch.setattr(own_repairs, "DEFAULT", replace(own_repairs.DEFAULT, rates=(3e-3,), max_steps=12))
    second = own_facts.diagnose(organism, asked[0], "{}'s capital city is", asked[2][:1])
    found = own_repairs.repair(second, "sink_token")
    assert found.edit.pathway == "sink_token" and not found.reached and found.counts["parameters"] == 120


def test_what_no_repair_can_be_of_is_refused(findings):
    with pytest.raises(EditError, match="unknown pathway 'half'; choose from full, "):
        own_repairs.repair(findings, "half")
    none_known = replace(findings, states=findings.states.assign(known=False))
    with pytest.raises(EditError, match="no fact of the fit part is known"):
        own_repairs.repair(none_known, "full")


def test_where_nothing_fails_it_says_so(organism, asked):
    facts, _, controls = asked
    found = own_facts.diagnose(organism, facts, controls[0], controls[:1])
    assert found.verdict is None and "every fact that is known is told" in str(found)
    with pytest.raises(EditError, match="nothing to repair: none: every fact"):
        own_repairs.repair(found, "v_only")


def test_where_nothing_is_known_it_says_so(organism, asked):
    found = own_facts.diagnose(organism, asked[0], "{} was", ["{} or"])
    assert "no fact is known under any control" in str(found)


def test_facts_with_one_answer_are_counted_and_not_diagnosed(organism, asked, findings):
    """What a head writes of an answer needs others to compare with."""
    failed = findings.failed.iloc[0]
    found = own_facts.diagnose(organism, [Fact(failed.subject, failed.answer, "fit")], asked[1], asked[2])
    assert len(found.failed) == 1 and "one distinct answer" in dict(found.rows())["failure"]


def test_what_cannot_be_asked_is_refused(organism, asked):
    facts, template, controls = asked
    with pytest.raises(DataError, match="the template: 'The capital is' has 0 holes"):
        own_facts.diagnose(organism, facts, "The capital is", controls)
    with pytest.raises(DataError, match=r"a control: .*holds the control character '\\x1b'"):
        own_facts.diagnose(organism, facts, template, ["\x1b[31m{} is"])
    with pytest.raises(DataError, match="tells none of the 1 answers by its first token"):
        own_facts.diagnose(organism, [Fact("A", "?")], template, controls)
    with pytest.raises(DataError, match="too few facts to take examples from; give at least one control"):
        own_facts.diagnose(organism, facts[:1], template)


def test_forms_are_chosen_by_how_much_they_tell(organism, asked, monkeypatch):
    """By the rule's own words: of the facts that are not held out; the three that tell most, in the order of FORMS."""
    facts = [replace(f, split=split_of(f.subject)) for f in scorable(organism, asked[0])]
    counts, seen = dict(zip(own_controls.FORMS, (1, 5, 0, 5, 3), strict=True)), []

    def told(model, study, texts, **_):
        seen.extend(study)
        parts = [pd.DataFrame({"template": n, "told": [i < counts[n] for i in range(len(study))]}) for n in texts]
        return pd.concat(parts)

    monkeypatch.setattr(own_controls, "tell", told)
    choice = own_controls.choose(organism, facts, asked[1])
    assert choice.asked[choice.asked.chosen].form.tolist() == ["arrows", "pairs", "the wording itself"]
    assert {f.split for f in seen} == {"fit", "selection"} and not set(seen) & set(choice.examples)
    assert len({f.answer for f in choice.examples}) == len(choice.examples) == 4
    assert all(text.count("{}") == 1 for text in choice.controls)
    first = choice.examples[0]
    assert choice.controls[0].startswith(f"{first.subject} -> {first.answer}\n") and choice.controls[0].endswith(
        "{} ->"
    )
    assert choice.controls[2].endswith(asked[1])


def test_examples_hold_no_other_subject_and_no_hole():
    pairs = [("Guinea", "A"), ("Equatorial Guinea", "B"), ("Mali", "C {}"), ("Chad", "D"), ("Peru", "D"), ("Togo", "E")]
    chosen = own_controls._examples(
        [Fact(s, a, "fit") for s, a in pairs] * 1 + [Fact(f"x{i}", "y", "fit") for i in range(9)]
    )
    names = {f.subject for f in chosen}
    assert not names & {"Guinea", "Equatorial Guinea", "Mali"} and not {"Chad", "Peru"} <= names


def test_without_controls_examples_are_shown_and_not_scored(organism, asked):
    facts, template, _ = asked
    found = own_facts.diagnose(organism, facts, template)
    assert found.choice and len(found.case.controls) == 3 and dict(found.rows())["controls"].startswith("3, chosen by")
    assert not {f.subject for f in found.choice.examples} & set(found.states.subject)


def test_a_further_answer_counts_as_told(organism, asked, findings):
    told = findings.states[findings.states.told].iloc[0]
    other = findings.states[~findings.states.told].iloc[0]
    fact = OpenFact(told.subject, other.answer, "fit", (told.answer,))
    found = own_facts.diagnose(organism, [fact, Fact(other.subject, other.answer, "fit")], asked[1], asked[2])
    assert found.states.set_index("subject").told[told.subject]
