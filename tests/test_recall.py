"""What is told and known: worked out by hand, and the paper's phenomenon on a real model."""

import pandas as pd
import pytest
import torch

from lib import recall
from lib.errors import DataError
from lib.facts import Case, Fact, load_facts, load_templates
from lib.recall import known_and_told, screen, tell


@pytest.mark.model
def test_screen_reports_and_leaves_out(smollm2):
    chosen = [
        Fact("France", "Paris"),
        Fact("Mexico", "Mexico City"),
        Fact("Costa Rica", "San Jose"),
        Fact("Puerto Rico", "San Juan"),
        Fact("Qatar", "Doha"),
    ]
    assert screen(smollm2, chosen).left_out.tolist() == ["", "echo", "shared", "shared", "odd split"]
    assert [f.subject for f in recall.scorable(smollm2, chosen)] == ["France"]
    with pytest.raises(DataError, match="none of the 1 answers can be told"):
        recall.scorable(smollm2, chosen[1:2])


@pytest.mark.model
def test_the_papers_phenomenon_on_smollm2(smollm2):
    """Two of eight told subject first, eight of eight under 'The capital of {} is', none as a question."""
    templates = load_templates()
    table = tell(smollm2, load_facts("eight"), {k: templates[k] for k in ("of_is", "subject_first", "question")})
    assert table.groupby("template").told.sum().to_dict() == {"of_is": 8, "question": 0, "subject_first": 2}
    untold = table[~table.told]
    assert (untold.competitor == untold.top).all() and (untold.margin <= 0).all()
    assert (table.told == (table["rank"] == 1)).all()


def test_told_and_known_by_hand():
    case = Case("c", "c", (), (), "bad", ("good", "other"))
    told = {"bad": [True, False, False], "good": [True, True, False], "other": [True, False, False], "x": [True] * 3}
    rows = [(t, s, v) for t, values in told.items() for s, v in zip("ABC", values, strict=True)]
    state = known_and_told(pd.DataFrame(rows, columns=["template", "subject", "told"]), case).set_index("subject")
    assert state.told.tolist() == [True, False, False]
    assert state.known.tolist() == [True, True, False]  # template x is no control of this case
    assert state.routing_failure.tolist() == [False, True, False]
    assert state.told_by.B == ("good",)


def test_best_controls_by_hand():
    told = {"own": [True] * 3, "none": [False] * 3, "one": [True, False, False], "all": [True] * 3, "too": [True] * 3}
    table = pd.DataFrame([(t, v) for t, values in told.items() for v in values], columns=["template", "told"])
    assert recall.best_controls(table, "own") == ("all", "too", "one")
    assert recall.best_controls(table, "all", 1) == ("own",)


def test_tell_by_hand(tiny, monkeypatch):
    """Rank, margin, probability and competitor from logits that are put there."""

    def put(model, prompts, **options):
        logits = torch.full((len(prompts), 49152), -50.0)
        logits[0, tiny.first_token("Paris")], logits[0, 11] = 2.0, 3.0
        return logits

    monkeypatch.setattr(recall, "next_token_logits", put)
    row = tell(tiny, [Fact("France", "Paris")], {"t": "{} is"}).iloc[0]
    assert (row.told, row["rank"], row.margin, row.competitor_token) == (False, 2, -1.0, 11)
    assert row.prob == pytest.approx(1 / (1 + 2.718281828), rel=1e-5)


def test_what_is_known_is_not_asked_again(tiny, monkeypatch):
    """Prompts of an earlier table keep its numbers; others, and another answer to the same prompt, are asked."""
    chosen, asked, really = load_facts("eight")[:3], [], recall.next_token_logits
    whole = tell(tiny, chosen, {"a": "The capital of {} is", "b": "{}:"})

    def ask(model, prompts, **options):
        asked.extend(prompts)
        return really(model, prompts, **options)

    monkeypatch.setattr(recall, "next_token_logits", ask)
    again = tell(tiny, [chosen[2], Fact("Italy", "Paris", "x")], {"c": "{}:", "d": "In {},"}, known=whole)
    assert asked == ["Italy:", "In Japan,", "In Italy,"] and again.columns.tolist() == whole.columns.tolist()
    expected = whole[(whole.template == "b") & (whole.subject == "Japan")].assign(template="c")
    assert again.iloc[0].to_dict() == expected.iloc[0].to_dict()
