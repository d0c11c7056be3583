"""What chapter 2 shows beside the diagnosis."""

from lib.studies import knowledge_path


def test_the_judge_can_disagree(organism, monkeypatch):
    wrong = [{**case, "knowledge_head": "L1 H1"} for case in knowledge_path.organism_truth()]
    monkeypatch.setattr(knowledge_path, "organism_truth", lambda: wrong)
    assert not knowledge_path.judge_rule(organism).agrees.any()
