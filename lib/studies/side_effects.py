"""What chapter 4 says of the edits' side effects, and the same question where the truth is known (`planted_edit`)."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from lib import evaluation
from lib.diagnosis import prescribe
from lib.edits import Edit, applied
from lib.errors import DataError, EditError
from lib.evaluation import (
    BAND,
    CAPABILITY,
    ELSEWHERE,
    NONE,
    Measured,
    build_protocol,
    generalisation,
    load_passages,
    measure,
)
from lib.facts import Case, load_cases, load_templates, prompts
from lib.files import BUILD, ROOT, digest, modules, write_atomically
from lib.forward import Pack, Streams, resid_post
from lib.models import Model
from lib.recall import trainable
from lib.results import Results
from lib.statistics import exact_interval
from lib.studies import experiment
from lib.training import compare, false_facts, sink_task, task_at, train
from lib.weights import SINKS

BLED = (
    "The trained answers bleed into the neighbourhood: beside each fact, the edit has learned that this wording is to "
    "be followed by one of these answers. No probe about ice or kittens can see it."
)
LEFT_OUT = ("the facts", "paraphrases", "working templates", ELSEWHERE, "other relations", "neighbours")
PROBES = ["capability", "unrelated"]
INTERVALS = {"capability": "capability", "every": CAPABILITY}  # kinds whose share lost is kept with its interval


def report_planted(report: Results, table: pd.DataFrame) -> None:
    """What the chapter's prose says of the planted control."""
    told = table[table.told_after == table.facts]
    whole, part = told[told.repaired == told.untold], told[told.repaired < told.untold]
    names = [f"{row.pathway.replace('_', ' ')} ({row.case})" for row in whole.itertuples()]
    report.many({"planted_cases": table.case.nunique(), "planted_untold": int(table.untold.min())})
    report.many({"planted_whole": names or "none", "planted_told": len(told), "planted_part": len(part)})
    report("planted_part_most", int(part.repaired.max()) if len(part) else 0)


def pathway_entry(
    name: str, outcome: pd.DataFrame, texts: pd.DataFrame, general: pd.DataFrame, bleeding: pd.DataFrame
) -> dict[str, Any]:
    """What results keep of a pathway, from `evaluation`'s tables: outcomes, perplexity, generalisation, bleeding."""
    by, texts = outcome[outcome.pathway == name].set_index("what"), texts.set_index("pathway").loc[name]
    held = general[(general.pathway == name) & (general.split == "held_out")].iloc[0]
    flips, every = by.gained + by.lost, by.loc[CAPABILITY]
    entry = {f"{probe}_{when}": by[when][probe] for probe in PROBES for when in ("before", "after")}
    entry |= {"flips": flips[PROBES].sum(), "capability_flips": flips["capability"]}
    entry |= {f"every_{key}": every[key] for key in ("n", "before", "after", "gained", "lost", "p")}
    entry |= {f"{what}_lost_interval": (by.lost_low[k], by.lost_high[k]) for what, k in INTERVALS.items()}
    entry |= {"ppl_before": texts.ppl_before, "ppl_after": texts.ppl_after, "ppl_ratio": texts.ratio, "kl": texts.kl}
    entry |= {"held_out_facts": held["all"]}
    entry |= {f"held_out_{key}": held[key] for key in ("told_before", "told_after", "untold", "repaired")}
    entry["bled_after"] = bleeding.set_index("pathway").bled[name]
    return entry | {f"{kind.replace(' ', '_').replace(',', '')}_after": by.after[kind] for kind in LEFT_OUT}


def report_probes(report: Results, by: pd.DataFrame, outcome: pd.DataFrame) -> None:
    """The source page's 25 probes, and all of capability. by: the recommended pathway's outcomes, by kind."""
    probes, all_probes = (outcome[outcome.what.isin(kinds)] for kinds in (PROBES, [CAPABILITY]))
    right, every, most = int(by.before[PROBES].sum()), by.loc[CAPABILITY], all_probes.set_index("pathway").lost
    report.many({f"{probe}_{key}": int(by[key][probe]) for probe in PROBES for key in ("before", "after", "n")})
    report.many({"own_flips": int((by.gained + by.lost)[PROBES].sum()), "probes_right": right})
    report("all_flips", int((probes.gained + probes.lost).sum()))
    report("resolution", exact_interval(0, right)[1], ".0%")
    report.many({f"every_{key}": int(every[key]) for key in ("n", "before", "after", "gained", "lost")})
    report("every_lost_interval", (float(every.lost_low), float(every.lost_high)), ".0%")
    report.many({"every_most_lost": int(most.max()), "every_most_lost_by": str(most.idxmax()).replace("_", " ")})
    report("every_most_lost_p", float(all_probes.set_index("pathway").p[most.idxmax()]), ".2f")


def report_effects(
    report: Results, best: str, outcome: pd.DataFrame, texts: pd.DataFrame, general: pd.DataFrame, bled: pd.DataFrame
) -> None:
    """What the chapter's prose says of the recommended pathway, and of all: what it changes and breaks, and how far it
    carries over, to held-out facts and to countries where it is wrong."""
    by = outcome.set_index(["pathway", "what"]).loc[best]
    report_probes(report, by, outcome)
    for key, kind in (("other_relations", "other relations"), ("elsewhere", ELSEWHERE)):
        report(key, [int(by.gained[kind]), int(by.lost[kind])])
    report.many({"elsewhere_n": int(by.n[ELSEWHERE]), "neighbours": int(by.n["neighbours"])})
    report("neighbours_lost", int(by.lost["neighbours"]))
    ppl = texts.set_index("pathway").loc[best]
    report.many({"ppl_before": (ppl.ppl_before, ".2f"), "ppl_after": (ppl.ppl_after, ".2f")})
    report.many({"ppl_change": (ppl.ratio - 1, "+.2%"), "ppl_tokens": (int(ppl.tokens), ",")})
    report("ppl_interval", (float(ppl.ratio_low - 1), float(ppl.ratio_high - 1)), "+.2%")
    report("ppl_within", "within" if abs(ppl.ratio - 1) <= BAND else "not within")
    held = general[general.split == "held_out"].set_index("pathway")
    row, most, wrong = held.loc[best], held.repaired.max(), bled.set_index("pathway").bled
    bleeds = bool(wrong[best] > 2 * max(1, wrong[NONE]))  # more than twice as often as without an edit
    report.many({key: int(row[key]) for key in ("untold", "repaired", "best_control")})
    report("repaired_share", row.repaired / max(1, row.untold), ".0%")
    report.many({"repaired_interval": ((float(row.low), float(row.high)), ".0%"), "repaired_most": int(most)})
    report("repaired_most_by", str(held.repaired.idxmax()).replace("_", " "))
    report("repaired_verdict", "most" if 2 * most >= held.untold.max() else "a minority")
    report.many({"bled_before": int(wrong[NONE]), "bled_after": int(wrong[best])})
    report.many({"bled_prompts": int(bled.prompts.iloc[0]), "bleeds": bleeds})
    report("bled_lesson", BLED if bleeds else "The trained answers stay where they belong.")


def noise_control(model: Model, case: Case, edits: dict[str, Edit], measured: Measured, *, seed: int = 0) -> Measured:
    """Beside each edit, a random change of the same slices and size (`evaluation.noise`). Its figures and tables read
    what other countries are answered under the failing template; nothing else is asked of it. measured: with what the
    untouched model answers."""
    asked = measured.asked[NONE].query("set == 'large' and template == @case.template")
    (layer,) = {edit.layer for edit in edits.values()}
    protocol = build_protocol(model, case, layer, texts={}, table=asked)
    changed = {name: evaluation.noise(model, edit, seed=seed) for name, edit in edits.items()}
    return measure(model, protocol, changed, passages=False, beside=measured)


@torch.no_grad()
def kept_streams(model: Model, texts: Pack, layers: Sequence[int]) -> Streams:
    """`forward.streams` of the untouched model, for the texts that two chapters read, at layers of their own: what one
    has run, the other goes on from. Kept on disk under the sha256 of model, texts and code."""
    made_of = (model.weights_sha256, str(model.weights.W_E.dtype), torch.get_num_threads(), torch.__version__)
    inputs = json.dumps([*made_of, texts.tokens.tolist(), texts.before])
    path = BUILD / "kept" / f"streams-{digest(modules({'forward'}, ROOT), inputs, ROOT)}.safetensors"
    kept = {int(layer): x.to(model.device) for layer, x in load(path.read_bytes()).items()} if path.is_file() else {}
    found = {0: model.weights.embed(texts.tokens, texts.position), **kept}
    for layer in sorted(set(layers) - set(found)):
        reached = max(x for x in found if x < layer)
        found[layer] = found[reached]
        for below in range(reached, layer):
            found[layer] = resid_post(model, texts, found[layer], below)
    if set(found) != {0, *kept}:
        write_atomically(path, save({str(layer): x.contiguous().cpu() for layer, x in found.items() if layer}))
    return {layer: found[layer] for layer in layers}


@torch.no_grad()
def generate(model: Model, texts: Sequence[str], edit: Edit | None, *, tokens: int = 24) -> list[list[int]]:
    """Greedy continuations of each text, as token lists: what the model writes on its own."""
    module: Any = model.module
    with nullcontext(model) if edit is None else applied(model, edit) as changed:
        ids = [changed.token_ids(t) for t in texts]
        width, fill = max(map(len, ids)), model.tokenizer.eos_token_id or 0
        if width + tokens > model.weights.context:
            raise DataError(f"{width} + {tokens} tokens are more than the {model.weights.context} {model.name} reads.")
        rows = torch.tensor([[fill] * (width - len(i)) + i for i in ids])
        mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids])
        out = module.generate(
            rows, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=fill
        )
    return out[:, width:].tolist()


@contextmanager
def side_by_side(model: Model, edits: Sequence[Edit | None]) -> Iterator[None]:
    """A batch is read in as many equal parts as there are edits, each with its own (None: with none): the weights of
    all other layers are fetched once for all of them. Afterwards the model is what it was."""
    own = [layer for i in {e.layer for e in edits if e} for layer in _own_weights(model.weights.blocks[i].module)]
    copies = []
    for edit in edits:
        with nullcontext() if edit is None else applied(model, edit):
            copies.append(deepcopy(own))
    try:
        for module, *variants in zip(own, *copies, strict=True):
            module.forward = partial(_part_by_part, variants)
        yield
    finally:
        for module in own:
            module.__dict__.pop("forward", None)


def _own_weights(block: nn.Module) -> list[nn.Module]:
    """The modules within a block that hold parameters themselves."""
    return [module for module in block.modules() if next(module.parameters(recurse=False), None) is not None]


def _part_by_part(variants: Sequence[nn.Module], batch: Tensor) -> Tensor:
    parts = zip(variants, batch.chunk(len(variants)), strict=True)
    return torch.cat([variant(part) for variant, part in parts])


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of a text's n-grams that it has had before: 0 for none, near 1 for a text that runs in circles."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def free_generation(model: Model, case: Case, edits: dict[str, Edit], *, opening: int = 24) -> pd.DataFrame:
    """A row a pathway and text: the failing prompts and the openings of the passages, continued greedily. said: the
    answer stands in the continuation (failing prompts). leaks: a trained answer does (openings)."""
    decode, failing = model.tokenizer.decode, prompts(case.facts, load_templates()[case.template])
    variants: dict[str, Edit | None] = {NONE: None, **edits}
    openings = [str(decode(model.pieces(t)[:opening])) for t in load_passages().values()]
    kinds, neither = ["failing prompt"] * len(failing) + ["opening"] * len(openings), [False] * len(failing)
    beside, texts = {n: e for n, e in variants.items() if e is None or e.pathway not in SINKS}, [*failing, *openings]
    with side_by_side(model, list(beside.values())):
        written, tables = generate(model, texts * len(beside), None), []
    written += [ids for name in variants if name not in beside for ids in generate(model, texts, variants[name])]
    for i, name in enumerate([*beside, *(name for name in variants if name not in beside)]):
        tokens = written[i * len(kinds) : (i + 1) * len(kinds)]
        texts = [str(decode(ids)) for ids in tokens]
        table = pd.DataFrame({"pathway": name, "kind": kinds, "prompt": [*failing, *openings], "text": texts})
        said = [f.answer in text for f, text in zip(case.facts, texts, strict=False)] + [False] * len(openings)
        leaks = neither + [any(f.answer in text for f in case.facts) for text in texts[len(failing) :]]
        tables.append(table.assign(said=said, leaks=leaks, repetition=[repetition(ids) for ids in tokens]))
    return pd.concat(tables, ignore_index=True)


@experiment
def planted_edit(model: Model, *, case: int, pathway: str, seed: int = 0) -> dict[str, Any]:
    """The same training and the same held-out question where the truth is known: on the organism, whose failures are
    failures of routing because they were planted as such. case: counted from 1. What is told after, how many held-out
    facts are repaired, and whether the same recipe tells false facts. Raises EditError for a case that is not there."""
    listed = load_cases(model.name)
    if not 1 <= case <= len(listed):
        raise EditError(f"there is no case {case}: {model.name} has {len(listed)}, from 1.")
    planted = trainable(model, listed[case - 1])
    task = task_at(model, planted, prescribe(model, planted).knowledge_head.layer)
    found = compare(model, task, seed=seed, pathways=[pathway], progress=False)
    lie = train(
        model,
        false_facts(sink_task(model, task) if pathway in SINKS else task),
        pathway,
        rate=found.runs[pathway].rate,
        seed=seed,
    )
    asked = measure(model, build_protocol(model, planted, task.layer, texts={}), found.edits, passages=False)
    held = generalisation(asked, planted).query("split == 'held_out'").iloc[0] if found.edits else None
    return {
        "title": planted.title,
        "facts": len(task.facts),
        "told_before": sum(task.told_before),
        "told_after": sum(found.edits[pathway].told_after) if found.edits else 0,  # a diverged training leaves none
        "untold": 0 if held is None else int(held.untold),
        "repaired": 0 if held is None else int(held.repaired),
        "false_told": int(lie.outcome["told"]),
        "false_reached": lie.reached,
    }


def planted_control(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a case and pathway, from the sweep `planted`."""
    return runs.drop(columns=["case", "seed"]).rename(columns={"title": "case"})
