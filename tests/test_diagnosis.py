"""The rule on evidence made by hand, and on failures that were planted."""

import pytest
import torch

from lib import diagnosis, static
from lib.diagnosis import Contributions, NoFailure, decide
from lib.errors import DataError
from lib.facts import load_cases
from lib.recall import scorable, study_facts
from lib.sites import Site
from lib.studies import knowledge_path

SITES = (Site(0, 0), Site(0, 1), Site(1, 0), Site(1, 1), Site(0, mlp=True), Site(1, mlp=True))


@pytest.mark.parametrize(
    ("still_written", "still_pushed", "margins", "kind", "suppressor", "unwritten"),
    [
        # head L1 H1 writes 5 and then 1; the margin falls by 4, all of it knowledge not written
        ([0, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0], (3, -1), "not retrieved", None, 1),
        # it writes 5 both times; L2 H0 pushes 6 against it only when it fails
        ([0, 5, 1, 0, 0, 0], [0, 5, -5, 0, 0, 0], (3, -3), "overridden", Site(1, 0), 0),
        # an MLP may be the suppressor
        ([0, 4, 1, 0, 0, 0], [0, 4, 1, 0, 0, -7], (3, -5), "overridden", Site(1, mlp=True), 1 / 8),
        # what a knowledge head no longer writes, 4 of the 11 lost, does not make it a suppressor
        ([0, 1, 1, 0, 0, 0], [0, 1, 1, -3, 0, -4], (3, -8), "overridden", Site(1, mlp=True), 4 / 11),
    ],
)
def test_the_rule_by_hand(still_written, still_pushed, margins, kind, suppressor, unwritten):
    """Four facts alike: attribution and difference are the same under the controls, and not under the failing one."""

    def contributions(attribution: list[int], difference: list[int], margin: float) -> Contributions:
        rows = (torch.tensor([x] * 4, dtype=torch.float) for x in (attribution, difference))
        return Contributions(*rows, torch.full((4,), float(margin)))

    written = [0, 5, 1, 0, 0, 0]
    control = contributions(written, written, margins[0])
    verdict = decide(SITES, control, contributions(still_written, still_pushed, margins[1]))
    assert (verdict.knowledge_head, verdict.failure_kind, verdict.suppressor) == (Site(0, 1), kind, suppressor)
    assert verdict.retention == pytest.approx(still_written[1] / 5)
    assert verdict.unwritten == pytest.approx(unwritten)


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


def test_a_case_without_a_failure_says_so(organism):
    case = load_cases("organism")[0]
    working = type(case)(case.name, case.title, case.facts, case.large, case.controls[0], case.controls[1:])
    table = diagnosis.case_table(organism, working)
    with pytest.raises(NoFailure, match=r"Case 'overridden': 8 of 8 facts are told .* no routing failure"):
        diagnosis.gather(organism, working, table)
