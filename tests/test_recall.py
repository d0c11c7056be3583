"""What is told and known: worked out by hand, and the paper's phenomenon on a real model."""

import pandas as pd
import pytest
import torch

from lib import recall
from lib.errors import DataError
from lib.facts import Case, Fact, OpenFact, load_facts, load_templates
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
    with pytest.raises(DataError, match="tells none of the 1 answers"):
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
        return [(torch.arange(len(prompts)), logits)]

    monkeypatch.setattr(recall, "logits_by_pack", put)
    row = tell(tiny, [Fact("France", "Paris")], {"t": "{} is"}).iloc[0]
    assert (row.told, row["rank"], row.margin, row.competitor_token) == (False, 2, -1.0, 11)
    assert row.prob == pytest.approx(1 / (1 + 2.718281828), rel=1e-5)


def test_what_is_known_is_not_asked_again(tiny, monkeypatch):
    """Prompts of an earlier table keep its numbers; others, and another answer to the same prompt, are asked."""
    chosen, asked, really = load_facts("eight")[:3], [], recall.logits_by_pack
    whole = tell(tiny, chosen, {"a": "The capital of {} is", "b": "{}:"})

    def ask(model, prompts, **options):
        asked.extend(prompts)
        return really(model, prompts, **options)

    monkeypatch.setattr(recall, "logits_by_pack", ask)
    again = tell(tiny, [chosen[2], Fact("Italy", "Paris", "x")], {"c": "{}:", "d": "In {},"}, known=whole)
    assert asked == ["Italy:", "In Japan,", "In Italy,"] and again.columns.tolist() == whole.columns.tolist()
    expected = whole[(whole.template == "b") & (whole.subject == "Japan")].assign(template="c")
    assert again.iloc[0].to_dict() == expected.iloc[0].to_dict()


def logits_of(model, monkeypatch, **values: float) -> None:
    """Every prompt gets these logits for the first tokens of words, and -50 for all others."""

    def put(_, prompts, **options):
        logits = torch.full((len(prompts), 49152), -50.0)
        for word, value in values.items():
            logits[:, model.first_token(word)] = value
        return [(torch.arange(len(prompts)), logits)]

    monkeypatch.setattr(recall, "logits_by_pack", put)


def test_a_fact_is_told_by_any_of_its_accepted_answers(tiny_gpt2_model, monkeypatch):
    """Lyon leads Berlin by 2 and Paris by 3: told if Lyon is accepted; the trained answer stays the first."""
    logits_of(tiny_gpt2_model, monkeypatch, Paris=1.0, Lyon=4.0, Berlin=2.0)
    facts = [
        Fact("France", "Paris"),
        OpenFact("France", "Paris", also=("Lyon",)),
        OpenFact("France", "Paris", also=("Rome",)),
    ]
    plain, told, untold = tell(tiny_gpt2_model, facts, {"t": "{} is"}).to_dict("records")
    assert (plain["told"], plain["rank"], plain["margin"]) == (False, 3, -3.0)
    assert (told["told"], told["rank"], told["margin"], told["competitor"]) == (True, 1, 2.0, " Berlin")
    assert (untold["told"], untold["rank"], untold["margin"], untold["competitor"]) == (False, 3, -3.0, " Lyon")
    assert plain["answer_token"] == told["answer_token"] == tiny_gpt2_model.first_token("Paris")
    assert told["prob"] == pytest.approx(1 / (1 + 2.718281828**-2 + 2.718281828**-3), rel=1e-5)


def test_what_is_known_of_one_set_of_answers_is_not_taken_for_another(tiny_gpt2_model, monkeypatch):
    logits_of(tiny_gpt2_model, monkeypatch, Lyon=4.0)
    one, both = Fact("France", "Paris"), OpenFact("France", "Paris", also=("Lyon",))
    known = tell(tiny_gpt2_model, [one, both], {"t": "{} is"})
    assert known.told.tolist() == [False, True]
    monkeypatch.setattr(recall, "logits_by_pack", None)
    assert tell(tiny_gpt2_model, [both, one], {"u": "{} is"}, known=known).told.tolist() == [True, False]


@pytest.mark.model
def test_further_answers_that_their_first_token_does_not_identify_are_left_out(smollm2):
    facts = [OpenFact("France", "Paris", also=("Lyon", "Londonderry", "Doha")), Fact("England", "London")]
    kept, other = recall.scorable(smollm2, facts)
    assert kept == OpenFact("France", "Paris", also=("Lyon",)) and other == facts[1]  # " London" is England's


@pytest.mark.parametrize(
    ("token", "letters"),
    [
        (" P", 1),
        (" Paris", 5),
        (" 서", 2),
        ("东", 2),
        ("\ufffd", 0),
        (" با", 2),
        (" ب", 1),
        ("दि", 2),
        ("Ａ", 1),
        ("7", 0),
    ],
)
def test_letters_of_a_token(token, letters):
    """A syllable or a word that is one character is no single letter; a part of a character is none."""
    assert recall._letters(token) == letters


@pytest.mark.model
def test_answers_in_other_scripts(smollm2):
    """SmolLM2 spells them in bytes, and a part of a character identifies nothing. Scripts without spaces get none."""
    assert screen(smollm2, [Fact("프랑스", "파리"), Fact("日本", "东京")]).left_out.tolist() == ["odd split"] * 2
    assert smollm2.joined("首都是", "东京") == "首都是东京" and smollm2.joined("수도는", "파리") == "수도는 파리"
    assert smollm2.pieces("is") + smollm2.word("东京") == smollm2.pieces("is东京")
