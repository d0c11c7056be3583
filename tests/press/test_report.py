"""The page on one's own facts: complete in itself, true to what was found, and whatever a user gives is text in it."""

import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest

import lib
from lib import __main__ as command
from lib.checkpoints.named import SPECS
from lib.errors import ChapterError, DataError, EditError
from lib.facts import Fact, load_cases, load_facts, load_templates
from lib.files import BUILD
from lib.press import report
from lib.press.texts import entries, rendered
from lib.show import tables
from lib.show.sentences import say

TEMPLATE, CONTROL = "{}'s capital city is", "The capital city of {} is"
HOSTILE = "<script>alert(1)</script>{{ 7 * 7 }}{% raw %}&'\"$x_1$"


@pytest.fixture(scope="module")
def own(organism):
    return lib.diagnose(organism, "organism_countries", TEMPLATE, [CONTROL])


class Tags(HTMLParser):
    """Every element, and every address that it names; unclosed ones stay on the stack."""

    def __init__(self):
        super().__init__()
        self.open, self.names, self.addresses = [], set(), []

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    return tags


def test_the_page_is_one_file_without_script_or_network(own, tmp_path):
    page = own.report(tmp_path / "a.html").read_text(encoding="utf-8")
    tags = parsed(page)
    assert "script" not in tags.names and "link" not in tags.names
    assert len(tags.addresses) == 2 and all(a.startswith("data:image/svg+xml;base64,") for a in tags.addresses)
    assert "http:" not in re.sub(r"base64,[\w+/=]+", "", page) and page == own.page()


def test_the_page_says_what_was_found(own):
    page, found = own.page(), own.findings
    for text in (str(found.verdict.knowledge_head), found.verdict.failure_kind, found.cause.name, "What to conclude"):
        assert text in page
    assert f"It tells {found.count('told')} of {len(found.states)} (" in page and "Two prescriptions" in page
    for score in report.planted_scores(found.model):
        assert f"<td>{score['n']}</td><td>{score['share']:.0%} (" in page


def test_the_scores_are_chapter_7s(organism):
    from lib import sweeps
    from lib.studies import scoring
    from lib.sweeps.record import read
    from lib.sweeps.runs import frame

    runs = frame(read(sweeps.load("plants", model_name="organism")).rows)
    row = scoring.summarise(runs).set_index("rule").loc["chapter 2"]
    mine = next(s for s in report.planted_scores(organism) if s["model"] == "organism" and "chapter 2" in s["rule"])
    assert (mine["n"], mine["share"]) == (row.n, row["kind and site"]) and mine["low"] <= mine["share"] <= mine["high"]


def test_a_repair_stands_in_the_page_and_its_edit_can_be_asked_again(own, organism, tmp_path):
    from lib import edits

    repaired = own.repair("full")
    try:
        lines, page = own.write(tmp_path / "a.html", tmp_path / "a.json"), own.page()
    finally:
        own.repaired = None
    counts = repaired.counts
    assert f"{counts['repaired']} of {counts['untold']} held-out facts" in page and "hash of the subject" in page
    assert len(repaired.effects) >= 3 and all(f"<td>{what}</td>" in page for what in repaired.effects.what)
    edit = edits.load(tmp_path / "a-full.safetensors")
    assert edits.verify(organism, edit)["as recorded"].all() and any("verify" in line for line in lines)
    assert json.loads((tmp_path / "a.json").read_text())["repair"]["repaired"] == counts["repaired"]


def test_whatever_a_user_gives_is_text(organism, own, monkeypatch):
    facts = [Fact(f.subject, f.answer) for f in load_facts("organism_countries")[:30]]
    found = lib.diagnose(organism, [*facts, Fact(HOSTILE, facts[0].answer + "x")], TEMPLATE, ["<b>$x$ of {} is"])
    found.facts_name = f"\x1b[31m{HOSTILE}\u202e"
    for page in (found.page(), found._repr_html_()):
        parsed(page)
        assert "<script" not in page and "<b>" not in page and "49" not in re.findall(r"raw %\}.{9}", page)
        assert "\x1b" not in page and "\u202e" not in page
    assert (
        "\\x1b[31m&lt;script&gt;alert(1)&lt;/script&gt;{{ 7 * 7 }}{% raw %}&amp;&#39;&#34;$x_1$\\u202e" in found.page()
    )


def test_a_page_where_nothing_fails_or_nothing_is_known(organism):
    told = lib.diagnose(organism, "organism_countries", CONTROL, [TEMPLATE])
    nothing = lib.diagnose(organism, "organism_countries", "{} was", ["{} or"])
    for found, words in ((told, "every fact that is known is told"), (nothing, "no fact is known under any control")):
        page = found.page()
        assert words in page and "Two prescriptions" not in page and len(parsed(page).addresses) == 1
        with pytest.raises(EditError, match="nothing to repair"):
            found.repair("v_only")
        numbers = found.numbers()
        box = rendered(entries("boxes.yaml")["10_your_model"]["answer"], v={**numbers, "facts_file": "x"})
        assert "No place is named" in box and words in box and words in numbers["repair"]


def test_facts_may_be_pairs_or_a_dictionary(organism):
    pairs = [(f.subject, f.answer) for f in load_facts("organism_eight")]
    first, second = (lib.diagnose(organism, given, TEMPLATE, [CONTROL]) for given in (pairs, dict(pairs)))
    assert str(first) == str(second) == repr(first) and "known, not told" in str(first)
    for given, message in ((3, "pairs of two texts"), ([("a",)], "pairs of two texts"), ([], "at least one pair")):
        with pytest.raises(DataError, match=message):
            lib.diagnose(organism, given, TEMPLATE, [CONTROL])
    with pytest.raises(DataError, match="put this one in brackets"):
        lib.diagnose(organism, pairs, TEMPLATE, CONTROL)


def run(monkeypatch, capsys, *words: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["lib", "diagnose", *words])
    with pytest.raises(SystemExit) as done:
        command.main()
    said = capsys.readouterr()
    return int(done.value.code or 0), said.out + said.err


def test_the_command_writes_report_and_json(monkeypatch, capsys, tmp_path):
    page, found = tmp_path / "r.html", tmp_path / "r.json"
    words = ["--model", "organism", "--facts", "organism_eight", "--template", TEMPLATE, "--control", CONTROL]
    code, said = run(monkeypatch, capsys, *words, "--output", str(page), "--json", str(found))
    assert code == 0 and f"report: {page}" in said and "known, not told" in said and "facts are asked under" in said
    assert parsed(page.read_text()) and json.loads(found.read_text())["model"] == "organism"


def test_the_command_takes_a_case(monkeypatch, capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        f"facts: organism_eight\nlarge: organism_countries\ntemplate: '{TEMPLATE.replace(chr(39), chr(39) * 2)}'\n"
        f"controls: ['{CONTROL}']\n"
    )
    words = ["--model", "organism", "--case", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "r.html")]
    code, said = run(monkeypatch, capsys, *words)
    assert code == 0 and "known, not told" in said and "mine.yaml on organism" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--facts", "no/such.csv", "--template", "{} is"], 1, "there is no fact file no/such.csv"),
        (["--facts", "eight"], 2, "needs --facts and --template, or --case"),
        (["--facts", "eight", "--template", "{} is", "--repair", "all"], 1, "unknown pathway 'all'; choose from full"),
        (["--facts", "eight", "--template", "{} is", "-o", "a.safetensors"], 1, "give one that ends in .html"),
        (["--facts", "eight", "--template", "{} is", "--model", "no-such"], 1, "no-such"),
        (["--facts", "eight", "--template", "It is"], 1, "the template: 'It is' has 0 holes"),
        (["--facts", "eight", "--template", "\x1b[31m{}"], 1, "holds the control character"),
    ],
)
def test_what_the_command_refuses(monkeypatch, capsys, words, code, message):
    found, said = run(monkeypatch, capsys, *(words if "--model" in words else [*words, "--model", "organism"]))
    assert (
        found == code
        and message in said
        and "Traceback" not in said
        and "\x1b[31m" not in said.replace("\x1b[31merr", "")
    )


def test_nothing_is_written_where_nothing_can_be(own, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*Give a folder that you may write to"):
        own.report(tmp_path / "file" / "a.html")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert str(BUILD) in own.write()[0] and load_cases("organism") and load_templates()


def test_what_chapter_10_reported_of_other_facts_is_one_table(tmp_path, monkeypatch):
    """Two runs by hand: one that was repaired, and one with nothing to diagnose; and one of other weights."""
    monkeypatch.setattr(report.record, "FOLDER", tmp_path)
    assert report.relations().empty
    (tmp_path / "gemma3" / "relations").mkdir(parents=True)
    provenance = {"model": "gemma3", "weights_sha256": SPECS["gemma3"].sha256, "lib": "0", "seed": 0}
    provenance |= {"commit": "012345678"}
    about = {"model": "gemma3", "template": "…: ", "told": 3, "known": 9, "facts": 20, "pathway": "v_only"}
    found = {"knowledge_head": "L1 H2", "failure_kind": "overridden", "cause": "format", "repaired": 2, "held_out": 4}
    for name, values in {"a": about | found, "b": about}.items():
        run = {"provenance": provenance, "values": values | {"facts_file": name}}
        (tmp_path / "gemma3" / "relations" / f"{name}.json").write_text(json.dumps(run))
    table = tables.arranged("relations", report.relations())
    assert table.index.tolist() == ["gemma3: a", "gemma3: b"]
    assert table["repaired, held out"].tolist() == ["2 of 4", "–"] and table["cause"].tolist() == ["format", "–"]
    assert set(table["told, known, of"]) == {"3, 9, 20"} and set(table["kept at"]) == {"0123456"}
    pairs = [("x", "sink_kv", 5), ("x", "v_only", 3), ("y", "sink_kv", 1), ("y", "v_only", 4), ("z", "v_only", 2)]
    kept = pd.DataFrame(pairs, columns=["facts_file", "pathway", "repaired"]).assign(model="m")
    assert "than v_only on 1 of 2 relations, and fewer on 1." in say("own", "relations", t=kept)
    run = run | {"provenance": provenance | {"weights_sha256": "0" * 64}}
    (tmp_path / "gemma3" / "relations" / "b.json").write_text(json.dumps(run))
    with pytest.raises(ChapterError, match=r"b\.json was made by gemma3"):
        report.relations()
