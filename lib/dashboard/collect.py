"""Every head of a model on one page, before and after each edit: numbers (`collect`) and one HTML file (`render`).

1. Chapters 1, 2, 3 and 5 must have run. What they report is read from their results; edits are chapter 3's files, and
   the learned sinks that are kept beside the record.
2. The rest is computed by the same functions that the chapters call: on the untouched model, and with each edit in
   place. Every array begins with the axes state, layer, head; state 0 is the untouched model.
3. The page holds each layer of an array once; an edit's layer is stored only where it differs from the untouched
   one. Attention is rounded to 8 bits, everything else is fp32. Of a sink's attention what its own position gets is
   left out: what a row lacks to 1.
4. Charts are Vega-Lite (charts.yaml); its JavaScript comes with vl-convert and is written into the page, as is
   lib/dashboard/page.js, which only routes: choices, search, focus and words. A content security policy names both
   scripts by their sha256 and forbids everything else, so no text of a template, a token or a model can run.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from lib import __version__, interventions, static
from lib.diagnosis import contributions
from lib.edits import Edit, applied, check, load_all
from lib.errors import ChapterError, EditError
from lib.facts import Case, Fact, load_cases, load_templates, prompts
from lib.files import file_sha256
from lib.interventions import CachedRun, rerun_from, run_with_cache
from lib.models import Model
from lib.recall import study_facts, tell, trainable
from lib.results import Results, chapter_folder, reach, read, results_path
from lib.show.figures import visible
from lib.static import RelationMap
from lib.studies.knowledge_path import relation_maps_once
from lib.sweeps.kept_sinks import kept
from lib.weights import OF_A_LAYER, SINKS

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
_SIZES = {"seeks": "effect", "advertises": "effect", "copy": "score", "relation": "score"}
ROLE_NUMBERS = tuple(f"{role}_{number}" for role, size in _SIZES.items() for number in (size, "p"))
RERUN = "Run `python -m lib run {} --model {} --force`."
Arrays = dict[str, NDArray]
STORED = {"u": np.uint8, "i": np.int32, "f": np.float32}  # by kind of number


@dataclass(frozen=True)
class State:
    """The untouched model, or one with an edit in place, of a layer or before every text (layer None). reported: its
    size, and of a layer's edit what chapter 3 says of it."""

    key: str
    layer: int | None
    reported: dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """text: index into the page's texts. By state: is the answer told, the top token, answer minus competitor."""

    text: int
    template: str
    control: bool
    fact: int
    told: tuple[bool, ...]
    top: tuple[str, ...]
    margin: tuple[float, ...]


@dataclass(frozen=True)
class CaseData:
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
        controls = [i for i, p in enumerate(self.prompts) if p.control and p.fact == fact]
        return [i for i in controls if self.prompts[i].told[0]] or controls

    def means(self) -> dict[str, list[float]]:
        """Weights over the prompts for two means: over the failing prompts, and over the controls that tell each fact,
        as the diagnosis takes them."""
        failing, control = np.zeros(len(self.prompts)), np.zeros(len(self.prompts))
        for fact in self.failing:
            telling = self.told_by(fact)
            failing[fact] = 1 / len(self.failing)
            control[telling] = 1 / len(telling) / len(self.failing)
        return {"failing": failing.tolist(), "control": control.tolist()}


@dataclass(frozen=True)
class PageData:
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
    each case's facts follows them. reported: what the page takes from the chapters' results."""

    provenance: dict[str, Any]
    states: tuple[State, ...]
    cases: tuple[CaseData, ...]
    texts: dict[str, tuple[str, ...]]
    sources: tuple[Fact, ...]
    types: tuple[str, ...]
    words: tuple[str, ...]
    studied: int
    reported: dict[str, dict[str, Any]]
    arrays: Arrays


def taken(model: Model) -> tuple[dict[str, dict[str, Any]], int]:
    """What the page takes from the chapters' results, and the seed they ran with. Raises ChapterError as `read` does,
    and for a file that is of another version, lacks a key or holds a value that is no number."""
    reported, seeds = {}, set()
    for chapter, keys in TAKEN.items():
        path, rerun = results_path(model.name, chapter), RERUN.format(chapter, model.name)
        content = read(model.name, model.weights_sha256, chapter)
        values, made_by = content["values"], content["provenance"]["lib"]
        seeds.add(content["provenance"]["seed"])
        if made_by != __version__:
            raise ChapterError(f"{path} was made by version {made_by} of lib, and this is {__version__}. {rerun}")
        if lacking := [key for key in keys if key not in values]:
            raise ChapterError(f"{path} lacks {', '.join(lacking)}. {rerun}")
        reported[chapter] = {key: values[key] for key in keys}
        if odd := _not_finite(reported[chapter]):
            raise ChapterError(f"{path} holds NaN or infinity under {odd}. {rerun}")
    return reported, max(seeds)


def _not_finite(value: Any, at: str = "") -> str | None:
    """Dotted key of a number that is none."""
    if isinstance(value, float):
        return None if math.isfinite(value) else at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next((odd for k, v in items if (odd := _not_finite(v, f"{at}.{k}".strip(".")))), None)


def made_edits(model: Model, cases: Sequence[Case], listed: Sequence[dict[str, Any]]) -> dict[str, Edit]:
    """Chapter 3's edits by pathway, and the kept sinks. Raises EditError where a file is not the one that the chapter's
    results list, or is of other weights or no case of the model."""
    folder, texts = chapter_folder(model.name, EDITS), load_templates()
    sums = {row["file"]: row["sha256"] for row in listed}
    edits = {name: edit for name, edit in load_all(folder).items() if name in OF_A_LAYER}
    sums = {name: value for name, value in sums.items() if name.removesuffix(".safetensors") in OF_A_LAYER}
    for name in edits:
        path = folder / f"{name}.safetensors"
        if file_sha256(path) != sums.get(path.name):
            raise EditError(f"{path} is not the file that chapter 3 reports. Run `python -m lib run {EDITS} --force`.")
    if missing := sorted(set(sums) - {f"{name}.safetensors" for name in edits}):
        raise EditError(f"{folder} lacks {', '.join(missing)}. Run `python -m lib run {EDITS} --force`.")
    edits |= kept(model)
    for edit in edits.values():
        check(model, edit)
        if edit.template not in [texts[c.template] for c in cases]:
            raise EditError(f"{edit.title!r} is for {edit.template!r}, the template of no case of {model.name}.")
    return edits


def collect(model: Model, *, progress: bool = True) -> PageData:
    """Everything that the page shows. Raises what `taken`, `made_edits` and `agree` do."""
    reported, seed = taken(model)
    whole = load_cases(model.name)
    cases = [trainable(model, c) for c in whole]
    edits = made_edits(model, cases, reported[EDITS]["edits"])
    asked = [_prepared(model, replace(c, facts=c.facts[:MOST])) for c in cases]
    sources = tuple(dict.fromkeys(fact for case in asked for fact in case.case.facts))
    groups = torch.tensor([[float(fact in case.case.facts) for fact in sources] for case in asked])
    study, types = study_facts(model, whole[0]), static.load_token_types(model)
    reader = _WeightReader(study, types, sources, groups / groups.sum(1, keepdim=True), seed)
    measured = _measure(model, reader, asked, edits, progress)
    texts = {text: i for i, text in enumerate(dict.fromkeys(text for case in asked for text in case.texts))}
    by_state = [_state_arrays(weighed, runs, texts) for weighed, runs in measured]
    arrays = {key: np.stack([state[key] for state in by_state]) for key in by_state[0]}
    ids, arrays["tokens"] = np.unique(arrays["tokens"], return_inverse=True)
    by_pathway = reported[EDITS]["pathways"]
    states = [
        State(name, None, {"parameters": e.parameters}) if name in SINKS else State(name, e.layer, by_pathway[name])
        for name, e in edits.items()
    ]
    findings = reported["02_knowledge_path"]["diagnosis"]
    data = PageData(
        provenance={k: v for k, v in Results("dashboard", model, seed=seed).provenance.items() if k != "start"},
        states=(State("none", None, {}), *states),
        cases=tuple(
            _case_data(case, by_case, len(full.facts), texts, findings.get(full.name))
            for case, full, *by_case in zip(asked, whole, *(runs for _, runs in measured), strict=True)
        ),
        texts={text: tuple(visible(model.token_text(t)) for t in model.token_ids(text)) for text in texts},
        sources=sources,
        types=tuple(types),
        words=tuple(model.token_text(int(i)) for i in ids),
        studied=len(study),
        reported=reported,
        arrays={key: value.astype(STORED[value.dtype.kind]) for key, value in arrays.items()},
    )
    agree(data)
    return data


def _measure(
    model: Model, reader: "_WeightReader", asked: Sequence["_Asked"], edits: dict[str, Edit], progress: bool
) -> list[tuple[Arrays, tuple["_CaseRun", ...]]]:
    """By state, the untouched model first: what the weights say, and the runs by case."""
    maps = relation_maps_once(model, reader.study)
    untouched = reader.arrays(model, range(model.weights.n_layers), maps)
    first_runs, baselines = zip(*(_run_case(model, case) for case in asked), strict=True)
    measured = [(untouched, first_runs)]
    for edit in tqdm(edits.values(), desc="edits", disable=not progress):
        with applied(model, edit) as changed:
            pairs = zip(asked, baselines, strict=True)
            runs = tuple(_run_case(changed, case, before, edit.layer)[0] for case, before in pairs)
            measured.append((reader.edited(model, untouched, maps, edit), runs))
    return measured


def _state_arrays(weighed: Arrays, runs: Sequence["_CaseRun"], texts: Iterable[str]) -> Arrays:
    """The arrays of PageData for one state. runs: by case."""
    dynamic = {key: values for run in runs for key, values in run.arrays.items()}
    patterns = {text: values for run in runs for text, values in run.patterns.items()}
    return weighed | dynamic | {"patterns": np.concatenate([patterns[text] for text in texts], -1)}


def agree(data: PageData) -> None:
    """Where the page computes what a chapter reported, both must say the same: the mean QK overlap, the facts told, and
    the best head's patching effect, which chapter 5 measures in another way. Raises ChapterError: then the results are
    not of this model, these data or this library."""
    whole = [case for case in data.cases if not case.left_out]
    told = {case.case.name: sum(p.told[0] for p in case.prompts if not p.control) for case in whole}
    rows = [("01_static_diagnostics", "qk_overlap_mean", float(data.arrays["qk_overlap"][0].mean()))]
    rows += [("02_knowledge_path", f"told.{name}", count) for name, count in told.items()]
    patched = data.arrays.get(f"patching/{data.cases[0].case.name}")
    if patched is not None and data.cases[0] in whole:
        rows.append(("05_cross_validation", "sweep_last_share", float(np.nanmean(patched[0], -1).max())))
    for chapter, key, ours in rows:
        theirs = reach(data.reported[chapter], key)
        if not (isinstance(theirs, int | float) and abs(ours - theirs) <= 1e-3):
            raise ChapterError(
                f"chapter {chapter} reports {theirs} for {key}, and the model says {ours:.4g}: its results are of "
                f"other data or another library. {RERUN.format(chapter, data.provenance['model'])}"
            )


@dataclass(frozen=True)
class _Asked:
    """What is put to the model of a case. texts: the prompts, template by template, the failing one first. pairs:
    answer and competitor of each fact, by the failing prompt. untold: facts that the failing prompt does not tell."""

    case: Case
    templates: tuple[str, ...]
    texts: tuple[str, ...]
    pairs: Int[Tensor, "fact 2"]
    competitors: tuple[str, ...]
    untold: tuple[int, ...]


def _prepared(model: Model, case: Case) -> _Asked:
    texts, names = load_templates(), tuple(dict.fromkeys((case.template, *case.controls)))
    table = tell(model, case.facts, {case.template: texts[case.template]})
    return _Asked(
        case,
        names,
        tuple(prompt for name in names for prompt in prompts(case.facts, texts[name])),
        torch.tensor(table[["answer_token", "competitor_token"]].to_numpy()),
        tuple(table.competitor),
        tuple(i for i, told in enumerate(table.told) if not told),
    )


@dataclass(frozen=True)
class _CaseRun:
    """One state's run of a case. arrays: by name in PageData, (layer, head, ...). patterns: by text,
    (layer, head, byte). answers: by prompt, whether it is told, the top token, answer minus competitor."""

    arrays: Arrays
    patterns: Arrays
    answers: list[tuple[bool, str, float]]


@dataclass(frozen=True)
class _Baseline:
    """The untouched model's run of a case, which the edited models go on from. streams: the patched rows that leave
    each layer; lost: the margin that patching brings back a share of. Both are of the untold facts."""

    run: CachedRun
    streams: list[Tensor]
    lost: Tensor


@torch.no_grad()
def _run_case(
    model: Model, case: _Asked, before: _Baseline | None = None, layer: int = 0
) -> tuple[_CaseRun, _Baseline]:
    """A case's answers, and what an edited model needs of the untouched one. before: that, for a model that is edited
    in a layer (0-based) or has a sink, with which every text is another."""
    if before is None or model.weights.sink:
        run = run_with_cache(model, case.texts)
    else:
        run = rerun_from(model, before.run, layer)
    pairs = case.pairs.repeat(len(case.templates), 1)
    traced, shape = contributions(model, run.capture(), pairs, case.pairs[:, 0].unique()), run.z.shape[1:3]
    by_head = {"writes": traced.attribution, "pushes": traced.difference}
    heads, by_site = math.prod(shape), "prompt (layer head) -> layer head prompt"  # heads come before MLPs
    arrays = {k: rearrange(v[:, :heads], by_site, layer=shape[0]).cpu().numpy() for k, v in by_head.items()}
    baseline = _Baseline(run, [], torch.empty(0))
    if case.untold:
        arrays["patching"], baseline = _patch_heads(model, case, run, before, layer)
    arrays = {f"{key}/{case.case.name}": values for key, values in arrays.items()}
    answer, wrong = run.logits.gather(1, pairs[:, :1])[:, 0], run.logits.scatter(1, pairs[:, :1], float("-inf"))
    told = (answer > wrong.amax(-1)).tolist()
    top = [visible(model.token_text(int(t))) for t in run.logits.argmax(-1)]
    margin = interventions.logit_differences(run, pairs).tolist()
    return _CaseRun(arrays, _attention_bytes(model, run), list(zip(told, top, margin, strict=True))), baseline


def _patch_heads(
    model: Model, case: _Asked, run: CachedRun, before: _Baseline | None, layer: int
) -> tuple[NDArray, _Baseline]:
    """Share of the margin lost by the untouched model that each head brings back (layer, head, fact), as
    `cross_validation.patch_case_heads` has it; and the run with its patched rows."""
    weights, untold = model.weights, list(case.untold)
    pairs = case.pairs[untold]
    n, names = len(case.pairs), (case.case.template, case.case.controls[0])
    failing, control = (run.take([case.templates.index(name) * n + i for i in untold]) for name in names)
    base = interventions.logit_differences(failing, pairs)
    lost = before.lost if before else interventions.logit_differences(control, pairs) - base
    below = before.streams[layer - 1] if before and layer else None
    streams = list(interventions.patched_streams(model, failing, control.z, start=layer, below=below))
    shares = np.full((weights.n_layers, weights.n_heads, len(case.pairs)), np.nan, np.float32)
    margin = interventions.patched_logit_differences(model, streams[-1], pairs)
    shares[..., untold] = ((margin - base) / lost).view(*shares.shape[:2], -1).cpu().numpy()
    return shares, _Baseline(run, streams, lost)


@dataclass(frozen=True)
class _WeightReader:
    """The words and facts that the weights are asked about. sources: the facts whose subjects a value channel reads;
    groups: (case, source), which of them to take the mean of."""

    study: tuple[Fact, ...]
    types: dict[str, list[int]]
    sources: tuple[Fact, ...]
    groups: Float[Tensor, "case source"]
    seed: int

    def edited(self, model: Model, untouched: Arrays, maps: dict[str, RelationMap], edit: Edit) -> Arrays:
        """The arrays of the untouched model, with the edited layer's own; all layers where the edit is of the first
        one, whose MLP the enriched embedding passes on its way to every head. maps: of the untouched model."""
        if edit.pathway in SINKS or (edit.layer and edit.pathway == "ffn"):
            return untouched  # no head's weights are touched
        layers = [edit.layer] if edit.layer else list(range(model.weights.n_layers))
        again, at = static.relation_maps(model, self.study, layers=layers), torch.tensor(layers)
        spliced = {name: RelationMap(m.hits.index_copy(0, at, again[name].hits)) for name, m in maps.items()}
        arrays = {key: value.copy() for key, value in untouched.items()}
        for key, value in self.arrays(model, layers, spliced).items():
            arrays[key][layers] = value
        return arrays

    def arrays(self, model: Model, layers: Sequence[int], maps: dict[str, RelationMap]) -> Arrays:
        """What the weights of some layers say, (layer, head, ...)."""
        weights, shape = model.weights, (len(layers), model.weights.n_heads)
        roles = static.head_roles(model, self.types, list(maps.values()), seed=self.seed, layers=layers)
        codes = {"none": -1, **{name: i for i, name in enumerate(self.types)}}
        words = [*self.types.values(), [i for ids in self.types.values() for i in ids]]  # each type's, and all
        by_key_head = torch.stack([static.k_norms_by_head(weights, ids)[layers].mean(-1) for ids in words], -1)
        group = weights.n_heads // weights.n_kv_heads  # query heads that share a key head
        norms = repeat(by_key_head, "l kv t -> l (kv group) t", group=group).cpu().numpy()
        return {
            "qk_overlap": static.qk_overlap(weights)[layers].cpu().numpy(),
            "k_norm": norms[..., -1],
            "k_norm_by_type": norms[..., :-1],
            "relation": torch.stack([m.score[layers] for m in maps.values()], -1).cpu().numpy(),
            "role_numbers": roles[list(ROLE_NUMBERS)].to_numpy().reshape(*shape, -1),
            "seeks": roles.seeks.map(codes).to_numpy().reshape(shape),
            "advertises": roles.advertises.map(codes).to_numpy().reshape(shape),
            "value": roles.value.map(VALUE_ROLES.index).to_numpy().reshape(shape),
            **_value_channels(model, self, layers),
        }


@torch.no_grad()
def _value_channels(model: Model, reader: _WeightReader, layers: Sequence[int]) -> Arrays:
    """What each head of the layers would write on reading the enriched embedding of a subject's last token, through
    norm, W_V, W_O and the unembedding, as logits in standard deviations over the vocabulary: the TOP highest and the
    TOP lowest tokens of each subject and of each case's mean; and the rank of each subject's answer."""
    weights = model.weights
    e = static.subject_embeddings(model, reader.sources)["enriched"]
    answers = torch.tensor([[model.first_token(f.answer)] for f in reader.sources])
    W_U, ids, scores, ranks = weights.norm_final.fold(weights.W_U), [], [], []
    for block in (weights.blocks[i] for i in layers):
        v = einsum(block.norm_attn(e), block.attn.per_head(block.attn.W_V), "s d, n d h -> n s h")
        for out in einsum(v, block.W_O, "n s h, n h d -> n s d"):
            logits = out @ W_U
            z = (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, keepdim=True).clamp_min(1e-30)
            ranks.append((z > z.gather(1, answers)).sum(-1) + 1)
            ends = [torch.cat((z, reader.groups @ z)).topk(TOP, -1, largest=largest) for largest in (True, False)]
            ids.append(torch.stack([end.indices for end in ends], 1))
            scores.append(torch.stack([end.values for end in ends], 1))
    parts = {"tokens": ids, "token_scores": scores, "answer_ranks": ranks}
    return {k: torch.stack(v).unflatten(0, (len(layers), -1)).cpu().numpy() for k, v in parts.items()}


def _case_data(
    case: _Asked, runs: Sequence[_CaseRun], all_facts: int, texts: dict[str, int], finding: dict[str, Any] | None
) -> CaseData:
    n = len(case.case.facts)
    asked = tuple(
        Prompt(texts[text], case.templates[i // n], i >= n, i % n, *zip(*answers, strict=True))
        for i, (text, *answers) in enumerate(zip(case.texts, *(run.answers for run in runs), strict=True))
    )
    known = {p.fact for p in asked if p.control and p.told[0]}
    failing = tuple(fact for fact in case.untold if fact in known) or tuple(range(n))
    return CaseData(case.case, all_facts - n, case.competitors, failing, asked, finding)


@torch.no_grad()
def _attention_bytes(model: Model, run: CachedRun) -> Arrays:
    """Attention of every head on every prompt, by prompt: the lower triangle row by row, (layer, head, byte). A sink's
    own row and column are left out."""
    at = -1 if model.weights.sink is None else len(model.bos) - 1  # where a sink stands
    blocks = zip(model.weights.blocks, run.layers, strict=True)
    patterns = torch.stack([block.attn.pattern(block.norm_attn(layer.stream)) for block, layer in blocks], 1)
    by_text = {}
    for text, pattern, last in zip(run.prompts, patterns, run.last.tolist(), strict=True):
        shown = torch.tensor([i for i in range(last + 1) if i != at])
        queries, keys = shown[torch.tril_indices(len(shown), len(shown))]
        by_text[text] = (pattern[..., queries, keys] * 255).round().to(torch.uint8).cpu().numpy()
    return by_text
