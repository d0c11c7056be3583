"""Side effects of an edit: the source page's 25 probes, and what "zero side effects" leaves out.

    probes          15 of general capability and 10 of unrelated tasks, item by item: which were right and are wrong now
    passages        perplexity, and KL from the untouched model, on texts that no training saw
    other relations of the same countries: does "France's currency is the" still say what it said?
    other templates of the same facts: those that fail too (paraphrases), and those that worked
    neighbours      countries that no edit was trained on, told before: still told?
    generalisation  countries known and not told, on which no edit was trained: how many does an edit make told?
    generation      text written freely after the edit: does the answer stand in it, does it run in circles?

Every question is asked of the untouched model and of each edit. All edits are of one layer, so what enters it is
computed once (`replay`). Efficacy, paraphrase and locality are Meng et al.'s (2022) words; that edits leak into other
relations of the same subject is reported by Liu et al. (2024) and Cohen et al. (2024).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from huggingface_hub import HfApi, hf_hub_download
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from lib.edits import Edit, applied
from lib.errors import DataError, EditError
from lib.facts import Case, Fact, load_templates, prompts
from lib.files import DATA, file_sha256
from lib.forward import Pack, above, pack, packs, streams
from lib.models import Model
from lib.recall import scorable
from lib.statistics import block_interval, exact_interval, gaussian, paired
from lib.training import slice_values

WINDOW = 512  # tokens of a passage read at once, or as many as the model reads
BLOCK = 32  # tokens of a block of the bootstrap: neighbouring tokens are not independent
BAND = 0.01  # a change of perplexity that this book calls small
ELSEWHERE = "working templates, other facts"
WIKITEXT = (  # repository, revision, file
    "Salesforce/wikitext",
    "b08601e04326c79dfdd32d625aee71d232d685c3",
    "wikitext-2-raw-v1/test-00000-of-00001.parquet",
)
NONE = "none"  # the pathway of the untouched model


@dataclass(frozen=True)
class Protocol:
    """All that is asked of each edit. questions: a row a prompt (set, item, template, subject, answer, split, prompt,
    answer_token). The streams are those that enter the edited layer."""

    layer: int
    questions: pd.DataFrame
    prompts: list[tuple[Pack, Float[Tensor, "t d_model"]]]
    passages: list[tuple[str, Pack, Float[Tensor, "t d_model"], Float[Tensor, "t d_model"]]]  # and the untouched final


@dataclass(frozen=True)
class Measured:
    """The outcome for each pathway and for `none`. asked: the questions with told, prob, top, margin. tokens: a row a
    token of the passages (passage, block, nll, kl)."""

    asked: dict[str, pd.DataFrame]
    tokens: dict[str, pd.DataFrame]

    @property
    def names(self) -> list[str]:
        return [name for name in self.asked if name != NONE]


def load_probes() -> pd.DataFrame:
    """The frozen probes: set (capability, unrelated), item, kind, prompt, answer."""
    content = yaml.safe_load((DATA / "probes.yaml").read_text(encoding="utf-8"))
    parts = [pd.DataFrame(content[name]).assign(set=name) for name in ("capability", "unrelated")]
    return pd.concat(parts).rename(columns={"id": "item"})[["set", "item", "kind", "prompt", "answer"]]


def load_relations(model: Model, facts: Sequence[Fact]) -> pd.DataFrame:
    """Other relations of the facts' subjects: item (the relation), template (its text), subject, answer. The organism
    brings its own."""
    if model.name != "organism":
        table = pd.read_csv(DATA / "relations.csv", keep_default_na=False)
        return table[table.subject.isin([f.subject for f in facts])].rename(columns={"relation": "item"})
    templates = json.loads((DATA / "organism" / "planted.json").read_text(encoding="utf-8"))["relation_templates"]
    table = pd.read_csv(DATA / "organism" / "relations.csv")
    table = table[table.subject.isin([f.subject for f in facts])].rename(columns={"relation": "item"})
    return pd.concat([table[table["item"] == r].assign(template=t) for r, ts in templates.items() for t in ts.values()])


def questions(model: Model, case: Case) -> pd.DataFrame:
    """Everything with one right next token. set: capability, unrelated, relations, eight (the case's facts under every
    template), large (the other scorable facts under the failing template and the controls)."""
    templates = load_templates()
    own = {f.subject for f in case.facts}
    large = [f for f in scorable(model, case.large) if f.subject not in own and f.split != "eight"]
    relations = load_relations(model, case.facts)
    filled = [t.replace("{}", s) for t, s in zip(relations.template, relations.subject, strict=True)]
    parts = [load_probes(), relations.assign(set="relations", prompt=filled)]
    for name, facts, used in (("eight", case.facts, templates), ("large", large, (case.template, *case.controls))):
        rows = pd.DataFrame(facts).assign(set=name)
        parts += [rows.assign(template=t, prompt=prompts(facts, templates[t])) for t in used]
    table = pd.concat(parts, ignore_index=True).fillna("")
    return table.assign(answer_token=[model.first_token(a) for a in table.answer])


def build_protocol(
    model: Model, case: Case, layer: int, *, texts: dict[str, str] | None = None, table: pd.DataFrame | None = None
) -> Protocol:
    """Run everything below the layer once. texts, table: as in `build_protocols`."""
    return build_protocols(model, case, [layer], texts=texts, table=table)[layer]


@torch.no_grad()
def build_protocols(
    model: Model,
    case: Case,
    layers: Sequence[int],
    *,
    texts: dict[str, str] | None = None,
    table: pd.DataFrame | None = None,
) -> dict[int, Protocol]:
    """A protocol for edits of each of some layers, from one run of the model; the layer that would follow the last one
    stands for changes of the logits alone. texts: passages by name; the book's own if none are given. table: the part
    of `questions` to ask; all, if not given."""
    table = questions(model, case) if table is None else table.reset_index(drop=True)
    end, passages = model.weights.n_layers, []
    asked = list(packs(model, [model.token_ids(p) for p in table.prompt], share=True))
    enter = [(p, streams(model, p, layers)) for p in tqdm(asked, desc="questions", leave=False)]
    for name, text in tqdm((load_passages() if texts is None else texts).items(), desc="passages", leave=False):
        ids, room = model.token_ids(text), min(WINDOW, model.weights.context)
        for some in (pack(model, [ids[i : i + room]]) for i in range(0, len(ids) - 1, room)):
            found = streams(model, some, [*layers, end])
            passages.append((name, some, found, model.weights.norm_final_module(found[end])))
    return {
        layer: Protocol(
            layer,
            table,
            [(p, found[layer]) for p, found in enter],
            [(name, some, found[layer], final) for name, some, found, final in passages],
        )
        for layer in layers
    }


def load_passages() -> dict[str, str]:
    """The book's own passages, by genre. Raises DataError where there is none."""
    found = sorted((DATA / "passages").glob("measure_*.txt"))
    if not found:
        raise DataError(f"{DATA / 'passages'} holds no measure_*.txt.")
    return {p.stem.removeprefix("measure_"): p.read_text(encoding="utf-8") for p in found}


def load_wikitext(articles: int = 10) -> dict[str, str]:
    """The first articles of WikiText-2's test set, from the hub at a pinned revision, checked against the checksum that
    the revision records. Raises DataError where the hub cannot be reached or the file is not what it should be."""
    repo, revision, name = WIKITEXT
    try:
        info: Any = HfApi().get_paths_info(repo, name, repo_type="dataset", revision=revision)[0]
        path = Path(hf_hub_download(repo, name, repo_type="dataset", revision=revision))
    except Exception as error:  # offline, moved, no permission: the remedy is the same
        raise DataError(
            f"WikiText-2 cannot be had ({type(error).__name__}): the model hub is out of reach. Run the chapter with "
            "wikitext = False, on the book's own passages."
        ) from error
    if file_sha256(path) != info.lfs.sha256:
        raise DataError(f"{path} is not what revision {revision[:12]} records; delete it and run again.")
    text = "".join(pd.read_parquet(path).text)
    found = re.split(r"(?m)^ (?== [^=]+ =\s*$)", text)[1 : articles + 1]
    return {part.split("=")[1].strip(): part for part in found}


@torch.no_grad()
def score_questions(
    model: Model, protocol: Protocol, edit: Edit | None, *, bias: Float[Tensor, " vocab"] | None = None
) -> pd.DataFrame:
    """The questions, each with told, prob (of the answer), top (the token said) and margin (in logits). bias: added to
    all logits."""
    rows, answers, done = [], torch.tensor(protocol.questions.answer_token.to_numpy()), 0
    for some, stream in protocol.prompts:
        final = above(model, some, protocol.layer, stream, _values(protocol, edit), some.last)
        logits = final @ model.weights.W_U + (0 if bias is None else bias)
        own = answers[done : (done := done + len(logits)), None]
        right = logits.gather(1, own)[:, 0]
        wrong = logits.scatter(1, own, float("-inf")).amax(1)
        rows.append(torch.stack((right - wrong, (right - logits.logsumexp(-1)).exp(), logits.argmax(-1).float()), 1))
    margin, prob, top = torch.cat(rows).T.cpu().numpy()
    said = [model.token_text(int(t)) for t in top]
    return protocol.questions.assign(told=margin > 0, prob=prob, margin=margin, top=said)


@torch.no_grad()
def score_passages(
    model: Model,
    protocol: Protocol,
    edits: Mapping[str, Edit | None],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    divergence: bool = True,
) -> dict[str, pd.DataFrame]:
    """For each edit, a row a predicted token of the passages: passage, block, nll and kl (untouched || edited), in
    nats. bias: added to all logits. divergence: False leaves kl out (NaN), which takes half of the time where little is
    run again. Passage by passage: the untouched model's logits are computed once for all edits, and never kept."""
    parts, start, W_U = {key: list[pd.DataFrame]() for key in edits}, 0, model.weights.W_U
    for name, some, stream, untouched in tqdm(protocol.passages, desc="passages", leave=False, disable=len(edits) < 2):
        base = _weighed(untouched[:-1] @ W_U) if divergence else None
        block = start + np.arange(len(some.tokens) - 1) // BLOCK
        start = int(block[-1]) + 1
        for key, edit in edits.items():
            final = above(model, some, protocol.layer, stream, _values(protocol, edit))[:-1]
            now = final @ W_U + (0 if bias is None else bias)
            normaliser = now.logsumexp(-1)
            nll = normaliser - now.gather(1, some.tokens[1:, None])[:, 0]
            kl = torch.full_like(nll, torch.nan) if base is None else _divergence(*base, now, normaliser)
            columns = {"nll": nll.cpu().numpy(), "kl": kl.cpu().numpy()}
            parts[key].append(pd.DataFrame({"passage": name, "block": block, **columns}))
    return {key: pd.concat(tables, ignore_index=True) for key, tables in parts.items()}


def _weighed(logits: Float[Tensor, "t vocab"]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, their softmax and their normaliser."""
    return logits, logits.softmax(-1), logits.logsumexp(-1)


def _divergence(
    base: Float[Tensor, "t vocab"],
    probs: Float[Tensor, "t vocab"],
    level: Float[Tensor, " t"],
    now: Float[Tensor, "t vocab"],
    normaliser: Float[Tensor, " t"],
) -> Float[Tensor, " t"]:
    """KL(base || now) from logits: the mean difference of the logits under base, less that of their normalisers."""
    return ((probs * (base - now)).sum(-1) - level + normaliser).clamp(min=0)


def measure(model: Model, protocol: Protocol, edits: dict[str, Edit], *, passages: bool = True) -> Measured:
    """The untouched model and every edit through the whole protocol."""
    everyone = {NONE: None, **edits}
    asked = {name: score_questions(model, protocol, edit) for name, edit in tqdm(everyone.items(), desc="side effects")}
    return Measured(asked, score_passages(model, protocol, everyone) if passages else {})


def noise(model: Model, edit: Edit, *, seed: int = 0) -> Edit:
    """The control: random changes of the same slices, each as large (in Frobenius norm) as the edit's own."""
    generator, before = torch.Generator().manual_seed(seed), slice_values(model, tuple(edit.values))
    values = {}
    for part, value in edit.values.items():
        random = gaussian(value.shape, generator)
        values[part] = before[part] + random * ((value - before[part]).norm() / random.norm())
    return replace(edit, values=values)


def flips(measured: Measured, *sets: str) -> pd.DataFrame:
    """The ledger: every question of the sets whose outcome an edit changed."""
    before, rows = measured.asked[NONE], []
    for name in measured.names:
        after = measured.asked[name]
        for i in np.flatnonzero((before.told != after.told) & before.set.isin(sets)):
            was, now = before.iloc[i], after.iloc[i]
            rows.append((name, was.set, was["item"], was.answer, was.top, now.top, "gained" if now.told else "lost"))
    return pd.DataFrame(rows, columns=["pathway", "set", "item", "answer", "said before", "says after", "flip"])


def outcomes(measured: Measured, case: Case) -> pd.DataFrame:
    """`paired` for each pathway and each kind of question; long form, with pathway and what."""
    asked = measured.asked[NONE]
    failing, control = asked.template == case.template, asked.template.isin(case.controls)
    picks = {
        "capability": asked.set == "capability",
        "unrelated": asked.set == "unrelated",
        "the facts": (asked.set == "eight") & failing,
        "paraphrases": (asked.set == "eight") & ~failing & ~control,
        "working templates": (asked.set == "eight") & control,
        ELSEWHERE: (asked.set == "large") & control,
        "other relations": asked.set == "relations",
        "neighbours": (asked.set == "large") & failing & asked.told,
    }
    rows = [
        {"pathway": name, "what": what, **paired(asked.told[pick], measured.asked[name].told[pick])}
        for name in measured.names
        for what, pick in picks.items()
    ]
    return pd.DataFrame(rows)


def generalisation(measured: Measured, case: Case) -> pd.DataFrame:
    """Of the other facts that are known and not told before, how many are told after; by pathway and split, with the
    exact 95 % interval. all, told_before, told_after: of every fact of the split. best_control: how many of the
    known and untold the single best control template tells, the nearer ceiling."""
    asked = measured.asked[NONE]
    large, rows = asked[asked.set == "large"], []
    told = large.pivot(index="subject", columns="template", values="told")
    split = large.drop_duplicates("subject").set_index("subject").split.loc[told.index]
    untold = told[list(case.controls)].any(axis=1) & ~told[case.template]
    for name in measured.names:
        after = measured.asked[name].query("set == 'large' and template == @case.template").set_index("subject").told
        for part in ("held_out", "selection", "fit"):
            here = split == part
            chosen = untold & here
            repaired, n = int(after[told.index][chosen].sum()), int(chosen.sum())
            low, high = exact_interval(repaired, n)
            rows.append(
                {
                    "pathway": name,
                    "split": part,
                    "untold": n,
                    "repaired": repaired,
                    "low": low,
                    "high": high,
                    "best_control": int(told.loc[chosen, list(case.controls)].sum().max()),
                    "all": int(here.sum()),
                    "told_before": int(told[case.template][here].sum()),
                    "told_after": int(after[told.index][here].sum()),
                }
            )
    return pd.DataFrame(rows)


def bleeding(model: Model, measured: Measured, case: Case) -> pd.DataFrame:
    """How often a prompt about another country, under the failing template, is answered with one of the trained
    answers, wrongly: before (pathway `none`) and after."""
    trained = {model.token_text(model.first_token(f.answer)) for f in case.facts}
    rows = []
    for name, asked in measured.asked.items():
        part = asked[(asked.set == "large") & (asked.template == case.template)]
        rows.append((name, int((part.top.isin(trained) & ~part.told).sum()), len(part)))
    return pd.DataFrame(rows, columns=["pathway", "bled", "prompts"])


def perplexity(measured: Measured, *, seed: int = 0) -> pd.DataFrame:
    """One row a pathway: perplexity before and after, their ratio with a 95 % bootstrap interval over blocks of
    tokens, mean KL a token, and the share of tokens whose loss changed by more than a tenth of a nat."""
    before = measured.tokens[NONE]
    rows = []
    for name in measured.names:
        after = measured.tokens[name]
        change = after.nll - before.nll
        low, high = block_interval(change, before.block, seed)
        rows.append(
            {
                "pathway": name,
                "tokens": len(before),
                "ppl_before": np.exp(before.nll.mean()),
                "ppl_after": np.exp(after.nll.mean()),
                "ratio": np.exp(change.mean()),
                "ratio_low": np.exp(low),
                "ratio_high": np.exp(high),
                "kl": after.kl.mean(),
                "moved": float((change.abs() > 0.1).mean()),
            }
        )
    return pd.DataFrame(rows)


def perplexity_by_genre(measured: Measured) -> pd.DataFrame:
    """Ratio of perplexities, after over before: passages down, pathways across."""
    before = measured.tokens[NONE]
    return pd.DataFrame(
        {
            name: np.exp((measured.tokens[name].nll - before.nll).groupby(before.passage).mean())
            for name in measured.names
        }
    )


@torch.no_grad()
def generate(model: Model, texts: Sequence[str], edit: Edit | None, *, tokens: int = 24) -> list[list[int]]:
    """Greedy continuations of each text, as token lists: what the model writes when nobody holds its hand."""
    tokenizer = model.tokenizer
    ids = [model.token_ids(t) for t in texts]
    width = max(map(len, ids))
    if width + tokens > model.weights.context:
        raise DataError(f"{width} + {tokens} tokens are more than the {model.weights.context} {model.name} reads.")
    fill = tokenizer.eos_token_id or 0
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
    prompted = prompts(case.facts, load_templates()[case.template])
    openings = [str(model.tokenizer.decode(model.token_ids(t)[:opening])) for t in load_passages().values()]
    rows = []
    for name, edit in tqdm([(NONE, None), *edits.items()], desc="generation"):
        for i, ids in enumerate(generate(model, [*prompted, *openings], edit)):
            text, asked = str(model.tokenizer.decode(ids)), i < len(prompted)
            rows.append(
                {
                    "pathway": name,
                    "kind": "failing prompt" if asked else "opening",
                    "prompt": [*prompted, *openings][i],
                    "text": text,
                    "said": asked and case.facts[i].answer in text,
                    "leaks": not asked and any(f.answer in text for f in case.facts),
                    "repetition": repetition(ids),
                }
            )
    return pd.DataFrame(rows)


def _values(protocol: Protocol, edit: Edit | None) -> dict | None:
    if edit is not None and edit.layer != protocol.layer:
        raise EditError(f"the protocol was prepared for layer index {protocol.layer}, the edit is of {edit.layer}.")
    return None if edit is None else edit.values
