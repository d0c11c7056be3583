"""The book's findings, asked again with other people's tools (chapter 5; the source page's "cross-validation"): neurons
with Captum, and heads and neurons by ablation and by patching, each beside controls that should show nothing."""

from collections import deque
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from lib import interventions, peers
from lib.diagnosis import Verdict, control_mean, prescribe
from lib.errors import DataError
from lib.facts import Case, Fact, load_cases, load_templates, prompts
from lib.forward import above, ends, pack, resid_pre, streams
from lib.interventions import (
    Part,
    Prefilled,
    ablate,
    final_streams,
    patch_components,
    prefill,
    read_logit_differences,
    run_with_cache,
    summarise_ablations,
)
from lib.models import Model, load
from lib.peers import Curves, Lenses, NeuronAttributions, Tokens, agreement, attribute_neurons, ranked
from lib.recall import first_tokens, known_and_told, study_facts, tell, trainable
from lib.results import Results
from lib.show.sentences import say
from lib.sites import Site
from lib.statistics import exact_interval
from lib.studies.knowledge_path import asked_before
from lib.studies.localisation import with_competitors
from lib.trace import Hook, components, hooked, subject_positions

Patched = dict[str, Float[Tensor, "n_layers n_heads fact"]]  # by position
COLUMNS = {"own": "own facts told", "own_n": "of", "large": "countries told", "large_n": "of them"}
AGAIN = "TransformerLens (the trace again)"  # the column of a tool that is no second witness


def agreement_by_layer(neurons: NeuronAttributions, *, seed: int = 0) -> pd.DataFrame:
    """A row a layer, with two controls: the gradient of another prompt, drawn at random, and that of the next layer."""
    order = torch.randperm(len(neurons.trace), generator=torch.Generator().manual_seed(seed), device="cpu")
    gradients, rows = [ranked(x) for x in neurons.gradient.unbind(1)], []
    for i, layer in enumerate(neurons.layers):
        trace, gradient, next_layer = ranked(neurons.trace[:, i]), gradients[i], gradients[(i + 1) % len(gradients)]
        for kind, other in (("same", gradient), ("other prompt", gradient[order]), ("other layer", next_layer)):
            table = agreement(trace, other)
            rows.append({"layer": layer + 1, "compared": kind, "n": len(table), **table.mean().to_dict()})
    return pd.DataFrame(rows)


def agreement_by_template(found: NeuronAttributions, layer: int, names: list[str], *, seed: int = 0) -> pd.DataFrame:
    """The same at one layer (0-based), a row a template (names: of each prompt), beside the other-prompt control drawn
    from the same template."""
    i, generator, rows = found.layers.index(layer), torch.Generator().manual_seed(seed), []
    for name in dict.fromkeys(names):
        pick = torch.tensor([n == name for n in names]).nonzero()[:, 0]
        trace, gradient = (ranked(x[pick, i]) for x in (found.trace, found.gradient))
        other = gradient[torch.randperm(len(pick), generator=generator, device="cpu")]
        same, control = agreement(trace, gradient).mean(), agreement(trace, other).mean()
        rows.append({"template": name, "n": len(pick), **same.to_dict(), "other_prompt": control.top1})
    return pd.DataFrame(rows)


def large_prompts(model: Model, case: Case, *, templates: int = 10) -> pd.DataFrame:
    """Every fact of the large set under the first templates: template, prompt, answer_token."""
    table = pd.DataFrame({"answer_token": first_tokens(model, case.large).tolist()})
    chosen = list(load_templates().items())[:templates]
    parts = [table.assign(template=name, prompt=prompts(case.large, text)) for name, text in chosen]
    return pd.concat(parts, ignore_index=True)[["template", "prompt", "answer_token"]]


def parts_of(model: Model, verdict: Verdict, neuron: int, *, seed: int = 0, controls: int = 5) -> dict[str, list[Part]]:
    """What is taken away: the knowledge head and the top neuron of its layer; and, as controls, other heads and
    neurons of the same layer, drawn at random."""
    layer, weights, draw = verdict.knowledge_head.layer, model.weights, np.random.default_rng(seed)
    heads = [h for h in range(weights.n_heads) if h != verdict.knowledge_head.head]
    width = weights.blocks[layer].mlp.W_out.shape[0]
    others = draw.choice([n for n in range(width) if n != neuron], controls, replace=False)
    random = draw.choice(heads, min(controls, len(heads)), replace=False)
    return {
        "knowledge head": [Part(verdict.knowledge_head)],
        "random heads": [Part(Site(layer, int(h))) for h in random],
        "top neuron": [Part(Site(layer), neuron)],
        "random neurons": [Part(Site(layer), int(n)) for n in others],
    }


def ablate_all(
    model: Model, texts: Sequence[str], answers: Tokens, parts: dict[str, list[Part]], kept: Prefilled = ()
) -> pd.DataFrame:
    """An `ablate` table of all parts, `part` being the kind: several random parts are averaged prompt by prompt. kept:
    the prompts' `prefill`, where it is at hand."""
    kept = kept or prefill(model, texts, min(part.site.layer for group in parts.values() for part in group))
    tables = []
    for kind, group in parts.items():
        rows = pd.concat([ablate(model, texts, answers, part, kept=kept) for part in group])
        means = rows.groupby(["way", "prompt"], sort=False)[["direct", "total"]].mean().reset_index()
        tables.append(means.assign(part=kind))
    return pd.concat(tables, ignore_index=True)


def total_effects(model: Model, texts: Sequence[str], answers: Tokens, parts: list[Part], way: str) -> pd.Series:
    """What the loss of each part, by one way of ablation, changes of the answers' logits (total, mean over prompts)."""
    table = ablate_all(model, texts, answers, {str(part): [part] for part in parts})
    return table[table.way == way].groupby("part", sort=False).total.mean()


@torch.no_grad()
def losses_of_heads(model: Model, texts: Sequence[str], answers: Tokens) -> Float[Tensor, "n_layers n_heads"]:
    """Every head of the model, one at a time, given its output for the next prompt: the mean change of the answer's
    logit. As `ablate` by `resample`, all in one pass."""
    run, weights = run_with_cache(model, texts), model.weights
    (rows,) = deque(interventions.patched_streams(model, run, run.z.roll(-1, 0)), maxlen=1)  # leaving the last layer
    final = weights.norm_final(rows).view(-1, len(texts), rows.shape[-1])
    logits = (final * weights.W_U[:, answers].T).sum(-1)
    return (logits - run.logits.gather(1, answers[:, None])[:, 0]).mean(1).view(weights.n_layers, weights.n_heads)


Asked = tuple[Sequence[str], Tokens]  # prompts, and the first tokens of their answers


def three_tools(model: Model, eight: Asked, others: Asked, verdict: Verdict, lenses: Lenses) -> pd.DataFrame:
    """One row a question, one column a tool; `-` where a tool does not answer it. What each tool names, it names from
    the eight; whether the answer loses by the loss of what it named is measured on the others, by an intervention that
    may say no. TransformerLens does this book's arithmetic on the same weights once more: it is no second witness."""
    texts, answers = eight
    knowledge, n_heads = verdict.knowledge_head, model.weights.n_heads
    neurons = attribute_neurons(model, texts, answers, [knowledge.layer])
    trace, gradient = (x[:, 0].mean(0) for x in (neurons.trace, neurons.gradient))
    top = [Part(Site(knowledge.layer), int(i)) for i in trace.topk(10).indices]
    costliest = total_effects(model, texts, answers, top, "zero").idxmin().split()[-1]
    patched = Site(*divmod(int(losses_of_heads(model, texts, answers).argmin()), n_heads))
    theirs = Site.parse(lenses.table.their_head.mode()[0])
    named = int(trace.argmax()), int(gradient.argmax()), int(costliest)
    loss_of_neuron = [_loss(model, others, Part(Site(knowledge.layer), neuron), "zero") for neuron in named]
    loss = {site: _loss(model, others, Part(site), "resample") for site in {knowledge, theirs, patched}}
    lens, layer = f"L{peers.routing_layer(lenses.theirs) + 1}", f"L{patched.layer + 1}"
    rows = [
        ("Which layer writes the answer?", f"L{knowledge.layer + 1}", "-", layer, lens),
        ("Which head?", str(knowledge), "-", str(patched), str(theirs)),
        ("Which neuron of that layer?", *map(str, named), "-"),
        ("Does the answer lose without that head?", loss[knowledge], "-", loss[patched], loss[theirs]),
        ("Does the answer lose without that neuron?", *loss_of_neuron, "-"),
    ]
    return pd.DataFrame(rows, columns=["question", "this book's trace", "Captum", "patching", AGAIN])


def _loss(model: Model, asked: Asked, part: Part, way: str) -> str:
    """Whether the answer's logit falls without a part, by the interval of the total effect, which follows."""
    table = summarise_ablations(ablate(model, *asked, part)).set_index("way").loc[way]
    word = "yes" if table.high < 0 else "no" if table.low > 0 else "cannot tell"
    return f"{word}: {table.total:+.2f} ({table.low:+.2f} to {table.high:+.2f})"


def agreed(table: pd.DataFrame) -> int:
    """On how many questions every witness that answers gives the same answer, of those that two answer."""
    answers = table.set_index("question").drop(columns=AGAIN, errors="ignore")
    said = [[text.split(":")[0] for text in row if text != "-"] for row in answers.to_numpy().tolist()]
    return sum(len(row) > 1 and len(set(row)) == 1 for row in said)


def same_as_captum(
    model: Model, sample: pd.DataFrame, found: NeuronAttributions, layers: Sequence[int]
) -> pd.DataFrame:
    """The fast path against Captum's own on the same prompts: a row a layer. found: of a table of prompts, of which
    the sample is some rows. Raises DataError where they differ by more than a thousandth of the largest attribution:
    rounding in another order stays far below."""
    answers = torch.tensor(sample.answer_token.to_numpy())
    captums, ours = peers.captum_attributions(model, list(sample.prompt), answers, layers), found.gradient[sample.index]
    rows = []
    for i, layer in enumerate(layers):
        difference = float((ours[:, found.layers.index(layer)] - captums[:, i]).abs().max())
        largest = float(captums[:, i].abs().max())
        if not difference <= 1e-3 * largest:
            raise DataError(f"gradient x activation of L{layer + 1} differs from Captum's by {difference:.2g}.")
        rows.append((layer + 1, len(sample), captums.shape[-1], difference, largest))
    return pd.DataFrame(rows, columns=["layer", "prompts", "neurons", "largest difference", "largest attribution"])


def planted_suppressor() -> str:
    """`suppressor_words` of the organism, whose suppressor was planted: which ways of taking away can see one."""
    organism = load("organism")
    cases = load_cases("organism")
    return suppressor_words(suppressors(organism, cases, prescribe(organism, trainable(organism, cases[0]))))


def organism_through_transformerlens() -> dict[str, pd.DataFrame]:
    """The table of `against_transformerlens` for the organism, the other model family."""
    model = load("organism")
    case = trainable(model, load_cases("organism")[0])
    answers = first_tokens(model, case.facts)
    texts = prompts(case.facts, load_templates()[case.controls[0]])
    return {"organism": peers.against_transformerlens(model, texts, answers).table}


def routing_chance(curves: Curves, layer: int, *, shuffles: int = 1000, seed: int = 0) -> float:
    """The control of a lens: how often the mean curve rises most over this layer if the rises of each prompt are put
    into a random order of layers."""
    rises, generator = curves.diff(), torch.Generator().manual_seed(seed)
    orders = torch.rand((shuffles, *rises.shape), generator=generator, device="cpu").argsort(-1).to(rises.device)
    tops = rises.expand(shuffles, -1, -1).gather(-1, orders).mean(1).argmax(-1)
    return float((tops == layer).float().mean())


def report_ablations(report: Results, table: pd.DataFrame) -> None:
    """What the chapter's prose says of the ablations."""
    by = table.set_index(["part", "way"])
    named = {"patching": ("top neuron", "zero"), "head": ("knowledge head", "resample")}
    for name, key in (named | {"own_neuron": ("each prompt's top neuron", "zero")}).items():
        report(f"{name}_effect", float(by.total[key]), "+.2f")
        report(f"{name}_interval", (float(by.low[key]), float(by.high[key])), "+.2f")
    report("own_neuron_direct", float(by.direct["each prompt's top neuron", "zero"]), "+.2f")
    report("random_neuron_effect", float(by.total["random neurons", "zero"]), "+.2f")
    report("random_head_effect", float(by.total["random heads", "resample"]), "+.2f")


def suppressors(model: Model, cases: Sequence[Case], first: Verdict, *, seed: int = 0) -> pd.DataFrame:
    """Each suppressor that the rule names, taken away from its failing prompts: the change of answer minus competitor;
    beside the same kind of part one layer below. Summarised ablations, empty where no case has a suppressor. On the
    eight, by the three ways of `ablate`; and (way `controls`), on these and on the countries of the study (large) that
    are known and not told, by `calmed`. first: the finding for the first case."""
    parts, templates = list[pd.DataFrame](), load_templates()
    for case in (trainable(model, c) for c in cases):
        site = (first if case.name == cases[0].name else prescribe(model, case)).suppressor
        if site is None:
            continue
        failing = tell(model, case.facts, {case.template: templates[case.template]})
        answers, against = (torch.tensor(failing[c].tolist()) for c in ("answer_token", "competitor_token"))
        texts, below = list(failing.prompt), Site(site.layer - 1, site.head, site.mlp)
        kept, sites = prefill(model, texts, below.layer), {"suppressor": site, "control": below}
        sets = {"the eight": case.facts, "large set": study_facts(model, case)}
        calm = {of: calmed(model, case, facts, list(sites.values())) for of, facts in sets.items()}
        for name, where in sites.items():
            table = ablate(model, texts, answers, Part(where), against=against, kept=kept).assign(of="the eight")
            table = pd.concat([table, *(rows[where].assign(of=of) for of, rows in calm.items())])
            parts.append(_summary(table.assign(part=f"{case.title}: {name} {where}, " + table.of), seed))
    columns = ["part", "way", "n", "direct", "total", "low", "high", "told"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def _summary(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """`summarise_ablations`, with how many are told then, where the margin is known."""
    told = (table.margin > 0).where(table.margin.notna()).groupby([table.part, table.way]).sum(min_count=1)
    return summarise_ablations(table, seed=seed).join(told.rename("told"), on=["part", "way"])


@torch.no_grad()
def calmed(model: Model, case: Case, facts: Sequence[Fact], sites: Sequence[Site]) -> dict[Site, pd.DataFrame]:
    """What all failing prompts share, a mean over them cannot take away. So a component of each failing prompt puts
    out, at the last position, what it does on average for the *other* facts under the controls that tell them: nothing
    of this answer. By site, an `ablate` table of the known and untold facts (way `controls`): the change of answer
    minus competitor, and what that margin is then."""
    texts, answers, tables = load_templates(), first_tokens(model, facts), {}
    run, good = run_with_cache(model, prompts(facts, texts[case.template])), []
    for control in case.controls:  # of a whole run of every country only this is kept
        other = run_with_cache(model, prompts(facts, texts[control]))
        good.append((other.z, other.mlps, other.logits.argmax(-1)))
        del other
    told = torch.stack([run.logits.argmax(-1), *(said for *_, said in good)]) == answers
    rows = (~told[0] & told[1:].any(0)).nonzero()[:, 0]
    pairs, run = with_competitors(run.logits, answers)[rows], run.take(rows.tolist())
    z, mlps = (
        control_mean(torch.stack([part[rows] for part in parts]), told[1:, rows])
        for parts in list(zip(*good, strict=True))[:2]
    )
    z, mlps = ((x.sum(0) - x) / max(1, len(rows) - 1) for x in (z, mlps))
    patched = patch_components(model, run, z, mlps, pairs, lowest=min(site.layer for site in sites))
    for site in sites:
        margin = patched[components(model).index(site)]
        change = (margin - interventions.logit_differences(run, pairs)).tolist()
        columns = {"prompt": run.prompts, "direct": np.nan, "total": change, "margin": margin.tolist()}
        tables[site] = pd.DataFrame(columns).assign(way="controls")
    return tables


@torch.no_grad()
def told_without(model: Model, texts: Sequence[str], answers: Tokens, parts: Sequence[Part]) -> dict[str, list[bool]]:
    """Which prompts are told, the whole vocabulary asked, when a part is silent at their last position; by part."""
    kept, told = prefill(model, texts, min(part.site.layer for part in parts)), dict[str, list[bool]]()
    for part in parts:
        block, tops = model.weights.blocks[part.site.layer], []
        for batch, before in kept:
            end = next(ends(model, batch, before, before[part.site.layer][batch.last], part.site.layer))
            silent = part.written(block, end, -part.held(end)[None])
            final = final_streams(model, batch, before, part.site, end, silent)[0]
            tops.append((model.weights.norm_final(final) @ model.weights.W_U).argmax(-1))
        told[str(part)] = (torch.cat(tops) == answers).tolist()
    return told


def last_layer(model: Model, case: Case) -> pd.DataFrame:
    """Does the last layer hold the answer back (Lv et al. 2024)? A row a head and MLP of it, and of the layer below for
    comparison: how many facts that are known and untold are told without it, of the case's own and of the study's
    countries (large). chosen: the part of the last layer without which most of its own are told; of the countries told
    under the first control, so many still are without that (kept)."""
    templates, last = load_templates(), model.weights.n_layers - 1
    heads, layers = range(model.weights.n_heads), [layer for layer in (last, last - 1) if layer >= 0]
    sites = [site for x in layers for site in (*(Site(x, h) for h in heads), Site(x, mlp=True))]
    table = pd.DataFrame({"part": [str(site) for site in sites], "last": [site.layer == last for site in sites]})
    asked = {name: templates[name] for name in (case.template, *case.controls)}
    for of, facts in {"own": case.facts, "large": study_facts(model, case)}.items():
        answers = tell(model, facts, asked, known=asked_before(model))
        states = known_and_told(answers, case).set_index("subject")
        failed = [f for f in facts if states.routing_failure[f.subject]]
        table[of], table[f"{of}_n"] = _left(model, failed, templates[case.template], sites), len(failed)
    control = set(answers[answers.told & (answers.template == case.controls[0])].subject)
    told, chosen = [f for f in facts if f.subject in control], int(table[table["last"]].own.idxmax())
    (kept,) = _left(model, told, templates[case.controls[0]], [sites[chosen]])
    return table.assign(chosen=table.index == chosen, kept=kept, kept_n=len(told))


def _left(model: Model, facts: Sequence[Fact], template: str, sites: Sequence[Site]) -> list[int]:
    """How many facts are told when each site is silent."""
    if not facts:
        return [0] * len(sites)
    texts, answers = prompts(facts, template), first_tokens(model, facts)
    told = told_without(model, texts, answers, [Part(Site(s.layer, s.head)) for s in sites])
    return [sum(flags) for flags in told.values()]


def report_last_layer(report: Results, cases: Sequence[Case], tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The part that a case's own facts choose, and what the study's countries say of it; the parts that matter."""
    rows = []
    for case, table in zip(cases, tables, strict=True):
        chosen, beside = table[table.chosen].iloc[0], table[table["last"] & ~table.chosen]
        below = table[~table["last"]].large  # none, where there is one layer only
        others = {"beside": int(beside.large.max()), "below": int(max(below, default=0))}
        rows.append({"case": case.title, **chosen.drop(["last", "chosen"]).to_dict(), **others})
        rows[-1] |= dict(zip(("low", "high"), exact_interval(chosen.large, max(1, chosen.large_n)), strict=True))
    report.table("last_layer", rows)
    report("last_layer_verdict", say("cross_validation", "last_layer", rows=rows))
    whole = pd.concat([t.assign(case=case.title) for case, t in zip(cases, tables, strict=True)])
    columns = ["case", "part", "own", "own_n", "large", "large_n"]
    return whole[(whole.own > 0) | (whole.large > 0)][columns].rename(columns=COLUMNS)


def suppressor_words(table: pd.DataFrame) -> str:
    """One sentence on what the suppressors' loss gives back, by each way."""
    rows = table[table.part.str.contains(": suppressor")]
    return say("cross_validation", "suppressors", rows=rows.to_dict("records"))


def report_suppressors(report: Results, table: pd.DataFrame) -> None:
    """Whether an intervention confirms the suppressors. On a set: given its output under the controls (`controls`), the
    margin rises by more than nothing and by more than with the same kind of part one layer below, intervals apart."""
    rows = table[table.way == "controls"].set_index("part")
    sure = {}
    for part in rows.index[rows.index.str.contains(": suppressor")]:
        case, of = part.split(": ")[0], part.split(", ")[1]
        (beside,) = (p for p in rows.index if p.startswith(f"{case}: control") and p.endswith(of))
        sure[part] = bool(rows.low[part] > max(0, rows.high[beside]))
    found = set(sure.values())
    confirmed = "in part" if len(found) > 1 else {None: "none named", True: "yes", False: "no"}[next(iter(found), None)]
    verdict = say("cross_validation", "suppressor_verdict", sure=sure, rows=rows.to_dict("index"))
    report.many({"suppressor_confirmed": confirmed, "suppressor_verdict": verdict})


@torch.no_grad()
def patch_heads(model: Model, facts: Sequence[Fact], failing: str, control: str, competitors: Tokens) -> Patched:
    """Every head of the failing prompt, one at a time, made to do what it does under the control template: at the last
    position, and at the last token of the subject. The share of the lost logit difference (answer minus competitor)
    that comes back; 1 is all of it."""
    pairs, shape = torch.stack((first_tokens(model, facts), competitors), 1), (model.weights.n_layers, -1, len(facts))
    bad, good = (run_with_cache(model, prompts(facts, template)) for template in (failing, control))
    base, told = (interventions.logit_differences(run, pairs) for run in (bad, good))
    (rows,) = deque(interventions.patched_streams(model, bad, good.z), maxlen=1)  # what leaves the last layer
    last = interventions.patched_logit_differences(model, rows, pairs).view(shape)
    texts = bad.prompts, good.prompts
    at = [[subject_positions(model, t, f.subject)[-1] for t, f in zip(batch, facts, strict=True)] for batch in texts]
    subject = patch_by_blocks(model, texts, torch.tensor(at), pairs)
    return {name: (patched - base) / (told - base) for name, patched in (("last", last), ("subject", subject))}


@torch.no_grad()
def patch_by_blocks(
    model: Model, texts: tuple[Sequence[str], Sequence[str]], at: Int[Tensor, "2 text"], pairs: Int[Tensor, "text 2"]
) -> Float[Tensor, "n_layers n_heads text"]:
    """Logit differences of the first texts with one head at one position each made to do what it does at a position of
    the second ones, by whole passes of the model's own blocks. at: these positions, of the first and of the second."""
    weights, ids = model.weights, [[model.token_ids(t) for t in batch] for batch in texts]
    bad, good = (pack(model, batch) for batch in ids)
    copies = pack(model, ids[0] * weights.n_heads)  # one for each head that is patched
    to, of = (batch.last - batch.position[batch.last] + place for batch, place in zip((bad, good), at, strict=True))
    entering, seen, out = streams(model, bad, range(weights.n_layers)), list[Tensor](), list[Tensor]()
    with hooked(before=dict.fromkeys((block.heads_out for block in weights.blocks), seen.append)):
        resid_pre(model, good, weights.n_layers)
    for layer, block in enumerate(tqdm(weights.blocks, desc="patching")):
        patch = _head_by_head(seen[layer].view(-1, weights.n_heads, weights.d_head)[of], to, len(bad.tokens))
        with hooked(before={block.heads_out: patch}):
            final = above(model, copies, layer, entering[layer].repeat(weights.n_heads, 1))[copies.last]
        out.append(read_logit_differences(model, final.view(weights.n_heads, len(pairs), -1), pairs))
    return torch.stack(out)


def _head_by_head(z: Float[Tensor, "fact n_heads d_head"], rows: Int[Tensor, " fact"], length: int) -> Hook:
    """For a pack that holds the texts, of `length` tokens, once for each head: in the h-th copy, head h gets z."""
    heads = torch.arange(z.shape[1])[:, None]

    def change(x: Tensor) -> Tensor:
        copies = x.reshape(len(heads), length, len(heads), -1).clone()  # (copy, token, head, d_head)
        copies[heads, rows, heads] = z.transpose(0, 1)
        return copies.view(x.shape)

    return change


def patch_case_heads(model: Model, case: Case) -> Patched:
    """`patch_heads` over the case's untold facts, from its first control template."""
    templates = load_templates()
    table = tell(model, case.facts, {case.template: templates[case.template]})
    pick = ~table.told.to_numpy()
    facts = [f for f, untold in zip(case.facts, pick, strict=True) if untold]
    competitors = torch.tensor(table.competitor_token.to_numpy()[pick])
    return patch_heads(model, facts, templates[case.template], templates[case.controls[0]], competitors)


def best_heads(grid: Float[Tensor, "n_layers n_heads fact"], k: int = 5) -> list[dict[str, object]]:
    """The heads that bring most of the margin back, on average."""
    best = grid.mean(-1).flatten().topk(k)
    return [{"head": str(Site(*divmod(int(i), grid.shape[1]))), "share": float(v)} for v, i in zip(*best, strict=True)]
