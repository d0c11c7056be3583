"""The real Gemma 3 270M: the paper's own story under the paper's own wording, and the checks that the book rests on."""

from dataclasses import replace

import pytest
import torch

from lib import peers, recall
from lib.evaluation import load_passages
from lib.facts import load_cases, load_templates, prompts
from lib.recall import first_tokens, tell
from lib.trace import CONVENTIONS, capture, logit_lens, logit_traces
from lib.weights import pathway_slices, places
from tests.conftest import plain_logits

pytestmark = pytest.mark.model
PARIS = "The capital of France is"


def test_it_is_what_it_should_be(gemma3):
    w = gemma3.weights
    assert (w.n_layers, w.n_heads, w.n_kv_heads, w.d_model, w.d_head) == (18, 4, 1, 640, 256)
    assert gemma3.token_ids(PARIS) == [2, 818, 5279, 529, 7001, 563] and gemma3.before_texts == "<bos>"
    assert sum(p.numel() for p in places(gemma3.module, pathway_slices(gemma3.module, 12, "v_only"))) == 163_840


def test_it_knows_and_does_not_tell(gemma3):
    case, text = load_cases("gemma3")[0], load_templates()
    told = tell(gemma3, case.facts, {name: text[name] for name in ("of_is", "visited", "form")})
    assert told.groupby("template").told.sum().to_dict() == {"of_is": 1, "visited": 8, "form": 8}
    assert (told[told.template == "of_is"].top == " the").sum() == 7


def test_without_its_beginning_of_text_it_reads_otherwise(gemma3):
    bare = replace(gemma3, bos=())
    assert bare.token_ids(PARIS) == gemma3.token_ids(PARIS)[1:]
    assert not torch.allclose(plain_logits(bare, [PARIS]), plain_logits(gemma3, [PARIS]), atol=0.1)


@pytest.mark.slow
def test_controls_are_what_the_rule_gives(gemma3):
    case = load_cases("gemma3")[0]
    facts = [f for f in recall.scorable(gemma3, case.large) if f.split == "fit"]
    table = tell(gemma3, facts, load_templates())
    assert recall.best_controls(table, case.template, len(case.controls)) == case.controls


def test_the_trace_is_exact_and_the_lens_sees_paris_before_the_end(gemma3):
    case = load_cases("gemma3")[0]
    asked = prompts(case.facts, load_templates()[case.template])
    seen, tokens = capture(gemma3, asked), first_tokens(gemma3, case.facts)[:, None]
    errors = {name: trace.error for name, trace in logit_traces(gemma3, seen, tokens).items()}
    assert list(errors) == list(CONVENTIONS) and max(errors.values()) < 1e-2
    assert max(errors["scaled"], errors["centred"]) < 1e-3  # `raw` sums terms of hundreds, which no norm tames
    _, ranks = logit_lens(gemma3, seen, tokens)
    paris = [layer for layer in range(19) if ranks[0, layer, 0] == 1]
    assert paris == [13, 16, 17]  # as many layers have run; the last one takes it away


def test_transformerlens_agrees(gemma3):
    case = load_cases("gemma3")[0]
    lenses = peers.against_transformerlens(gemma3, [PARIS], first_tokens(gemma3, case.facts[:1]))
    assert lenses.table[["logits", "heads", "lens"]].max(axis=None) < 1e-2
    assert (lenses.table.our_head == lenses.table.their_head).all()


def test_windows_begin_as_texts_do(gemma3):
    windows = gemma3.windows(next(iter(load_passages().values())), 64)
    assert len(windows) > 1 and all(window[0] == gemma3.bos[0] and len(window) <= 64 for window in windows)
