"""What chapter 2 shows beside the diagnosis."""

import pytest

from lib import recall
from lib.facts import load_cases, load_templates
from lib.recall import tell
from lib.studies import knowledge_path
from tests.conftest import plain_logits


def test_the_judge_can_disagree(organism, monkeypatch):
    wrong = [{**case, "knowledge_head": "L1 H1"} for case in knowledge_path.organism_truth()]
    monkeypatch.setattr(knowledge_path, "organism_truth", lambda: wrong)
    assert not knowledge_path.judge_rule(organism).agrees.any()


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
