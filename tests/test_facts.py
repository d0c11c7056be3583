"""Facts, templates, cases: what is read and what is refused."""

import dataclasses
import hashlib
import json

import pandas as pd
import pytest
from safetensors import safe_open

from lib import edits, facts, files
from lib.errors import DataError
from lib.facts import OpenFact, load_facts, load_templates
from lib.inputs.mappings import validated
from tests.test_edits import an_edit


def test_the_eight_and_the_countries():
    eight = ["France", "Germany", "Japan", "Italy", "Spain", "China", "Russia", "England"]
    assert [f.subject for f in load_facts("eight")] == eight
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
        ("subject,town\nFrance,Paris\n", "has no column answer; it needs subject,answer"),
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


@pytest.mark.parametrize(
    ("title", "facts_file", "rest", "message"),
    [
        ("a", "eight", "", "controls is missing"),
        ("a", "eight", ", controls: []", "controls is empty; give at least one value"),
        ("a", "eight", ", controls: [in_is], x: 1", "unknown key '0.x'"),
        ("3", "eight", ", controls: [in_is]", "title: .*, not 3"),
        ("a", "nowhere", ", controls: [in_is]", "there is no fact file"),
    ],
)
def test_an_entry_that_is_no_case_names_file_entry_and_fault(tmp_path, title, facts_file, rest, message):
    entry = f"{{name: a, title: {title}, facts: {facts_file}, large: eight, template: of_is{rest}}}"
    path = tmp_path / "cases.yaml"
    path.write_text(f"any: [{entry}]\n")
    with pytest.raises(DataError, match=message) as refused:
        facts.load_cases("smollm2", path)
    assert "no fact file" in message or "cases.yaml, cases of smollm2: " in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty or not a mapping"),
        ("- a", "is empty or not a mapping"),
        ("a: [", "is no YAML"),
        ("a: 3", "a: .*, not 3"),
    ],
)
def test_files_that_map_no_names(tmp_path, text, message):
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"t\.yaml.* {message}"):
        load_templates(path)
    with pytest.raises(DataError, match=r"there is no file .*nowhere\.yaml"):
        facts.load_mapping(tmp_path / "nowhere.yaml")


def test_every_model_has_cases():
    for name in ("smollm2", "gpt2", "organism", "somebody-elses"):
        assert facts.load_cases(name)


def test_an_edit_keeps_further_answers(tiny_gpt2_model, tmp_path):
    """And the header of a fact without them is what it was."""
    edit = an_edit(tiny_gpt2_model)
    told = (OpenFact("France", "Paris", also=("Lutetia",)), edit.facts[1])
    path = edits.save(dataclasses.replace(edit, facts=told), tmp_path / "a.safetensors")
    assert edits.load(path).facts == told
    with safe_open(path, "pt") as file:
        kept = json.loads(file.metadata()["edit"])["facts"]
    assert kept[0]["also"] == ["Lutetia"] and kept[1] == {"subject": "Germany", "answer": "Berlin", "split": ""}
    with pytest.raises(DataError, match=r"it: 0\.0: Input should be a valid string, not 3"):
        validated(tuple[facts.Fact, ...], [kept[0] | {"also": [3]}], "it")
