"""What causes a failure: counts by hand, and what chapter 2 says in words about SmolLM2."""

import pandas as pd
import pytest

from lib import diagnosis, edits, sinks, trace
from lib.facts import load_cases, load_templates, prompts
from lib.interventions import run_with_cache
from lib.recall import first_tokens, study_facts, tell, trainable
from lib.sites import Site
from lib.statistics import mean_interval
from lib.studies import causes, cross_validation, upper_bounds
from lib.sweeps import kept_sinks


def test_a_sink_is_told_by_its_peak():
    assert causes.sink({"none": 50.0, "fact": 3.0, "control": 4.0}) == (12.5, "an attention sink")
    assert causes.sink({"none": 39.0, "control": 4.0}) == (9.75, "no attention sink")


def test_prefixes_are_counted_by_hand():
    case = load_cases("smollm2")[0]
    subjects = pd.DataFrame({"case": case.title, "subject": [*"ABC"], "pieces": [1, 1, 2]})
    none = subjects.assign(prefix="none", text="", told=[False, True, False])
    runs = pd.concat([none, subjects.assign(prefix="newline", text="\n", told=[True, True, False])])
    counts = causes.prefix_counts(runs)
    assert counts.told.tolist() == [1, 2] and counts.n.tolist() == [3, 3]
    assert causes.prefix_by_pieces(runs, case)["one token"].tolist() == ["1 of 2", "2 of 2"]
    told = pd.DataFrame({"template": ["of_is", "of_is", "in_is"], "told": [True, True, False]})
    numbers = causes.prefix_numbers(counts, told, case)
    assert (numbers["best_prefix"], numbers["best_prefix_told"], numbers["no_prefix_told"]) == ("newline", 2, 1)
    assert (numbers["best_control"], numbers["best_control_told"]) == (load_templates()["of_is"], 2)


@pytest.fixture(scope="module")
def story(smollm2):
    """The two cases and their evidence on the eight."""
    cases = load_cases("smollm2")
    return cases, [diagnosis.gather(smollm2, c, diagnosis.case_table(smollm2, c)) for c in cases]


@pytest.mark.model
def test_smollm2_writes_little_in_one_case_and_is_overridden_in_the_other(story):
    _, evidence = story
    first, question = (e.verdict() for e in evidence)
    assert first.failure_kind == diagnosis.NOT_RETRIEVED and first.retention < 0.25, "writes little"
    assert question.failure_kind == diagnosis.OVERRIDDEN and 0.3 < question.retention < 0.7, "about half"
    assert question.suppressor == evidence[0].sites[-1], "the last MLP"
    assert set(evidence[1].competitors) == {"\n", "<|im_end|>"}, "a line end or the end of the turn"


@pytest.mark.model
def test_what_repairs_smollm2s_eight_and_what_does_not(smollm2, story):
    (case, question), _ = story
    runs, n = causes.prefix_runs(smollm2, [case, question], large=False), len(case.facts)
    told = runs.groupby(["case", "text"]).told.sum()
    words = {c.name: causes.any_word(smollm2, c, words=12).told for c in (case, question)}
    assert runs[runs.case == case.title].pieces.max() == 1, "the eight are single tokens"
    assert told[case.title, "\n"] == told[case.title, "Fact: "] == n, "a newline or 'Fact:' tells all"
    assert n / 2 < told[case.title, "Well, "] < n, "'Well,' does not"
    assert words[case.name].mean() > 0.75 * n, "random words tell most"
    assert told[case.title, "<|im_start|>"] <= n / 2 < told[case.title, "<|endoftext|>"]
    assert told[question.title].max() == 0 and words[question.name].max() == 0, "no prefix helps"


@pytest.mark.model
def test_smollm2s_eight_stand_in_a_sink_and_longer_names_do_not(smollm2, story):
    (case, _), _ = story
    short = causes.subject_streams(smollm2, case, case.facts, ["none", "bos", "document", "fact"])
    none, chat, document, fact, control = (float(norms.mean(0)[5]) for norms in short.values())
    assert none > 3 * control and chat > 3 * control, "inflated early"
    assert document < 1.5 * control and fact < 1.5 * control, "normal early"
    several = [f for f in study_facts(smollm2, case)[::3] if len(smollm2.token_ids(f.subject)) > 1]
    texts = load_templates()
    asked = {t: texts[t] for t in (case.template, case.controls[0])}
    told = tell(smollm2, several, asked).pivot(index="subject", columns="template", values="told")
    untold = [f for f in several if told[case.controls[0]][f.subject] and not told[case.template][f.subject]]
    long = causes.subject_streams(smollm2, case, untold, ["none", "fact"])
    peaks = [causes.sink(causes.stream_peaks(streams))[0] for streams in (short, long)]
    assert peaks[0] > causes.SINK > 2 > peaks[1], "a sink in the eight, not in the long"
    after = tell(smollm2, several, {case.template: texts[case.template]}, prefix="Fact: ").told
    assert told[case.template].mean() < after.mean() < 0.6, "many of the long still fail"


@pytest.mark.model
def test_smollm2s_knowledge_head_looks_away_from_a_country_at_the_start(smollm2, story):
    (case, _), (first, _) = story
    looks = causes.first_position(smollm2, case, case.facts, first.verdict().knowledge_head).set_index("prompts")
    failing, prefixed, control = looks.own_subject
    assert failing < control / 3, "falls to less than a third"
    assert prefixed > 2 * failing, "a word before the prompt brings it back"


@pytest.mark.model
def test_smollm2s_suppressor_is_confirmed_in_part(smollm2, story):
    (_, question), (_, evidence) = story
    site = evidence.verdict().suppressor
    eight, many = (
        cross_validation.calmed(smollm2, question, facts, [site])[site]
        for facts in (question.facts, study_facts(smollm2, question)[::2])
    )
    low, high = mean_interval(eight.total)[1:]
    assert low < 0 < high, "on the eight the interval includes no gain"
    assert mean_interval(many.total)[1] > 0 and 0 < (many.margin > 0).mean() < 0.6, "a part is told"


def test_attention_to_the_first_position_by_hand(organism):
    """Shares of one, by head; under a prefix another token stands first."""
    case = load_cases("organism")[0]
    looks = causes.first_position(organism, case, case.facts, Site(7, 5))
    assert looks.every.between(0, 1).all() and looks.most.between(0, 1).all()
    run = run_with_cache(organism, prompts(case.facts, load_templates()[case.template]))
    assert looks.every[0] == pytest.approx(float(run.patterns[..., 0].mean()))
    assert (looks.own_first + looks.own_subject <= 1 + 1e-5).all() or looks.token[0] == "the subject's first"


def test_the_cause_of_the_planted_failures_is_no_position_and_no_format(organism):
    """Their causes are weights: no prefix and no end may bring them back."""
    cases = [trainable(organism, c) for c in load_cases("organism")]
    text = load_templates()
    facts = study_facts(organism, cases[0])
    large = tell(organism, facts, {n: text[n] for c in cases for n in (c.template, *c.controls)})
    runs = causes.prefix_runs(organism, cases, large=True, known=large)
    table = causes.found(organism, cases, runs, large)
    assert table.cause.tolist() == ["none found", "none found"] and (table.n > 0).all()


def test_the_rule_of_causes_by_hand(organism, monkeypatch):
    case = trainable(organism, load_cases("organism")[0])
    facts = study_facts(organism, case)[:4]
    monkeypatch.setattr(causes, "study_facts", lambda *_: facts)
    rows = [(f, t, t == case.controls[0]) for f in facts for t in (case.template, *case.controls)]  # known, not told
    large = pd.DataFrame([{"subject": f.subject, "template": t, "told": told} for f, t, told in rows])

    def after(prefixed, ended):
        runs = [(case.title, "newline", f.subject, i < prefixed) for i, f in enumerate(facts)]
        monkeypatch.setattr(causes, "tell", lambda *_: pd.DataFrame({"told": [i < ended for i in range(4)]}))
        return causes.found(organism, [case], pd.DataFrame(runs, columns=["case", "prefix", "subject", "told"]), large)

    told = [(2, 0), (1, 2), (1, 1), (4, 4)]
    assert [after(*x).cause[0] for x in told] == ["first position", "format", "none found", "first position"]


def test_what_a_head_reads_is_what_the_parts_say(organism):
    """By hand for one row each; and a sink that was never trained is the line break that it starts from."""
    case, templates = trainable(organism, load_cases("organism")[0]), load_templates()
    site, facts, case_text = Site(7, 5), case.facts[:4], templates[case.template]
    values = sinks.ordinary(organism, "sink_token")
    about = {"pathway": "sink_token", "layer": 0, "facts": facts, "template": case_text, "seed": 0, "recipe": {}}
    untrained = edits.make(organism, values, told_before=(False,) * 4, **about)
    both = {"sink_kv": kept_sinks.kept(organism)["sink_kv"], "sink_token": untrained}
    table = causes.reading(organism, case, facts, site, both).set_index("context")
    assert ", ".join(table.index[1:]) == "after a line break, with sink kv, with sink token, control template"
    numbers = ["told", "looks", "writes", "low", "high", "others_look", "others_write"]
    pd.testing.assert_series_equal(
        table.loc["with sink token", numbers], table.loc["after a line break", numbers], check_names=False, rtol=1e-4
    )
    assert table.edited.tolist() == [False, False, True, True, False]
    with edits.applied(organism, both["sink_kv"]) as changed:
        assert table.told["with sink kv"] == tell(changed, facts, {"": case_text}).told.sum() > table.told.iloc[0]
    texts = prompts(facts, case_text)
    traced = trace.logit_trace(organism, trace.capture(organism, texts), first_tokens(organism, facts).repeat(4, 1))
    shares = traced.heads[:, :, 7]  # prompt, answer, head
    own = shares.diagonal().T
    relative = own - (shares.sum(1) - own) / 3
    assert table.writes.iloc[0] == pytest.approx(float(relative[:, 5].mean()), abs=1e-4)
    rest = [h for h in range(12) if h != 5]
    assert table.others_write.iloc[0] == pytest.approx(float(relative[:, rest].mean()), abs=1e-4)
    alone = causes.reading(organism, case, facts[:1], site, {})
    assert alone.low.isna().all() and len(alone) == 3


def test_smollm2s_knowledge_head_writes_again_with_a_sink(smollm2):
    """Chapter 8, on selection countries: told by no training on them."""
    case = trainable(smollm2, load_cases("smollm2")[0])
    trained = {f.subject for f in case.facts}
    new = [f for f in upper_bounds.untold_facts(smollm2, case, ("selection",)) if f.subject not in trained]
    table = causes.reading(smollm2, case, new, Site(23, 4), kept_sinks.kept(smollm2)).set_index("context")
    failing = table.loc["failing template"]
    for name in ("with sink kv", "with sink token"):
        assert table.low[name] > failing.high and 2 * table.told[name] > len(new), "more than half, no weight changed"
        assert table.writes[name] - failing.writes > 3 * (table.others_write[name] - failing.others_write)
        assert table.others_look[name] < failing.others_look / 2, "the country is their sink no more"
