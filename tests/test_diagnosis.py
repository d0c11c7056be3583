"""The rule on evidence made by hand, and on failures that were planted."""

import pytest
import torch

from lib import diagnosis, static
from lib.diagnosis import Contributions, NoFailure, Verdict, decide
from lib.errors import DataError
from lib.facts import load_cases
from lib.recall import scorable, study_facts
from lib.sites import Site
from lib.studies import knowledge_path

SITES = (Site(0, 0), Site(0, 1), Site(1, 0), Site(1, 1), Site(0, mlp=True), Site(1, mlp=True))


def verdict_on(written, still_written, pushed, still_pushed, margins, n: int = 4) -> Verdict:
    """The rule on n facts alike: attribution, then difference, under the controls and under the failing template."""

    def contributions(attribution, difference, margin) -> Contributions:
        rows = (torch.tensor(x, dtype=torch.float)[None].expand(n, -1) for x in (attribution, difference))
        return Contributions(*rows, torch.full((n,), float(margin)))

    control, failing = zip((written, still_written), (pushed, still_pushed), margins, strict=True)
    return decide(SITES, contributions(*control), contributions(*failing))


def test_not_retrieved_by_hand():
    """Head L1 H1 writes 5 and then 1; the margin falls by 4, all of it knowledge not written."""
    verdict = verdict_on([0, 5, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 5, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0], (3, -1))
    assert verdict.knowledge_head == Site(0, 1) and verdict.failure_kind == "not retrieved"
    assert verdict.suppressor is None
    assert verdict.retention == pytest.approx(0.2) and verdict.unwritten == pytest.approx(1.0)


def test_overridden_by_hand():
    """The same head writes 5 both times; L2 H0 pushes 6 against it only when it fails."""
    verdict = verdict_on([0, 5, 1, 0, 0, 0], [0, 5, 1, 0, 0, 0], [0, 5, 1, 0, 0, 0], [0, 5, -5, 0, 0, 0], (3, -3))
    assert verdict.failure_kind == "overridden" and verdict.suppressor == Site(1, 0)
    assert verdict.unwritten == pytest.approx(0.0)


def test_an_mlp_may_be_the_suppressor():
    verdict = verdict_on([0, 5, 1, 0, 0, 0], [0, 4, 1, 0, 0, 0], [0, 5, 1, 0, 0, 0], [0, 4, 1, 0, 0, -7], (3, -5))
    assert verdict.suppressor == Site(1, mlp=True) and verdict.failure_kind == "overridden"


def test_what_a_knowledge_head_no_longer_writes_does_not_make_it_a_suppressor():
    verdict = verdict_on([0, 5, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 5, 0, 0, 0, 0], [0, 1, 0, -3, 0, -4], (3, -8))
    assert verdict.failure_kind == "overridden"  # 4 of 11 lost
    assert verdict.suppressor == Site(1, mlp=True)


def test_one_answer_alone_cannot_be_compared(organism):
    case = load_cases("organism")[0]
    alone = type(case)(case.name, case.title, case.facts[:1], case.large, case.template, case.controls)
    with pytest.raises(DataError, match="has one distinct answer"):
        diagnosis.gather(organism, alone, diagnosis.case_table(organism, alone))


PLANTED = knowledge_path.organism_truth()


@pytest.fixture(scope="module")
def organism_diagnoses(organism):
    cases = load_cases("organism")
    joint = static.join(static.relation_maps(organism, study_facts(organism, cases[0])).values())
    return {d.case.template: d for d in diagnosis.diagnose_cases(organism, cases, joint)}


def test_the_ground_truth_is_there():
    assert {c["kind"] for c in PLANTED} == {"overridden", "not retrieved"}


@pytest.mark.parametrize("planted", PLANTED, ids=lambda c: c["kind"])
def test_the_diagnosis_names_what_was_planted(organism_diagnoses, planted):
    found = organism_diagnoses[planted["template"]]
    assert found.verdict.failure_kind == planted["kind"]
    assert str(found.verdict.knowledge_head) == planted["knowledge_head"]
    assert (str(found.verdict.suppressor) if found.verdict.suppressor else None) == planted["suppressor"]
    assert found.evidence.completeness < 1e-3


def test_static_and_dynamic_evidence_agree_on_the_organism(organism_diagnoses):
    for found in organism_diagnoses.values():
        assert found.static_rank == 1 and found.static_p <= 0.05 and found.confidence == "high"


@pytest.mark.model
def test_smollm2_cases(smollm2):
    """Both cases by the same code: the same head, two kinds of failure."""
    cases = load_cases("smollm2")
    joint = static.join(static.relation_maps(smollm2, scorable(smollm2, cases[0].facts)).values())
    first, question = diagnosis.diagnose_cases(smollm2, cases, joint)
    assert first.verdict.knowledge_head == question.verdict.knowledge_head == Site.parse("L24 H4")
    assert (first.verdict.failure_kind, question.verdict.failure_kind) == ("not retrieved", "overridden")
    assert question.verdict.suppressor == Site.parse("L30 MLP")
    assert max(first.evidence.completeness, question.evidence.completeness) <= 1e-3


def test_a_case_without_a_failure_says_so(organism):
    case = load_cases("organism")[0]
    working = type(case)(case.name, case.title, case.facts, case.large, case.controls[0], case.controls[1:])
    table = diagnosis.case_table(organism, working)
    with pytest.raises(NoFailure, match=r"Case 'overridden': 8 of 8 facts are told .* no routing failure"):
        diagnosis.gather(organism, working, table)
