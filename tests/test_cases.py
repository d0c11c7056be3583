"""A case of one's own: read from its file, put in the place of the book's, counted in what depends on it."""

import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lib import __main__ as commands
from lib import facts, files
from lib.errors import DataError, SweepError
from lib.facts import load_cases, load_templates, read_case, split_of
from lib.inputs.mappings import read_yaml
from lib.sweeps import experiments, record, specification

COUNTRIES = [f.subject for f in facts.load_facts("countries")]
PLAIN = {"facts": "mine.csv", "template": "The capital of {} is", "controls": ["visited", "In {}, the capital is"]}


@pytest.fixture
def write(tmp_path):
    """Write a case, and beside it thirty facts."""
    rows = [f"{f.subject},{f.answer}" for f in facts.load_facts("countries")[:30] if "," not in f.subject + f.answer]
    (tmp_path / "mine.csv").write_text("\n".join(["subject,answer", *rows]))

    def case(content: object = PLAIN, name: str = "capitals.yaml") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, allow_unicode=True))
        return path

    return case


@pytest.fixture
def chosen(write, monkeypatch):
    """Put a case in the place of the book's."""

    def choose(content: object = PLAIN) -> Path:
        path = write(content)
        monkeypatch.setenv(files.CASE_VARIABLE, str(path))
        return path

    return choose


def test_a_case_by_hand(write, tmp_path):
    own = read_case(write())
    case, whole = own.case, facts.load_facts(tmp_path / "mine.csv")
    assert (case.name, case.title, case.template, case.controls) == (
        "capitals",
        "capitals",
        "template",
        ("visited", "control_2"),
    )
    assert own.templates == {
        "template": "The capital of {} is",
        "control_2": "In {}, the capital is",
        "visited": load_templates()["visited"],
    }
    assert [f.subject for f in case.large] == [f.subject for f in whole]
    assert [f.split for f in case.large] == [split_of(f.subject) for f in whole]
    assert case.facts == tuple(f for f in case.large if f.split == "fit") and 5 < len(case.facts) < 20
    assert own.files == {"case": tmp_path / "capitals.yaml", "facts": tmp_path / "mine.csv"}


def test_paths_are_relative_to_the_file_that_names_them(write, tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    path = write({**PLAIN, "facts": "../mine.csv"}, "below/case.yaml")
    monkeypatch.chdir("/")
    assert read_case(path).case.large == read_case(write()).case.large


def test_a_word_is_a_fact_set_of_the_book(write):
    own = read_case(write({**PLAIN, "facts": "eight", "large": "countries", "name": "a.b", "title": "mine: é"}))
    assert own.case.facts == facts.load_facts("eight") and own.case.large == facts.load_facts("countries")
    assert (own.case.name, own.case.title, own.files["large"].name) == ("a.b", "mine: é", "countries.csv")


def test_templates_of_the_file_and_of_the_book(write):
    named = {**PLAIN, "template": "mine", "controls": ["visited"], "templates": {"mine": "{} has", "other": "Of {}:"}}
    own = read_case(write(named))
    assert own.templates == {"mine": "{} has", "other": "Of {}:", "visited": load_templates()["visited"]}
    own = read_case(write({**PLAIN, "template": "of_is", "controls": ["visited"]}))
    assert own.templates == load_templates()  # none of its own: it is about capitals, and all are asked


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": None}, "template: Input should be a valid string, not None"),
        ({"controls": []}, "controls is empty; give at least one value"),
        ({"contrls": []}, r"unknown key 'contrls' \(known: facts, template, controls, large, templates, name, title\)"),
        ({"template": "The capital is {"}, r"template: 'The capital is \{' has 0 holes; write exactly one \{\}"),
        ({"controls": ["{} and {}"]}, r"control_1: '\{\} and \{\}' has 2 holes"),
        (
            {"controls": ["nowhere"]},
            r"control_1 names the template 'nowhere', which neither it nor templates\.yaml has",
        ),
        (
            {"controls": ["The capital of {} is", "of_is", "of_is"]},
            "a template stands twice among template and controls",
        ),
        ({"templates": {"of_is": "{} is"}}, r"templates\.of_is: the book calls another template so; choose another"),
        ({"templates": {"template": "{} is"}}, r"templates\.template: the book calls another template so"),
        ({"templates": {"a": "none"}}, r"templates\.a: 'none' has 0 holes"),
        ({"templates": {"../a": "{}"}}, r"templates\.\.\./a\.\[key\]: String should match pattern"),
        ({"facts": "nowhere.csv"}, r"there is no fact file .*nowhere\.csv; make one"),
        ({"facts": "../../etc/passwd"}, "there is no fact file|is of no kind that is read"),
        ({"facts": "countries", "large": "eight"}, "its facts fall into 244 fit, 0 selection, 0 held_out"),
        ({"title": "a\x1b[2J"}, r"title: 'a\\x1b\[2J' holds the control character '\\x1b'; leave it out"),
        ({"template": "{}\u0007"}, r"template: '\{\}\\x07' holds the control character"),
        ({"name": "../up"}, "name: String should match pattern"),
        ({"title": False}, "title: Input should be a valid string, not False"),
    ],
)
def test_cases_that_are_refused(write, change, message):
    with pytest.raises(DataError, match=message) as refused:
        read_case(write({**PLAIN, **change}))
    assert "\n" not in str(refused.value) and "\x1b" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"capitals\.yaml: it: Input should be .*dictionary.*, not None"),
        ("a: [", r"capitals\.yaml is no YAML: .*line 1"),
        ("facts: !!python/object/apply:os.system [echo]", "is no YAML: could not determine a constructor for the tag"),
        ("facts: a.csv\nfacts: b.csv", "is no YAML: line 1: 'facts' stands twice; keep one"),
        ("a: &a [x, x]\nb: [*a, *a]", r"is no YAML: line 2 refers to another place \(\*\); repeat it"),
        ("a: " + "[" * 5000, "is no YAML: it is nested too deeply|is no YAML"),
        ("a: 2024-99-99", "is no YAML: month must be in 1..12"),
        ("a: !!bool x", "is no YAML"),
        ("a: \x07", "is no YAML: unacceptable character"),
        ("#" * 2**20 + "#", "is larger than a megabyte"),
    ],
)
def test_files_that_hold_no_case(write, content, message):
    with pytest.raises(DataError, match=message) as refused:
        read_case(write(content))
    assert "capitals.yaml" in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_is_no_text_or_not_there(write, tmp_path):
    path = write("facts: é")
    path.write_bytes("facts: é".encode("cp1252"))
    with pytest.raises(DataError, match=r"capitals\.yaml is no YAML: .*utf-8.* can't decode byte"):
        read_case(path)
    with pytest.raises(DataError, match=r"there is no file .*nowhere\.yaml"):
        read_case(tmp_path / "nowhere.yaml")
    with pytest.raises(SweepError, match="is no YAML: line 2 refers to another place"):
        specification.load(write("a: &a 1\nb: *a"))
    assert read_yaml(write("\ufefffacts: a.csv\r\n")) == {"facts": "a.csv"}


def test_the_books_yaml_passes_the_stricter_reader():
    for path in files.DATA.rglob("*.yaml"):
        assert read_yaml(path) == yaml.safe_load(path.read_text(encoding="utf-8"))


def test_it_stands_in_the_place_of_the_books(chosen):
    book, own = load_templates(), read_case(chosen())
    assert load_cases("smollm2") == load_cases("gpt2") == load_cases("a/copy") == (own.case,)
    assert [case.name for case in load_cases("organism@bos")] == ["overridden", "not_retrieved"]
    shown = load_templates()
    assert dict(shown) == own.templates and list(shown) == list(own.templates)
    assert shown["subject_first"] == book["subject_first"]  # what the organism's cases need is found by name
    with pytest.raises(KeyError):
        shown["nowhere"]


def test_every_file_of_a_case_counts(chosen, tmp_path):
    (tmp_path / "more.json").write_text(json.dumps(dict.fromkeys(COUNTRIES, "x")))
    path = chosen({**PLAIN, "large": "more.json"})
    before = facts.case_sums()
    assert list(before) == ["case/case", "case/facts", "case/large"] and str(tmp_path) not in str(before)
    for file, part in ((path, "case"), (tmp_path / "mine.csv", "facts"), (tmp_path / "more.json", "large")):
        file.write_text(file.read_text() + "\n")
        changed = {name for name, value in facts.case_sums().items() if value != before[name]}
        assert changed == {f"case/{part}"}
        before = facts.case_sums()
    (tmp_path / "mine.csv").unlink()
    assert facts.case_sums()["case/facts"] == ""


def test_without_a_case_nothing_counts(monkeypatch):
    monkeypatch.delenv(files.CASE_VARIABLE, raising=False)
    assert facts.case_sums() == {} and files.run_folder("a/b") == "a-b"


def test_runs_and_records_know_the_case(chosen, monkeypatch):
    name = "distillation.distilled" if "distillation.distilled" in experiments.listed() else experiments.listed()[0]
    book, meant, rests = experiments.code(name), experiments.meaning(name), record.rests_on("smollm2")
    chosen()
    assert set(experiments.code(name)) - set(book) == {"case/case", "case/facts"}
    assert experiments.meaning(name) == meant
    assert set(record.rests_on("smollm2")) - set(rests) == {"case/case", "case/facts"}
    assert not {name for name in record.rests_on("organism") if name.startswith("case/")}
    with pytest.raises(SweepError, match=r"was made of other data \(case/case, case/facts\).*RECORD=off"):
        record.read(specification.load("layers"))
    assert files.run_folder("smollm2") == "smollm2+capitals"


@pytest.mark.parametrize("words", [["run", "1"], ["sweep", "layers", "--dry-run"], ["dashboard"]])
def test_the_commands_read_the_case_first(write, monkeypatch, words, tmp_path):
    monkeypatch.setenv(files.CASE_VARIABLE, "")  # what the command sets is undone
    done = CliRunner().invoke(commands.app, [*words, "--model", "organism", "--case", str(write())])
    assert done.exit_code == 2 and "the organism's cases are its planted failures; give another model" in done.output
    done = CliRunner().invoke(commands.app, [*words, "--case", str(tmp_path / "nowhere.yaml")])
    assert done.exit_code == 1 and "there is no file" in str(done.exception) and not os.environ[files.CASE_VARIABLE]


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.text(max_size=8), st.sampled_from(["{}", "eight", "of_is", ".."])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
CASES = st.one_of(
    st.fixed_dictionaries({}, optional=dict.fromkeys(facts.CaseEntry.model_fields, VALUES)).map(json.dumps),
    st.fixed_dictionaries(
        {key: st.just(PLAIN[key]) for key in PLAIN}, optional={"large": VALUES, "templates": VALUES}
    ).map(json.dumps),
    st.text(st.sampled_from("abfacts: {}[]&*!|>-'\"\n\t#%@,0.~é\x1b"), max_size=60),
    st.text(max_size=30),
)


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=CASES)
def test_whatever_stands_in_a_case_is_read_or_refused(tmp_path, write, content):
    path = tmp_path / "capitals.yaml"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    before = sorted(tmp_path.iterdir())
    try:
        assert read_case(path).case.controls
    except DataError as error:
        assert "\x1b" not in str(error) and "\n" not in str(error)
    assert sorted(tmp_path.iterdir()) == before
