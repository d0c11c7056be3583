"""Files of facts as they come: each form is read right, or refused with file, line and remedy."""

import json
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib import files
from lib.errors import DataError
from lib.facts import Fact, OpenFact, load_facts, split_of, with_splits
from lib.inputs import rows, tables

TWO = [("France", "Paris"), ("Germany", "Berlin")]
LAMA = [{"sub_label": s, "obj_label": a, "sub_uri": "Q1", "predicate_id": "P36"} for s, a in TWO]
REWRITES = [
    {"case_id": 1, "requested_rewrite": {"subject": s, "relation_id": r, "target_true": {"str": a, "id": "Q1"}}}
    for s, a, r in [("France", "Paris", "P36"), ("Germany", "Berlin", "P36"), ("Ann", "French", "P103")]
]


@pytest.fixture
def pairs(tmp_path):
    """Write a file of this name and content, and give what is read of it: (subject, answers)."""

    def read(name: str, content: str | bytes, relation: str = "") -> list[tuple[str, ...]]:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [(f.subject, *f.accepted) for f in load_facts(f"{path}{relation}")]

    return read


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "subject,answer\nFrance,Paris\nGermany,Berlin\n"),
        ("a.CSV", "subject,answer\r\nFrance,Paris\r\nGermany,Berlin\r\n"),
        ("a.csv", "subject,answer\rFrance,Paris\rGermany,Berlin"),
        ("a.csv", "\ufeffsubject,answer\nFrance,Paris\nGermany,Berlin\n"),
        ("a.csv", "subject,answer\nFrance,Paris\nGermany,Berlin\n".encode("utf-16")),
        ("a.csv", b"\xfe\xff" + "subject,answer\nFrance,Paris\nGermany,Berlin\n".encode("utf-16-be")),
        ("a.tsv", "subject\tanswer\nFrance\tParis\nGermany\tBerlin\n"),
        ("a.txt", "France\tParis\nGermany\tBerlin\n"),
        ("a.csv", "subject;answer\nFrance;Paris\nGermany;Berlin\n"),
        ("a.csv", "sep=;\nsubject;answer\nFrance;Paris\nGermany;Berlin\n"),
        ("a.csv", "Answer,SUBJECT\nParis,France\nBerlin,Germany\n"),
        ("a.csv", " Answer , Subject \n Paris , France \n Berlin , Germany \n"),
        ("a.csv", "answer,code,subject,note\nParis,FR,France,x\nBerlin,DE,Germany,\n"),
        ("a.csv", "subject,answer,,\nFrance,Paris,,\n,,,\nGermany,Berlin,,,,\n"),
        ("a.csv", "# of 2, from a list\n\nsubject,answer\n#\n#done\nFrance,Paris\n  # more, later\nGermany,Berlin\n"),
        ("a.csv", 'subject,answer\n"France","Paris"\n"Germany", "Berlin"\n'),
        ("a.csv", "subject,answer\nFrance\u00a0,\u200bParis\ufeff\nGermany,Berlin\n"),
        ("a.csv", "country,capital\nFrance,Paris\nGermany,Berlin\n"),
        ("a.csv", "France,Paris\nGermany,Berlin\n"),
        ("a.json", json.dumps(dict(TWO))),
        ("a.json", json.dumps([{"Subject": s, "answer": a, "x": [1]} for s, a in TWO], indent=1)),
        ("a.jsonl", "\n".join(json.dumps({"subject": s, "answer": [a]}) for s, a in TWO)),
        ("P36.jsonl", "\r\n".join(map(json.dumps, LAMA)) + "\n"),
        (
            "known_1000.json",
            json.dumps([{"known_id": 0, "subject": s, "attribute": a, "prediction": "x"} for s, a in TWO]),
        ),
    ],
)
def test_what_is_read_right(pairs, name, content):
    assert pairs(name, content) == TWO


def test_cells_with_commas_and_quotes(pairs):
    content = 'subject,answer\n"Korea, South",Seoul\nUnited States, "Washington, D.C."\n"The ""Rock""",Gibraltar\n'
    expected = [("Korea, South", "Seoul"), ("United States", "Washington, D.C."), ('The "Rock"', "Gibraltar")]
    assert pairs("a.csv", content) == expected


def test_other_scripts_are_read_as_they_are(pairs):
    content = "subject,answer\n프랑스,파리\n日本,东京\nفرنسا,باريس\nIran,\u062a\u0647\u200c\u0631\u0627\u0646\n"
    assert pairs("a.csv", content)[:3] == [("프랑스", "파리"), ("日本", "东京"), ("فرنسا", "باريس")]
    assert pairs("a.csv", content)[3][1].count("\u200c") == 1  # which Persian needs


def test_several_accepted_answers(pairs, tmp_path):
    assert pairs("a.csv", "subject,answer\nSwitzerland,Bern | Berne|Bern\n") == [("Switzerland", "Bern", "Berne")]
    assert pairs("a.json", '[{"subject": "Eire", "answers": ["Dublin", "B.Á.C."]}]') == [("Eire", "Dublin", "B.Á.C.")]
    (fact,) = load_facts(tmp_path / "a.json")
    assert fact == OpenFact("Eire", "Dublin", "", ("B.Á.C.",)) and fact.accepted[0] == fact.answer
    assert Fact("Eire", "Dublin").accepted == ("Dublin",)


def test_public_sets_as_they_are(pairs):
    twice = [*LAMA, {"sub_label": "France", "obj_label": "Lutetia"}]
    with pytest.raises(DataError, match=r"2 relations \(P36 2, none 1\)"):
        pairs("a.jsonl", "\n".join(map(json.dumps, twice)))
    twice[-1]["predicate_id"] = "P36"
    assert pairs("a.jsonl", "\n".join(map(json.dumps, twice))) == [("France", "Paris", "Lutetia"), TWO[1]]
    content = json.dumps(REWRITES)
    assert pairs("counterfact.json", content, "#P36") == TWO
    assert pairs("counterfact.json", content, "#P103") == [("Ann", "French")]
    with pytest.raises(DataError, match=r"holds 2 relations \(P36 2, P103 1\); name one after .*, as in FILE#P36"):
        pairs("counterfact.json", content)
    with pytest.raises(DataError, match=r"holds no relation 'P1'; it holds P36 2, P103 1\."):
        pairs("counterfact.json", content, "#P1")


def test_a_name_with_a_hash_is_a_file_where_there_is_one(pairs):
    assert pairs("a#b.csv", "subject,answer\nFrance,Paris\n") == [("France", "Paris")]


def test_splits_are_optional_and_may_have_their_usual_names(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("split,subject,answer\ntrain,A,b\nValidation,B,b\ntest,C,b\n,France,b\n")
    assert [f.split for f in load_facts(path)] == ["fit", "selection", "held_out", ""]
    assert [f.split for f in with_splits(load_facts(path))] == ["fit", "selection", "held_out", split_of("France")]


def test_the_split_by_hash_is_the_countries_rule():
    table = pd.read_csv(files.DATA / "facts" / "countries.csv", keep_default_na=False).query("split != 'eight'")
    assert len(table) > 200 and [split_of(code) for code in table.code] == table.split.tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("United States,Washington, D.C.\n", r"line 2: ' D\.C\.' may belong to the cell before it; put quotes around"),
        ("United States,Washington,D.C.\n", r"line 2: it has 3 cells, and the header 2; put quotes around a cell"),
        ("France,Paris\n#Spain,Madrid\n", "line 3: it begins with #; put a space after that if it is a comment"),
        ('"France,Paris\nSpain,Madrid\n', r"line 2: its cells cannot be told apart \(unexpected end of data\); close"),
        ('"France"x,Paris\n', "line 2: its cells cannot be told apart .*write a quote within a cell twice"),
        ("France,\n", "line 2: subject 'France' with answer ''; neither may be empty"),
        ("France\n", "line 2: subject 'France' with answer ''; neither may be empty"),
        ("France,Paris|\n", r"line 2: one of the answers of 'Paris\|' is empty; write A\|B for two"),
        ("France,Paris\nFrance ,Paris\n", "'France' stands 2 times; keep one row: line 2 and line 3"),
        ("Cafe\u0301,x\nCaf\u00e9,y\n", r"'Café' stands 2 times; keep one row \(x\|y as its answer, if all are"),
        ("\x1b[31mFrance,Paris\n", r"line 2: '\\x1b\[31mFrance' holds the character '\\x1b', which no name has"),
        ("Fran\u202ece,Paris\n", r"line 2: 'Fran\\u202ece' holds the character '\\u202e'"),
        ("Fran\u200bce,Paris\n", r"holds the character '\\u200b'"),
        ("Bogot\ufffd,x\n", r"holds the character '\\ufffd'"),
    ],
)
def test_rows_that_are_refused(pairs, content, message):
    with pytest.raises(DataError, match=rf"a\.csv.*{message}"):
        pairs("a.csv", f"subject,answer\n{content}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("subject,answer,note\nKorea, South,Seoul\n", "line 2: ' South' may belong to the cell before it"),
        ("subject,answer,split\nBosnia,Herzegovina,Sarajevo\n", "line 2: the split 'sarajevo' is none; write fit, sel"),
        ("code,subject,answer,note\nFrance,Paris,x\n", "line 2: it has 3 cells, and the header 4; write the emp"),
        ("subject,answer,Answer\nA,b,c\n", r"has 2 columns for the answer \(answer, answer\); keep one"),
        ("country,entity,capital\nA,b,c\n", r"has 2 columns for the subject \(country, entity\); keep one"),
        ("a,b,c\nA,b,c\n", "has no column subject and no column answer; it needs subject,answer"),
        ("France\nGermany\n", "has no column subject and no column answer"),
        ("France;Paris,x\nGermany;Berlin,y", "may be separated by commas or semicolons; put a first line"),
        ("subject,answer,relation\nA,b,P1\nB,c,P2\n", "holds 2 relations .*as in FILE#P1"),
        ("\n \n", "is empty; it needs a line subject,answer"),
        ("# nothing\n", "is empty; it needs a line subject,answer"),
    ],
)
def test_tables_that_are_refused(pairs, content, message):
    with pytest.raises(DataError, match=rf"a\.csv.*{message}"):
        pairs("a.csv", content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "subject,answer\nColombia,Bogotá\n".encode("cp1252"), "line 2: it is not UTF-8; as cp1252 it wo"),
        ("a.csv", "subject,answer\n프랑스,파리\n".encode("euc-kr"), "line 2: it is not UTF-8; .*Save the fi"),
        ("a.csv", "subject,answer\nA,b\n".encode("utf-16-le"), "holds zero bytes: it is UTF-16 without its mark"),
        ("a.csv", "subject,answer\nA,b\n".encode("utf-32"), "holds zero bytes|is not the UTF-16"),
        ("a.csv", b"\xff\xfea", "it is not the UTF-16 that it says"),
        ("a.csv", b"PK\x03\x04...", r"is a workbook, not a text; give it the ending \.xlsx"),
        ("a.xlsx", b"PK\x03\x04...", r"is no workbook that can be read \(BadZipFile\); save it as CSV"),
        ("a.pdf", b"%PDF", r"is of no kind that is read; give one of \.csv, \.tsv"),
        ("a.json", "[1,\n2", r"line 2: it is no JSON \(Expecting ',' delimiter\); mend it"),
        ("a.json", '{"a": "b", "a": "c"}', r"it is no JSON \('a' stands 2 times in one object\)"),
        ("a.json", "[" * 10**5, "it is nested too deeply"),
        ("a.json", '"x"', "entry 1: 'x' is no object with subject and answer"),
        ("a.json", '[{"subject": "A", "answer": 3}]', "entry 1: 3 is no text; put it in quotes"),
        ("a.json", '[{"subject": "A"}]', "entry 1, has no column answer; it needs subject,answer"),
        ("a.json", '[{"subject": "A", "answer": []}]', r"entry 1: subject 'A' with answer \[\]; neither may be empty"),
        ("a.json", '{"A": "\\ud800"}', r"holds the character '\\ud800'"),
        ("a.json", '[{"requested_rewrite": {"subject": "A"}}]', "entry 1: its requested_rewrite lacks subject or t"),
        ("a.json", "[]", "holds no fact: add at least one row"),
        ("a.jsonl", '{"subject":"A","answer":"b"}\n{"subject":}\n', r"line 2: it is no JSON \(Expecting value\)"),
        ("a.jsonl", "", "is empty; it needs a line subject,answer"),
    ],
)
def test_files_that_are_refused(pairs, name, content, message):
    with pytest.raises(DataError, match=rf"{name}.*({message})"):
        pairs(name, content)


def test_what_is_not_there_or_too_large_is_refused(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"there is no fact file .*\.\..*mine\.csv; make one with the columns"):
        load_facts("../mine.csv", tmp_path)
    for name in ("a" * 5000 + ".csv", "a\0.csv", str(tmp_path)):
        with pytest.raises(DataError, match=r"there is no fact file|is of no kind"):
            load_facts(name)
    (tmp_path / "a.csv").write_text("subject,answer\nFrance,Paris\n")
    monkeypatch.setattr(rows, "LARGEST", 10)
    with pytest.raises(DataError, match="is larger than 10 bytes"):
        load_facts(tmp_path / "a.csv")


def test_workbooks(tmp_path, monkeypatch):
    """Read by pandas, where openpyxl is there; whether it is does not matter here."""
    path = tmp_path / "a.xlsx"
    with zipfile.ZipFile(path, "w") as parts:
        parts.writestr("x", "0" * 1000)
    sheet = pd.DataFrame([["answer", "subject"], ["Paris", "France"], ["", ""], ["Berlin", "Germany"]])
    monkeypatch.setattr(tables.pd, "read_excel", lambda *_, **options: {"a": sheet, "b": pd.DataFrame()})
    assert [(f.subject, f.answer) for f in load_facts(path)] == TWO
    monkeypatch.setattr(tables.pd, "read_excel", lambda *_, **options: {"a": sheet, "b": sheet})
    with pytest.raises(DataError, match=r"a\.xlsx has 2 sheets \('a', 'b'\); keep one, or save one as CSV"):
        load_facts(path)
    monkeypatch.setattr(tables, "LARGEST", 999)
    with pytest.raises(DataError, match="unpacks to more than 999 bytes"):
        load_facts(path)


def test_a_workbook_without_openpyxl_names_the_package(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w") as parts:
        parts.writestr("x", "")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(DataError, match=r"needs the package openpyxl: `pip install openpyxl`, or save it as CSV"):
        load_facts(tmp_path / "a.xlsx")


def test_pairs_without_a_header_say_that_they_have_none(pairs, caplog):
    caplog.set_level("INFO")
    assert pairs("a.csv", "état,chef-lieu\nFrance,Paris\n")[0] == ("état", "chef-lieu")
    assert "line 1 of the facts names no column: 'état' -> 'chef-lieu' is read as a fact" in caplog.text


HOSTILE = [
    "<script>alert(1)</script>",
    "{{7*7}}",
    "{}",
    "!!python/object:os.system",
    "../../etc/passwd",
    "'; DROP",
    "$(id)",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_looks_like_code_is_text(pairs, text):
    assert pairs("a.json", json.dumps({text: text})) == [(text, text)]
    assert pairs("a.csv", f'subject,answer\n"{text}","{text}"\n') == [(text, text)]


FUZZ: dict = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
PIECES = st.sampled_from(
    [*'",;\t|#\n\r\0 {}[]:\\-*&!', "subject", "answer", "split", "\ufeff", "\x1b", "é", "한", "sub_label"]
)
TEXTS = st.lists(st.one_of(PIECES, st.text(max_size=6)), max_size=30).map("".join)
JSONS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["subject", "answer", "requested_rewrite", "target_true", "str", "x"]), inner),
    ),
    max_leaves=12,
)
CONTENTS = st.one_of(
    TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")),
    TEXTS.map(lambda text: ("subject,answer\n" + text).encode("utf-8", "surrogatepass")),
    TEXTS.map(lambda text: text.encode("utf-16", "surrogatepass")),
    JSONS.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=200),
    st.binary(max_size=50).map(lambda raw: b"PK\x03\x04" + raw),
)


@settings(**FUZZ, max_examples=400)
@given(content=CONTENTS, kind=st.sampled_from([*rows.TABLES, *rows.OBJECTS, *rows.BOOKS]))
def test_whatever_stands_in_a_file_is_read_or_refused(tmp_path, content, kind):
    """No other error than DataError, no empty or unclean cell, and nothing written."""
    path = tmp_path / f"a{kind}"
    path.write_bytes(content)
    before = sorted(tmp_path.iterdir())
    try:
        found = load_facts(path)
    except DataError as error:
        assert str(error).startswith(f"{path}") and str(error).endswith(".") and "\x1b" not in str(error)
    else:
        assert found and len({f.subject for f in found}) == len(found)
        for text in (text for f in found for text in (f.subject, *f.accepted)):
            assert text and text == " ".join(text.split()) and (text.isprintable() or "\x1b" not in text)
    assert sorted(tmp_path.iterdir()) == before and path.read_bytes() == content
    path.unlink()


@settings(**FUZZ, max_examples=100)
@given(cut=st.integers(0, 400), put=st.binary(max_size=3), of=st.sampled_from(["eight", "countries", "organism_eight"]))
def test_a_real_file_with_bytes_changed_is_read_or_refused(tmp_path, cut, put, of):
    raw, path = (files.DATA / "facts" / f"{of}.csv").read_bytes()[:2000], Path(tmp_path / "a.csv")
    path.write_bytes(raw[:cut] + put + raw[cut + 1 :])
    try:
        assert load_facts(path)
    except DataError as error:
        assert str(error).startswith(f"{path}")
