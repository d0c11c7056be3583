"""Known answers: a full-size GPT-2 with random weights, its own answers recorded straight from Hugging Face, and every
wrong convention caught. GPT-2's own figures need its weights; here the file of them is read, and fails as it should."""

import dataclasses
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lib.checkpoints.named import SPECS
from lib.errors import BookError, DataError, ModelError
from lib.press import execute
from lib.studies import known_answers
from lib.studies.known_answers import Answer, check, load_answers, require
from tests.conftest import tiny_gpt2, wrap

BOS = 50256
IDS = (464, 3139, 286, 4881, 318)  # The capital of France is


@pytest.fixture(scope="session")
def random_gpt2(smollm2):
    torch.manual_seed(0)
    return wrap(GPT2LMHeadModel(GPT2Config()), smollm2.tokenizer)


@torch.no_grad()
def direct(model, ids) -> torch.Tensor:
    """Log-probabilities by position from a plain forward pass, written without the module under test."""
    logits = model.module(input_ids=torch.tensor([ids])).logits[0]
    return logits - logits.exp().sum(-1, keepdim=True).log()


@pytest.fixture(scope="session")
def recorded(random_gpt2) -> dict[str, Answer]:
    """The random model's own answers, with and without the token before the text."""
    out, model = {}, random_gpt2
    for name, bos in (("with", BOS), ("without", None)):
        ids = [*([] if bos is None else [bos]), *IDS]
        logp = direct(model, ids)
        each = [float(logp[i, ids[i + 1]]) for i in range(len(ids) - 1)]
        top = logp[-1].exp().topk(3)
        with torch.no_grad():
            text = model.module.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=BOS)
        figures = {
            "logprobs": each,
            "loss": -sum(each) / len(each),
            "greedy": text[0, len(ids) :].tolist(),
            "top": [[int(t), float(p)] for p, t in zip(*top, strict=True)],
        }
        for kind, expected in figures.items():
            out[f"{kind} {name}"] = Answer(f"{kind} {name}", kind, "here", expected, 1e-4, bos, IDS)
        pair = (262, 6342)
        expected = float(logp[-1, pair[0]] - logp[-1, pair[1]])
        out[f"difference {name}"] = Answer("d", "difference", "here", expected, 1e-4, bos, IDS, tokens=pair)
    return out


def holds(model, *answers) -> list[bool]:
    return check(model, answers).holds.tolist()


def holds_with(model, answer, **changes) -> list[bool]:
    return holds(model, dataclasses.replace(answer, **changes))


def test_its_own_answers_hold_in_both_conventions(random_gpt2, recorded):
    table = check(random_gpt2, list(recorded.values()))
    assert list(table.columns) == ["what", "convention", "source", "expected", "found", "tolerance", "holds"]
    assert table.holds.all(), table[~table.holds]
    require(random_gpt2, list(recorded.values()))


def test_the_token_before_the_text_left_out_or_added_is_caught(random_gpt2, recorded):
    for name, answer in recorded.items():
        swapped = dataclasses.replace(answer, bos=None if answer.bos else BOS)
        if answer.kind == "logprobs":  # as many as are asked for: with BOS, the first token has one too
            first = recorded["logprobs with"].expected[0]
            expected = answer.expected[1:] if answer.bos else [first, *answer.expected]
            swapped = dataclasses.replace(swapped, expected=expected)
        if answer.kind != "greedy":  # a random model may well say the same with and without
            assert holds(random_gpt2, swapped) == [False], name


def test_a_missing_value_is_not_taken_for_agreement(random_gpt2, recorded):
    answer = recorded["logprobs with"]
    for expected in (answer.expected[:-1], [*answer.expected[:-1], math.nan]):
        assert holds_with(random_gpt2, answer, expected=expected) == [False]


def test_off_by_one_position_is_caught(random_gpt2, recorded):
    """p(token t) read from position t instead of t - 1."""
    ids = [BOS, *IDS]
    logp = direct(random_gpt2, ids)
    shifted = [float(logp[i, ids[i]]) for i in range(1, len(ids))]
    answer = recorded["logprobs with"]
    assert holds_with(random_gpt2, answer, expected=shifted) == [False]
    earlier = holds_with(random_gpt2, answer, ids=IDS[1:], expected=answer.expected[1:])
    assert earlier == [False], "the same tokens one position earlier"


def test_other_logarithms_are_caught(random_gpt2, recorded):
    for name in ("logprobs with", "logprobs without"):
        bits = [x / math.log(2) for x in recorded[name].expected]
        assert holds_with(random_gpt2, recorded[name], expected=bits) == [False]
    loss = recorded["loss with"]
    assert holds_with(random_gpt2, loss, expected=loss.expected / math.log(2)) == [False]
    assert holds_with(random_gpt2, loss, expected=math.exp(loss.expected)) == [False], "a perplexity"


def test_one_wrong_token_is_caught(random_gpt2, recorded):
    greedy, top, pair = (recorded[f"{kind} with"] for kind in ("greedy", "top", "difference"))
    for i in range(len(greedy.expected)):
        wrong = [*greedy.expected[:i], (greedy.expected[i] + 1) % 50257, *greedy.expected[i + 1 :]]
        assert holds_with(random_gpt2, greedy, expected=wrong) == [False], i
    other = [[11, top.expected[0][1]], *top.expected[1:]]
    assert holds_with(random_gpt2, top, expected=other) == [False]
    assert holds_with(random_gpt2, pair, tokens=pair.tokens[::-1]) == [False]


def test_a_tokenizer_that_splits_otherwise_is_caught(random_gpt2, recorded):
    """SmolLM2's tokenizer stands in for a wrong one: its ids for this text are not GPT-2's."""
    answer = recorded["loss with"]
    assert holds(random_gpt2, answer, dataclasses.replace(answer, text="The capital of France is")) == [True, False]


def test_size_and_checksum(random_gpt2):
    right = Answer("size", "parameters", "hub", 124_439_808)
    wrong = dataclasses.replace(right, expected=163_037_184)  # the embedding counted twice
    sums = [Answer("sum", "sha256", "hub", s) for s in ("0" * 64, SPECS["gpt2"].sha256)]
    assert holds(random_gpt2, right, wrong, *sums) == [True, False, True, False]


def test_require_names_the_first_miss(random_gpt2, recorded):
    good, bad = recorded["loss with"], dataclasses.replace(recorded["top without"], id="the miss", expected=[[1, 0.5]])
    with pytest.raises(ModelError) as error:
        require(random_gpt2, [good, bad, dataclasses.replace(bad, id="a later one")])
    message = str(error.value)
    assert "'the miss' (most likely next tokens and their probabilities, nothing before the text; here)" in message
    assert "expected 1: 0.5000, found " in message and "a later one" not in message


# the file of GPT-2's own figures


def test_the_file_is_sound_and_says_where_each_figure_is_from():
    answers = load_answers()
    assert len({a.id for a in answers}) == len(answers) >= 25
    assert {a.kind for a in answers} == set(known_answers.KINDS)
    assert {a.bos for a in answers if a.kind == "logprobs"} == {None, BOS}, "both conventions are covered"
    by_id = {a.id: a for a in answers}
    assert by_id["weights"].expected == SPECS["gpt2"].sha256 and by_id["size"].expected == SPECS["gpt2"].parameters
    assert by_id["capital_of_france"].ids == IDS and by_id["capital_of_france"].bos is None
    assert all(len(a.source.split(", ")) == 3 for a in answers)
    for answer in answers:
        if answer.kind == "logprobs" and answer.ids:  # with the token before it, every token has a value
            assert len(answer.expected) == len(answer.ids) - (answer.bos is None)
        if answer.kind == "difference":
            assert len(answer.tokens) == 2 and answer.bos in (None, BOS)


def test_gpt2s_figures_refuse_another_model(random_gpt2):
    """Random weights pass nothing but the size; the first miss is the checksum, and without it a figure."""
    with pytest.raises(ModelError, match=r"does not give the known answer 'weights' \(of the weights file; openai"):
        require(random_gpt2)
    table = check(random_gpt2, load_answers())
    assert table[table.holds].what.tolist() == ["size"]
    small = wrap(tiny_gpt2(vocab_size=50257), random_gpt2.tokenizer)
    assert not check(small, load_answers()).holds.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("answers: []", "answers is empty; give at least one value"),
        ("answers: [{id: x, kind: vibes, source: s, text: a, expected: 1}]", "x: kind: .*'logprobs'.* not 'vibes'"),
        ("answers: [{id: x, kind: loss, source: t, text: a, expected: 1}]", "x: source 't'; choose from s"),
        ("answers: [{id: x, kind: loss, source: s, expected: 1}]", "x: a loss needs ids or a text to read"),
        ("answers: [{id: x, kind: loss, source: s, text: a}]", "x: expected is missing"),
        ("answers: [{id: x, kind: loss, source: s, text: a, expected: 1, bso: true}]", "x: unknown key 'bso'"),
    ],
)
def test_a_faulty_file_is_refused(tmp_path, change, message):
    path = tmp_path / "known.yaml"
    path.write_text(f"bos_id: 50256\nsources: {{s: {{repo: r, path: p, commit: c, licence: l}}}}\n{change}\n")
    with pytest.raises(DataError, match=message):
        load_answers(path)


def test_a_run_on_gpt2_begins_with_them(monkeypatch, tmp_path, random_gpt2):
    """Nothing is executed where GPT-2 is not what it should be; other models are not asked."""
    executed = []
    monkeypatch.setattr(execute, "BUILD", tmp_path)
    monkeypatch.setattr("lib.results.BUILD", tmp_path)
    monkeypatch.setattr(execute, "weights_sha256", lambda name: "sum")
    monkeypatch.setattr(execute, "load", lambda name: random_gpt2)
    monkeypatch.setattr(execute, "execute", lambda *a, **k: executed.append(a))
    with pytest.raises(ModelError, match="does not give the known answer 'weights'"):
        execute.run("gpt2", ["01_static_diagnostics"])
    assert not executed
    monkeypatch.setattr(execute, "load", lambda name: pytest.fail("another model is not asked"))
    with pytest.raises(BookError, match="saved no results"):
        monkeypatch.setattr(execute, "execute", lambda book, done, values, **k: done.write_text("ran"))
        execute.run("organism", ["01_static_diagnostics"])
