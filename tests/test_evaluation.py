"""Side effects: statistics worked out by hand; the protocol against the plainly edited model; controls that show."""

import dataclasses
import hashlib

import numpy as np
import pandas as pd
import pytest
import torch

from lib import evaluation
from lib.edits import applied
from lib.errors import DataError, EditError
from lib.evaluation import NONE, Measured, Protocol
from lib.facts import Case, Fact, load_cases, load_facts
from lib.forward import pack, streams
from lib.recall import study_facts, trainable
from lib.studies import side_effects
from lib.training import slice_values
from tests.conftest import plain_logits
from tests.test_edits import an_edit


def test_repetition_by_hand():
    assert side_effects.repetition([1, 2, 3, 4, 5, 6]) == 0
    assert side_effects.repetition([1, 2, 1, 2, 1, 2, 1]) == pytest.approx(1 - 2 / 4)  # four 4-grams, two different
    assert side_effects.repetition([1, 2]) == 0


def world(told_after: dict[str, bool]) -> Measured:
    """Five countries under a failing and two control templates; `told_after` under the failing one."""
    rows = []
    known = {"A": (1, 0), "B": (0, 1), "C": (0, 0), "D": (1, 1), "E": (1, 0)}
    for name, controls in known.items():
        row = {"set": "large", "item": "", "subject": name, "answer": name.lower()}
        row["split"] = "fit" if name == "E" else "held_out"
        told = {"fail": name == "D", "c1": bool(controls[0]), "c2": bool(controls[1])}
        rows += [row | {"template": t, "told": v, "top": name.lower() if v else "x"} for t, v in told.items()]
    before = pd.DataFrame(rows)
    after = before.copy()
    for name, told in told_after.items():
        after.loc[(after.subject == name) & (after.template == "fail"), "told"] = told
    return Measured({NONE: before, "v_only": after}, {})


CASE = Case("c", "c", (Fact("France", "Paris"),), (), "fail", ("c1", "c2"))


def test_generalisation_counts_known_and_untold_only():
    """Held out: A and B are known and untold, C is not known, D is told already. Making C told repairs nothing."""
    table = evaluation.generalisation(world({"A": True, "C": True, "D": False}), CASE).set_index("split")
    held = table.loc["held_out"]
    assert (held.untold, held.repaired, held["all"], held.told_before, held.told_after) == (2, 1, 4, 1, 2)
    assert held.best_control == 1  # c1 tells A, c2 tells B: no single control tells both
    assert (table.loc["fit"].untold, table.loc["fit"].repaired) == (1, 0)


def test_bleeding_counts_wrong_trained_answers_only(smollm2):
    """Paris said of Peru bleeds; Lima said of Peru does not, nor Paris where Paris is right, nor another wrong word."""
    rows = [("Peru", False, " Paris"), ("Peru", True, " Lima"), ("Gaul", True, " Paris"), ("Chad", False, " the")]
    asked = pd.DataFrame([{"set": "large", "template": "fail", "told": t, "top": w} for _, t, w in rows])
    found = evaluation.bleeding(smollm2, Measured({NONE: asked}, {}), CASE)
    assert found.iloc[0].tolist() == [NONE, 1, 4]


@pytest.fixture(scope="module")
def protocol(organism) -> tuple[Case, Protocol]:
    case = trainable(organism, load_cases("organism")[0])
    table = evaluation.questions(organism, case, more=True)
    return case, evaluation.build_protocol(
        organism, case, 1, texts={"a": evaluation.load_passages()["recipe"][:900]}, table=table
    )


def test_the_protocol_sees_what_the_edited_model_does(organism, protocol):
    """Replayed from the kept stream, without the model being written to, against the model with the edit in place."""
    _, asked = protocol
    edit, loss = an_edit(organism, "v_only"), torch.nn.functional.cross_entropy
    measured = evaluation.measure(organism, asked, {"v_only": edit})
    table = measured.asked["v_only"]
    with applied(organism, edit):
        logits = plain_logits(organism, list(table.prompt))
        windows = [passage.pack.tokens[None] for passage in asked.passages]
        nll = [loss(organism.module(w).logits[0, :-1], w[0, 1:], reduction="none") for w in windows]
    probs = logits.softmax(-1)[torch.arange(len(table)), torch.tensor(table.answer_token.to_numpy())]
    np.testing.assert_allclose(table.prob, probs, atol=1e-5)
    np.testing.assert_allclose(measured.tokens["v_only"].nll, torch.cat(nll), atol=1e-4)
    assert measured.tokens[NONE].kl.max() < 1e-6 < measured.tokens["v_only"].kl.mean()
    assert set(table.set) == {"capability", evaluation.MORE, "unrelated", "relations", "eight", "large"}
    assert (table.set.isin(["capability", "unrelated"])).sum() == 25


def test_summaries_of_a_real_run_hold_together(organism, protocol):
    case, asked = protocol
    measured = evaluation.measure(organism, asked, {"v_only": an_edit(organism, "v_only")})
    outcome, texts = evaluation.outcomes(measured, case), evaluation.perplexity(measured)
    general = evaluation.generalisation(measured, case)
    bled = evaluation.bleeding(organism, measured, case)
    entry = side_effects.pathway_entry("v_only", outcome, texts, general, bled)
    assert bled.prompts.tolist() == [52, 52] and entry["bled_after"] == bled.bled[1]
    ledger = evaluation.flips(measured, "capability", "unrelated")
    assert len(ledger) == entry["flips"]
    assert (outcome.after - outcome.before == outcome.gained - outcome.lost).all()
    every = outcome.set_index("what").loc[evaluation.CAPABILITY]
    assert every.n == entry["every_n"] == 15 + len(evaluation.load_more_probes()) >= 75
    assert (outcome.clusters <= outcome.n).all() and every.clusters == every.n
    assert outcome.set_index("what").clusters["paraphrases"] == len(case.facts)
    assert outcome.query("what == 'neighbours'").eval("before == n").all()
    assert texts.ratio_low[0] <= texts.ratio[0] <= texts.ratio_high[0]
    assert texts.ratio[0] == pytest.approx(texts.ppl_after[0] / texts.ppl_before[0], rel=1e-4)


def test_noise_is_as_large_and_goes_elsewhere(organism):
    edit = an_edit(organism, "v_only")
    control, before = evaluation.noise(organism, edit, seed=1), slice_values(organism, tuple(edit.values))
    for part, value in edit.values.items():
        own, random = value - before[part], control.values[part] - before[part]
        assert random.norm() == pytest.approx(float(own.norm()), rel=1e-4)
        assert abs(float(torch.cosine_similarity(own.flatten(), random.flatten(), 0))) < 0.1


def test_noise_is_asked_as_much_as_is_read_of_it(organism, protocol):
    """Its generalisation and bleeding come out as if it were asked everything."""
    case, asked = protocol
    edits = {name: an_edit(organism, name) for name in ("v_only", "ffn")}
    noise = {name: evaluation.noise(organism, edit, seed=3) for name, edit in edits.items()}
    measured = evaluation.measure(organism, asked, edits, passages=False)
    whole = evaluation.measure(organism, asked, noise, passages=False, beside=measured)
    control = side_effects.noise_control(organism, case, edits, measured, seed=3)
    assert len(control.asked["ffn"]) < len(whole.asked["ffn"]) / 4
    pd.testing.assert_frame_equal(*(evaluation.generalisation(m, case) for m in (whole, control)))
    pd.testing.assert_frame_equal(*(evaluation.bleeding(organism, m, case) for m in (whole, control)))


def test_edits_of_another_layer_are_refused(organism, protocol):
    edit = dataclasses.replace(an_edit(organism, "v_only"), layer=3)
    with pytest.raises(EditError, match="prepared for layer index 1, the edit is of 3"):
        evaluation.score_questions(organism, protocol[1], edit)


def test_generation_equals_one_at_a_time(organism):
    """Left padding must not change what is written."""
    texts = ["The capital of Zorland is", "Zorland"]
    together = side_effects.generate(organism, texts, None, tokens=8)
    assert together == [side_effects.generate(organism, [t], None, tokens=8)[0] for t in texts]
    with pytest.raises(DataError, match="more than the 64"):
        side_effects.generate(organism, texts, None, tokens=80)


def test_edits_side_by_side_write_what_each_writes_alone(organism):
    texts = ["The capital of Zorland is", "Zorland"]
    edits = [None, *(an_edit(organism, name) for name in ("v_only", "full", "ffn"))]
    before = {name: p.clone() for name, p in organism.module.named_parameters()}
    with side_effects.side_by_side(organism, edits):
        together = side_effects.generate(organism, texts * 4, None, tokens=8)
    alone = [side_effects.generate(organism, texts, edit, tokens=8) for edit in edits]
    assert together == [row for rows in alone for row in rows] and alone[0] != alone[2]
    assert all(torch.equal(p, before[name]) for name, p in organism.module.named_parameters())
    assert side_effects.generate(organism, texts, None, tokens=8) == alone[0]


def test_kept_streams_are_the_model_s_wherever_one_begins(tiny, tmp_path, monkeypatch):
    """The second reader goes on from what the first one kept; other texts and other weights are other streams."""
    monkeypatch.setattr(side_effects, "BUILD", tmp_path)
    texts, ran = pack(tiny, [[5, 6, 7], [5, 8]]), []
    own = side_effects.resid_post
    monkeypatch.setattr(side_effects, "resid_post", lambda *a: ran.append(a[-1]) or own(*a))
    for layers, new in (([1], [0]), ([0, 2, 3], [1, 2]), ([1, 3], [])):
        found = side_effects.kept_streams(tiny, texts, layers)
        assert ran == new and list(found) == layers
        for layer, stream in streams(tiny, texts, layers).items():
            torch.testing.assert_close(found[layer], stream)
        ran.clear()
    side_effects.kept_streams(tiny, pack(tiny, [[5, 6, 8], [5, 8]]), [1])
    side_effects.kept_streams(dataclasses.replace(tiny, weights_sha256="1"), texts, [1])
    assert ran == [0, 0] and len(list((tmp_path / "kept").iterdir())) == 3


def test_wikitext_says_what_to_do_without_a_hub(monkeypatch):
    with pytest.raises(DataError, match="wikitext = False"):
        evaluation.load_wikitext()


def test_wikitext_is_checked_and_cut_into_articles(monkeypatch, tmp_path):
    path = tmp_path / "t.parquet"
    lines = ["", " = Robert = \n", " One .\n", " = = Life = = \n", " Two .\n", " = Valkyria = \n", " Three .\n"]
    pd.DataFrame({"text": lines}).to_parquet(path)
    right = hashlib.sha256(path.read_bytes()).hexdigest()

    class Info:
        class lfs:
            sha256 = right

    monkeypatch.setattr(evaluation.HfApi, "get_paths_info", lambda *a, **k: [Info])
    monkeypatch.setattr(evaluation, "hf_hub_download", lambda *a, **k: str(path))
    found = evaluation.load_wikitext()
    assert list(found) == ["Robert", "Valkyria"] and "Two" in found["Robert"]
    Info.lfs.sha256 = "0" * 64
    with pytest.raises(DataError, match="is not what revision"):
        evaluation.load_wikitext()


def test_the_facts_of_the_protocol_are_disjoint(smollm2):
    """Held-out countries: asked about here, and neither among the eight nor in what chapters 1 to 3 look at."""
    case = trainable(smollm2, load_cases("smollm2")[0])
    table = evaluation.questions(smollm2, case)
    held = set(table.query("set == 'large' and split == 'held_out'").subject)
    assert len(held) == 57
    assert not held & {f.subject for f in study_facts(smollm2, case)}
    assert not held & {f.subject for f in load_facts("eight")}


def test_a_planted_failure_is_repaired_for_all_or_for_none(organism):
    """What was planted is known: case 1 is a suppressor, so an edit that mends its route tells every held-out fact,
    and a query cannot mend it."""
    rows = {name: side_effects.planted_edit(organism, case=1, pathway=name) for name in ("full", "q_only")}
    full = rows["full"]
    assert full["told_after"] == full["facts"] and full["repaired"] == full["untold"] > 0
    assert rows["q_only"]["repaired"] == 0 and rows["q_only"]["title"] == load_cases("organism")[0].title
    table = side_effects.planted_control(
        pd.DataFrame([{"case": 1, "pathway": n, "seed": 0, **r} for n, r in rows.items()])
    )
    assert table.case.tolist() == [full["title"]] * 2
    with pytest.raises(EditError, match=r"no case 3: organism has 2, from 1"):
        side_effects.planted_edit(organism, case=3, pathway="full")
