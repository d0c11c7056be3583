"""Other people's tools against ours: equal where they must be, apart where a control says so; planted truths found."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lib import diagnosis, interventions, peers
from lib.diagnosis import prescribe
from lib.edits import outside_sha256
from lib.errors import DataError
from lib.facts import load_cases, load_templates, prompts
from lib.interventions import Part, ablate
from lib.peers import agreement, attribute_neurons, captum_attributions, ranked
from lib.recall import first_tokens, trainable
from lib.sites import Site
from lib.studies import cross_validation
from lib.trace import capture, hooked, logit_trace
from tests.studies.test_comparisons import Reported

TEXTS = ["The capital of France is", "Once upon a time there was a", "Two plus two equals"]
ANSWERS = torch.tensor([300, 400, 500])


def test_gradients_equal_captums_own(tiny):
    """The same numbers as Captum's LayerGradientXActivation, for every neuron, prompt and layer, in both families."""
    own = captum_attributions(tiny, TEXTS, ANSWERS, [1, 2])
    fast = attribute_neurons(tiny, TEXTS, ANSWERS, [1, 2])
    torch.testing.assert_close(fast.gradient, own, atol=1e-5, rtol=1e-4)
    assert float(own.abs().max()) > 1e-2, "there is something to compare"


def test_neurons_come_in_the_order_of_the_prompts(tiny):
    """Prompts that begin alike are run together, and each gets its own numbers back; so do other tools' batches."""
    texts = [*TEXTS, "The capital of France is Paris and", TEXTS[0]]
    answers = torch.cat((ANSWERS, torch.tensor([600, 700])))
    together, captums = (
        attribute_neurons(tiny, texts, answers, [1, 2]),
        captum_attributions(tiny, texts, answers, [1, 2]),
    )
    for i, text in enumerate(texts):
        alone = attribute_neurons(tiny, [text], answers[i : i + 1], [1, 2])
        torch.testing.assert_close(together.trace[i], alone.trace[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.gradient[i], alone.gradient[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.gradient, captums, atol=1e-5, rtol=1e-4)


def test_neuron_trace_sums_to_the_mlps_term(tiny):
    """Parts sum to the whole: the neurons of a layer, to the MLP's contribution in the exact trace."""
    found = attribute_neurons(tiny, TEXTS, ANSWERS, [1])
    trace = logit_trace(tiny, capture(tiny, TEXTS), ANSWERS[:, None])
    torch.testing.assert_close(found.trace[:, 0].sum(-1), trace.mlps[:, 0, 1], atol=1e-4, rtol=1e-4)


def test_last_layer_gradient_is_the_trace_but_for_the_norm(tiny):
    """After the last layer no detour is left but the norm's own slope: the two must be nearly the same there, and
    farther apart one layer below."""
    found = attribute_neurons(tiny, TEXTS, ANSWERS, [1, 2])
    last, below = (agreement(ranked(found.trace[:, i]), ranked(found.gradient[:, i])).rho.mean() for i in (1, 0))
    assert last > 0.75 and last > below


def test_agreement_by_hand():
    one = torch.tensor([[9.0, 8, 7, 6, 5, 0, 0.1, 0.2], [9, 8, 7, 6, 5, 0, 0.1, 0.2]])
    other = torch.tensor([[9.0, 8, 7, 6, 5, 0, 0.1, 0.2], [5, 0, 0.1, 0.2, 9, 8, 7, 6]])
    assert ranked(one[:1]).tolist() == [[7, 6, 5, 4, 3, 0, 1, 2]]
    found = agreement(ranked(one), ranked(other))
    assert found.top1.tolist() == [True, False]
    assert found.top5.tolist() == [1.0, pytest.approx(2 / 5)]  # neurons 0 and 4
    assert found.rho[0] == pytest.approx(1) and found.rho[1] < 0


def test_the_direct_effect_of_zeroing_a_head_is_minus_its_trace(tiny):
    table = ablate(tiny, TEXTS, ANSWERS, Part(Site(2, 1))).query("way == 'zero'")
    trace = logit_trace(tiny, capture(tiny, TEXTS), ANSWERS[:, None])
    np.testing.assert_allclose(table.direct, -trace.heads[:, 0, 2, 1], atol=1e-4)


def test_another_copy_of_the_same_prompt_takes_nothing_away(tiny):
    same = ablate(tiny, TEXTS[:1] * 2, ANSWERS[:1].expand(2), Part(Site(1), 3)).query("way in ('mean', 'resample')")
    assert same.total.abs().max() < 1e-4


@pytest.mark.parametrize("part", [Part(Site(0, 1)), Part(Site(2, 1)), Part(Site(1), 3), Part(Site(1))], ids=str)
def test_ablation_of_last_tokens_equals_a_whole_forward_pass(tiny, part):
    """Only last tokens are run again; the model's own forward pass, one prompt at a time, with the part put to zero
    at the last position by a hook, gives the same total effect."""
    table = ablate(tiny, TEXTS, ANSWERS, part).query("way == 'zero'").set_index("prompt").total
    block, d = tiny.weights.blocks[part.site.layer], tiny.weights.d_head
    module = block.mlp_out if part.site.head is None else block.heads_out
    columns = slice(part.neuron, part.neuron and part.neuron + 1)
    columns = columns if part.site.head is None else slice(part.site.head * d, (part.site.head + 1) * d)

    def zero(x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).clone()
        flat[-1, columns] = 0
        return flat.view(x.shape)

    for text, answer in zip(TEXTS, ANSWERS, strict=True):
        ids = torch.tensor([tiny.token_ids(text)])
        before = tiny.module(ids).logits[0, -1, answer]
        with hooked(before={module: zero}):
            after = tiny.module(ids).logits[0, -1, answer]
        assert table[text] == pytest.approx(float(after - before), abs=1e-4)
    assert table.abs().max() > 1e-3, "there is something to take away"


@pytest.fixture(scope="module")
def planted(organism):
    case = trainable(organism, load_cases("organism")[0])
    return case, diagnosis.prescribe(organism, case)


def test_the_sweep_finds_the_planted_suppressor(organism, planted):
    """The failing template against a control: of 144 heads, patching the planted suppressor alone brings all back."""
    case, verdict = planted
    swept = cross_validation.patch_case_heads(organism, case)
    first, second = cross_validation.best_heads(swept["last"], 2)
    assert first["head"] == str(verdict.suppressor) == "L11 H2"
    assert first["share"] == pytest.approx(1, abs=0.05) and second["share"] < 0.3
    assert swept["subject"].mean(-1).max() < 0.1, "the country's own position has nothing to give back"


def test_a_sweep_cell_equals_a_plain_patched_run(organism, planted):
    """One cell, by hand: the model's own forward with one head's output replaced at the last position."""
    (case, _), module, width = planted, organism.weights.blocks[10].heads_out, organism.weights.d_head
    fact, head, seen = case.facts[:1], slice(2 * width, 3 * width), list[torch.Tensor]()
    failing, control = (load_templates()[t] for t in (case.template, case.controls[0]))
    cell = cross_validation.patch_heads(organism, fact, failing, control, torch.tensor([5]))["last"][10, 2]
    bad, good = (organism.encode(prompts(fact, t))[0] for t in (failing, control))

    def margin(tokens: torch.Tensor, **hooks: dict) -> float:
        with hooked(**hooks):
            logits = organism.module(tokens).logits[0, -1]
        return float(logits[organism.first_token(fact[0].answer)] - logits[5])

    def patch(z: torch.Tensor) -> torch.Tensor:
        patched = z.clone()
        patched[0, -1, head] = seen[0][0, -1, head]
        return patched

    told, untold = margin(good, before={module: seen.append}), margin(bad)
    back = margin(bad, before={module: patch}) - untold
    assert float(cell[0]) == pytest.approx(back / (told - untold), abs=1e-4)


def test_transformerlens_agrees_on_the_organism(organism, planted):
    found = cross_validation.organism_through_transformerlens()["organism"]
    assert found.logits.max() < 1e-4 and found["heads"].max() < 1e-3 and found.lens.max() < 1e-3
    assert (found.our_head == found.their_head).all() and set(found.our_head) == {"L8 H5"}


def test_the_bridge_shares_the_parameters_and_leaves_them_alone(organism, tiny):
    """Through a run with the bridge as well: bit for bit the same, at the same place, and nothing to be trained."""
    for model in (organism, tiny):
        places = {name: p.data_ptr() for name, p in model.module.named_parameters()}
        before, modules = outside_sha256(model.module, ()), list(model.module.modules())
        lens = peers.bridge(model)
        lens.run_with_cache(torch.tensor([[5, 6, 7]]), prepend_bos=False)
        assert lens.W_E.data_ptr() == model.weights.W_E.data_ptr(), "the embedding is no copy"
        assert outside_sha256(model.module, ()) == before and list(model.module.modules()) == modules
        assert {name: p.data_ptr() for name, p in model.module.named_parameters()} == places
        assert not any(p.requires_grad for p in model.module.parameters())


@pytest.mark.model
def test_transformerlens_agrees_on_smollm2(smollm2):
    case = load_cases("smollm2")[0]
    texts = prompts(case.facts[:2], load_templates()["of_is"])
    answers = torch.tensor([smollm2.first_token(f.answer) for f in case.facts[:2]])
    found = peers.against_transformerlens(smollm2, texts, answers).table
    assert found.logits.max() < 1e-4 and found["heads"].max() < 1e-3


def test_transformerlens_agrees_on_full_size_gpt2(full_gpt2):
    """Both run the same fp32 weights without folding or centring; they sum in another order, and 1e-3 of a logit is
    far above that rounding and far below the smallest contribution that any figure shows."""
    found = peers.against_transformerlens(full_gpt2, ["The capital of France is"] * 2, torch.tensor([11, 262])).table
    assert found.logits.max() < 1e-4 and found["heads"].max() < 1e-3


def test_routing_layer_and_its_chance():
    """A curve that jumps over layer 3 in every prompt; in a random order of layers, one in five would be there."""
    curves = torch.tensor([[0.0, 0.1, 0.2, 0.3, 5.0, 5.1]] * 6)
    assert peers.routing_layer(curves) == 3
    assert cross_validation.routing_chance(curves, 3) < 0.5
    one = cross_validation.routing_chance(curves[:1], 3)
    assert one == pytest.approx(1 / 5, abs=0.05)


def test_agreed_counts_tools_that_answer():
    """Agreed: a. The second differs, the third has one answer, and what only repeats the trace is no witness."""
    rows = [("a?", "yes: 1", "-", "yes: 2", "no"), ("b?", "1", "2", "1", "1"), ("c?", "1", "-", "-", "1")]
    table = pd.DataFrame(rows, columns=["question", *"abc", cross_validation.AGAIN])
    assert cross_validation.agreed(table) == 1


def test_all_heads_at_once_are_single_ablations(organism):
    case = trainable(organism, load_cases("organism")[0])
    texts = prompts(case.facts, load_templates()[case.controls[0]])
    answers = first_tokens(organism, case.facts)
    losses = cross_validation.losses_of_heads(organism, texts, answers)
    for site in (Site(7, 5), Site(0, 3), Site(11, 2)):
        table = ablate(organism, texts, answers, Part(site)).query("way == 'resample'")
        assert float(losses[site.layer, site.head]) == pytest.approx(table.total.mean(), abs=1e-4)


def test_a_planted_suppressor_is_confirmed_and_what_stands_below_it_is_not(organism):
    """A mean over failing prompts cannot take away what they share; the controls' mean of other facts can."""
    cases = load_cases("organism")
    table = cross_validation.suppressors(organism, cases, prescribe(organism, trainable(organism, cases[0])))
    effect = table.assign(part=table.part.str.split(": ").str[1]).set_index(["part", "way"]).total
    assert abs(effect["suppressor L11 H2, the eight", "mean"]) < 1
    assert effect["suppressor L11 H2, large set", "controls"] > 4
    assert abs(effect["control L10 H2, large set", "controls"]) < 0.01
    said = Reported()
    cross_validation.report_suppressors(said, table)
    assert said["suppressor_confirmed"] == "yes" and "and 33 are told; confirmed" in said["suppressor_verdict"]
    low = table.assign(low=table.low.where(table.part.str.contains("eight"), -1.0))
    cross_validation.report_suppressors(said, low)
    assert said["suppressor_confirmed"] == "in part" and "not confirmed" in said["suppressor_verdict"]


def test_suppressors_are_empty_where_there_is_none(organism, planted, monkeypatch):
    none = type("V", (), {"suppressor": None})()
    monkeypatch.setattr(cross_validation, "prescribe", lambda *a: none)
    table = cross_validation.suppressors(organism, load_cases("organism"), none)
    assert table.empty and "nothing to take away" in cross_validation.suppressor_words(table)


def test_captum_equality_can_fail(organism):
    """The sample's rows of what was found for all, and not others."""
    case = trainable(organism, load_cases("organism")[0])
    table = cross_validation.large_prompts(organism, case, templates=1).head(6)
    sample = table.iloc[[4, 0, 3]]
    asked = organism, list(table.prompt), torch.tensor(table.answer_token.to_numpy())
    found = attribute_neurons(*asked, [6, 7])
    assert cross_validation.same_as_captum(organism, sample, found, [7])["largest difference"].max() < 1e-5
    for off in (replace(found, layers=(7, 6)), replace(found, gradient=found.gradient.roll(1, 0))):
        with pytest.raises(DataError, match="differs from Captum's"):
            cross_validation.same_as_captum(organism, sample, off, [7])


def test_each_prompts_own_neuron(tiny):
    """The neuron of each prompt by the trace; zeroing it equals zeroing that neuron by itself."""
    own = interventions.ablate_top_neurons(tiny, TEXTS, ANSWERS, 1)
    trace = attribute_neurons(tiny, TEXTS, ANSWERS, [1]).trace[:, 0]
    assert own.neuron.tolist() == trace.argmax(-1).tolist()
    np.testing.assert_allclose(own.direct, -trace.amax(-1), atol=1e-5)
    for i, text in enumerate(TEXTS):
        alone = ablate(tiny, [text], ANSWERS[i : i + 1], Part(Site(1), int(own.neuron[i]))).query("way == 'zero'")
        assert float(own.total[i]) == pytest.approx(float(alone.total.iloc[0]), abs=1e-4)


def test_a_missing_tool_is_an_error(monkeypatch):
    assert set(peers.require_tools()) == {"captum", "transformer-lens"}
    monkeypatch.setattr(peers, "TOOLS", ("captum", "no-such-tool"))
    with pytest.raises(DataError, match=r"no-such-tool is not installed.*pip install -r requirements\.txt"):
        peers.require_tools()
