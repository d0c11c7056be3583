"""Claims: what is refused, each verdict from results made by hand, and the book's own list."""

import ast
import json
import re
import shutil
from functools import cache
from itertools import product

import nbformat
import pytest
import yaml
from typer.testing import CliRunner

from lib.__main__ import app
from lib.errors import DataError
from lib.files import DATA, ROOT
from lib.press import build, check, claims, execute, texts
from lib.results import results_path
from lib.studies import scoring
from lib.studies.pathways import gpt2_sizes
from tests.press.test_chapters import cells
from tests.press.test_execute import notebook, workshop  # noqa: F401

CHAPTERS = ("01_a", "02_b")
PLAIN = {
    "id": "one",
    "kind": "empirical",
    "says": "it tells 8/8",
    "paper": "8/8",
    "chapter": "01_a",
    "judged_on": "any",
    "found": "{told} of {facts}",
    "must": [{"key": "told", "equals": 8}],
}


def listed(folder, *entries, chapters=CHAPTERS):
    path = folder / "claims.yaml"
    path.write_text(json.dumps({"claims": list(entries)}))  # which is YAML, and repeats what stands twice
    return claims.load(path, chapters=chapters)


def verdict(folder, values, model="s", **changes):
    (claim,) = listed(folder, {**PLAIN, **changes})
    return claims.judge(claim, model, {"01_a": values}, case="first")


# what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"must": []}, r"claim 1 \('one'\): must is empty; give at least one value"),
        ({"paper": ""}, r"claim 1 \('one'\): paper: .*at least 1 character"),
        ({"paper": 8}, r"paper: Input should be a valid string, not 8"),
        ({"must": [{"equals": 8}]}, r"must\.0\.any_of\.0\.key is missing"),
        ({"must": ["told"]}, r"must\.0: .*, not 'told'"),
        ({"must": {"key": "told", "equals": 8}}, r"must: Input should be a valid list"),
        (
            {"must": [{"key": "told"}]},
            r"must\.0\.any_of\.0: a comparison needs a `key` and exactly one of equals, within",
        ),
        ({"must": [{"key": "told", "equal": 8}]}, r"exactly one of equals"),
        ({"must": [{"key": "told", "equals": 8, "above": 1}]}, r"exactly one of equals"),
        ({"must": [{"key": "told", "within": 8}]}, r"`within` takes \[value, tolerance\]"),
        ({"must": [{"key": "told", "at_least": [8, 1]}]}, r"the others one value"),
        ({"must": [{"any_of": []}]}, r"must\.0\.any_of is empty"),
        ({"chapter": "09_z"}, r"claim 1 \('one'\) names the chapter '09_z'; there are 01_a, 02_b"),
        ({"found": "{09_z/told}"}, r"names the chapter '09_z'"),
        ({"must": [{"key": "told", "equals": "$09_z/facts"}]}, r"names the chapter '09_z'"),
        ({"judged_on": "smollm2"}, r"judged_on: Input should be 'any', 'gpt2' or 'shape', not 'smollm2'"),
        ({"kind": "theory"}, r"kind: Input should be 'empirical', 'arithmetic' or 'design', not 'theory'"),
        ({"shuold": [{"key": "told", "equals": 8}]}, r"unknown key 'shuold' \(known: id, kind, says, paper"),
        ({"found": "{told of {facts}"}, r"a text has a brace that closes or opens nothing"),
    ],
)
def test_a_faulty_claim_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        listed(tmp_path, {**PLAIN, **changes})


def test_a_file_without_claims_or_with_one_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"claims\.yaml: two claims have the id 'one'"):
        listed(tmp_path, PLAIN, PLAIN)
    with pytest.raises(DataError, match="has no list `claims`"):
        listed(tmp_path)
    with pytest.raises(DataError, match="there is no file"):
        claims.load(tmp_path / "none.yaml", chapters=CHAPTERS)


# each verdict


def test_a_right_number_is_reproduced_and_of_a_wrong_one_the_reason_says_it(tmp_path):
    found = verdict(tmp_path, {"told": 8, "facts": 8})
    assert (found.verdict, found.found, found.reason) == ("reproduced", "8 of 8", "")
    found = verdict(tmp_path, {"told": 7, "facts": 8})
    assert (found.verdict, found.reason) == ("not reproduced", "told is 7. Wanted: `told` is 8.")
    because = [{"key": "told", "equals": 8, "because": "Only {told} of {facts}."}]
    assert verdict(tmp_path, {"told": 7, "facts": 8}, must=because).reason == "Only 7 of 8."


def test_what_it_should_survive_and_does_not_makes_it_differ(tmp_path):
    should = [{"key": "lost", "equals": 0, "because": "It loses {lost}."}]
    values = {"told": 8, "facts": 8, "lost": 3}
    assert verdict(tmp_path, values, should=should).verdict == "differs"
    assert verdict(tmp_path, values, should=should).reason == "It loses 3."
    assert verdict(tmp_path, values | {"lost": 0}, should=should).verdict == "reproduced"
    broken = verdict(tmp_path, values | {"told": 7}, should=should)
    assert broken.verdict == "not reproduced" and "loses" not in broken.reason


def test_what_fails_where_it_must_hold_cannot_be_told(tmp_path):
    """A positive control: it speaks only where the claim does not hold."""
    control = [{"key": "planted", "equals": 8, "because": "Planted, it is {planted}."}]
    values = {"told": 7, "facts": 8, "planted": 8}
    assert verdict(tmp_path, values, control=control).verdict == "not reproduced"
    blind = verdict(tmp_path, values | {"planted": 2}, control=control)
    assert blind.verdict == "cannot tell" and blind.reason.endswith("Planted, it is 2.")
    assert verdict(tmp_path, values | {"told": 8, "planted": 2}, control=control).verdict == "reproduced"
    assert verdict(tmp_path, {"told": 7, "facts": 8}, control=control).verdict == "not run"


def test_kinds_are_counted_apart(tmp_path):
    entries = [{**PLAIN, "id": kind, "kind": kind} for kind in ("design", "empirical", "arithmetic")]
    judged = [claims.judge(c, "s", {"01_a": {"told": 8, "facts": 8}}) for c in listed(tmp_path, *entries, {**PLAIN})]
    text = claims.counts(judged)
    assert [part.split(":")[0] for part in text.split("; ")] == ["empirical", "arithmetic", "design"]
    assert text.startswith("empirical: 2 reproduced,") and text.count("1 reproduced") == 2


def test_a_missing_result_is_not_run_whatever_else_holds(tmp_path):
    (claim,) = listed(tmp_path, PLAIN)
    found = claims.judge(claim, "s", {})
    assert (found.verdict, found.found) == ("not run", "")
    assert found.reason == "Chapter 1 was not run on s as it stands."
    assert verdict(tmp_path, {"told": 8}).reason == "Chapter 1 gave no `facts`."
    for place in ("must", "should"):
        conditions = [*PLAIN["must"], {"key": "02_b/x", "equals": 1}]
        found = verdict(tmp_path, {"told": 7, "facts": 8}, **{place: conditions})
        assert (found.verdict, found.reason) == ("not run", "Chapter 2 was not run on s as it stands.")
    either = [{"any_of": [{"key": "told", "equals": 8}, {"key": "absent", "equals": 8}]}]
    assert verdict(tmp_path, {"told": 8, "facts": 8}, must=either).verdict == "not run"


def test_what_is_about_gpt2_is_judged_on_gpt2_alone(tmp_path):
    values = {"told": 8, "facts": 8}
    found = verdict(tmp_path, values, judged_on="gpt2")
    assert (found.verdict, found.found) == ("not run", "") and "this build ran s" in found.reason
    assert verdict(tmp_path, values, "gpt2", judged_on="gpt2").verdict == "reproduced"
    assert verdict(tmp_path, {}, "gpt2", judged_on="gpt2").verdict == "not run"
    assert verdict(tmp_path, values, judged_on="shape").verdict == "reproduced"


@pytest.mark.parametrize(
    ("condition", "holds", "fails"),
    [
        ({"equals": "L10 H8"}, ["L10 H8"], ["L10 H9", None]),
        ({"equals": True}, [True], [False]),
        ({"equals": "$facts"}, [8], [7]),
        ({"within": [25.8, 0.05]}, [25.8, 25.84], [25.86, -25.8]),
        ({"at_least": 3}, [3, 3.5], [2.9]),
        ({"at_most": "$facts"}, [8, 0], [9]),
        ({"above": 0}, [0.1], [0]),
        ({"below": 0}, [-0.1], [0]),
        ({"contains": "overridden"}, [["not retrieved", "overridden"]], [["not retrieved"], []]),
    ],
)
def test_every_comparison_by_hand(tmp_path, condition, holds, fails):
    for value in holds + fails:
        wanted = "reproduced" if value in holds else "not reproduced"
        must = [{"key": "x", **condition}]
        found = verdict(tmp_path, {"x": value, "facts": 8}, found="{x}", must=must)
        assert found.verdict == wanted, (condition, value)


@pytest.mark.parametrize(
    ("condition", "value"),
    [
        ({"at_least": 3}, "many"),
        ({"at_least": 1}, True),
        ({"within": [1, 0.1]}, None),
        ({"equals": 8}, "8"),
        ({"equals": True}, 1),
        ({"equals": "yes"}, True),
        ({"contains": "a"}, "abc"),
        ({"below": "$facts"}, [1]),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_claim_and_file(tmp_path, condition, value):
    with pytest.raises(DataError) as error:
        verdict(tmp_path, {"x": value, "facts": 8}, found="-", must=[{"key": "x", **condition}], id="odd")
    message = str(error.value)
    assert message.startswith("claim 'odd': x in") and str(results_path("s", "01_a")) in message
    assert repr(value) in message


def test_a_text_that_cannot_show_its_value_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"claim 'one': the value 'many' .*01_a\.json cannot be written as '\.1f'"):
        verdict(tmp_path, {"told": 8, "x": "many"}, found="{x:.1f}")


def test_keys_reach_into_lists_other_chapters_and_the_first_case(tmp_path):
    must = [{"key": "interval.1", "below": 0}, {"key": "02_b/kind.<case>", "equals": "$kinds.0"}]
    (claim,) = listed(tmp_path, {**PLAIN, "found": "{interval:+.1%}, {02_b/kind.<case>}, {none}, {sure}", "must": must})
    own = {"interval": [-0.02, -0.01], "kinds": ["overridden"], "none": None, "sure": True}
    results = {"01_a": own, "02_b": {"kind": {"first": "overridden", "second": "not retrieved"}}}
    found = claims.judge(claim, "s", results, case="first")
    assert (found.verdict, found.found) == ("reproduced", "-2.0%, -1.0%, overridden, none, yes")
    assert claims.judge(claim, "s", results, case="second").verdict == "not reproduced"
    assert claims.judge(claim, "s", results, case="third").verdict == "not run"


def test_one_of_several_is_enough(tmp_path):
    must = [{"any_of": [{"key": "raw", "within": [25.8, 0.05]}, {"key": "scaled", "within": [25.8, 0.05]}]}]
    values = {"told": 8, "facts": 8, "raw": 25.8, "scaled": 1.0}
    assert verdict(tmp_path, values, must=must).verdict == "reproduced"
    assert verdict(tmp_path, values | {"raw": 1.0}, must=must).verdict == "not reproduced"


# the page and the command


def test_the_page_counts_first_and_escapes_what_it_quotes(tmp_path):
    entries = [PLAIN, {**PLAIN, "id": "two", "says": "a * b_c [x]", "judged_on": "gpt2", "note": "As a note."}]
    judged = [claims.judge(c, "s", {"01_a": {"told": 8, "facts": 8}}) for c in listed(tmp_path, *entries)]
    page = claims.page(judged, "s")
    assert "empirical: 1 reproduced, 0 not reproduced, 0 differ, 0 cannot tell, 1 not run" in page.splitlines()[2]
    assert r"a \* b\_c \[x\]" in page and "*As a note.*" in page
    assert "{bdg-success}`reproduced`" in page and "{bdg-muted}`not run` Needs GPT-2's weights" in page
    assert "s: 8 of 8 ({doc}`chapter 1 <01_a>`)" in page and "*Must*: `told` is 8." in page
    assert list(claims.table(judged, "s")["this build (s)"]) == ["8 of 8", "–"]


RUN_CLAIM = {**PLAIN, "found": "{seed} and {x.y:.2f}", "must": [{"key": "seed", "equals": 0}]}


@pytest.fixture
def small_book(workshop):  # noqa: F811
    path = notebook(workshop, "01_a")
    chapter = nbformat.read(path, 4)
    chapter.cells.insert(0, nbformat.v4.new_markdown_cell("# A chapter"))
    nbformat.write(chapter, path)
    (workshop / "data" / "claims.yaml").write_text(yaml.safe_dump({"claims": [RUN_CLAIM]}))
    return workshop


def test_only_a_run_of_the_present_inputs_counts(small_book):
    assert [j.verdict for j in check.judged("s")] == ["not run"]
    execute.run("s", ["01_a"], say=lambda _: None)
    assert [(j.verdict, j.found) for j in check.judged("s")] == [("reproduced", "0 and 0.50")]
    (small_book / "data" / "claims.yaml").write_text(
        yaml.safe_dump({"claims": [{**RUN_CLAIM, "must": [{"key": "seed", "equals": 1}]}]})
    )
    assert [j.verdict for j in check.judged("s")] == ["not reproduced"], "a new rule needs no new run"
    (small_book / "data" / "new.csv").write_text("changed")
    assert [j.verdict for j in check.judged("s")] == ["not run"], "numbers of other inputs do not count"


@pytest.mark.slow
def test_the_page_is_built_with_the_book_and_follows_results_and_templates(small_book, monkeypatch):
    (small_book / "_config.yml").write_text(
        "title: t\nexecute: {execute_notebooks: 'off'}\nbibtex_bibfiles: [book/references.bib]\n"
        "parse: {myst_enable_extensions: [colon_fence, dollarmath, smartquotes]}\n"
    )
    (small_book / "book" / "references.bib").write_text("@misc{qkv2026decomposition, title={T}, author={A}, year=2026}")
    (small_book / "_toc.yml").write_text(
        "format: jb-book\nroot: book/index\nchapters:\n- file: book/01_a\n- file: book/reproduction\n"
    )
    (small_book / "book" / "index.md").write_text("# A book\n\n```{bibliography}\n```\n")
    execute.run("s", ["01_a"], say=lambda _: None)
    page = build.build("s", say=lambda _: None).parent / "book" / "reproduction.html"
    assert "0 and 0.50" in page.read_text() and "1 reproduced, 0 not reproduced" in page.read_text()
    said: list[str] = []
    build.build("s", say=said.append)
    assert said == ["book: nothing changed, kept"]
    shutil.copytree(texts.TEMPLATES, small_book / "templates")
    (small_book / "templates" / "foot.md").write_text("Another foot.\n")
    monkeypatch.setattr(texts, "TEMPLATES", small_book / "templates")
    chapter = build.build("s", say=said.append).parent / "book" / "01_a.html"
    assert "Another foot." in chapter.read_text() and "built" in said[-1], (
        "a template is part of what a book is made of"
    )
    execute.run("s", ["01_a"], {"seed": 5}, say=lambda _: None)
    build.build("s", say=said.append)
    assert "5 and 0.50" in page.read_text() and "0 reproduced, 1 not reproduced" in page.read_text()


def test_the_command_prints_every_claim(small_book):
    execute.run("s", ["01_a"], say=lambda _: None)
    shown = CliRunner().invoke(app, ["claims", "--model", "s"])
    assert shown.exit_code == 0 and "it tells 8/8" in shown.output
    assert "1 reproduced, 0 not reproduced, 0 differ, 0 cannot tell, 0 not run" in shown.output


# the book's own claims


OWN = claims.load(DATA / "claims.yaml", chapters=execute.chapter_names())
BY_ID = {c.id: c for c in OWN}


def own(name, results, model="smollm2"):
    return claims.judge(BY_ID[name], model, results, case="subject_first")


def test_without_a_run_every_claim_is_not_run():
    for model in ("smollm2", "gpt2", "organism"):
        assert {claims.judge(claim, model, {}).verdict for claim in OWN} == {"not run"}


def texts_in(code: str) -> tuple[set[str], set[str]]:
    """Every text that stands in some code; and every f-string as a pattern: what it fills in may be any word."""
    nodes = list(ast.walk(ast.parse(code)))
    patterns = set()
    for text in (node for node in nodes if isinstance(node, ast.JoinedStr)):
        parts = [part.value if isinstance(part, ast.Constant) else None for part in text.values]
        if max((len(part) for part in parts if part), default=0) > 1:  # else it would match every word
            patterns.add("".join(r"\w+" if part is None else re.escape(part) for part in parts))
    return {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}, patterns


@cache
def texts_of(chapter: str) -> tuple[set[str], set[str]]:
    """Of a chapter's code, and of the library's with its data."""
    code = "\n".join(cells(chapter, "code")).splitlines()
    codes = ["\n".join(line for line in code if not line.startswith(("%", "!")))]
    codes += [path.read_text(encoding="utf-8") for path in (ROOT / "lib").rglob("*.py")]
    texts, patterns = (set().union(*parts) for parts in zip(*map(texts_in, codes), strict=True))
    data = (path.read_text(encoding="utf-8") for path in (ROOT / "lib").rglob("*.yaml"))
    return texts | {key for text in data for key in re.findall(r"^(\w+):", text, re.M)}, patterns


def is_reported(key: str, chapter: str) -> bool:
    """Whether a chapter's code, or the library, has the key as a text: plain, or put together in an f-string."""
    written = (key, key.removesuffix("s"), key.removeprefix("organism_"))  # of all cases, of the planted model
    texts, patterns = texts_of(chapter)
    halves = ((key[: m.start()], key[m.end() :]) for m in re.finditer("_", key))  # of an f-string with two holes
    plain = not texts.isdisjoint(written) or any({*pair} <= texts for pair in halves)
    return plain or any(re.fullmatch(p, name) for p in patterns for name in written)


def test_every_key_is_one_that_its_chapter_reports():
    by_rule = {scoring.key(rule, what) for rule, what in product(scoring.REPORTED, scoring.SHARES)}  # chapter 7
    for claim in OWN:
        for key in claim.keys:
            chapter, _, path = key.partition("/")
            name = path.split(".")[0]
            assert name in by_rule or is_reported(name, chapter), (claim.id, key)
    assert not is_reported("no_such_key", "01_static_diagnostics")


def test_reasons_and_values_are_made_of_results():
    for claim in OWN:
        for text in [claim.found, *(c.because for c in claim.conditions)]:
            assert not re.search(r"\d", re.sub(r"\{[^}]*\}|L\d+ H\d+", "", text)), (claim.id, text)
        assert claim.judged_on == "shape" or all(c.because for c in claim.conditions), claim.id


def test_what_cannot_surprise_is_not_called_empirical():
    kinds = {c.id: c.kind for c in OWN}
    assert all(c.kind == "arithmetic" for c in OWN if c.judged_on == "shape")
    assert [name for name in kinds if kinds[name] == "design"] == [
        "twenty_five_probes",
        "all_heads_classified",
        "captum_n",
        "weights_released",
        "rerun",
    ]


def test_the_query_side_cannot_be_told_while_the_control_fails():
    told = {"facts": 8, "pathways": {p: {"told_after": 6} for p in ("q_only", "k_only", "v_only")}}
    told |= {"spread": {p: {"reached": n, "seeds": 10} for p, n in (("q_only", 0), ("k_only", 0), ("v_only", 10))}}
    planted = {"facts": 8, "q_only": 2, "k_only": 8, "v_only": 2}
    found = own("q_side", {"03_four_pathways": told | {"planted_query": planted}})
    assert found.verdict == "cannot tell" and "tells 2 of 8 as well, and retraining K alone 8" in found.reason
    found = own("q_side", {"03_four_pathways": told | {"planted_query": planted | {"q_only": 8}}})
    assert found.verdict == "not reproduced"


def test_the_numbers_of_gpt2_need_gpt2():
    sites = ("knowledge_head", "knowledge_head_logit", "suppressor", "suppressor_logit", "same_site_l10")
    others = ("capability_numbers", "perplexity_numbers", "patching_number", "weights_released")
    assert {c.id for c in OWN if c.judged_on == "gpt2"} >= {*sites, *others}
    assert {c.id for c in OWN if c.judged_on == "shape"} >= {f"parameters_{p}" for p in ("full", "ffn", "v_only")}


EFFECTS = yaml.safe_load("""
{own_flips: 0, ppl_change: -0.002, bled_before: 6, bled_after: 6, bled_prompts: 143,
 neighbours_lost: 0, neighbours: 13, other_relations: [2, 0], probes_right: 18}
""")


@pytest.mark.parametrize(
    ("change", "wanted", "says"),
    [
        ({}, "reproduced", ""),
        ({"own_flips": 1}, "not reproduced", "changes 1 of"),
        ({"ppl_change": 0.02}, "not reproduced", "by +2.00%"),
        ({"bled_after": 66}, "differs", "of 143 prompts about other countries 66 are now answered"),
        ({"neighbours_lost": 2}, "differs", "2 of 13 untrained countries"),
        ({"probes_right": 0}, "differs", "none could be lost"),
    ],
)
def test_zero_side_effects_means_near_by_as_well(change, wanted, says):
    found = own("zero_side_effects", {"04_side_effects": EFFECTS | change})
    assert found.verdict == wanted and says in found.reason


@pytest.mark.parametrize(
    ("same", "controls", "wanted"),
    [
        (0.9, (0.1, 0.1), "reproduced"),
        (0.21, (0.08, 0.11), "differs"),
        (0.21, (0.3, 0.1), "not reproduced"),
        (0.9, (0.1, 0.9), "not reproduced"),
    ],
)
def test_agreement_counts_only_beyond_its_controls(same, controls, wanted):
    values = {"captum_top1_agreement": same, "captum_n": 2440, "negative_control_agreement": controls[0]}
    results = {"05_cross_validation": values | {"captum_control_same_template": controls[1]}}
    assert own("captum", results).verdict == wanted


@pytest.mark.parametrize(
    ("neuron", "own_neuron", "head", "wanted"),
    [
        ((-0.6, -0.3), 0.0, (-4, -3), "reproduced"),
        ((0.01, 0.04), -0.4, (-4, -3), "reproduced"),
        ((0.01, 0.04), 0.0, (-4, -3), "differs"),
        ((-0.1, 0.1), 0.0, (-1, 1), "not reproduced"),
    ],
)
def test_patching_the_head_may_confirm_what_the_neuron_does_not(neuron, own_neuron, head, wanted):
    values = {"layer": 24, "random_neuron_effect": 0.0, "random_head_effect": -0.1}
    intervals = {"patching": neuron, "own_neuron": (own_neuron - 0.1, own_neuron + 0.1), "head": head}
    for name, interval in intervals.items():
        values |= {f"{name}_effect": sum(interval) / 2, f"{name}_interval": list(interval)}
    assert own("patching", {"05_cross_validation": values}).verdict == wanted


@pytest.mark.parametrize(
    ("known", "repaired", "false", "wanted"),
    [(8, 19, 0, "reproduced"), (7, 19, 0, "not reproduced"), (8, 2, 0, "differs"), (8, 19, 4, "differs")],
)
def test_routing_needs_more_than_eight_of_eight(known, repaired, false, wanted):
    results = {
        "02_knowledge_path": {"known": {"subject_first": known}, "facts": {"subject_first": 8}},
        "03_four_pathways": {"false_pathways": false, "paper_pathways": 4},
        "04_side_effects": {"repaired": repaired, "untold": 19, "repaired_share": repaired / 19},
    }
    found = own("routing_not_absence", results)
    assert found.verdict == wanted
    assert f"repaired of the held-out facts that fail alike: {repaired} of 19" in found.found


def test_the_share_of_v_only_is_half_a_per_cent_and_not_the_pages_two_digits():
    results = {"03_four_pathways": {"gpt2": gpt2_sizes()}}
    assert own("share_v_only", results).verdict == "differs"
    assert "0.47%" in own("share_v_only", results).reason
    for name in ("full", "attention", "ffn", "v_only"):
        assert own(f"parameters_{name}", results).verdict == "reproduced"


def test_the_two_logits_hold_in_any_convention_on_gpt2():
    sizes = {"raw": (25.84, 149.9), "scaled": (2.0, 11.0), "centred": (1.0, 9.0)}
    terms = {c: {"answer": {"L10 H8": a}, "competitor": {"L12 H0": b}} for c, (a, b) in sizes.items()}
    values = {"example": "The capital of France is", "example_answer": "Paris", "example_competitor": "the"}
    values["example_terms"] = terms
    results = {"02_knowledge_path": values}
    assert own("knowledge_head_logit", results, "gpt2").verdict == "differs", "raw alone is no logit of the model"
    assert own("suppressor_logit", results, "gpt2").verdict == "differs"
    terms["raw"]["answer"]["L10 H8"] = 25.9
    assert own("knowledge_head_logit", results, "gpt2").verdict == "not reproduced"
    assert own("knowledge_head_logit", results).verdict == "not run"
    values["example"] = "Germany"
    assert own("suppressor_logit", results, "gpt2").verdict == "not reproduced"


def test_every_expectation_can_fail():
    for path in sorted((ROOT / "data" / "expected").glob("*.json")):
        for chapter, entries in json.loads(path.read_text(encoding="utf-8")).items():
            for key, wanted in entries.items():
                where = f"{path.stem} {chapter} {key}: {wanted}"
                assert wanted.get("min", 0) >= 0 or key.endswith("_effect"), where
                assert wanted.get("min", -1) < wanted.get("max", 10**9), where
                assert {"value", "min", "max"} & set(wanted) and wanted["why"], where
