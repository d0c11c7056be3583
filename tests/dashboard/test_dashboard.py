"""The dashboard: its numbers are the library's, bad input is refused, and a browser drives the page."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

from lib import diagnosis, recall, results, static
from lib.dashboard import collect, render
from lib.edits import Edit, applied, load, save
from lib.errors import BookError, ChapterError, EditError
from lib.facts import load_cases, load_templates, prompts
from lib.interventions import run_with_cache
from lib.models import Model
from lib.press import build
from lib.press.browser import chromium
from lib.recall import study_facts, trainable
from lib.results import Results, chapter_folder, results_path
from lib.sites import Site
from lib.studies import cross_validation
from lib.sweeps import kept_sinks
from lib.trace import capture
from lib.weights import OF_A_LAYER, SINKS, pathway_slices


def chapters(model: Model, share: float, pathways: Sequence[str] = OF_A_LAYER) -> None:
    """Results and edits as the chapters leave them, without their work: an edit scales its slices a little. share: the
    best head's patching effect, as chapter 5 has it."""
    cases, texts = [trainable(model, c) for c in load_cases(model.name)], load_templates()
    verdicts = {c.name: diagnosis.prescribe(model, c) for c in cases}
    knowledge_head = verdicts[cases[0].name].knowledge_head
    layer, parameters = knowledge_head.layer, dict(model.module.named_parameters())
    listed, made = [], {}
    for name in pathways:
        values = {s: s.of(parameters[s.name]).detach() * 1.1 for s in pathway_slices(model.module, layer, name)}
        told = (False,) * len(cases[0].facts)
        origin = (model.name, model.weights_sha256, name, layer, cases[0].facts, texts[cases[0].template])
        edit = Edit(*origin, told, told, 0, (), {}, values)
        path = save(edit, chapter_folder(model.name, "03_four_pathways") / f"{name}.safetensors")
        listed.append({"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
        made[name] = {"parameters": edit.parameters, "kl": 0.01, "told_before": 2, "told_after": 8}
    mean, low, high = static.qk_overlap_chance(model.weights.d_model)
    overlap = {"qk_overlap_chance": mean, "qk_overlap_band": [low, high]}
    parts = ("knowledge_head", "suppressor", "failure_kind")
    reported = {
        "01_static_diagnostics": overlap | {"qk_overlap_mean": static.qk_overlap(model.weights).mean()},
        "02_knowledge_path": {
            "told": {c.name: int(recall.tell(model, c.facts, {"": texts[c.template]}).told.sum()) for c in cases},
            "diagnosis": {n: {p: getattr(v, p) for p in parts} | {"confidence": "high"} for n, v in verdicts.items()},
        },
        "03_four_pathways": {"pathways": made, "edits": listed, "recommended": "v only"},
        "05_cross_validation": {"knowledge_head": knowledge_head, "head_effect": -3.3, "head_interval": [-3.9, -2.9]}
        | {"sweep_last_share": share},
    }
    for chapter, values in reported.items():
        report = Results(chapter, model)
        for key, value in values.items():
            report.table(key, value)
        report.save()


@pytest.fixture(scope="module")
def build_folder(tmp_path_factory):
    """A _build of its own, for everything in this file."""
    folder = tmp_path_factory.mktemp("build")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "BUILD", folder)
        patch.setattr(build, "BUILD", folder)
        yield folder


@pytest.fixture(scope="module")
def board(build_folder, organism) -> collect.PageData:
    chapters(organism, 1.00494)
    return collect.collect(organism, progress=False)


@pytest.fixture(scope="module")
def html(board) -> str:
    return render.render(board)


def edit_of(board, model, name) -> tuple[int, Edit]:
    state = [s.key for s in board.states].index(name)
    if name in SINKS:
        return state, kept_sinks.kept(model)[name]
    return state, load(chapter_folder(model.name, "03_four_pathways") / f"{name}.safetensors")


@contextmanager
def restored(path: Path) -> Iterator[bytes]:
    """What a file holds, and holds again afterwards."""
    content = path.read_bytes()
    try:
        yield content
    finally:
        path.write_bytes(content)


def signed(value: float) -> str:
    """A number as the page writes it: three decimals where two would hide it, a true minus, no signed zero."""
    text = f"{value:+.{3 if abs(value) < 0.095 else 2}f}"
    return text.replace("-", "−") if float(text) else "0"


# Numbers


def test_contributions_are_those_of_the_diagnosis(board, organism):
    for shown in board.cases:
        case, arrays = shown.case, board.arrays
        evidence = diagnosis.gather(organism, case, diagnosis.case_table(organism, case))
        assert [case.facts[i] for i in shown.failing] == list(evidence.facts)
        means = {name: np.array(weights) for name, weights in shown.means().items()}
        for key, part in (("writes", "attribution"), ("pushes", "difference")):
            for name, traced in (("control", evidence.control), ("failing", evidence.failing)):
                mean = arrays[f"{key}/{case.name}"][0] @ means[name]
                np.testing.assert_allclose(mean, evidence.grid(getattr(traced, part).mean(0)), atol=1e-4)
        assert [p.told[0] for p in shown.prompts].count(True) > 8, "controls tell"


def test_patching_is_chapter_5s_sweep(board, organism):
    case = board.cases[0].case
    swept = cross_validation.patch_case_heads(organism, case)["last"].mean(-1)
    shares = board.arrays[f"patching/{case.name}"]
    np.testing.assert_allclose(np.nanmean(shares[0], -1), swept, atol=1e-3)
    untold = [i for i, p in enumerate(board.cases[0].prompts[: len(case.facts)]) if not p.told[0]]
    assert np.isnan(shares).any() and np.isfinite(shares[..., untold]).all(), "a told fact has nothing to bring back"


@pytest.mark.parametrize("pathway", ["attention", "sink_token"])
def test_patching_of_an_edit_is_a_share_of_the_same_margin(board, organism, pathway):
    """patch_heads divides by the loss of the edited model; the page, for all states, by that of the untouched one."""
    shown, (state, edit) = board.cases[0], edit_of(board, organism, pathway)
    case, templates = shown.case, load_templates()
    fact = shown.failing[0]
    table = recall.tell(organism, case.facts, {"failing": templates[case.template]})
    pair = torch.tensor(table[["answer_token", "competitor_token"]].iloc[[fact]].to_numpy())
    texts = [prompts([case.facts[fact]], templates[t])[0] for t in (case.template, case.controls[0])]

    def lost(model: Model) -> float:
        logits = capture(model, texts).logits[:, pair[0]]
        return float((logits[1, 0] - logits[1, 1]) - (logits[0, 0] - logits[0, 1]))

    before = lost(organism)
    with applied(organism, edit) as changed:
        after = lost(changed)
        lines = (templates[case.template], templates[case.controls[0]])
        swept = cross_validation.patch_heads(changed, [case.facts[fact]], *lines, pair[:, 1])["last"]
    shares = board.arrays[f"patching/{case.name}"][state, ..., fact]
    np.testing.assert_allclose(shares, swept[..., 0] * after / before, atol=1e-3)
    assert abs(after / before - 1) > 1e-3, "the edit changes what is lost"


def test_static_numbers_are_chapter_1s(board, organism):
    study = study_facts(organism, load_cases("organism")[0])
    types = static.load_token_types(organism)
    for state, edit in ((0, None), edit_of(board, organism, "full")):
        with applied(organism, edit) if edit else torch.no_grad():
            maps = static.relation_maps(organism, study)
            roles = static.head_roles(organism, types, list(maps.values()))
            overlap = static.qk_overlap(organism.weights)
            norms = static.k_norms_by_head(organism.weights, types["verb"]).mean(1)
        arrays = {key: value[state] for key, value in board.arrays.items()}
        np.testing.assert_allclose(arrays["qk_overlap"], overlap, atol=1e-6)
        verbs = arrays["k_norm_by_type"][..., list(types).index("verb")]
        np.testing.assert_allclose(verbs.mean(1), norms.mean(1), rtol=1e-5)
        for i, name in enumerate(("raw", "enriched")):
            np.testing.assert_allclose(arrays["relation"][..., i], maps[name].score)
        numbers = arrays["role_numbers"].reshape(len(roles), -1)
        np.testing.assert_allclose(numbers, roles[list(render.ROLE_NUMBERS)], atol=1e-5)
        for key in ("seeks", "advertises"):
            labels = ["none", *board.types]
            assert [labels[i + 1] for i in arrays[key].ravel()] == roles[key].tolist()
        assert [render.VALUE_ROLES[i] for i in arrays["value"].ravel()] == roles["value"].tolist()


def test_attention_is_the_models_to_eight_bits(board, organism, monkeypatch):
    """Against Hugging Face's own attentions, with and without an edit."""
    texts = list(board.texts)
    lengths = [len(t) * (len(t) + 1) // 2 for t in board.texts.values()]
    starts = np.cumsum([0, *lengths])
    monkeypatch.setattr(organism.module.config, "_attn_implementation", "eager")
    for state, edit in ((0, None), edit_of(board, organism, "q_only")):
        with applied(organism, edit) if edit else torch.no_grad():
            for i in (0, len(texts) - 1):
                out = organism.module(torch.tensor([organism.token_ids(texts[i])]), output_attentions=True)
                theirs = torch.stack(out.attentions)[:, 0].detach()
                rows, columns = np.tril_indices(theirs.shape[-1])
                stored = board.arrays["patterns"][state, ..., starts[i] : starts[i + 1]] / 255
                np.testing.assert_allclose(stored, theirs[..., rows, columns], atol=0.5 / 255 + 1e-4)


def test_value_channel_is_embedding_times_matrices(board, organism):
    """By hand for one head, untouched and edited: e + MLP(e), norm, W_V, W_O, final gain, W_U."""
    fact, (layer, head) = board.sources[0], (7, 5)  # L8 H5
    for state, edit in ((0, None), edit_of(board, organism, "v_only")):
        with applied(organism, edit) if edit else torch.no_grad(), torch.no_grad():
            w = organism.weights
            e = w.W_E[organism.token_ids(f" {fact.subject}")[-1]]
            e = e + w.blocks[0].mlp(w.blocks[0].norm_mlp(e))
            attn = w.blocks[layer].attn
            out = w.blocks[layer].norm_attn(e) @ attn.W_V[head] @ attn.W_O[head]
            out = (out - out.mean()) * w.norm_final.gain
            logits = out @ w.W_U
        z = (logits - logits.mean()) / logits.std()
        ids, scores = board.arrays["tokens"][state, layer, head, 0], board.arrays["token_scores"][state, layer, head, 0]
        top = [organism.token_text(int(i)) for i in z.topk(collect.TOP).indices]
        assert [board.words[i] for i in ids[0]] == top
        np.testing.assert_allclose(scores[1], z.topk(collect.TOP, largest=False).values, atol=1e-3)
        rank = int((z > z[organism.first_token(fact.answer)]).sum()) + 1
        assert board.arrays["answer_ranks"][state, layer, head, 0] == rank == 1, "the planted head knows it"


def test_an_ffn_edit_leaves_what_the_heads_weights_say(board):
    state = [s.key for s in board.states].index("ffn")
    for key in ("qk_overlap", "k_norm", "relation", "tokens", "role_numbers"):
        np.testing.assert_array_equal(board.arrays[key][state], board.arrays[key][0])
    assert not np.array_equal(board.arrays["patterns"][state], board.arrays["patterns"][0])


@pytest.mark.parametrize("pathway", SINKS)
def test_a_sink_stands_before_every_text(board, organism, pathway):
    """Answers, contributions, patching and attention are those of the model that has the sink; the weights are as they
    were."""
    state, edit = edit_of(board, organism, pathway)
    case, templates = board.cases[0].case, load_templates()
    assert board.states[state].layer is None and edit.template == templates[case.template]
    said = tuple(p.told[state] for p in board.cases[0].prompts[: len(case.facts)])
    assert said == edit.told_after and sum(said) > sum(edit.told_before), "as training left it"
    text, tokens = next(iter(board.texts.items()))
    pair = torch.tensor([[organism.first_token(case.facts[0].answer, text), 0]])
    with applied(organism, edit) as changed:
        run = capture(changed, [text])
        answers = torch.tensor([organism.first_token(f.answer, text) for f in case.facts])
        traced = diagnosis.contributions(changed, run, pair, answers)
        stream, block = run_with_cache(changed, [text]).layers[7].stream, changed.weights.blocks[7]
        pattern = block.attn.pattern(block.norm_attn(stream))[0]
    writes = board.arrays[f"writes/{case.name}"][state, ..., 0].ravel()
    np.testing.assert_allclose(writes, traced.attribution[0, : writes.size], atol=1e-4)
    n = len(tokens)
    triangle = board.arrays["patterns"][state, 7, :, : n * (n + 1) // 2] / 255
    rows, columns = np.tril_indices(n)
    np.testing.assert_allclose(triangle, pattern[:, 1:, 1:][:, rows, columns], atol=0.5 / 255 + 1e-4)
    last = triangle[:, -n:].sum(-1)
    np.testing.assert_allclose(last, 1 - pattern[:, -1, 0], atol=0.01)
    assert (last < 0.9).any(), "some head looks at the sink"
    for key in ("qk_overlap", "k_norm", "relation", "tokens", "role_numbers"):
        np.testing.assert_array_equal(board.arrays[key][state], board.arrays[key][0])


def unpack(packed: dict, heads: int, rest: tuple[int, ...]) -> np.ndarray:
    blocks = np.frombuffer(base64.b64decode(packed["data"]), "<" + packed["kind"]).reshape(-1, heads, *rest)
    return np.stack([blocks[at] for at in packed["at"]])


def test_packing_loses_nothing_and_shares_layers(board):
    for values in board.arrays.values():
        packed = render.pack(values)
        np.testing.assert_array_equal(unpack(packed, values.shape[2], values.shape[3:]), values)
        assert packed["size"] == np.prod(values.shape[3:])
    below = render.pack(board.arrays["patterns"])["at"]
    edited = board.states[1].layer
    of_a_layer = [row for row, state in zip(below, board.states, strict=True) if state.key not in SINKS]
    assert all(row[:edited] == below[0][:edited] for row in of_a_layer), "an edit leaves the layers below it alone"
    assert all(row[1] != below[0][1] for row in below[-2:]), "a sink changes every layer"


# Bad input


@pytest.mark.parametrize(
    ("chapter", "key", "value", "message"),
    [
        ("01_static_diagnostics", "provenance.model", "gpt2", "was made by gpt2 .*, not by organism"),
        ("02_knowledge_path", "provenance.weights_sha256", "f" * 64, "was made by organism .ffff.*not by organism"),
        ("03_four_pathways", "provenance.lib", "0.0.1", r"was made by version 0\.0\.1 of lib, and this is"),
        ("05_cross_validation", "values.head_effect", None, "lacks head_effect"),
        ("01_static_diagnostics", "values.qk_overlap_band", [0.1, float("nan")], r"NaN .* under qk_overlap_band\.1"),
        ("03_four_pathways", "values.pathways.full.kl", float("inf"), r"infinity under pathways\.full\.kl"),
        ("02_knowledge_path", "provenance", None, "is no results file"),
    ],
)
def test_results_that_do_not_belong_are_refused(board, organism, chapter, key, value, message):
    """A value of None takes the key away."""
    path = results_path("organism", chapter)
    with restored(path) as before:
        content = json.loads(before)
        *way, last = key.split(".")
        place = reduce(dict.__getitem__, way, content)
        place.pop(last)
        if value is not None:
            place[last] = value
        path.write_text(json.dumps(content))
        with pytest.raises(ChapterError, match=message) as error:
            collect.collect(organism, progress=False)
        assert f"python -m lib run {chapter}" in str(error.value), "it says what to do"


@pytest.mark.parametrize(
    ("chapter", "key"), [("01_static_diagnostics", "qk_overlap_mean"), ("05_cross_validation", "sweep_last_share")]
)
def test_results_that_the_model_contradicts_are_refused(board, chapter, key):
    collect.agree(board)
    off = board.reported | {chapter: board.reported[chapter] | {key: board.reported[chapter][key] + 0.01}}
    with pytest.raises(ChapterError, match=rf"chapter {chapter} reports .* for {key}, and the model says"):
        collect.agree(replace(board, reported=off))
    with pytest.raises(ChapterError, match=r"reports not run for told\.overridden, and the model says 2"):
        collect.agree(replace(board, reported=board.reported | {"02_knowledge_path": {"told": {}}}))


@pytest.mark.parametrize(("content", "message"), [(None, "there is no .*05_cross"), ("{", "is no results file")])
def test_results_that_cannot_be_read_are_refused(board, organism, content, message):
    path = results_path("organism", "05_cross_validation")
    with restored(path), pytest.raises(ChapterError, match=message):
        path.write_text(content) if content else path.unlink()
        collect.taken(organism)


def test_edits_that_are_not_chapter_3s_are_refused(board, organism):
    path = chapter_folder("organism", "03_four_pathways") / "v_only.safetensors"
    edit = load(path)
    with restored(path):
        save(replace(edit, seed=1), path)
        with pytest.raises(EditError, match=r"v_only.safetensors is not the file that chapter 3 reports"):
            collect.collect(organism, progress=False)
        path.unlink()
        with pytest.raises(EditError, match=r"lacks v_only.safetensors"):
            collect.collect(organism, progress=False)
        save(replace(edit, template="Of {} it is"), path)
        files = path.parent.glob("*.safetensors")
        listed = [{"file": p.name, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in files]
        with pytest.raises(EditError, match=r"'Of \{\} it is', the template of no case"):
            collect.made_edits(organism, [c.case for c in board.cases], listed)


def test_a_case_of_many_facts_is_cut_and_said(board, organism, monkeypatch):
    monkeypatch.setattr(collect, "MOST", 3)
    small = collect.collect(organism, progress=False)
    assert all(len(c.case.facts) == 3 and c.left_out == 5 for c in small.cases)
    assert small.arrays["answer_ranks"].shape[-1] == 3


# The command


def test_the_page_is_kept_until_something_changes(board, build_folder, monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(collect, "collect", lambda model: made.append(model.name) or board)
    monkeypatch.setattr(render, "render", lambda data: "the page")
    monkeypatch.setattr(render, "PARTS", ())
    monkeypatch.setattr(build, "ROOT", build_folder.parent)  # sources are taken from there
    monkeypatch.setattr(build, "shared_inputs", list)
    monkeypatch.setattr(kept_sinks, "FOLDER", build_folder.parent / "record")
    said: list[str] = []

    def run(**options) -> bool:
        made.clear()
        build.dashboard("organism", say=said.append, **options)
        return bool(made)

    assert run() and not run() and run(force=True) and not run()
    path = results_path("organism", "02_knowledge_path")
    path.write_text(path.read_text() + "\n")
    assert run() and not run()
    sink = kept_sinks.folder("organism") / "sink_token.safetensors"
    sink.parent.mkdir(parents=True)
    sink.write_bytes(b"another")
    assert run() and not run()
    source = build_folder.parent / "lib" / "dashboard" / "collect.py"
    source.parent.mkdir(parents=True)
    source.write_text("x = 1")
    assert run() and not run()
    assert not run(output=tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == build.dashboard_path("organism").read_text()
    monkeypatch.setattr(collect, "collect", lambda model: (_ for _ in ()).throw(BookError("no")))
    with pytest.raises(BookError):
        run(force=True)
    assert not build.dashboard_path("organism").exists(), "no older page is left standing"


# The page


@pytest.fixture(scope="module")
def browser():
    with chromium("Looking at the dashboard") as running:
        yield running


class Opened:
    """A page opened from disk, with every request to the outside refused and all trouble kept."""

    def __init__(self, browser, path, address="", **options):
        self.trouble: list[str] = []
        self.context = browser.new_context(**options)
        self.context.route(re.compile("^(?!file:|data:|blob:)"), self.refuse)
        self.page: Page = self.context.new_page()
        self.page.on("console", lambda m: self.trouble.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.trouble.append(str(e)))
        self.page.goto(path.as_uri() + address)
        self.settle()

    def refuse(self, route) -> None:
        self.trouble.append(f"asked for {route.request.url}")
        route.abort()

    def settle(self) -> None:
        self.page.wait_for_selector("body[aria-busy=false]")

    def text(self, element: str) -> str:
        self.settle()
        return self.page.locator(f"#{element}").inner_text()

    def colour(self, site: str) -> str:
        """Fill of the chart's own mark that lies under a cell, near its corner."""
        self.settle()
        box = self.page.locator(f"#cell-{site}").bounding_box()
        return self.page.evaluate(
            """([x, y]) => document.elementsFromPoint(x, y)
                .find((e) => e.tagName === "path" && e.closest(".mark-rect"))?.getAttribute("fill") ?? "none\"""",
            [box["x"] + box["width"] / 4, box["y"] + box["height"] / 4],
        )


@pytest.fixture
def opened(browser, html, tmp_path):
    """Opens the page of `board`, or another one, at an address. Afterwards nothing may have gone wrong."""
    views: list[Opened] = []

    def open_page(address="", page=html, **options) -> Opened:
        file = tmp_path / "heads.html"
        file.write_text(page, encoding="utf-8")
        views.append(Opened(browser, file, address, **options))
        return views[-1]

    yield open_page
    for view in views:
        view.context.close()
        assert not view.trouble, "no console error, no request to the outside"


def test_measure_head_link_and_edit_by_mouse(opened, board):
    """The four things that a reader does, with numbers that the board holds."""
    view = opened()
    page = view.page
    assert view.text("head-title") == "L8 H5", "it starts with the first case's knowledge head"
    page.select_option("#measure", "qk_overlap")
    assert view.text("grid-title") == "QK overlap"
    page.locator("#cell-L3H4").click()
    assert view.text("head-title") == "L3 H4"
    assert f"{board.arrays['qk_overlap'][0, 2, 4]:.2f}" in view.text("readout")
    assert page.url.split("#")[1].startswith("L3H4&measure=qk_overlap&")
    first = page.locator("#ranking a").first
    name = first.inner_text().split("\n")[0]
    best = np.unravel_index(board.arrays["qk_overlap"][0].argmax(), (12, 12))
    assert name == str(Site(*map(int, best)))
    first.click()
    assert view.text("head-title") == name
    page.select_option("#edit", label="q only of L8")
    assert "with the edit q only of L8" in view.text("grid-title")
    view.settle()
    page.go_back()
    page.wait_for_function("document.getElementById('head-title').textContent === 'L3 H4'")


def test_switching_the_edit_changes_what_is_shown(opened, board):
    view = opened("#L8H5&measure=writes&prompt=failing")
    values = board.arrays["writes/overridden"] @ np.array(board.cases[0].means()["failing"])
    for state, key in enumerate(s.key for s in board.states):
        view.page.select_option("#edit", str(state))
        assert f"{signed(values[state, 7, 5])} logits" in view.text("readout"), key
    view.page.check("#change")
    change = values[-1, 7, 5] - values[0, 7, 5]
    assert f"{signed(change)} logits" in view.text("readout")
    assert "change by the edit" in view.text("grid-title")
    assert view.page.locator("#roles thead th").all_inner_texts()[-1] == "sink token before every text"
    assert "the sink before the text" in view.text("attention")


def test_all_by_keyboard(opened, board):
    """No mouse: the skip link, a select, arrows within the grid, Enter, and a link of the ranking."""
    view = opened()
    page, keys = view.page, view.page.keyboard
    keys.press("Tab")
    assert page.evaluate("document.activeElement.id") == "skip"
    page.focus("#measure")
    keys.press("ArrowDown")
    view.settle()
    assert page.input_value("#measure") == "pushes"
    page.focus("#cell-L8H5")
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowLeft"):
        keys.press(key)
    assert page.evaluate("document.activeElement.id") == "cell-L7H7"
    assert view.text("head-title") == "L8 H5", "walking does not choose"
    assert page.locator("#grid [tabindex='0']").count() == 1, "one stop for Tab"
    keys.press("Enter")
    assert view.text("head-title") == "L7 H7"
    assert page.evaluate("document.activeElement.id") == "cell-L7H7", "the place is kept"
    assert page.locator("#cell-L7H7").get_attribute("aria-selected") == "true"
    value = board.arrays["pushes/overridden"][0, 6, 7] @ np.array(board.cases[0].means()["control"])
    assert f"{signed(value)} logits" in page.locator("#cell-L7H7").get_attribute("aria-label")
    for _ in range(20):
        keys.press("ArrowUp")
    assert page.evaluate("document.activeElement.id") == "cell-L7H0", "the edge holds"
    keys.press("Control+End")
    assert page.evaluate("document.activeElement.id") == "cell-L12H11"
    page.focus("#edit")
    keys.press("ArrowDown")
    assert "full of L8" in view.text("grid-title")
    page.locator("#ranking a").nth(1).focus()
    wanted = page.locator("#ranking a").nth(1).inner_text().split("\n")[0]
    keys.press("Enter")
    assert view.text("head-title") == wanted
    assert wanted in view.text("said"), "said to a screen reader"


def test_an_address_opens_everything_it_names(opened):
    view = opened("#L11H2&measure=patching&case=overridden&prompt=of_is%2FZorland&edit=v_only&change=1")
    page = view.page
    assert view.text("head-title") == "L11 H2" and "suppressor" in view.text("tags")
    assert page.input_value("#measure") == "patching" and page.is_checked("#change")
    assert "Zorland" in page.locator("#prompt option:checked").inner_text()
    assert "v only" in page.locator("#edit option:checked").inner_text()
    link = page.get_attribute("#link", "href")
    page.evaluate("location.hash = '#L2H3'")
    page.wait_for_function("document.getElementById('head-title').textContent === 'L2 H3'")
    assert page.input_value("#measure") == "patching", "what an address does not name stays"
    assert opened(link).text("head-title") == "L11 H2", "the link leads back here"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("#L99H1", "There is no L99 H1: layers go from 1 to 12, heads from 0 to 11."),
        ("#L1H12", "There is no L1 H12"),
        ("#L1H1&edit=<b>all</b>", "There is no edit “<b>all</b>” here."),
        ("#L1H1&prompt=of_is/Atlantis", "There is no prompt “of_is/Atlantis” here."),
        ("#%E0%A4%A", "The address is damaged."),
    ],
)
def test_an_address_of_nothing_is_said(opened, address, said):
    assert said in opened(address).text("said")


def test_search_and_filters(opened, board):
    view = opened("#L8H5&measure=relation")
    page = view.page
    page.fill("#search", "L8 H5")
    assert view.text("matches") == "1 of 144 heads:" and page.locator("#ranking a").count() == 1
    page.fill("#search", "layer 8")
    assert view.text("matches").startswith("12 of 144 heads")
    page.fill("#search", "suppressor")
    assert page.locator("#ranking a").first.inner_text().startswith("L11 H2")
    page.fill("#search", "no such role")
    assert "0 of 144 heads. Loosen the search." in view.text("matches")
    page.fill("#search", "")
    page.select_option("#role", "value:maps relation")
    wanted = int((board.arrays["value"][0] == render.VALUE_ROLES.index("maps relation")).sum())
    assert view.text("matches").startswith(f"{wanted} of 144 heads")
    page.select_option("#role", "")
    page.locator("#least").evaluate("e => { e.value = 0.5; e.dispatchEvent(new Event('input', {bubbles: true})) }")
    best = board.arrays["relation"][0].max(-1)
    assert view.text("matches").startswith(f"{int((best >= best.max() / 2).sum())} of 144 heads")
    assert "not among the found" in page.locator("#cell-L1H5").get_attribute("aria-label")


def test_colours_are_those_of_the_values(opened, board):
    """Vega's own cell lies under the cell that is clicked, and its colour follows the value."""
    view = opened("#L1H1&measure=relation")
    best = board.arrays["relation"][0].max(-1)
    assert best[7, 5] == best.max()
    least = int(best.min(1).argmin())
    top, none = view.colour("L8H5"), view.colour(f"L{1 + least}H{int(best[least].argmin())}")
    numbers = [int(x) for x in re.findall(r"\d+", top)]
    assert top != none and numbers[0] > 200 and numbers[2] < 80, "viridis ends in yellow"
    view.page.select_option("#measure", "value")
    view.settle()
    assert view.colour("L8H5").lower() in ("#009e73", "rgb(0, 158, 115)"), "maps relation"


def test_no_text_is_ever_run(opened, board):
    """Cases, templates, tokens, answers and the model's name may look like HTML or script."""
    evil = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><b>{js}</b>"
    first = board.cases[0]
    facts = tuple(replace(f, subject=f.subject + evil, answer=evil) for f in first.case.facts)
    case = replace(first.case, title="title" + evil, facts=facts)
    shown = tuple(replace(p, top=(evil,) * len(p.top)) for p in first.prompts)
    first = replace(first, case=case, competitors=(evil,) * len(facts), prompts=shown)
    sources = tuple(facts[i] if i < len(facts) else f for i, f in enumerate(board.sources))
    other = replace(board.cases[1], case=replace(board.cases[1].case, facts=sources[: len(board.cases[1].case.facts)]))
    texts = {text + evil: (evil,) * len(tokens) for text, tokens in board.texts.items()}
    bad = replace(
        board,
        cases=(first, other),
        texts=texts,
        sources=sources,
        words=(evil,) * len(board.words),
        types=tuple(t + evil for t in board.types),
        provenance=board.provenance | {"model": evil, "source": evil},
    )
    view = opened("#L8H5&edit=v_only", render.render(bad))
    page = view.page
    for measure in ("writes", "seeks"):
        page.select_option("#measure", measure)
        view.settle()
    page.hover("#points")
    box = page.locator("#attention-0").bounding_box()  # a tooltip is made of the same texts
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0 and page.locator("b:text-is('{js}')").count() == 0
    for element in ("told", "attention", "tokens", "ranks"):
        assert "<script>window.hacked = 1</script>" in view.text(element), "shown as text"
    assert "<img src=x" in page.locator("h1").inner_text() and "<img src=x" in page.locator("footer").inner_text()


def test_a_case_without_a_failure_is_shown_without_patching(opened, board):
    """Nothing was diagnosed, nothing lost, so nothing can be brought back: said, and no error."""
    case = replace(board.cases[0], finding=None)
    arrays = {key: v for key, v in board.arrays.items() if key != f"patching/{case.case.name}"}
    page = render.render(replace(board, cases=(case, *board.cases[1:]), arrays=arrays))
    view = opened("#L8H5&measure=patching", page)
    assert "Patching effect: none here." in view.text("said") and "nothing to bring back" in view.text("roles")
    assert view.page.locator("#tags").inner_text() == "knowledge head, planted blind query", "of the other case"


def test_the_policy_stops_a_script_that_slips_in(browser, html, tmp_path):
    """The second line of defence, with its control: the same page without the policy does run it."""
    slipped = html.replace("<main>", "<main><script>window.hacked = 1</script>", 1)
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", slipped)
    ran = []
    for name, text in (("with", slipped), ("without", bare)):
        file = tmp_path / f"{name}.html"
        file.write_text(text, encoding="utf-8")
        view = Opened(browser, file)
        ran.append(view.page.evaluate("window.hacked"))
        view.context.close()
    assert ran == [None, 1]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("address", ["", "#L11H2&measure=value&edit=attention&prompt=of_is/Zorland"])
def test_accessible(opened, theme, address):
    view = opened(address, color_scheme=theme)
    assert view.page.evaluate("document.documentElement.dataset.theme") == theme
    violations = Axe().run(view.page).response["violations"]
    serious = [(v["id"], v["nodes"][:3]) for v in violations if v["impact"] in ("serious", "critical")]
    assert not serious
    view.page.click("#theme")
    view.settle()
    assert view.page.evaluate("document.documentElement.dataset.theme") != theme


@pytest.mark.parametrize("address", ["#L8H5", "#L8H5&measure=seeks&edit=full&change=1"])
def test_a_phone_has_no_sideways_overflow(opened, address):
    view = opened(address, viewport={"width": 390, "height": 844}, has_touch=True)
    assert view.page.evaluate("document.documentElement.scrollWidth") <= 390
    view.page.locator("#cell-L3H4").tap()
    assert view.text("head-title") == "L3 H4"
    box = view.page.locator("#cell-L3H4").bounding_box()
    assert box["width"] >= 22 and box["height"] >= 24, "large enough for a thumb"


def test_footer_says_whose_numbers_these_are(opened, board):
    text = opened().page.locator("footer").inner_text()
    named = [board.provenance[key] for key in ("model", "weights_sha256", "lib", "commit")]
    assert all(part in text for part in (*named, "figures of GPT-2 need a run"))


def test_nothing_in_the_page_points_outside(html):
    """No element loads anything; addresses occur only as names inside Vega's source."""
    outside = re.sub(r"<script.*?</script>", "", html, flags=re.S)
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", outside)
    assert html.count("<script") == 3 and "default-src 'none'" in html


@pytest.mark.slow
@pytest.mark.model
def test_smollm2s_270_heads_fit_and_read(build_folder, smollm2, opened, monkeypatch):
    """The real model with two edits: the numbers that the book tells of, and the page itself. Relation maps are of a
    third of the countries, for time. Of the built book's, with six edits, tests/pages takes the size."""
    monkeypatch.setattr(collect, "study_facts", lambda *given: study_facts(*given)[::3])
    chapters(smollm2, 0.82743, ("full", "v_only"))
    board = collect.collect(smollm2, progress=False)
    page = render.render(board)
    first = board.cases[0]
    writes = board.arrays[f"writes/{first.case.name}"][0] @ np.array(first.means()["control"])
    assert writes.shape == (30, 9) and np.unravel_index(writes.argmax(), writes.shape) == (23, 4)
    patched = np.nanmean(board.arrays[f"patching/{first.case.name}"][0], -1)
    assert np.unravel_index(patched.argmax(), patched.shape) == (23, 4)
    assert patched.max() == pytest.approx(0.83, abs=0.01)
    for options in ({}, {"viewport": {"width": 390, "height": 844}}):
        view = opened("#L30H1&measure=relation", page, **options)
        assert view.text("head-title") == "L30 H1" and "0.2" in view.text("readout")
        assert view.page.locator("#grid [role=gridcell]").count() == 270
        assert view.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
