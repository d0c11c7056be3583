"""What chapter 2 shows beside the diagnosis."""

import pandas as pd
import pytest
import torch

from lib import recall
from lib.edits import written
from lib.facts import load_cases, load_facts, load_templates
from lib.recall import tell
from lib.studies import knowledge_path
from lib.training import slice_values
from lib.weights import pathway_slices
from tests.conftest import plain_logits


def test_the_judge_can_disagree(organism, monkeypatch):
    wrong = [{**case, "knowledge_head": "L1 H1"} for case in knowledge_path.organism_truth()]
    monkeypatch.setattr(knowledge_path, "organism_truth", lambda: wrong)
    assert not knowledge_path.judge_rule(organism).agrees.any()


def test_many_questions_are_put_once_and_answered_as_ever(tiny, tmp_path, monkeypatch):
    """Whatever the second one calls the templates; other facts, or a model with an edit in place, are asked anew."""
    monkeypatch.setattr(knowledge_path, "BUILD", tmp_path)
    facts, texts, asked = load_facts("eight")[:3], {"a": "{} has the capital", "b": "The capital of {} is"}, []
    monkeypatch.setattr(knowledge_path, "tell", lambda *a, **k: asked.append(1) or tell(*a, **k))
    pd.testing.assert_frame_equal(knowledge_path.answers_once(tiny, facts, texts), tell(tiny, facts, texts))
    again = {text: text for text in texts.values()}
    pd.testing.assert_frame_equal(knowledge_path.answers_once(tiny, facts, again), tell(tiny, facts, again))
    assert len(asked) == 1
    knowledge_path.answers_once(tiny, facts[:2], texts)
    bias = {part: value + 1 for part, value in slice_values(tiny, pathway_slices(tiny.module, 1, "v_only")).items()}
    with written(tiny.module, bias):
        changed = knowledge_path.answers_once(tiny, facts, texts)
    assert len(asked) == 3 and not changed.prob.equals(tell(tiny, facts, texts).prob)


def test_relation_maps_that_were_kept_come_back_in_their_order(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(knowledge_path, "BUILD", tmp_path)
    facts = load_facts("eight")
    made, kept = (knowledge_path.relation_maps_once(tiny, facts) for _ in range(2))
    monkeypatch.setattr(knowledge_path, "relation_maps", None)  # nothing is made again
    assert list(made) == list(kept) == list(knowledge_path.relation_maps_once(tiny, facts)) == ["raw", "enriched"]
    assert all(torch.equal(made[name].hits, kept[name].hits) for name in made)


def test_every_term_of_the_example_is_kept_under_its_site(organism):
    case = load_cases("organism")[0]
    row = recall.first_failing(case, tell(organism, case.facts, load_templates()))
    terms = knowledge_path.convention_terms(organism, row)
    kept = knowledge_path.terms_by_site(terms)
    assert set(kept) == {"raw", "scaled", "centred"}
    assert len(kept["raw"]["answer"]) == 12 * 12 + 12 + 1, "heads, MLPs and the sum of all"
    scaled = kept["scaled"]
    logits = plain_logits(organism, [row.prompt])[0]
    assert scaled["answer"]["all terms"] == pytest.approx(float(logits[row.answer_token]), abs=1e-3)
    assert scaled["competitor"]["all terms"] == pytest.approx(float(logits[row.competitor_token]), abs=1e-3)
    shift = {site: scaled["answer"][site] - kept["centred"]["answer"][site] for site in scaled["answer"]}
    other = {site: scaled["competitor"][site] - kept["centred"]["competitor"][site] for site in scaled["answer"]}
    assert shift == pytest.approx(other, abs=1e-4), "centring takes the same from every token"
    assert len(knowledge_path.strongest_terms(terms, k=3)) == 4
