"""Facts of one's own: what is found agrees with the book's own rule, and what cannot be asked is refused."""

import json

import pytest

from lib import __main__ as command
from lib.errors import DataError, EditError
from lib.facts import load_cases, load_facts, load_templates
from lib.recall import known_and_told, scorable, tell
from lib.studies import own_facts


@pytest.fixture(scope="module")
def asked(organism):
    case, text = load_cases("organism")[0], load_templates()
    return load_facts("organism_countries"), text[case.template], [text[c] for c in case.controls[:2]]


@pytest.fixture(scope="module")
def findings(organism, asked):
    return own_facts.diagnose(organism, *asked)


def test_what_is_told_and_known_is_what_recall_says(organism, asked, findings):
    facts, template, controls = asked
    names = {"f": template, **{str(i): text for i, text in enumerate(controls)}}
    case = load_cases("organism")[0]
    like = type(case)("", "", (), (), "f", ("0", "1"))
    expected = known_and_told(tell(organism, scorable(organism, facts), names), like).set_index("subject")
    found = findings.states.set_index("subject")
    assert found.told.tolist() == expected.told.tolist() and found.known.tolist() == expected.known.tolist()
    assert findings.left_out == len(facts) - len(found)


def test_a_planted_fault_has_no_cause_before_the_text(findings):
    """It lies in weights; the table says so, and where it is seen."""
    assert findings.verdict and findings.cause == "none found"
    said = dict(findings.rows())
    assert (
        said["failure kind"] == findings.verdict.failure_kind
        and str(findings.verdict.knowledge_head) in said["seen at"]
    )
    assert "known, not told" in str(findings)
    assert json.loads(json.dumps(findings.as_json(), default=str))["model"] == "organism"


def test_a_repair_trains_fit_facts_and_asks_the_others(findings):
    edit, counts = own_facts.repair(findings, "full")
    held = findings.failed[findings.failed.split == "held_out"]
    assert {f.split for f in edit.facts} == {"fit"} and counts["untold"] == len(held)
    assert counts["told_after"] >= counts["told_before"] and 0 <= counts["repaired"] <= counts["untold"]
    with pytest.raises(EditError, match="unknown pathway 'half'"):
        own_facts.repair(findings, "half")


def test_where_nothing_fails_it_says_so(organism, asked):
    facts, _, controls = asked
    found = own_facts.diagnose(organism, facts, controls[0], controls[:1])
    assert found.verdict is None and "every fact that is known is told" in str(found)
    with pytest.raises(EditError, match="nothing to repair"):
        own_facts.repair(found, "v_only")


def test_what_cannot_be_asked_is_refused(organism, asked):
    facts, template, controls = asked
    with pytest.raises(DataError, match="0 holes"):
        own_facts.diagnose(organism, facts, "The capital is", controls)
    with pytest.raises(DataError, match="at least one control"):
        own_facts.diagnose(organism, facts, template, [])


def test_the_command_names_a_missing_file(monkeypatch, capsys):
    words = ["lib", "diagnose", "--facts", "no/such.csv", "--template", "{} is", "--control", "of {} is"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as done:
        command.main()
    assert done.value.code == 1 and "there is no fact file no/such.csv" in capsys.readouterr().err
