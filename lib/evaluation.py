"""Side effects of an edit: the source page's 25 probes, and what "zero side effects" leaves out.

    probes          15 of general capability and 10 of unrelated tasks, item by item: which were right and are wrong
                    now; and, where asked for, 88 more of capability
    passages        perplexity, and KL from the untouched model, on texts that no training saw
    other relations of the same countries: does "France's currency is the" still say what it said?
    other templates of the same facts: those that fail too (paraphrases), and those that worked
    neighbours      countries that no edit was trained on, told before: still told?
    generalisation  countries known and not told, on which no edit was trained: how many does an edit make told?

Every question is asked of the untouched model and of each edit. All edits are of one layer, so what enters it is
computed once (`forward`). Efficacy, paraphrase and locality are Meng et al.'s (2022) words; that edits leak into other
relations of the same subject is reported by Liu et al. (2024) and Cohen et al. (2024).
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

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
from lib.forward import Bias, Pack, Streams, above, beside, pack, packs, streams
from lib.models import Model
from lib.recall import scorable
from lib.statistics import block_interval, cluster_interval, exact_interval, gaussian, paired
from lib.training import slice_values
from lib.weights import SINKS

WINDOW = 512  # tokens of a passage read at once, or as many as the model reads
BLOCK = 32  # tokens of a block of the bootstrap: neighbouring tokens are not independent
ROWS = 128  # prompts whose logits, each over the whole vocabulary, are held at once
BAND = 0.01  # a change of perplexity that this book calls small
MOVED = 0.1  # nats: a token whose loss changed by more than this has moved
ELSEWHERE = "working templates, other facts"
MORE, CAPABILITY = "more capability", "capability, all probes"  # the set of further probes; and they with the 15
WIKITEXT, WIKITEXT_FILE = "Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet"
ARTICLES = 10  # of WikiText-2
WIKITEXT_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
NONE = "none"  # the pathway of the untouched model
Texts = dict[str, str]  # by name


@dataclass(frozen=True)
class Passage:
    """Tokens of a text. entering: the streams before the edited layer. final: those the untouched model ends with."""

    name: str
    pack: Pack
    entering: Float[Tensor, "t d_model"]
    final: Float[Tensor, "t d_model"]


@dataclass(frozen=True)
class Protocol:
    """All that is asked of each edit of a layer. questions: a row a prompt (set, item, template, subject, answer,
    split, prompt, answer_token). prompts: these, packed, with the streams that enter the layer."""

    layer: int
    questions: pd.DataFrame
    prompts: list[tuple[Pack, Float[Tensor, "t d_model"]]]
    passages: list[Passage]


@dataclass(frozen=True)
class Measured:
    """The outcome for each pathway and for `none`. asked: the questions with told, prob, top, margin. tokens: a row a
    token of the passages (passage, block, nll, kl)."""

    asked: dict[str, pd.DataFrame]
    tokens: dict[str, pd.DataFrame]

    @property
    def names(self) -> list[str]:
        """The pathways, without `none`."""
        return [name for name in self.asked if name != NONE]


def load_probes() -> pd.DataFrame:
    """The frozen probes: set (capability, unrelated), item, kind, prompt, answer."""
    content = yaml.safe_load((DATA / "probes.yaml").read_text(encoding="utf-8"))
    parts = [pd.DataFrame(content[name]).assign(set=name) for name in ("capability", "unrelated")]
    return pd.concat(parts).rename(columns={"id": "item"})[["set", "item", "kind", "prompt", "answer"]]


def load_more_probes() -> pd.DataFrame:
    """The further frozen probes of capability, as `load_probes` has them. No recorded sweep reads them."""
    content = yaml.safe_load((DATA / "more_probes.yaml").read_text(encoding="utf-8"))
    parts = [pd.DataFrame(items).assign(set=MORE, kind=kind) for kind, items in content.items()]
    return pd.concat(parts).rename(columns={"id": "item"})[["set", "item", "kind", "prompt", "answer"]]


def load_relations(model: Model, facts: Sequence[Fact]) -> pd.DataFrame:
    """Other relations of the facts' subjects: item (the relation), template (its text), subject, answer. The organism
    brings its own."""
    organism = DATA / "organism"
    table = pd.read_csv((organism if model.plain_name == "organism" else DATA) / "relations.csv", keep_default_na=False)
    table = table[table.subject.isin([f.subject for f in facts])].rename(columns={"relation": "item"})
    if model.plain_name != "organism":
        return table
    templates = json.loads((organism / "planted.json").read_text(encoding="utf-8"))["relation_templates"]
    return pd.concat([table[table["item"] == r].assign(template=t) for r, ts in templates.items() for t in ts.values()])


def questions(model: Model, case: Case, *, more: bool = False) -> pd.DataFrame:
    """Everything with one right next token. set: capability, unrelated, relations, eight (the case's facts under every
    template), large (the other scorable facts under the failing template and the controls); with more, also MORE."""
    templates, trained = load_templates(), {f.subject for f in case.facts}
    large = [f for f in scorable(model, case.large) if f.subject not in trained and f.split != "eight"]
    relations = load_relations(model, case.facts)
    filled = [t.replace("{}", s) for t, s in zip(relations.template, relations.subject, strict=True)]
    parts = [load_probes(), *([load_more_probes()] if more else []), relations.assign(set="relations", prompt=filled)]
    for name, facts, used in (("eight", case.facts, templates), ("large", large, (case.template, *case.controls))):
        rows = pd.DataFrame(facts).assign(set=name)
        parts += [rows.assign(template=t, prompt=prompts(facts, templates[t])) for t in used]
    table = pd.concat(parts, ignore_index=True).fillna("")
    asked = zip(table.answer, table.prompt, strict=True)
    return table.assign(answer_token=[model.first_token(answer, prompt) for answer, prompt in asked])


def build_protocol(model: Model, case: Case, layer: int, **options: Any) -> Protocol:
    """Run everything below the layer once. options: as in `build_protocols`."""
    return build_protocols(model, case, [layer], **options)[layer]


@torch.no_grad()
def build_protocols(
    model: Model,
    case: Case,
    layers: Sequence[int],
    *,
    texts: Texts | None = None,
    table: pd.DataFrame | None = None,
    run: Callable[[Model, Pack, Sequence[int]], Streams] = streams,
) -> dict[int, Protocol]:
    """A protocol for edits of each of some layers, from one run of the model; the layer that would follow the last one
    stands for changes of the logits alone. texts: passages by name, or the book's. table: some of `questions`. run: how
    streams are come by."""
    table = questions(model, case) if table is None else table.reset_index(drop=True)
    protocols = _prompts(model, table, layers, run)
    end, size = model.weights.n_layers, min(WINDOW, model.weights.context)
    for name, text in tqdm((load_passages() if texts is None else texts).items(), desc="passages", leave=False):
        for ids in model.windows(text, size):
            window = pack(model, [ids])
            before = run(model, window, [*layers, end])
            final = model.weights.norm_final_module(before[end])
            for layer, protocol in protocols.items():
                protocol.passages.append(Passage(name, window, before[layer], final))
    return protocols


def _prompts(
    model: Model,
    table: pd.DataFrame,
    layers: Sequence[int],
    run: Callable[[Model, Pack, Sequence[int]], Streams] = streams,
) -> dict[int, Protocol]:
    """Protocols with the questions of a table, and no passages."""
    protocols = {layer: Protocol(layer, table, [], []) for layer in layers}
    for batch in packs(model, [model.token_ids(p) for p in table.prompt], share=True):
        before = run(model, batch, layers)
        for layer, protocol in protocols.items():
            protocol.prompts.append((batch, before[layer]))
    return protocols


def load_passages() -> Texts:
    """The book's own passages, by genre. Raises DataError where there is none."""
    paths = sorted((DATA / "passages").glob("measure_*.txt"))
    if not paths:
        raise DataError(f"{DATA / 'passages'} holds no measure_*.txt.")
    return {p.stem.removeprefix("measure_"): p.read_text(encoding="utf-8") for p in paths}


def load_wikitext() -> Texts:
    """The first ARTICLES of WikiText-2's test set, from the hub at a pinned revision, checked against the checksum that
    the revision records. Raises DataError where the hub cannot be reached or the file is not what it should be."""
    place: dict[str, Any] = {"repo_type": "dataset", "revision": WIKITEXT_REVISION}
    try:
        info: Any = HfApi().get_paths_info(WIKITEXT, WIKITEXT_FILE, **place)[0]
        path = Path(hf_hub_download(WIKITEXT, WIKITEXT_FILE, **place))
    except Exception as error:  # offline, moved, no permission: the remedy is the same
        raise DataError(
            f"WikiText-2 cannot be had ({type(error).__name__}): the model hub is out of reach. Run the chapter with "
            "wikitext = False, on the book's own passages."
        ) from error
    if file_sha256(path) != info.lfs.sha256:
        raise DataError(f"{path} is not what revision {WIKITEXT_REVISION[:12]} records; delete it and run again.")
    parts = re.split(r"(?m)^ (?== [^=]+ =\s*$)", "".join(pd.read_parquet(path).text))[1 : ARTICLES + 1]
    return {part.split("=")[1].strip(): part for part in parts}


@torch.no_grad()
def score_questions(model: Model, protocol: Protocol, edit: Edit | None, *, bias: Bias = None) -> pd.DataFrame:
    """The questions with told, prob (of the answer), top (the token said), margin (in logits). bias: of all logits."""
    if edit is not None and edit.pathway in SINKS:  # every layer reads otherwise: all is run again
        with applied(model, edit) as changed:
            return score_questions(changed, _prompts(changed, protocol.questions, [0])[0], None, bias=bias)
    values, scores = _values(protocol, edit), []
    answers = torch.tensor(protocol.questions.answer_token.to_numpy())[:, None]
    finals = torch.cat([above(model, p, protocol.layer, enter, values, p.last) for p, enter in protocol.prompts])
    for final, token in zip(finals.split(ROWS), answers.split(ROWS), strict=True):
        logits = final @ model.weights.W_U if bias is None else final @ model.weights.W_U + bias
        right, log_z = logits.gather(1, token)[:, 0], logits.logsumexp(-1)
        wrong, rival = logits.scatter_(1, token, float("-inf")).max(1)
        top = torch.where(right > wrong, token[:, 0], rival)
        scores.append(torch.stack((right - wrong, (right - log_z).exp(), top.float()), 1))
    margin, prob, top = torch.cat(scores).T.cpu().numpy()
    said = [model.token_text(int(token)) for token in top]
    return protocol.questions.assign(told=margin > 0, prob=prob, margin=margin, top=said)


@torch.no_grad()
def score_passages(
    model: Model, protocol: Protocol, edits: Mapping[str, Edit | None], *, bias: Bias = None, divergence: bool = True
) -> dict[str, pd.DataFrame]:
    """For each edit, a row a predicted token of the passages: passage, block, nll and kl (untouched || edited), in
    nats. `none` is the untouched model, which is not run again. bias: added to all logits of the others. divergence:
    False leaves kl out (NaN), which takes half of the time where little is run again. Passage by passage, all at once.

    Training's KL, `forward.Reference.divergence`, needs no logits; its rounding is of the size of what is seen here."""
    parts, start, rows = {name: list[pd.DataFrame]() for name in edits}, 0, [name for name in edits if name != NONE]
    first = int(divergence or NONE in edits)  # row 0 is the untouched model
    for passage in tqdm(protocol.passages, desc="passages", leave=False, disable=len(edits) < 2):
        texts, edited = passage.pack, [_final(model, protocol, passage, edits[name]) for name in rows]
        finals = torch.stack([passage.final] * first + edited)[:, :-1]
        nll, kl = beside(finals, texts.tokens[1:], model.weights.W_U, bias, first=first)
        block = start + np.arange(nll.shape[1]) // BLOCK
        start = int(block[-1]) + 1
        for name in edits:
            row = rows.index(name) + first if name in rows else 0
            columns = {"nll": nll[row].cpu().numpy(), "kl": kl[row].cpu().numpy() if divergence else np.nan}
            parts[name].append(pd.DataFrame({"passage": passage.name, "block": block, **columns}))
    return {name: pd.concat(tables, ignore_index=True) for name, tables in parts.items()}


def _final(model: Model, protocol: Protocol, passage: Passage, edit: Edit | None) -> Float[Tensor, "t d_model"]:
    """The final stream (normalised) of a passage's tokens with an edit. With a sink there is one token more: left out
    is the row that no token of the passage follows, so that each row is followed by what followed it; and the last
    token, which nothing follows, makes room (its row repeats the one before)."""
    if edit is None or edit.pathway not in SINKS:
        return above(model, passage.pack, protocol.layer, passage.entering, _values(protocol, edit))
    with applied(model, edit) as changed:
        texts = pack(changed, [changed.begun(passage.pack.tokens.tolist()[len(model.bos) : -1])])
        final = above(changed, texts, 0, changed.weights.embed(texts.tokens, texts.position))
        place = texts.tokens.tolist().index(changed.bos[-1])
    left_out = max(place - 1, 0)
    return torch.cat((final[:left_out], final[left_out + 1 :], final[-1:]))


def measure(
    model: Model, protocol: Protocol, edits: dict[str, Edit], *, passages: bool = True, beside: Measured | None = None
) -> Measured:
    """The untouched model and every edit through the whole protocol. beside: what was measured by the same protocol,
    with the untouched model, which is not asked again."""
    everyone = edits if beside else {NONE: None, **edits}
    asked = {name: score_questions(model, protocol, edit) for name, edit in tqdm(everyone.items(), desc="side effects")}
    asked = {NONE: beside.asked[NONE], **asked} if beside else asked
    return Measured(asked, score_passages(model, protocol, {NONE: None, **edits}) if passages else {})


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
    before, tables = measured.asked[NONE], []
    for name in measured.names:
        after = measured.asked[name]
        said = {"said before": before.top, "says after": after.top}
        table = before.assign(pathway=name, flip=np.where(after.told, "gained", "lost"), **said)
        tables.append(table[(before.told != after.told) & before.set.isin(sets)])
    columns = ["pathway", "set", "item", "answer", "said before", "says after", "flip"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def kinds(asked: pd.DataFrame, case: Case, told_before: pd.Series) -> dict[str, pd.Series]:
    """Which of the questions are of which kind; CAPABILITY only where MORE was asked."""
    failing, control = asked.template == case.template, asked.template.isin(case.controls)
    eight, large, more = asked.set == "eight", asked.set == "large", asked.set == MORE
    return ({CAPABILITY: more | (asked.set == "capability")} if more.any() else {}) | {
        "capability": asked.set == "capability",
        "unrelated": asked.set == "unrelated",
        "the facts": eight & failing,
        "paraphrases": eight & ~failing & ~control,
        "working templates": eight & control,
        ELSEWHERE: large & control,
        "other relations": asked.set == "relations",
        "neighbours": large & failing & told_before,
    }


def outcomes(measured: Measured, case: Case) -> pd.DataFrame:
    """`paired` for each pathway and each kind of question; long form, with pathway and what. Questions about one
    country, under several templates or of several relations, are one cluster; a probe is a cluster of its own."""
    before = measured.asked[NONE]
    about = before.subject.where(before.subject != "", before["item"])
    rows = [
        {"pathway": name, "what": what, **paired(before.told[pick], measured.asked[name].told[pick], about[pick])}
        for name in measured.names
        for what, pick in kinds(before, case, before.told).items()
    ]
    return pd.DataFrame(rows)


def generalisation(measured: Measured, case: Case) -> pd.DataFrame:
    """Of the other facts that are known and not told before, how many are told after; by pathway and split, with the
    exact 95 % interval. all, told_before, told_after: of every fact of the split. best_control: how many of the
    known and untold the single best control template tells, the nearer ceiling."""
    large, controls, rows = measured.asked[NONE].query("set == 'large'"), list(case.controls), []
    told = large.pivot(index="subject", columns="template", values="told")
    split = large.groupby("subject").split.first()
    untold = told[controls].any(axis=1) & ~told[case.template]
    for name in measured.names:
        after = measured.asked[name].query("set == 'large' and template == @case.template").set_index("subject").told
        for part in ("held_out", "selection", "fit"):
            here = split == part
            repaired, n = int(after[told.index][untold & here].sum()), int((untold & here).sum())
            best = told.loc[untold & here, controls].sum().max()
            counts = map(int, (best, here.sum(), told.loc[here, case.template].sum(), after[told.index][here].sum()))
            rows.append((name, part, n, repaired, *exact_interval(repaired, n), *counts))
    columns = ["pathway", "split", "untold", "repaired", "low", "high", "best_control", "all"]
    return pd.DataFrame(rows, columns=[*columns, "told_before", "told_after"])


def bled(model: Model, asked: pd.DataFrame, case: Case) -> tuple[int, int]:
    """How many prompts about other countries, under the failing template, are answered with one of the trained
    answers, wrongly; and how many such prompts there are."""
    trained = {model.token_text(model.first_token(f.answer)) for f in case.facts}
    others = asked[(asked.set == "large") & (asked.template == case.template)]
    return int((others.top.isin(trained) & ~others.told).sum()), len(others)


def bleeding(model: Model, measured: Measured, case: Case) -> pd.DataFrame:
    """`bled` before (pathway `none`) and after each edit."""
    rows = [(name, *bled(model, asked, case)) for name, asked in measured.asked.items()]
    return pd.DataFrame(rows, columns=["pathway", "bled", "prompts"])


def perplexity(measured: Measured, *, by: Literal["passage", "block"] = "passage", seed: int = 0) -> pd.DataFrame:
    """One row a pathway: perplexity before and after, their ratio with a 95 % bootstrap interval, mean KL a token, and
    the share of tokens whose loss changed by more than a tenth of a nat. by: what is drawn for the interval. Whole
    passages: it holds for texts of their kind. Blocks of tokens (or where there is one passage): for these texts only.
    """
    before, rows = measured.tokens[NONE], []
    by = by if before.passage.nunique() > 1 else "block"
    drawn = cluster_interval if by == "passage" else block_interval
    for name in measured.names:
        after = measured.tokens[name]
        change = after.nll - before.nll
        interval = np.exp(drawn(change, before[by], seed))
        means = np.exp([before.nll.mean(), after.nll.mean(), change.mean()])
        moved = float((change.abs() > MOVED).mean())
        rows.append((name, len(before), *means, *interval, after.kl.mean(), moved))
    columns = ["pathway", "tokens", "ppl_before", "ppl_after", "ratio", "ratio_low", "ratio_high", "kl", "moved"]
    return pd.DataFrame(rows, columns=columns)


def perplexity_by_genre(measured: Measured) -> pd.DataFrame:
    """Ratio of perplexities, after over before: passages down, pathways across."""
    before, after = measured.tokens[NONE], {name: measured.tokens[name].nll for name in measured.names}
    return pd.DataFrame({name: np.exp((x - before.nll).groupby(before.passage).mean()) for name, x in after.items()})


def _values(protocol: Protocol, edit: Edit | None) -> dict | None:
    if edit is not None and edit.layer != protocol.layer:
        raise EditError(f"the protocol was prepared for layer index {protocol.layer}, the edit is of {edit.layer}.")
    return None if edit is None else edit.values
