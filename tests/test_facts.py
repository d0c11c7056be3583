"""Facts, templates, cases: what is read, what is refused, and what told and known mean."""

import hashlib

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib import facts, files, recall
from lib.errors import DataError
from lib.facts import Case, Fact, load_facts, load_templates
from lib.recall import known_and_told, screen, tell
from lib.statistics import exact_interval


def test_the_eight_and_the_countries():
    assert [f.subject for f in load_facts("eight")] == [
        "France",
        "Germany",
        "Japan",
        "Italy",
        "Spain",
        "China",
        "Russia",
        "England",
    ]
    countries = load_facts("countries")
    assert len(countries) == 244
    assert {f.split for f in countries} == {"eight", "fit", "selection", "held_out"}
    assert {f.subject: f.answer for f in countries}["Namibia"] == "Windhoek"  # code NA is no missing value


def test_splits_follow_the_hash_of_the_code():
    table = pd.read_csv(files.DATA / "facts" / "countries.csv", keep_default_na=False)
    for row in table[table.split != "eight"].itertuples():
        tenth = int(hashlib.sha256(row.code.encode()).hexdigest(), 16) % 10
        assert row.split == ("fit" if tenth < 4 else "selection" if tenth < 6 else "held_out")


def test_there_are_ten_templates_or_more():
    assert len(load_templates()) >= 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; it needs a line subject,answer"),
        ("subject,answer\nFrance, \n", "line 2: subject 'France' with answer ' '; neither may be empty"),
        ("subject,answer\n", "holds no fact: add at least one row"),
        ("subject,capital\nFrance,Paris\n", "has no column answer; it needs subject,answer"),
        ("subject,answer\nFrance,Paris\nFrance,Lyon\n", "'France' stands 2 times; keep one row"),
        ("subject,answer\nFrance,Paris\nSpain,\n", "line 3: subject 'Spain' with answer ''; neither may be empty"),
        ("subject,answer\n ,Paris\n", "line 2: subject ' '"),
    ],
)
def test_bad_fact_files(tmp_path, content, message):
    path = tmp_path / "mine.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_facts(path)


def test_missing_fact_file():
    with pytest.raises(DataError, match=r"there is no fact file .*nowhere\.csv; make one with the columns"):
        load_facts("nowhere")


@pytest.mark.parametrize(
    ("text", "holes"), [("The capital is", 0), ("{} and {} are", 2), ("{name} has {}", 1), ("{}: {", 1)]
)
def test_templates_have_exactly_one_hole(tmp_path, text, holes):
    path = tmp_path / "t.yaml"
    path.write_text(f"mine: {text!r}\n")
    with pytest.raises(DataError, match=rf"mine: .* has {holes} holes; write exactly one"):
        load_templates(path)


def test_case_with_an_unknown_template(tmp_path):
    path = tmp_path / "cases.yaml"
    path.write_text("any: [{name: a, title: a, facts: eight, large: eight, template: of_is, controls: [nowhere]}]\n")
    with pytest.raises(DataError, match="case 'a' names the template 'nowhere'"):
        facts.load_cases("smollm2", path)


def test_every_subject_has_cases():
    for name in ("smollm2", "gpt2", "organism", "somebody-elses"):
        assert facts.load_cases(name)


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


def test_exact_interval_is_the_textbooks():
    low, high = exact_interval(2, 8)
    assert (round(low, 3), round(high, 3)) == (0.032, 0.651)
    assert exact_interval(8, 8)[1] == 1.0
    assert exact_interval(0, 0) == (0.0, 1.0)


@given(st.integers(0, 60), st.integers(1, 60))
def test_exact_interval_holds_the_share(k, n):
    k = min(k, n)
    low, high = exact_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1
