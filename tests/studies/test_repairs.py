"""Edits of the place and of the cause: what is asked, what is trained, what the rule chooses, and what is said."""

import pandas as pd
import pytest
import torch

from lib.edits import outside_sha256
from lib.errors import EditError
from lib.facts import load_cases, load_templates
from lib.recall import tell
from lib.show import tables
from lib.studies import carrying_over, mended_routes, repairs
from lib.studies.repairs import _asked, _case, fitted, lesson, repair_at
from tests.studies.test_comparisons import Reported

QUICK = {"case": 1, "rate": 3e-3, "steps": 2}


def test_choosing_asks_no_held_out_country_and_judging_asks_them_all(organism):
    chosen, judged = (_asked(organism, 1, look).questions for look in ("selection", "held_out"))
    assert "held_out" not in set(chosen.split) and "held_out" in set(judged[judged.untold].split)
    case = _case(organism, 1)
    held = {f.subject for f in case.large if f.split == "held_out"}
    assert not held & set(chosen.subject)
    assert not held & {f.subject for name in repairs.LESSONS for f in lesson(organism, 1, name)}


def test_with_no_step_a_sink_is_the_line_break(organism):
    edit, _ = fitted(organism, 1, "sink_token", rate=1e-3, steps=0)
    case = _case(organism, 1)
    text = load_templates()[case.template]
    assert list(edit.told_after) == tell(organism, case.facts, {"": text}, prefix="\n").told.tolist()
    rows = [repair_at(organism, **QUICK | {"steps": 0}, pathway=name) for name in ("sink_token", "sink_kv")]
    parts = [{k: v for k, v in row.items() if isinstance(v, int) and k != "parameters"} for row in rows]
    assert parts[0] == parts[1], "both start as the same prefix"


@pytest.mark.parametrize(
    ("pathway", "variant"),
    [("sink_kv", "true"), ("sink_token", "true"), ("sink_token", "in the middle"), ("v_only", "true")],
)
def test_a_run_gives_the_same_again_and_leaves_the_model_as_it_was(organism, pathway, variant):
    before = outside_sha256(organism.module, ())
    first, again = (repair_at(organism, **QUICK, pathway=pathway, variant=variant, seed=3) for _ in range(2))
    assert first == again and outside_sha256(organism.module, ()) == before
    assert first["facts_n"] == 8 and len(first["changes"]) == 7


def test_only_a_row_stands_in_the_middle(organism):
    for pathway in ("v_only", "sink_kv"):
        with pytest.raises(EditError, match=f"'in the middle' of {pathway}"):
            repair_at(organism, **QUICK, pathway=pathway, variant="in the middle")


def test_lessons_are_the_eight_these_and_more_and_the_known_fit_countries(organism):
    eight, sixteen, fit = (lesson(organism, 1, name) for name in repairs.LESSONS)
    assert eight == _case(organism, 1).facts and sixteen[:8] == eight and set(sixteen[8:]) <= set(fit)
    assert {f.split for f in fit} == {"fit"}
    parts = repairs._parts(fit, torch.Generator().manual_seed(0))
    assert {f for part in parts for f in part} == set(fit) and {len(part) for part in parts} == {8}


def test_one_layer_alone_is_trained(organism):
    edit, learned = fitted(organism, 1, "sink_kv", rate=1e-2, steps=2, variant="one layer")
    assert learned["lesson_n"] == 8 and 0 <= learned["learned"] <= 8
    values = edit.values
    start = repairs._start(organism, repairs._task(organism, 1, True), "sink_kv", "true", torch.Generator())
    for part, value in values.items():
        assert int((value != start[part]).flatten(1).any(1).sum()) == 1


def test_other_words_are_refused(organism):
    for wrong in ({"facts": "nine"}, {"variant": "half"}, {"look": "all"}, {"case": 9}):
        with pytest.raises(EditError):
            repair_at(organism, **QUICK | {"pathway": "sink_kv"} | wrong)


def run(**row):
    """A row of a finished sweep."""
    counts = {f"{kind}_{what}": 10 for kind in ("capability", "working") for what in ("before", "told")}
    lost = {"capability_lost": 0, "working_lost": 0, "relations_told": 30, "relations_before": 20, "relations_n": 56}
    usual = {"case": 1, "pathway": "sink_kv", "rate": 0.01, "steps": 60, "facts": "eight", "variant": "true", "seed": 0}
    size = {
        "parameters": 11520,
        "facts_n": 8,
        "facts_told": 8,
        "told": 8,
        "learned": 8,
        "lesson_n": 8,
        "untold": 16,
        "repaired": 8,
    }
    text = {"ratio": 1.0, "ratio_start": 0.7, "ratio_later": 1.0, "log_probability": -1.0}
    return usual | size | counts | lost | text | {"bled": 3, "bled_n": 80, "bled_before": 1} | row


def test_the_rule_by_hand():
    runs = pd.DataFrame(
        [
            run(rate=1.0, repaired=16, capability_told=9),  # a probe is lost
            run(rate=2.0, repaired=15, ratio_later=1.02),  # perplexity rises
            run(rate=3.0, repaired=9, ratio_later=0.9, log_probability=-2.0),  # that it falls is no harm
            run(rate=4.0, repaired=9, log_probability=-1.5),  # as many, and likelier
            run(rate=5.0, repaired=8),
            run(rate=6.0, repaired=16, steps=0),  # nothing was trained
            run(rate=7.0, pathway="full", repaired=2, working_told=9),  # none harmless: the best of all
            run(rate=8.0, pathway="full", repaired=1, working_told=9),
        ]
    )
    best = carrying_over.chosen(runs).set_index("pathway")
    assert best.rate.to_dict() == {"sink_kv": 4.0, "full": 7.0}
    assert carrying_over.frontier(runs).query("chosen").rate.tolist() == [4.0, 7.0]


def test_the_pathway_that_is_compared_is_not_chosen_by_what_is_shown():
    """Selection countries choose it: of equals, the likelier answers; held-out countries are only counted."""
    seen = [
        run(repaired=5),
        run(pathway="sink_token", repaired=5, log_probability=-0.5),
        run(pathway="full", repaired=1),
    ]
    held = [run(repaired=15), run(pathway="sink_token", repaired=9), run(pathway="full", repaired=2)]
    held += [run(pathway="v_only", repaired=12)]  # which was not tried on selection countries
    table, seen = carrying_over.judged(pd.DataFrame(held)), pd.DataFrame(seen)
    assert carrying_over.best_of(table, seen, 1, "cause", "eight").pathway == "sink_token"
    assert carrying_over.best_of(table, seen, 1, "place", "eight").pathway == "full"


def test_the_verdict_by_hand():
    runs = [run(seed=s, repaired=r) for s, r in enumerate((9, 12, 10))]
    runs += [run(pathway="v_only", parameters=110_592, repaired=1, bled=33), run(steps=0, repaired=9, parameters=576)]
    runs += [run(facts="fit", repaired=13, lesson_n=40), run(variant="false", repaired=0, learned=7)]
    runs += [run(variant="one layer", repaired=r, seed=s) for s, r in enumerate((11, 10, 15))]
    runs += [run(variant="in the middle", repaired=r, seed=s) for s, r in enumerate((4, 0))]
    table = carrying_over.judged(pd.DataFrame(runs))
    row = table.set_index(["pathway", "facts"]).loc["sink_kv", "eight"]
    assert (row.repaired, row.least, row.most, row.middle, row.seeds) == (pytest.approx(31 / 3), 9, 12, 10, 3)
    assert table.pathway.tolist() == ["newline", "sink_kv", "sink_kv", "v_only"]
    report = Reported()
    carrying_over.report_judged(report, table, pd.DataFrame(runs), ["subject first"])
    said = report
    assert said["goal_eight"] and said["goal_fit"] and "is reached" in said["goals"]
    assert (
        "makes 10.3 told (9 to 12 over 3 seeds" in said["verdict"] and "at least 33 with V-only" in said["cost_verdict"]
    )
    carrying_over.report_variants(report, carrying_over.variants(pd.DataFrame(runs)))
    assert "Of the false answers sink kv learns 7 of 8, and repairs" in report["variants_verdict"]
    assert "repaired all the same, beside 9 with all layers trained" in report["variants_verdict"]
    assert (
        "repairs 0 to 4 held-out countries; before every text it repairs 9 to 12: so many" in report["middle_verdict"]
    )
    controls = tables.arranged("variants", carrying_over.variants(pd.DataFrame(runs)).assign(case_title="c"))
    ranges = dict(zip(controls.control, controls["held-out repaired, least to most"], strict=True))
    assert ranges["a token in the middle"] == "0 to 4 of 16" and ranges["one random layer"] == "10 to 15 of 16"
    shown = tables.arranged("judged", table.assign(case_title="c"))
    assert shown["trained facts told"].tolist() == ["8 of 8", "8 of 8", "8 of 40", "8 of 8"]


def test_planted_routes_are_counted(organism):
    before = outside_sha256(organism.module, ())
    rows = [mended_routes.mended(organism, seed=seed) for seed in (1000, 1001)]
    assert rows == [mended_routes.mended(organism, seed=seed) for seed in (1000, 1001)]
    assert outside_sha256(organism.module, ()) == before
    assert rows[0]["used"] and rows[0]["full trained told"] == rows[0]["trained"], "at its site a fault can be mended"
    assert rows[0]["trained"] + rows[0]["held"] >= 4 and rows[0]["drawn"] != rows[0]["layer"]
    report = Reported()
    table = carrying_over.report_mended(report, pd.DataFrame(rows))
    assert table.trained_n.unique().tolist() == [sum(r.get("trained", 0) for r in rows)]
    assert len(load_cases("organism")) == 2
