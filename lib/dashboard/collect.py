"""Every head of a subject on one page, before and after each edit: numbers (`collect`) and one HTML file (`render`).

1. Chapters 1, 2, 3 and 5 must have run. What they report is read from their results; edits are chapter 3's files.
2. The rest is computed by the same functions that the chapters call: on the untouched model, and with each edit in
   place. Every array begins with the axes state, layer, head; state 0 is the untouched model.
3. The page holds each layer of an array once; an edit's layer is stored only where it differs from the untouched
   one. Attention is rounded to 8 bits, everything else is fp32.
4. Charts are Vega-Lite, made with Altair; its JavaScript comes with vl-convert and is written into the page, as is
   lib/dashboard.js, which only routes: choices, search, focus and words. A content security policy names both
   scripts by their sha256 and forbids everything else, so no text of a template, a token or a model can run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from lib import __version__, interventions
from lib.edits import Edit, applied, check, load_all
from lib.errors import ChapterError, EditError
from lib.facts import Case, Fact, load_cases, load_templates, prompts
from lib.files import file_sha256
from lib.models import Model
from lib.recall import study_facts, tell, trainable
from lib.results import Results, chapter_folder, reach, results_path
from lib.show.figures import visible
from lib.static import RelationMap, enrich, head_roles, k_norms_by_head, load_token_types, qk_overlap, relation_maps
from lib.trace import logit_trace

EDITS = "03_four_pathways"
TAKEN = {  # what is read from the chapters' results
    "01_static_diagnostics": ("qk_overlap_chance", "qk_overlap_band", "qk_overlap_mean"),
    "02_knowledge_path": ("told", "diagnosis"),
    EDITS: ("pathways", "edits", "recommended"),
    "05_cross_validation": ("knowledge_head", "head_effect", "head_interval", "sweep_last_share"),
}
MOST = 16  # facts of a case that the page shows; a case of hundreds would make a file that no browser likes
TOP = 8  # tokens that a value channel promotes most, and suppresses most
VALUE_ROLES = ("neither", "copies", "suppresses", "maps relation")  # the first is drawn grey, as "none" is
ROLE_NUMBERS = (
    "seeks_effect",
    "seeks_p",
    "advertises_effect",
    "advertises_p",
    "copy_score",
    "copy_p",
    "relation_score",
    "relation_p",
)
UNTOUCHED = "none"


@dataclass(frozen=True)
class Measure:
    """A choice of colour for the grid. kind: share (from 0), signed (around 0) or role. by: whether it is of the
    weights alone, of a prompt, or of a fact."""

    key: str
    title: str
    unit: str
    kind: str
    by: str
    text: str


MEASURES = (
    Measure(
        "writes",
        "Contribution to the answer",
        "logits",
        "signed",
        "prompt",
        "What the head writes at the last position: its exact share of the answer's logit, minus the mean of its "
        "shares of the other facts' answers. It must say this answer, not answers in general.",
    ),
    Measure(
        "pushes",
        "Answer minus competitor",
        "logits",
        "signed",
        "prompt",
        "The head's exact share of the margin: the answer's logit minus that of the strongest wrong token of the "
        "failing prompt, as the untouched model has it.",
    ),
    Measure(
        "patching",
        "Patching effect",
        "of the lost margin",
        "signed",
        "fact",
        "The head is made to do in the failing prompt, at the last position, what it does under the first control "
        "template. The share of the margin that the untouched model loses which comes back; 1 is all of it.",
    ),
    Measure(
        "relation",
        "Relation map",
        "of countries",
        "share",
        "weights",
        "Without input: the share of countries whose capital is among the ten tokens that the head's value channel "
        "promotes most, from the bare or the enriched embedding, whichever is higher.",
    ),
    Measure(
        "qk_overlap",
        "QK overlap",
        "of dimensions",
        "share",
        "weights",
        "Without input: the share of residual dimensions that the query and the key matrix both read most.",
    ),
    Measure(
        "k_norm",
        "K-norm",
        "",
        "share",
        "weights",
        "Without input: the mean length of the head's key over single-token words of all types.",
    ),
    Measure(
        "seeks",
        "Query role",
        "",
        "role",
        "weights",
        "Without input: the token type that the head's query seeks, where it beats permuted types.",
    ),
    Measure(
        "advertises",
        "Key role",
        "",
        "role",
        "weights",
        "Without input: the token type whose keys are longest, where it beats permuted types.",
    ),
    Measure(
        "value",
        "Value role",
        "",
        "role",
        "weights",
        "Without input: what the head's value channel does with the word that it reads.",
    ),
)


@dataclass(frozen=True)
class State:
    """The untouched model (layer None), or one with an edit in place. found: what chapter 3 reports of the edit."""

    key: str
    layer: int | None
    found: dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """text: index into the board's texts. By state: whether the answer is told, the top token, answer minus
    competitor."""

    text: int
    template: str
    control: bool
    fact: int
    told: tuple[bool, ...]
    top: tuple[str, ...]
    margin: tuple[float, ...]


@dataclass(frozen=True)
class Shown:
    """A case as the page shows it. prompts: of the failing template, fact by fact, then of each control. failing: the
    facts that are known and not told, over which means are taken (all facts where there are none). left_out: facts that
    are not shown, because their answer's first token does not tell it or there are more than MOST. finding:
    the diagnosis of chapter 2, None where it had nothing to diagnose."""

    case: Case
    left_out: int
    competitors: tuple[str, ...]
    failing: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    finding: dict[str, Any] | None

    def told_by(self, fact: int) -> list[int]:
        """The control prompts that tell a fact on the untouched model; all its control prompts if none does."""
        mine = [i for i, p in enumerate(self.prompts) if p.control and p.fact == fact]
        return [i for i in mine if self.prompts[i].told[0]] or mine

    def means(self) -> dict[str, list[float]]:
        """Weights over the prompts for two means: over the failing prompts, and over the controls that tell each fact,
        as the diagnosis takes them."""
        failing, control = np.zeros(len(self.prompts)), np.zeros(len(self.prompts))
        for fact in self.failing:
            mine = self.told_by(fact)
            failing[fact] = 1 / len(self.failing)
            control[mine] = 1 / len(mine) / len(self.failing)
        return {"failing": failing.tolist(), "control": control.tolist()}


@dataclass(frozen=True)
class Board:
    """All numbers of the page. arrays: each with the axes state, layer, head, and then

        qk_overlap, k_norm       none               k_norm_by_type    type
        relation                 raw, enriched      role_numbers      as ROLE_NUMBERS
        seeks, advertises        index of a type (-1: none)
        value                    index of a role, as in VALUE_ROLES
        tokens, token_scores     source, promoted or suppressed, TOP (index of a word; standard deviations)
        answer_ranks             source that is a fact (1 is the top)
        patterns                 byte: the lower triangle of each text's attention, row by row (0 to 255)
        writes/CASE, pushes/CASE prompt             patching/CASE     fact (NaN: told, nothing to bring back)

    sources: the facts whose subject's embedding a value channel reads; in `tokens` and `token_scores`, the mean over
    each case's facts follows them."""

    provenance: dict[str, Any]
    states: tuple[State, ...]
    cases: tuple[Shown, ...]
    texts: dict[str, tuple[str, ...]]
    sources: tuple[Fact, ...]
    types: tuple[str, ...]
    words: tuple[str, ...]
    studied: int
    found: dict[str, dict[str, Any]]
    arrays: dict[str, NDArray]


# Collecting


def taken(model: Model) -> tuple[dict[str, dict[str, Any]], int]:
    """What the page takes from the chapters' results, and the seed they ran with. Raises ChapterError for a file that
    is missing, unreadable, of another subject, other weights or another version, that lacks a key or holds a value
    that is no number."""
    found, seeds = {}, set()
    for chapter, keys in TAKEN.items():
        path = results_path(model.name, chapter)
        again = f"Run `python -m lib run {chapter} --model {model.name} --force`."
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            own, values = content["provenance"], content["values"]
            made = own["model"], own["weights_sha256"], own["lib"]
            seeds.add(own["seed"])
        except FileNotFoundError:
            raise ChapterError(f"there is no {path}, which the dashboard is made from. {again}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ChapterError(f"{path} is no results file ({error!r}). {again}") from error
        if made[:2] != (model.name, model.weights_sha256):
            raise ChapterError(
                f"{path} was made by {made[0]} ({made[1][:12]}...), not by {model.name} "
                f"({model.weights_sha256[:12]}...). {again}"
            )
        if made[2] != __version__:
            raise ChapterError(f"{path} was made by version {made[2]} of lib, and this is {__version__}. {again}")
        if lacking := [key for key in keys if key not in values]:
            raise ChapterError(f"{path} lacks {', '.join(lacking)}. {again}")
        found[chapter] = {key: values[key] for key in keys}
        if odd := _not_finite(found[chapter]):
            raise ChapterError(f"{path} holds NaN or infinity under {odd}. {again}")
    return found, max(seeds)


def _not_finite(value: Any, at: str = "") -> str | None:
    """Dotted key of a number that is none."""
    if isinstance(value, float):
        return None if math.isfinite(value) else at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next((odd for k, v in items if (odd := _not_finite(v, f"{at}.{k}".strip(".")))), None)


def made_edits(model: Model, cases: Sequence[Case], listed: Sequence[dict[str, Any]]) -> dict[str, Edit]:
    """Chapter 3's edits by pathway. Raises EditError where a file is not the one that the chapter's results list, or
    is of other weights or no case of the subject."""
    folder, texts = chapter_folder(model.name, EDITS), load_templates()
    sums = {row["file"]: row["sha256"] for row in listed}
    edits = load_all(folder)
    for name, edit in edits.items():
        path = folder / f"{name}.safetensors"
        if file_sha256(path) != sums.get(path.name):
            raise EditError(f"{path} is not the file that chapter 3 reports. Run `python -m lib run {EDITS} --force`.")
        check(model, edit)
        if edit.template not in [texts[c.template] for c in cases]:
            raise EditError(f"{path} is for {edit.template!r}, which is the template of no case of {model.name}.")
    if missing := sorted(set(sums) - {f"{name}.safetensors" for name in edits}):
        raise EditError(f"{folder} lacks {', '.join(missing)}. Run `python -m lib run {EDITS} --force`.")
    return edits


def collect(model: Model, *, progress: bool = True) -> Board:
    """Everything that the page shows. Raises what `taken`, `made_edits` and `agree` do."""
    found, seed = taken(model)
    whole = load_cases(model.name)
    cases = [trainable(model, c) for c in whole]
    edits = made_edits(model, cases, found[EDITS]["edits"])
    asked = [_ask(model, replace(c, facts=c.facts[:MOST])) for c in cases]
    weighing = _Weighing.of(model, study_facts(model, whole[0]), asked, seed)
    base = weighing.whole(model, "relation maps" if progress else None)
    seen = [[_observe(model, test)] for test in asked]
    static = [base.arrays]
    for edit in tqdm(edits.values(), desc="edits", disable=not progress):
        with applied(model, edit):
            static.append(weighing.edited(model, base, edit))
            for test, runs in zip(asked, seen, strict=True):
                runs.append(_observe(model, test, before=runs[0], layer=edit.layer))
    arrays = {key: np.stack([own[key] for own in static]) for key in base.arrays}
    for test, runs in zip(asked, seen, strict=True):
        arrays |= {f"{key}/{test.case.name}": np.stack([r.arrays[key] for r in runs]) for key in runs[0].arrays}
    patterns = {text: i for i, text in enumerate(dict.fromkeys(t for test in asked for t in test.texts))}
    held = [dict(chain.from_iterable(run.patterns.items() for run in state)) for state in zip(*seen, strict=True)]
    arrays["patterns"] = np.stack([np.concatenate([own[text] for text in patterns], -1) for own in held])
    ids, arrays["tokens"] = np.unique(arrays["tokens"], return_inverse=True)
    states = [State(name, edit.layer, found[EDITS]["pathways"][name]) for name, edit in edits.items()]
    board = Board(
        provenance={k: v for k, v in Results("dashboard", model, seed=seed).provenance.items() if k != "start"},
        states=(State(UNTOUCHED, None, {}), *states),
        cases=tuple(
            _shown(test, runs, len(case.facts), patterns, found["02_knowledge_path"]["diagnosis"].get(case.name))
            for test, runs, case in zip(asked, seen, whole, strict=True)
        ),
        texts={text: tuple(visible(model.token_text(t)) for t in model.token_ids(text)) for text in patterns},
        sources=weighing.sources,
        types=tuple(weighing.types),
        words=tuple(model.token_text(int(i)) for i in ids),
        studied=len(weighing.study),
        found=found,
        arrays={key: _small(value) for key, value in arrays.items()},
    )
    agree(board)
    return board


def agree(board: Board) -> None:
    """Where the page computes what a chapter reported, both must say the same: the mean QK overlap, the facts told, and
    the best head's patching effect, which chapter 5 measures in another way. Raises ChapterError: then the results are
    not of this model, these data or this library."""
    whole = [shown for shown in board.cases if not shown.left_out]
    rows = [("01_static_diagnostics", "qk_overlap_mean", float(board.arrays["qk_overlap"][0].mean()))]
    for shown in whole:
        count = sum(p.told[0] for p in shown.prompts if not p.control)
        rows.append(("02_knowledge_path", f"told.{shown.case.name}", float(count)))
    patched = board.arrays.get(f"patching/{board.cases[0].case.name}")
    if patched is not None and board.cases[0] in whole:
        rows.append(("05_cross_validation", "sweep_last_share", float(np.nanmean(patched[0], -1).max())))
    for chapter, key, ours in rows:
        theirs = reach(board.found[chapter], key)
        if not (isinstance(theirs, int | float) and abs(ours - theirs) <= 1e-3):
            raise ChapterError(
                f"chapter {chapter} reports {theirs} for {key}, and the model says {ours:.4g}: its results are of "
                f"other data or another library. Run `python -m lib run {chapter} --model "
                f"{board.provenance['model']} --force`."
            )


def _small(values: NDArray) -> NDArray:
    """As the page stores it: bytes, 4-byte integers, 4-byte floats."""
    if values.dtype == np.uint8:
        return values
    return values.astype(np.float32 if np.issubdtype(values.dtype, np.floating) else np.int32)


@dataclass(frozen=True)
class _Asked:
    """What is put to the model of a case. pairs: answer and competitor of each fact, by the failing prompt. untold:
    facts that the failing prompt does not tell."""

    case: Case
    templates: tuple[str, ...]
    texts: tuple[str, ...]
    pairs: Int[Tensor, "fact 2"]
    competitors: tuple[str, ...]
    untold: tuple[int, ...]

    def at(self, template: str) -> list[int]:
        """Indices of the untold facts' prompts with a template."""
        return [self.templates.index(template) * len(self.case.facts) + i for i in self.untold]


def _ask(model: Model, case: Case) -> _Asked:
    texts, names = load_templates(), tuple(dict.fromkeys((case.template, *case.controls)))
    table = tell(model, case.facts, {case.template: texts[case.template]})
    return _Asked(
        case,
        names,
        tuple(p for name in names for p in prompts(case.facts, texts[name])),
        torch.tensor(table[["answer_token", "competitor_token"]].to_numpy()),
        tuple(table.competitor),
        tuple(i for i, told in enumerate(table.told) if not told),
    )


@dataclass(frozen=True)
class _Run:
    """One state's answers to a case. arrays: (layer, head, ...). patterns: by text, (layer, head, byte). Of the
    untouched model, which the edited ones go on from: climbed, the patched rows that leave each layer; lost, the margin
    that they are a share of; and the run itself."""

    arrays: dict[str, NDArray]
    patterns: dict[str, NDArray]
    told: list[bool]
    top: list[str]
    margin: list[float]
    climbed: list[Tensor]
    lost: Tensor | None
    run: interventions.CachedRun | None


@torch.no_grad()
def _observe(model: Model, test: _Asked, *, before: _Run | None = None, layer: int = 0) -> _Run:
    """before: the untouched model's run, for a subject that is edited in a layer (0-based)."""
    kept = before.run if before else None
    run = interventions.rerun_from(model, kept, layer) if kept else interventions.run_with_cache(model, test.texts)
    pairs, bank = test.pairs.repeat(len(test.templates), 1), test.pairs[:, 0].unique()
    seen = run.capture()
    answers = logit_trace(model, seen, bank.expand(len(pairs), -1)).heads  # (prompt, bank, layer, head)
    own = answers[(bank == pairs[:, :1]).nonzero(as_tuple=True)]
    writes = own - (answers.sum(1) - own) / max(1, len(bank) - 1)
    pushes = logit_trace(model, seen, pairs).difference().heads[:, 0]
    arrays = {k: rearrange(v, "p l h -> l h p").cpu().numpy() for k, v in (("writes", writes), ("pushes", pushes))}
    climbed: list[Tensor] = []
    lost = None
    if test.untold:
        arrays["patching"], climbed, lost = _patch(model, test, run, before, layer)
    answer, wrong = run.logits.gather(1, pairs[:, :1])[:, 0], run.logits.scatter(1, pairs[:, :1], float("-inf"))
    return _Run(
        arrays,
        _bytes(model, run),
        told=(answer > wrong.amax(-1)).tolist(),
        top=[visible(model.token_text(int(t))) for t in run.logits.argmax(-1)],
        margin=interventions.logit_differences(run, pairs).tolist(),
        climbed=[] if kept else climbed,
        lost=lost,
        run=None if kept else run,
    )


def _patch(
    model: Model, test: _Asked, run: interventions.CachedRun, before: _Run | None, layer: int
) -> tuple[NDArray, list[Tensor], Tensor]:
    """Share of the margin lost by the untouched model that each head brings back (layer, head, fact), as
    `crosscheck.sweep_case` has it; the patched rows; and the margin lost."""
    weights, pairs = model.weights, test.pairs[list(test.untold)]
    bad, good = (run.take(test.at(name)) for name in (test.case.template, test.case.controls[0]))
    base = interventions.logit_differences(bad, pairs)
    lost = interventions.logit_differences(good, pairs) - base if before is None or before.lost is None else before.lost
    below = before.climbed[layer - 1] if before and layer else None
    climbed = list(interventions.patched_streams(model, bad, good.z, start=layer, below=below))
    shares = np.full((weights.n_layers, weights.n_heads, len(test.pairs)), np.nan, np.float32)
    margin = interventions.patched_logit_differences(model, climbed[-1], pairs)
    shares[..., list(test.untold)] = ((margin - base) / lost).view(*shares.shape[:2], -1).cpu().numpy()
    return shares, climbed, lost


@dataclass(frozen=True)
class _Weighed:
    """What the weights alone say, (layer, head, ...), and the relation maps behind it."""

    arrays: dict[str, NDArray]
    maps: dict[str, RelationMap]


@dataclass(frozen=True)
class _Weighing:
    """The words and facts that the weights are asked about. sources: the facts whose subjects a value channel reads;
    groups: (case, source), which of them to take the mean of."""

    study: tuple[Fact, ...]
    types: dict[str, list[int]]
    sources: tuple[Fact, ...]
    groups: Float[Tensor, "case source"]
    seed: int

    @classmethod
    def of(cls, model: Model, study: tuple[Fact, ...], asked: Sequence[_Asked], seed: int) -> _Weighing:
        sources = tuple(dict.fromkeys(f for test in asked for f in test.case.facts))
        groups = torch.tensor([[float(f in test.case.facts) for f in sources] for test in asked])
        return cls(study, load_token_types(model), sources, groups / groups.sum(1, keepdim=True), seed)

    def whole(self, model: Model, progress: str | None) -> _Weighed:
        layers = range(model.weights.n_layers)
        maps = relation_maps(model, self.study, progress=progress)
        return _Weighed(self._layers(model, layers, maps), maps)

    def edited(self, model: Model, before: _Weighed, edit: Edit) -> dict[str, NDArray]:
        """The arrays of the untouched model, with the edited layer's own; all layers where the edit is of the first
        one, whose MLP the enriched embedding passes on its way to every head."""
        if edit.layer and edit.pathway == "ffn":
            return before.arrays  # no head's weights are touched
        layers = [edit.layer] if edit.layer else list(range(model.weights.n_layers))
        new = relation_maps(model, self.study, layers=layers)
        maps = {name: _splice_map(before.maps[name], m, layers) for name, m in new.items()}
        arrays = {key: value.copy() for key, value in before.arrays.items()}
        for key, value in self._layers(model, layers, maps).items():
            arrays[key][layers] = value
        return arrays

    def _layers(self, model: Model, layers: Sequence[int], maps: dict[str, RelationMap]) -> dict[str, NDArray]:
        weights, names = model.weights, list(self.types)
        roles = head_roles(model, self.types, list(maps.values()), seed=self.seed, layers=layers)
        shape = (len(layers), weights.n_heads)
        by_type = [k_norms_by_head(weights, ids)[layers].mean(-1) for ids in self.types.values()]
        every = k_norms_by_head(weights, [i for ids in self.types.values() for i in ids])[layers].mean(-1)
        group = weights.n_heads // weights.n_kv_heads
        return {
            "qk_overlap": qk_overlap(weights)[layers].cpu().numpy(),
            "k_norm": repeat(every, "l kv -> l (kv g)", g=group).cpu().numpy(),
            "k_norm_by_type": repeat(torch.stack(by_type, -1), "l kv t -> l (kv g) t", g=group).cpu().numpy(),
            "relation": torch.stack([m.score[layers] for m in maps.values()], -1).cpu().numpy(),
            "role_numbers": roles[list(ROLE_NUMBERS)].to_numpy().reshape(*shape, -1),
            "seeks": roles.seeks.map({"none": -1, **{t: i for i, t in enumerate(names)}}).to_numpy().reshape(shape),
            "advertises": (
                roles.advertises.map({"none": -1, **{t: i for i, t in enumerate(names)}}).to_numpy().reshape(shape)
            ),
            "value": roles.value.map(VALUE_ROLES.index).to_numpy().reshape(shape),
            **_value_channels(model, self.sources, self.groups, layers),
        }


def _splice_map(old: RelationMap, new: RelationMap, layers: list[int]) -> RelationMap:
    hits = old.hits.clone()
    hits[layers] = new.hits
    return RelationMap(hits)


@torch.no_grad()
def _value_channels(
    model: Model, sources: Sequence[Fact], groups: Float[Tensor, "case source"], layers: Sequence[int]
) -> dict[str, NDArray]:
    """What each head of the layers would write on reading the enriched embedding of a subject's last token, through
    norm, W_V, W_O and the unembedding, as logits in standard deviations over the vocabulary: the TOP highest and the
    TOP lowest tokens of each subject and of each case's mean; and the rank of each subject's answer."""
    weights = model.weights
    e = enrich(weights, weights.W_E[[model.token_ids(f" {f.subject}")[-1] for f in sources]])
    answers = torch.tensor([[model.first_token(f.answer)] for f in sources])
    W_U, ids, scores, ranks = weights.norm_final.fold(weights.W_U), [], [], []
    for block in (weights.blocks[i] for i in layers):
        v = einsum(block.norm_attn(e), block.attn.per_head(block.attn.W_V), "s d, n d h -> n s h")
        for out in einsum(v, block.attn.W_O, "n s h, n h d -> n s d"):
            logits = out @ W_U
            z = (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, keepdim=True).clamp_min(1e-30)
            ranks.append((z > z.gather(1, answers)).sum(-1) + 1)
            ends = [torch.cat((z, groups @ z)).topk(TOP, -1, largest=largest) for largest in (True, False)]
            ids.append(torch.stack([end.indices for end in ends], 1))
            scores.append(torch.stack([end.values for end in ends], 1))
    parts = {"tokens": ids, "token_scores": scores, "answer_ranks": ranks}
    return {k: torch.stack(v).unflatten(0, (len(layers), -1)).cpu().numpy() for k, v in parts.items()}


def _shown(
    test: _Asked, runs: Sequence[_Run], all_facts: int, texts: dict[str, int], finding: dict[str, Any] | None
) -> Shown:
    facts = range(len(test.case.facts))
    asked = tuple(
        Prompt(
            texts[text],
            test.templates[i // len(facts)],
            i >= len(facts),
            i % len(facts),
            tuple(r.told[i] for r in runs),
            tuple(r.top[i] for r in runs),
            tuple(r.margin[i] for r in runs),
        )
        for i, text in enumerate(test.texts)
    )
    known = {p.fact for p in asked if p.control and p.told[0]}
    failing = tuple(f for f in test.untold if f in known)
    return Shown(test.case, all_facts - len(facts), test.competitors, failing or tuple(facts), asked, finding)


@torch.no_grad()
def _bytes(model: Model, run: interventions.CachedRun) -> dict[str, NDArray]:
    """Attention of every head on every prompt, by prompt: the lower triangle row by row, (layer, head, byte)."""
    blocks = zip(model.weights.blocks, run.layers, strict=True)
    whole = torch.stack([block.attn.pattern(block.norm_attn(layer.stream)) for block, layer in blocks], 1)
    out = {}
    for i, text in enumerate(run.prompts):
        rows, columns = torch.tril_indices(int(run.last[i]) + 1, int(run.last[i]) + 1)
        out[text] = (whole[i][..., rows, columns] * 255).round().to(torch.uint8).cpu().numpy()
    return out
