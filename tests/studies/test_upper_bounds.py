"""How far one layer could get: patched streams against worked-out answers, and the sentences of the chapter."""

import pandas as pd
import pytest

from lib import recall
from lib.errors import DataError
from lib.facts import load_cases, load_templates, prompts
from lib.forward import above, logits_by_pack, pack, resid_pre
from lib.recall import study_facts, tell
from lib.studies import knowledge_path, location, repairs, upper_bounds
from lib.trace import subject_positions


@pytest.fixture(scope="module")
def real(smollm2):
    case = load_cases("smollm2")[0]
    return case, [f for f in case.large if f.split == "selection"][:20]


def test_untold_are_known_and_not_told_and_of_the_splits_asked_for(organism, case):
    found = upper_bounds.untold_facts(organism, case)
    assert found and {f.split for f in found} <= set(upper_bounds.SEEN)
    text = load_templates()
    assert not tell(organism, found, {"f": text[case.template]}).told.any()
    known = [tell(organism, found, {c: text[c]}).told.to_numpy() for c in case.controls]
    assert pd.DataFrame(known).any().all()
    with pytest.raises(DataError, match="no fact of nowhere is known"):
        upper_bounds.untold_facts(organism, case, ("nowhere",))


@pytest.mark.parametrize("ask", ["facts", "states", "places"])
def test_what_chapter_2_asked_is_not_asked_again_and_gives_the_same(organism, case, ask, monkeypatch):
    """Beside it only the case's own facts, and held-out countries where these are judged."""
    texts, study = load_templates().values(), {f.subject for f in study_facts(organism, case)}
    again = {text.replace("{}", subject) for text in texts for subject in study}
    location.prepared(organism), knowledge_path.asked_before(organism)
    calls = {
        "facts": lambda: upper_bounds.untold_facts(organism, case),
        "states": lambda: repairs._states.__wrapped__(organism, 1).told_by.to_dict(),
        "places": lambda: location.untold.__wrapped__(organism),
    }
    asked: list[str] = []
    watched = lambda model, prompts, **k: asked.extend(prompts) or logits_by_pack(model, prompts, **k)  # noqa: E731
    monkeypatch.setattr(recall, "logits_by_pack", watched)
    kept = calls[ask]()
    assert again.isdisjoint(asked)
    nothing = pd.DataFrame({"prompt": [], "answer": []})
    for room in (upper_bounds, repairs, location):
        monkeypatch.setattr(room, "asked_before", lambda model: nothing)
    assert calls[ask]() == kept
    assert not again.isdisjoint(asked), "there was something to ask"


@pytest.mark.model
def test_the_whole_stream_of_the_last_position_ends_as_the_prefix_does(smollm2, real):
    """What enters the last layer at the last position decides nearly all; nothing but the own token enters the first
    layer, which is the same in both runs: it brings back nothing."""
    case, facts = real
    last, prefix = smollm2.weights.n_layers - 1, upper_bounds.PREFIX
    table = upper_bounds.carried(smollm2, case, facts, prefix, [0, last]).set_index(["layer", "place"]).told
    text = load_templates()[case.template]
    bare, whole = (int(tell(smollm2, facts, {"f": text}, prefix=p).told.sum()) for p in ("", upper_bounds.PREFIX))
    assert whole >= bare + 3
    assert all(table[1, place] == bare for place in upper_bounds.PLACES)
    assert abs(table[last + 1, "last position"] - whole) <= 1
    assert table[last + 1, "subject's last token"] <= bare + 1


@pytest.mark.model
def test_what_is_carried_is_what_whole_passes_with_the_stream_written_in_say(smollm2, real):
    case, facts = real
    text, facts, layer = load_templates()[case.template], facts[:12], smollm2.weights.n_layers // 2
    bare, full = (prompts(facts, text, x) for x in ("", upper_bounds.PREFIX))
    told = dict.fromkeys(upper_bounds.PLACES, 0)
    for fact, one, other in zip(facts, bare, full, strict=True):
        short, long = (pack(smollm2, [smollm2.token_ids(p)]) for p in (one, other))
        own, theirs = (resid_pre(smollm2, p, layer) for p in (short, long))
        at = subject_positions(smollm2, one, fact.subject)[-1] - len(own)
        for place, spots in zip(upper_bounds.PLACES, ([at], [-1], [at, -1]), strict=True):
            patched = own.clone()
            patched[spots] = theirs[spots]
            logits = above(smollm2, short, layer, patched)[-1] @ smollm2.weights.W_U
            told[place] += int(logits.argmax()) == smollm2.first_token(fact.answer)
    found = upper_bounds.carried(smollm2, case, facts, upper_bounds.PREFIX, [layer]).set_index("place").told
    assert found.to_dict() == told and len(set(told.values())) > 1


def test_a_prefix_that_cuts_the_prompt_anew_is_refused(smollm2, real):
    case, facts = real
    for prefix in ("Answer: ", ""):  # the space of the first joins the name
        with pytest.raises(DataError, match="is cut into other tokens"):
            upper_bounds.carried(smollm2, case, facts[:3], prefix, [0])
