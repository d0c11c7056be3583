"""`lib.diagnose` on a hundred facts beside the same work done by hand with TransformerLens: seconds, memory, ratio.

python -m tests.bench.diagnose_by_hand [--model smollm2] [--facts countries] [--n 100]

By hand, as its manuals show, in batches of equally long prompts: every fact asked under every wording; each head's
contribution to its answer in the failing prompts and in those that tell; every prefix and end on the facts that fail;
each head of the upper two thirds patched at the last position, for PATCHED facts (a sample of layers stands for all).
Not done by hand, though `diagnose` does it: relation maps, MLPs, resampling, the attention sink. First of all it is
checked that both count the same facts as told and name the same head.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import lib
from lib import models, peers
from lib.facts import Fact, load_facts, load_templates, prompts
from lib.models import Model
from lib.recall import first_tokens, load_prefixes, scorable
from lib.studies.causes import ENDS
from lib.studies.own_facts import MOST
from lib.trace import logit_direction
from tests.bench.measure import timed

TEMPLATE, CONTROLS = "subject_first", ("of_is", "in_is")
PATCHED, BATCH, SAMPLE = 5, 16, 2  # facts; prompts at a time; layers that stand for the upper two thirds


def batches(model: Model, texts: Sequence[str]) -> list[tuple[list[int], Tensor]]:
    """Which prompts, and their tokens: no batch is padded."""
    by_length = defaultdict(list)
    ids = [model.token_ids(t) for t in texts]
    for i, tokens in enumerate(ids):
        by_length[len(tokens)].append(i)
    parts = [rows[k : k + BATCH] for rows in by_length.values() for k in range(0, len(rows), BATCH)]
    return [(rows, torch.tensor([ids[i] for i in rows])) for rows in parts]


@torch.no_grad()
def told(lens: Any, model: Model, facts: Sequence[Fact], wording: str, prefix: str = "") -> Tensor:
    answers, out = first_tokens(model, facts), torch.zeros(len(facts), dtype=torch.bool)
    for rows, tokens in batches(model, prompts(facts, wording, prefix)):
        out[rows] = lens(tokens, prepend_bos=False)[:, -1].argmax(-1) == answers[rows]
    return out


@torch.no_grad()
def heads(lens: Any, model: Model, facts: Sequence[Fact], wording: str, bank: Tensor) -> tuple[Tensor, Tensor]:
    """What each head writes of each fact's answer, more than of the others' (fact, layer x head), and every z."""
    answers, w = first_tokens(model, facts), model.weights
    W_O = torch.stack([b.attn.W_O.view(w.n_heads, -1, w.d_model) for b in lens.blocks])
    names, last = [f"blocks.{i}.attn.hook_z" for i in range(w.n_layers)], f"blocks.{w.n_layers - 1}.hook_resid_post"
    written, kept = torch.zeros(len(facts), w.n_layers * w.n_heads), [torch.empty(0)] * len(facts)
    for rows, tokens in batches(model, prompts(facts, wording)):
        _, cache = lens.run_with_cache(tokens, prepend_bos=False, names_filter=[*names, last])
        z = torch.stack(
            [cache[n][:, -1].view(len(rows), w.n_heads, -1) for n in names], 1
        )  # (row, layer, head, d_head)
        out = torch.einsum("blnh,lnhd->blnd", z, W_O).flatten(1, 2)
        final = cache[last][:, -1]
        every = torch.stack([(out * logit_direction(model, final, t.expand(len(rows)))[:, None]).sum(-1) for t in bank])
        own = torch.stack([every[(bank == answers[i]).nonzero()[0, 0], k] for k, i in enumerate(rows)])
        written[rows] = own - (every.sum(0) - own) / (len(bank) - 1)
        for k, i in enumerate(rows):
            kept[i] = z[k]
    return written, torch.stack(kept)


@torch.no_grad()
def patched(lens: Any, model: Model, facts: Sequence[Fact], wording: str, clean: Tensor, layers: Sequence[int]) -> int:
    """Each head of some layers put in from the control, a pass each; how many passes."""
    n, done = model.weights.n_heads, 0

    def put(z: Tensor, hook: Any, layer: int, head: int, rows: list[int]) -> Tensor:
        z.view(*z.shape[:2], n, -1)[:, -1, head] = clean[rows, layer, head]
        return z

    for rows, tokens in batches(model, prompts(facts, wording)):
        for layer in layers:
            for head in range(n):
                hook = partial(put, layer=layer, head=head, rows=rows)
                lens.run_with_hooks(tokens, prepend_bos=False, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", hook)])
                done += 1
    return done


def by_hand(lens: Any, model: Model, facts: Sequence[Fact], wordings: Sequence[str]) -> tuple[int, int, float]:
    """How many are told; the head (layer x head) that writes most; and by how many seconds the patching would have
    been longer, had all layers been done."""
    states = torch.stack([told(lens, model, facts, w) for w in wordings])
    lost = (~states[0] & states[1:].any(0)).nonzero()[:, 0].tolist()
    failing = [facts[i] for i in lost][:MOST]
    bank = first_tokens(model, failing).unique()
    heads(lens, model, failing, wordings[0], bank)
    found, weight, clean = torch.zeros(len(failing), 1), torch.zeros(len(failing), 1), torch.empty(0)
    for tells, control in zip(states[1:], wordings[1:], strict=True):
        telling = tells[lost[:MOST]].float()[:, None]
        written, clean = heads(lens, model, failing, control, bank)
        found, weight = found + telling * written, weight + telling
    for prefix in load_prefixes(model).values():
        told(lens, model, failing, wordings[0], prefix)
    for end in ENDS:
        told(lens, model, failing, wordings[0] + end)
    layers, start = range(model.weights.n_layers // 3, model.weights.n_layers), time.perf_counter()
    patched(lens, model, failing[:PATCHED], wordings[0], clean, layers[:SAMPLE])
    more = (time.perf_counter() - start) * (len(layers) / SAMPLE - 1)
    return int(states[0].sum()), int((found / weight).mean(0).argmax()), more


def main(
    model: str = "smollm2", facts: str = "countries", n: Annotated[int, typer.Option(help="Facts at most.")] = 100
) -> None:
    loaded, text = models.use_device_of(models.load(model)), load_templates()
    listed = [Fact(f.subject, f.answer, "fit") for f in scorable(loaded, load_facts(facts))[:n]]
    wordings, lens, kept = [text[name] for name in (TEMPLATE, *CONTROLS)], peers.bridge(loaded), dict[str, Any]()

    def keeping(name: str, work: Callable[[], Any]) -> tuple[float, float, float | None]:
        before = time.process_time()
        seconds, grown = timed(lambda: kept.update({name: work()}))
        return seconds, time.process_time() - before, grown

    by_lens = keeping("lens", lambda: by_hand(lens, loaded, listed, wordings))
    ours = keeping("ours", lambda: lib.diagnose(loaded, listed, wordings[0], wordings[1:]))
    (count, best, more), found = kept["lens"], kept["ours"].findings
    site, most = found.diagnosis.verdict.knowledge_head, divmod(best, loaded.weights.n_heads)
    assert (count, most) == (found.count("told"), (site.layer, site.head)), "both ways must find the same"
    whole = by_lens[0] + more
    print(f"{len(listed)} facts, {len(wordings)} wordings, {loaded.name}; both: {count} told, {site} writes most")
    for name, (seconds, cpu, grown) in (
        ("diagnose", ours),
        ("by hand", (whole, by_lens[1] * whole / by_lens[0], by_lens[2])),
    ):
        memory = "unknown" if grown is None else f"{grown:,.0f} MB"
        print(f"  {name:<9} {seconds:7.1f} s ({cpu:.1f} s of processor), the process grew by {memory}")
    print(f"  by hand takes {whole / ours[0]:.1f} times as long ({more:.1f} s of it scaled from a sample of layers)")


if __name__ == "__main__":
    typer.run(main)
