"""Is a part of the last layer what holds an answer back? Against a forward pass, and where a suppressor was planted."""

import pytest
import torch

from lib.diagnosis import prescribe
from lib.facts import load_cases, load_templates, prompts
from lib.interventions import Part
from lib.recall import first_tokens, trainable
from lib.results import Results
from lib.sites import Site
from lib.studies import cross_validation as study


@pytest.fixture(scope="module")
def tables(organism):
    cases = [trainable(organism, case) for case in load_cases(organism.name)]
    return cases, [study.last_layer(organism, case) for case in cases]


def test_silence_is_what_a_hook_makes_it(organism):
    case = trainable(organism, load_cases(organism.name)[0])
    texts, answers = prompts(case.facts, load_templates()[case.template]), first_tokens(organism, case.facts)
    for layer, head in ((10, 2), (11, 0), (11, None)):
        block, n = organism.module.transformer.h[layer], organism.weights.n_heads

        def silent(module, inputs, head=head, n=n):
            (z,) = (inputs[0].clone(),)
            z[:, -1].view(len(z), *((n, -1) if head is not None else (1, -1)))[:, head or 0] = 0
            return (z,)

        where = block.attn.c_proj if head is not None else block.mlp.c_proj
        handle = where.register_forward_pre_hook(silent)
        tops = [organism.module(torch.tensor([organism.token_ids(t)])).logits[0, -1].argmax() for t in texts]
        handle.remove()
        (told,) = study.told_without(organism, texts, answers, [Part(Site(layer, head))]).values()
        assert told == (torch.stack(tops) == answers).tolist()


def test_the_planted_suppressor_is_found_where_it_was_planted(tables):
    first = tables[1][0].set_index("part")
    assert first.own["L11 H2"] == first.own_n["L11 H2"] > 4 and first.large["L11 H2"] == first.large_n["L11 H2"] > 20
    assert first.own.drop("L11 H2").max() == 0


def test_what_is_said_follows_the_counts(tables, organism):
    cases, found = tables
    report = Results("05_x", organism)
    shown = study.report_last_layer(report, cases[:1], found[:1])
    said = report.values["last_layer_verdict"]
    assert list(shown.part) == ["L11 H2"] and "no head of the last layer" in said and "the layer below 33" in said
    moved = found[0].assign(last=found[0].part.str.startswith("L11"), chosen=found[0].part == "L11 H2")
    report = Results("05_y", organism)
    study.report_last_layer(report, cases[:1], [moved])
    said = report.values["last_layer_verdict"]
    assert "told without L11 H2" in said and "does hold answers back" in said


def test_a_layer_with_few_heads_lends_all_its_others_as_random_ones(organism):
    verdict = prescribe(organism, trainable(organism, load_cases(organism.name)[0]))
    parts = study.parts_of(organism, verdict, 0, controls=50)
    heads = {part.site.head for part in parts["random heads"]}
    assert heads == set(range(organism.weights.n_heads)) - {verdict.knowledge_head.head}
    assert len(parts["random neurons"]) == 50
