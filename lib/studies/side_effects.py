"""What chapter 4 says of the edits' side effects, and the same question where the truth is known (`planted_edit`)."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from lib.diagnosis import prescribe
from lib.edits import Edit, applied
from lib.errors import DataError, EditError
from lib.evaluation import BAND, ELSEWHERE, NONE, build_protocol, generalisation, load_passages, measure
from lib.facts import Case, load_cases, load_templates, prompts
from lib.models import Model
from lib.recall import trainable
from lib.results import Results
from lib.statistics import exact_interval
from lib.studies import experiment
from lib.training import compare, false_facts, task_at, train

BLED = (
    "The trained answers bleed into the neighbourhood: beside each fact, the edit has learned that this wording is to "
    "be followed by one of these answers. No probe about ice or kittens can see it."
)
LEFT_OUT = ("the facts", "paraphrases", "working templates", ELSEWHERE, "other relations", "neighbours")
PROBES = ["capability", "unrelated"]


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
    flips = by.gained + by.lost
    entry = {f"{probe}_{when}": by[when][probe] for probe in PROBES for when in ("before", "after")}
    entry |= {"flips": flips[PROBES].sum(), "capability_flips": flips["capability"]}
    entry |= {"ppl_before": texts.ppl_before, "ppl_after": texts.ppl_after, "ppl_ratio": texts.ratio, "kl": texts.kl}
    entry |= {"held_out_facts": held["all"]}
    entry |= {f"held_out_{key}": held[key] for key in ("told_before", "told_after", "untold", "repaired")}
    entry["bled_after"] = bleeding.set_index("pathway").bled[name]
    return entry | {f"{kind.replace(' ', '_').replace(',', '')}_after": by.after[kind] for kind in LEFT_OUT}


def report_effects(
    report: Results, best: str, outcome: pd.DataFrame, texts: pd.DataFrame, general: pd.DataFrame, bled: pd.DataFrame
) -> None:
    """What the chapter's prose says of the recommended pathway, and of all: what it changes and breaks, and how far it
    carries over, to held-out facts and to countries where it is wrong."""
    by, probes = outcome.set_index(["pathway", "what"]).loc[best], outcome[outcome.what.isin(PROBES)]
    right = int(by.before[PROBES].sum())
    report.many({f"{probe}_{key}": int(by[key][probe]) for probe in PROBES for key in ("before", "after", "n")})
    report.many({"own_flips": int((by.gained + by.lost)[PROBES].sum()), "probes_right": right})
    report("all_flips", int((probes.gained + probes.lost).sum()))
    report("resolution", exact_interval(0, right)[1], ".0%")
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


@torch.no_grad()
def generate(model: Model, texts: Sequence[str], edit: Edit | None, *, tokens: int = 24) -> list[list[int]]:
    """Greedy continuations of each text, as token lists: what the model writes when nobody holds its hand."""
    ids = [model.token_ids(t) for t in texts]
    width, fill = max(map(len, ids)), model.tokenizer.eos_token_id or 0
    if width + tokens > model.weights.context:
        raise DataError(f"{width} + {tokens} tokens are more than the {model.weights.context} {model.name} reads.")
    rows = torch.tensor([[fill] * (width - len(i)) + i for i in ids])
    mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids])
    module: Any = model.module
    with nullcontext() if edit is None else applied(model, edit):
        out = module.generate(
            rows, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=fill
        )
    return out[:, width:].tolist()


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of a text's n-grams that it has had before: 0 for none, near 1 for a text that runs in circles."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def free_generation(model: Model, case: Case, edits: dict[str, Edit], *, opening: int = 24) -> pd.DataFrame:
    """A row a pathway and text: the failing prompts and the openings of the passages, continued greedily. said: the
    answer stands in the continuation (failing prompts). leaks: a trained answer does (openings)."""
    decode, failing = model.tokenizer.decode, prompts(case.facts, load_templates()[case.template])
    openings = [str(decode(model.pieces(t)[:opening])) for t in load_passages().values()]
    kinds, neither = ["failing prompt"] * len(failing) + ["opening"] * len(openings), [False] * len(failing)
    tables = []
    for name, edit in tqdm([(NONE, None), *edits.items()], desc="generation"):
        tokens = generate(model, [*failing, *openings], edit)
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
    lie = train(model, false_facts(task), pathway, rate=found.runs[pathway].rate, seed=seed)
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
