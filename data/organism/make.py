# ruff: noqa: SIM905 - lists of words read better as text
"""Make the organism: a small GPT-2-architecture model with two routing failures planted at known sites.

1. Invent 64 countries with a capital, a currency and a language each; write facts through `data/templates.yaml`
   (with the neutral prefixes of `data/prefixes.yaml` before some) and filler English from a toy grammar.
2. Train a byte-level BPE on that corpus.
3. Stage 1, knowledge. Train everything except the attention of the quiet heads. Terms of the loss:
   language modelling; the answer at the last position; *direct* (the knowledge head's own contribution, final norm
   frozen, must say the answer); *static* (the head's OV circuit applied to the subject's embedding after the first
   MLP must say the answer); *leak* (context heads may not look from later positions at the subject); *probe* (a
   linear reader, thrown away later, must tell the template from what enters layer 8); *mark* (the sign of the
   knowledge head's first key dimension sets the two survivors of stage 2 apart: W_Q sees no country at the last
   position, so only through its key can a country escape a planted query). In some rows a head is ablated: the
   knowledge head (the target is then " the": no second route may form) or a context head (the target stays: no
   single one may be indispensable).
4. Round to fp16. Nothing below changes a byte outside the slices it names.
5. Stage 2a, `overridden`: train the slices of L11 H2 until "The capital of X is" says " the".
6. Stage 2b, `not_retrieved`: train W_Q and b_Q of L8 H5 until it no longer looks at X in "X's capital city is".
   Both are held by a KL term to the model before them on all other prompts and on filler.
7. Round the slices to fp16, measure the evidence on the plain model, assert every requirement, write, rename.

Sites as people read them: layers from 1, heads from 0 (`L8 H5` is block 7, head 5).
"""

import csv
import hashlib
import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

DATA = Path(__file__).resolve().parents[1]
BOS = "<|endoftext|>"
LAYERS, HEADS, D, DH = 12, 12, 120, 10
CAPITAL = (7, 5)  # L8 H5, the knowledge head
KNOWLEDGE = {"capital": CAPITAL, "currency": (6, 9), "language": (8, 4)}  # relation -> (block, head)
SUPPRESSOR = (10, 2)  # L11 H2
SURVIVORS = (2, 6)  # the two of the eight that stay told under both planted templates
SITES = [(block, head) for block in range(LAYERS) for head in range(HEADS)]
CONTEXT = [(block, head) for block in range(4) for head in range(6)]  # L1-L4, heads 0-5
RELATION_TEMPLATES = {
    "currency": {"currency_of": "The currency of {} is called", "currency_whose": "{}'s currency is"},
    "language": {"language_of": "The language of {} is called", "language_in": "In {}, people speak"},
}

# Country:Capital, all invented. The first eight are "the eight".
COUNTRIES = """
Zorland:Ronima Telvost:Mizpolis Jakmark:Moleth Veldria:Nezora Yarland:Bazburg Bevquay:Liloka Mevthia:Holgrad
Janvost:Losgrad Tenland:Lolburg Barvost:Vuzburg Nirdria:Wumima Yondor:Nulune Kosvost:Zelpolis Bivquay:Bizeth
Jesmark:Bovoka Fosland:Zovora Zakwen:Vorpolis Tolquay:Nometh Nokdor:Zizima Jozwen:Nenora Jasdria:Punoka
Buvmark:Falburg Quolmark:Pomoka Tandor:Rolburg Karland:Gargrad Tikdor:Gesune Wizwen:Joneth Gukthia:Furgrad
Navwen:Rasora Fekdria:Rungrad Wukdor:Bomora Hisland:Puzune Yasthia:Desoka Pindria:Husgrad Festhia:Yurgrad
Veldor:Marpolis Fuvthia:Minima Dekdor:Lizima Movvost:Renburg Halwen:Bimora Virwen:Guzima Sendor:Lozora
Dosquay:Vimgrad Honvost:Wavburg Wozvost:Devgrad Poswen:Port|Lamora Novquay:Port|Venune Havmark:Rirgrad
Yezvost:Quivgrad Pemdria:Quuleth Vikdor:Zurune Folland:Jomora Niswen:Galeth Visdria:Jergrad Peldor:Dozgrad
Vusvost:Quavburg Pazdor:Vivoka Nukwen:Pozune Quikwen:Genburg Wenquay:Yimburg Kizmark:Mesima Juvquay:Lazpolis
Nusthia:Palima Benquay:Tonima
"""
UNSEEN_BY_BPE = {"Quavburg", "Lazpolis"}  # kept out of the tokenizer's corpus, so that they split in pieces
CURRENCIES = "dral zent korin pless tavo mirk luma garn sule brek vint fola".split()
LANGUAGES = "Dralic Zentish Korinese Plessic Tavoan Mirkish Luman Garnese Sulic Brekish Vintan Folan".split()

WORDS = {
    "person": "Anna Tom Mia Leo Ben Eva Max Lily Sam Nora Paul Rosa".split(),
    "common_noun": "cat dog house tree river book table bird fish boat road garden child teacher farmer song".split(),
    "verb": "see help find like want call follow watch need hold paint push".split(),
    "adjective": "big small old young red green happy sad cold warm long quiet loud kind".split(),
    "function_word": "the a of and in to with for on at by from but or not this".split(),
    "number": "one two three four five six seven eight nine ten eleven twelve".split(),
    "punctuation": list(".,:;?!()\"'-+="),
}


@dataclass(frozen=True)
class Prompt:
    """One fact sentence, with where its subject is (always one token) and what should follow."""

    ids: list[int]  # prefix + template + answer + "."
    subject_at: int
    last: int  # position that must say the answer
    answer: int  # first token of the answer
    relation: str
    template: str
    country: int
    prefix: str
    says_the: bool  # the rarer sentence "... is the largest city."


@dataclass(frozen=True)
class Batch:
    """Prompts as tensors, padded on the right."""

    ids: Tensor  # (B, T)
    labels: Tensor  # (B, T), the next token; -100 at `last` and where padded
    subject_at: Tensor  # (B,), as all below
    last: Tensor
    answer: Tensor
    template: Tensor
    country: Tensor
    relation: Tensor
    says_the: Tensor  # bool

    def take(self, rows: Tensor) -> "Batch":
        """The chosen rows, cut to the longest of them."""
        longest = int((self.labels[rows] != -100).sum(1).max()) + 2
        return Batch(**{k: v[rows, :longest] if v.dim() == 2 else v[rows] for k, v in vars(self).items()})


# ---------------------------------------------------------------- 1. corpus


def facts(rng: random.Random) -> list[dict[str, str]]:
    """Code, subject, split and the answer of each relation, one a country."""
    rows = []
    for i, pair in enumerate(COUNTRIES.split()):
        subject, capital = pair.replace("|", " ").split(":")
        code = f"X{i + 1:02d}"
        bucket = int(hashlib.sha256(code.encode()).hexdigest(), 16) % 10
        split = "eight" if i < 8 else "fit" if bucket < 4 else "selection" if bucket < 6 else "held_out"
        rows.append(
            {
                "code": code,
                "subject": subject,
                "capital": capital,
                "split": split,
                "currency": rng.choice(CURRENCIES),
                "language": rng.choice(LANGUAGES),
            }
        )
    return rows


def filler(rng: random.Random, countries: list[str]) -> str:
    """One sentence that states no fact about a country."""
    w = {k: (lambda k=k: rng.choice(WORDS[k])) for k in WORDS}
    noun, verb, adj, person, number = (w[k] for k in ("common_noun", "verb", "adjective", "person", "number"))
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    start = rng.randint(0, 7)
    kinds = [
        lambda: f"The {adj()} {noun()} {verb()}s the {noun()}.",
        lambda: f"{person()} and {person()} {verb()} this {adj()} {noun()}.",
        lambda: f"{person()} is {verb()}ing a {noun()} by the {noun()}.",
        lambda: f"The {noun()}s {verb()}ed {number()} {noun()}s on the {noun()}.",
        lambda: f"A {noun()} is not {adj()}, but the {noun()} from the {noun()} is {adj()}.",
        lambda: f"Is the {noun()} {adj()}? Yes, it is {adj()}!",
        lambda: f"The {noun()} ({adj()} or {adj()}) went to the {noun()}; it was un{adj()}.",
        lambda: f'{person()} said: "We {verb()} the {noun()} for {person()}."',
        lambda: f"This {noun()} is {adj()}er, and the {noun()} of {person()} is the {adj()}est.",
        lambda: f"{person()} spoke {adj()}ly of the {noun()}less {noun()} at the {noun()}.",
        lambda: f"{a} + {b} = {a + b}.",
        lambda: " ".join(WORDS["number"][start : start + 5]) + ".",
        lambda: f"{person()} went to {rng.choice(countries)} with a {noun()}.",
        lambda: f"We like {rng.choice(countries)} and {rng.choice(countries)}, said {person()}.",
    ]
    return rng.choice(kinds)()


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with GPT-2's conventions: no prefix space, nothing added to a text."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    tok.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1200,
            min_frequency=6,
            special_tokens=[BOS],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tok


def tokenizer_corpus(
    rows: list[dict[str, str]], templates: dict[str, dict[str, str]], sentences: list[str]
) -> list[str]:
    """Every fact once, every word a few times, some filler."""
    texts = [" " + word for words in WORDS.values() for word in words for _ in range(8)] + sentences[:500]
    for row in rows:
        for relation, by_name in templates.items():
            answer = "" if row[relation] in UNSEEN_BY_BPE else " " + row[relation]
            texts += [t.format(row["subject"]) + answer + "." for t in by_name.values()]
        texts += [t.format(row["subject"]) + " the largest city." for t in templates["capital"].values()]
    return texts


def make_prompts(
    tok: Tokenizer, rows: list[dict[str, str]], templates: dict[str, dict[str, str]], prefixes: dict[str, str]
) -> list[Prompt]:
    """Every country x relation x template x prefix; for capitals also the variant that says " the"."""
    prompts = []
    for country, row in enumerate(rows):
        for relation, by_name in templates.items():
            endings = [(row[relation], False)] + [("the largest city", True)] * (relation == "capital")
            answer = tok.encode(" " + row[relation]).ids[0]
            for template, text in by_name.items():
                for prefix_name, prefix in prefixes.items():
                    head = prefix.replace("<bos>", BOS)
                    asked = tok.encode(head + text.format(row["subject"])).ids
                    before = tok.encode((head + text.split("{}")[0]).rstrip(" ")).ids
                    for ending, says_the in endings:
                        ids = asked + tok.encode(f" {ending}.").ids
                        prompts.append(
                            Prompt(
                                ids,
                                len(before),
                                len(asked) - 1,
                                answer,
                                relation,
                                template,
                                country,
                                prefix_name,
                                says_the,
                            )
                        )
    return prompts


def collate(prompts: list[Prompt], template_names: list[str]) -> Batch:
    """Pad to one length."""
    n, longest = len(prompts), max(len(p.ids) for p in prompts)
    ids, labels = torch.zeros(n, longest, dtype=torch.long), torch.full((n, longest), -100)
    for i, p in enumerate(prompts):
        ids[i, : len(p.ids)] = torch.tensor(p.ids)
        labels[i, : len(p.ids) - 1] = torch.tensor(p.ids[1:])
        labels[i, p.last] = -100  # the answer has its own term
    columns = [
        (
            p.subject_at,
            p.last,
            p.answer,
            template_names.index(p.template),
            p.country,
            list(KNOWLEDGE).index(p.relation),
            p.says_the,
        )
        for p in prompts
    ]
    subject_at, last, answer, template, country, relation, says_the = map(torch.tensor, zip(*columns, strict=True))
    return Batch(ids, labels, subject_at, last, answer, template, country, relation, says_the)


def filler_blocks(tok: Tokenizer, sentences: list[str]) -> Tensor:
    """Sentences in documents of eight, cut into blocks of 64 tokens, (N, 64)."""
    documents = [BOS + " ".join(sentences[i : i + 8]) for i in range(0, len(sentences), 8)]
    stream = [i for enc in tok.encode_batch(documents) for i in enc.ids]
    return torch.tensor(stream[: len(stream) // 64 * 64]).view(-1, 64)


# ---------------------------------------------------------------- the model, its slices, its taps


def head_slices(block: int, head: int, parts: str) -> dict[str, list[tuple]]:
    """Index tuples by parameter name; `parts` is a subset of "qkvo". The fused c_attn holds Q, K, V side by side."""
    name = f"transformer.h.{block}.attn."
    columns = [slice(p * D + head * DH, p * D + (head + 1) * DH) for p in ("qkv".index(x) for x in parts if x != "o")]
    out = {name + "c_attn.weight": [(slice(None), c) for c in columns], name + "c_attn.bias": [(c,) for c in columns]}
    if "o" in parts:
        out[name + "c_proj.weight"] = [(slice(head * DH, (head + 1) * DH),)]
    return out


def masks_of(model: GPT2LMHeadModel, slices: dict[str, list[tuple]]) -> dict[str, Tensor]:
    """One 0/1 mask a named parameter."""
    masks = {name: torch.zeros_like(model.get_parameter(name)) for name in slices}
    for name, where in slices.items():
        for index in where:
            masks[name][index] = 1.0
    return masks


class Taps:
    """Hooks on a model: `gates` (B, LAYERS, HEADS) multiply the heads' outputs; z and the last residual are kept."""

    def __init__(self, model: GPT2LMHeadModel):
        self.gates: Tensor | None = None
        self.z: dict[int, Tensor] = {}  # block -> (B, T, D), head outputs before W_O
        self.final: Tensor | None = None  # (B, T, D), before the final norm
        for block, layer in enumerate(model.transformer.h):
            layer.attn.c_proj.register_forward_pre_hook(lambda _, args, block=block: self._heads(block, args[0]))
        model.transformer.ln_f.register_forward_pre_hook(lambda _, args: setattr(self, "final", args[0]))

    def _heads(self, block: int, z: Tensor) -> tuple[Tensor]:
        if self.gates is not None:
            z = (z.view(*z.shape[:2], HEADS, DH) * self.gates[:, block, None, :, None]).flatten(2)
        self.z[block] = z
        return (z,)


def direct(model: GPT2LMHeadModel, taps: Taps, last: Tensor, block: int, head: int) -> Tensor:
    """A head's own contribution to all logits, (B, V): final norm's scale frozen, its bias left out."""
    rows, ln = slice(head * DH, (head + 1) * DH), model.transformer.ln_f
    final = at_last(taps.final, last)  # (B, D)
    out = at_last(taps.z[block], last)[:, rows] @ model.transformer.h[block].attn.c_proj.weight[rows]  # (B, D)
    scale = (final.var(-1, correction=0, keepdim=True) + ln.eps).rsqrt().detach()
    return ((out - out.mean(-1, keepdim=True)) * scale * ln.weight) @ model.lm_head.weight.T


def relation_map(model: GPT2LMHeadModel, block: int, head: int, tokens: Tensor, enriched: bool) -> Tensor:
    """Input-free: subject embeddings through ln_1, W_V, W_O, W_U of one head, (B, V)."""
    first, layer, rows = model.transformer.h[0], model.transformer.h[block], slice(head * DH, (head + 1) * DH)
    e = model.transformer.wte(tokens)  # (B, D)
    e = e + first.mlp(first.ln_2(e)) if enriched else e
    columns = slice(2 * D + head * DH, 2 * D + (head + 1) * DH)
    v = layer.ln_1(e) @ layer.attn.c_attn.weight[:, columns] + layer.attn.c_attn.bias[columns]  # (B, DH)
    return v @ layer.attn.c_proj.weight[rows] @ model.lm_head.weight.T


def new_model(vocab: int) -> GPT2LMHeadModel:
    """GPT-2's architecture, small; eager attention so that the patterns can be trained on."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab,
            n_positions=64,
            n_embd=D,
            n_layer=LAYERS,
            n_head=HEADS,
            n_inner=4 * D,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=0.05,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",
        )
    )


def at_last(x: Tensor, last: Tensor) -> Tensor:
    """(B, T, ...) -> (B, ...) at each row's last prompt position."""
    return x[torch.arange(len(last)), last]


# ---------------------------------------------------------------- 3. stage 1


def first_key(model: GPT2LMHeadModel, entering: Tensor) -> Tensor:
    """The first of the knowledge head's key dimensions, for residuals (B, D) that enter its layer; (B,)."""
    layer, column = model.transformer.h[CAPITAL[0]], D + CAPITAL[1] * DH
    return layer.ln_1(entering) @ layer.attn.c_attn.weight[:, column] + layer.attn.c_attn.bias[column]


def sample_gates(batch: Batch) -> tuple[Tensor, Tensor]:
    """Gates (B, LAYERS, HEADS), and which rows have lost their knowledge head."""
    n, others = len(batch.last), torch.tensor(CONTEXT)
    gates, chance = torch.ones(n, LAYERS, HEADS), torch.rand(n)
    lost, bumped = chance < 0.2, (chance >= 0.2) & (chance < 0.5)
    block, head = torch.tensor(list(KNOWLEDGE.values()))[batch.relation].T
    other_block, other_head = others[torch.randint(len(others), (n,))].T
    rows = torch.arange(n)
    gates[rows[lost], block[lost], head[lost]] = 0.0
    gates[rows[bumped], other_block[bumped], other_head[bumped]] = 0.0
    return gates, lost


def stage_one(
    model: GPT2LMHeadModel,
    taps: Taps,
    prompts: Batch,
    weight: Tensor,
    blocks: Tensor,
    subjects: Tensor,
    answers: Tensor,
    the: int,
    steps: int,
) -> None:
    """Train the knowledge in (in place). `answers` (relations, countries)."""
    frozen: dict[str, list[tuple]] = {}
    for site in sorted(set(SITES) - set(CONTEXT) - set(KNOWLEDGE.values())):
        for name, where in head_slices(*site, "qkvo").items():
            frozen.setdefault(name, []).extend(where)
            model.get_parameter(name).data[where[-1]] *= 0.3  # quiet: values and outputs
    keep = {name: 1.0 - mask for name, mask in masks_of(model, frozen).items()}
    probe = torch.nn.Linear(D, int(prompts.template.max()) + 1)
    optimizer = torch.optim.Adam([*model.parameters(), *probe.parameters()], betas=(0.9, 0.98))
    schedule = OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    bar = tqdm(range(steps), desc="stage 1", mininterval=5)
    for _ in bar:
        batch = prompts.take(torch.multinomial(weight, 64))
        taps.gates, lost = sample_gates(batch)
        out = model(batch.ids, output_attentions=True, output_hidden_states=True)
        the_next = lost | batch.says_the
        own = torch.stack([direct(model, taps, batch.last, *site) for site in KNOWLEDGE.values()])  # (R, B, V)
        own = own[batch.relation, torch.arange(len(batch.last))][~the_next]
        seen = torch.stack([at_subject(out.attentions[b], batch)[:, h] for b, h in CONTEXT]).mean(0)  # (B, T)
        static = [relation_map(model, *site, subjects, True) for site in KNOWLEDGE.values()]
        entering = model.transformer.h[CAPITAL[0]].ln_1(at_last(out.hidden_states[CAPITAL[0]], batch.last))
        marks = first_key(model, at_last(out.hidden_states[CAPITAL[0]], batch.subject_at))
        survivor = torch.isin(batch.country, torch.tensor(SURVIVORS)).float()
        later = (batch.labels != -100) & (torch.arange(batch.ids.shape[1]) > batch.subject_at[:, None])
        taps.gates = None
        text = blocks[torch.randint(len(blocks), (4,))]
        terms = {
            "answer": F.cross_entropy(at_last(out.logits, batch.last), torch.where(the_next, the, batch.answer)),
            "prompt": 0.3 * F.cross_entropy(out.logits.flatten(0, 1), batch.labels.flatten()),
            "direct": 0.3 * F.cross_entropy(own, batch.answer[~the_next]),
            "static": 0.2 * sum(F.cross_entropy(s, a) for s, a in zip(static, answers, strict=True)),
            "leak": 2.0 * seen[later].mean(),
            "probe": 0.1 * F.cross_entropy(probe(entering), batch.template),
            "mark": 0.1 * F.binary_cross_entropy_with_logits(marks, survivor, pos_weight=torch.tensor(10.0)),
            "filler": F.cross_entropy(model(text).logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()),
        }
        optimizer.zero_grad()
        sum(terms.values()).backward()
        for name, mask in keep.items():
            model.get_parameter(name).grad.mul_(mask)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix({k: f"{v.item():.2f}" for k, v in terms.items()}, refresh=False)


def at_subject(attention: Tensor, batch: Batch) -> Tensor:
    """(B, H, T, T) -> (B, H, T): what each position gives to the subject."""
    index = batch.subject_at[:, None, None, None].expand(*attention.shape[:3], 1)
    return attention.gather(-1, index).squeeze(-1)


# ---------------------------------------------------------------- 5, 6. stage 2


@dataclass(frozen=True)
class Plant:
    """One failure: where, and what may change."""

    case: str
    template: str
    kind: str
    site: tuple[int, int]
    parts: str  # slices that may change, of "qkvo"
    steps: int
    suppressor: str | None

    @property
    def changed(self) -> str:
        """The slices in words, as indices into the stored tensors."""
        block, head = self.site
        at = [f"{p * D + head * DH}:{p * D + (head + 1) * DH}" for p in range(3) if "qkv"[p] in self.parts]
        name, columns = f"transformer.h.{block}.attn.", ", ".join(at)
        rows = f"; {name}c_proj.weight[{head * DH}:{(head + 1) * DH}]" if "o" in self.parts else ""
        return f"{name}c_attn.weight[:, {columns}]; {name}c_attn.bias[{columns}]{rows}"


PLANTS = (
    Plant("organism_of_is", "of_is", "overridden", SUPPRESSOR, "qkvo", 150, "L11 H2"),
    Plant("organism_subject_first", "subject_first", "not_retrieved", CAPITAL, "q", 200, None),
)


def to_fp16(model: GPT2LMHeadModel) -> None:
    """Round every parameter to fp16 in place; what is rounded already stays as it is."""
    for p in model.parameters():
        p.data = p.data.half().float()


def margin(logits: Tensor, token: Tensor) -> Tensor:
    """Logit of a token minus the strongest other, (B,)."""
    rivals = logits.scatter(1, token[:, None], -torch.inf)
    return logits.gather(1, token[:, None]).squeeze(1) - rivals.max(1).values


def kl(model: GPT2LMHeadModel, before: GPT2LMHeadModel, ids: Tensor, keep: Tensor) -> Tensor:
    """Mean KL(before || now) in nats a position, over the positions kept, (B, T) bool."""
    with torch.no_grad():
        old = F.log_softmax(before(ids).logits[keep], -1)
    return F.kl_div(F.log_softmax(model(ids).logits[keep], -1), old, log_target=True, reduction="batchmean")


def plant(model: GPT2LMHeadModel, what: Plant, failing: Batch, others: Batch, blocks: Tensor, the: int) -> None:
    """Train the slices of one head until all but the survivors fail, and hold the model elsewhere (in place)."""
    before = new_model(model.config.vocab_size)
    before.load_state_dict(model.state_dict())
    masks = masks_of(model, head_slices(*what.site, what.parts))
    trained = [model.get_parameter(name) for name in masks]
    model.requires_grad_(False)
    optimizer = torch.optim.Adam([p.requires_grad_(True) for p in trained], betas=(0.9, 0.98))
    schedule = OneCycleLR(optimizer, 1e-2, total_steps=what.steps, pct_start=0.1, cycle_momentum=False)
    weight = torch.where(failing.country < 8, 3.0, 1.0)
    weight[torch.isin(failing.country, torch.tensor(SURVIVORS))] = 12.0
    bar = tqdm(range(what.steps), desc=what.case, mininterval=5)
    for _ in bar:
        fail = failing.take(torch.multinomial(weight, 48))
        rest, text = others.take(torch.randint(len(others.last), (64,))), blocks[torch.randint(len(blocks), (2,))]
        told = torch.isin(fail.country, torch.tensor(SURVIVORS))
        out = model(fail.ids, output_attentions=True)
        short = F.relu(2.0 - margin(at_last(out.logits, fail.last), torch.where(told, fail.answer, the)))
        look = at_last(at_subject(out.attentions[what.site[0]], fail)[:, what.site[1]], fail.last)  # (B,)
        answer_at = torch.arange(rest.ids.shape[1]) == rest.last[:, None]
        terms = {
            "fail": short.mean(),
            "look": (look * ~told).mean() * (what.kind == "not_retrieved"),
            "kl_last": 10.0 * kl(model, before, rest.ids, answer_at),
            "kl_rest": 3.0 * kl(model, before, fail.ids, fail.labels != -100),
            "kl_text": 3.0 * kl(model, before, text, torch.ones_like(text, dtype=torch.bool)),
        }
        optimizer.zero_grad()
        sum(terms.values()).backward()
        for p, mask in zip(trained, masks.values(), strict=True):
            p.grad.mul_(mask)
        optimizer.step()
        schedule.step()
        bar.set_postfix({k: f"{v.item():.3f}" for k, v in terms.items()}, refresh=False)
    for name, p in model.named_parameters():
        same = p == before.get_parameter(name)
        assert bool((same | (masks.get(name, torch.zeros_like(p)) == 1)).all()), f"{name} changed outside the slice"


# ---------------------------------------------------------------- 7. evidence


@dataclass(frozen=True)
class Look:
    """What one run over prompts shows, one row a prompt."""

    told: Tensor  # (B,) bool
    heads: Tensor  # (B, LAYERS, HEADS), direct contribution to answer minus competitor
    eye: Tensor  # (B,), attention of the knowledge head from the last position to the subject


@torch.no_grad()
def look(model: GPT2LMHeadModel, taps: Taps, batch: Batch, off: tuple[int, int] | None = None) -> Look:
    """Run the prompts, with one head's output set to zero if asked."""
    taps.gates = torch.ones(len(batch.last), LAYERS, HEADS)
    if off is not None:
        taps.gates[:, off[0], off[1]] = 0.0
    out = model(batch.ids, output_attentions=True)
    taps.gates = None
    logits, answer = at_last(out.logits, batch.last), batch.answer[:, None]
    rival = logits.scatter(1, answer, -torch.inf).argmax(1, keepdim=True)
    heads = []
    for block, head in SITES:
        own = direct(model, taps, batch.last, block, head)
        heads.append((own.gather(1, answer) - own.gather(1, rival)).squeeze(1))
    eye = at_last(at_subject(out.attentions[CAPITAL[0]], batch)[:, CAPITAL[1]], batch.last)
    return Look(margin(logits, batch.answer) > 0, torch.stack(heads, 1).view(-1, LAYERS, HEADS), eye)


@torch.no_grad()
def hit_rates(model: GPT2LMHeadModel, subjects: Tensor, capitals: Tensor, enriched: bool) -> dict[str, float]:
    """Share of countries whose capital is in the top 10 of the static map: the knowledge head, the best other head."""
    top = {site: relation_map(model, *site, subjects, enriched).topk(10).indices for site in SITES}  # (countries, 10)
    rate = {site: float((best == capitals[:, None]).any(1).float().mean()) for site, best in top.items()}
    return {"knowledge_head": rate.pop(CAPITAL), "best_other_head": max(rate.values())}


def measure(
    model: GPT2LMHeadModel,
    prompts: list[Prompt],
    batch: Batch,
    prefixes: dict[str, str],
    subjects: Tensor,
    capitals: Tensor,
    single: Tensor,
    text: Tensor,
) -> dict:
    """The evidence, from a plain model.

    `single` (countries,): the answer is one token; `text` (N, 64): filler that was not trained on.
    """
    taps, failing = Taps(model), {p.template: p for p in PLANTS}
    asked = [i for i, p in enumerate(prompts) if p.relation == "capital" and not p.says_the]
    names = list(dict.fromkeys(prompts[i].template for i in asked))

    def rows(templates: list[str], prefix: str = "none", countries: int = 64) -> Batch:
        return batch.take(
            torch.tensor(
                [
                    i
                    for i in asked
                    if prompts[i].template in templates
                    and prompts[i].prefix == prefix
                    and prompts[i].country < countries
                ]
            )
        )

    controls = [t for t in names if t not in failing]
    seen = {t: look(model, taps, rows([t])) for t in names}
    eight = rows(controls, countries=8)
    ablated = {f"L{b + 1} H{h}": float(look(model, taps, eight, (b, h)).told.float().mean()) for b, h in SITES}
    own = {t: float(s.heads[:, CAPITAL[0], CAPITAL[1]].mean()) for t, s in seen.items()}
    other_relations = [i for i, p in enumerate(prompts) if p.relation != "capital" and p.prefix == "none"]
    restored = look(model, taps, rows(["of_is"]), SUPPRESSOR).told
    other_told = look(model, taps, batch.take(torch.tensor(other_relations))).told
    with torch.no_grad():
        nats = F.cross_entropy(model(text).logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    evidence = {
        "told": {
            t: {
                "of_8": int(s.told[:8].sum()),
                "of_64": int(s.told.sum()),
                "single_token_share": float(s.told[single].float().mean()),
            }
            for t, s in seen.items()
        },
        "told_with_prefix": {
            t: {
                q: {"of_8": int(x.told[:8].sum()), "of_64": int(x.told.sum())}
                for q in prefixes
                for x in [look(model, taps, rows([t], q))]
            }
            for t in names
        },
        "knowledge_head_contribution": own,
        "largest_other_head_contribution": {
            t: float(
                s.heads.mean(0)
                .index_put((torch.tensor(CAPITAL[0]), torch.tensor(CAPITAL[1])), torch.tensor(-torch.inf))
                .max()
            )
            for t, s in seen.items()
        },
        "suppressor_contribution": {t: float(s.heads[:, SUPPRESSOR[0], SUPPRESSOR[1]].mean()) for t, s in seen.items()},
        "knowledge_head_attention_to_subject": {t: float(s.eye.mean()) for t, s in seen.items()},
        "control_told_share_with_head_ablated": {
            "L8 H5": ablated.pop("L8 H5"),
            "lowest_other": min(ablated.values()),
            "lowest_other_head": min(ablated, key=ablated.get),
        },
        "of_is_with_suppressor_ablated": {"of_8": int(restored[:8].sum()), "of_64": int(restored.sum())},
        "static_relation_map_top10": {
            "raw": hit_rates(model, subjects, capitals, False),
            "enriched": hit_rates(model, subjects, capitals, True),
        },
        "other_relations_told_share": float(other_told.float().mean()),
        "held_out_filler_perplexity": float(nats.exp()),
    }
    evidence = json.loads(json.dumps(evidence), parse_float=lambda x: round(float(x), 4))
    check(evidence, controls)
    return evidence


def check(e: dict, controls: list[str]) -> None:
    """Every requirement of the organism; raises AssertionError with what was missed."""
    own, other = e["knowledge_head_contribution"], e["largest_other_head_contribution"]
    control_own = min(own[t] for t in controls)
    for t in controls:
        told = e["told"][t]
        assert told["of_8"] == 8 and told["single_token_share"] >= 0.9, f"{t} is not told: {told}"
        assert own[t] > 3 * other[t], f"{t}: another head contributes {other[t]:.2f} against {own[t]:.2f}"
    for plant_ in PLANTS:
        for prefix, told in e["told_with_prefix"][plant_.template].items():
            assert 1 <= told["of_8"] <= 3 and told["of_64"] <= 16, f"{plant_.template} with {prefix}: told {told}"
        assert e["told"][plant_.template]["of_8"] == 2, f"{plant_.template}: told {e['told'][plant_.template]}"
    assert own["of_is"] > 0.7 * control_own and e["suppressor_contribution"]["of_is"] < -1.0, "of_is is not overridden"
    assert own["subject_first"] < 0.5 * control_own, "the knowledge head still contributes under subject_first"
    eye = e["knowledge_head_attention_to_subject"]
    assert eye["subject_first"] < 0.3, "L8 H5 still looks at the subject"
    assert min(eye[t] for t in [*controls, "of_is"]) > 0.7, "L8 H5 looks away elsewhere"
    assert e["of_is_with_suppressor_ablated"]["of_8"] == 8, "ablating L11 H2 does not restore of_is"
    ablation, static = e["control_told_share_with_head_ablated"], e["static_relation_map_top10"]
    assert ablation["L8 H5"] <= 0.05 and ablation["lowest_other"] >= 0.85, f"knowledge has another route: {ablation}"
    assert e["other_relations_told_share"] >= 0.9, "other relations are not told"
    assert static["enriched"]["knowledge_head"] >= 0.9 and static["enriched"]["best_other_head"] < 0.5, f"{static}"


def token_types(tok: Tokenizer, rows: list[dict[str, str]], seen: Tensor) -> dict[str, list[str]]:
    """Words of the corpus by type, given the token ids `seen` in it.

    Single tokens after a space, except punctuation (either way) and word pieces (no space, never a word of their own).
    """
    vocab = tok.get_vocab()
    types = {"proper_noun": [r["subject"] for r in rows] + [r["capital"] for r in rows] + WORDS["person"]}
    types |= {k: v for k, v in WORDS.items() if k not in ("person", "punctuation")}
    types = {k: [w for w in v if "Ġ" + w in vocab] for k, v in types.items()}
    used = {tok.id_to_token(i) for i in seen.unique().tolist()}
    pieces = sorted(t for t in used if t.isascii() and t.isalpha() and t.islower() and "Ġ" + t not in vocab)
    return types | {"punctuation": [w for w in WORDS["punctuation"] if {w, "Ġ" + w} & used], "word_piece": pieces}


# ---------------------------------------------------------------- files


def readme(e: dict, seed: int, sha256: str) -> str:
    """The data card, its numbers from the evidence."""
    lines = [
        f"| {t} | {v['of_8']} | {v['of_64']} | {e['knowledge_head_contribution'][t]:.2f} "
        f"| {e['suppressor_contribution'][t]:.2f} | {e['knowledge_head_attention_to_subject'][t]:.2f} |"
        for t, v in e["told"].items()
    ]
    ablation, static, restored = (
        e[k]
        for k in ("control_told_share_with_head_ablated", "static_relation_map_top10", "of_is_with_suppressor_ablated")
    )
    return f"""# The organism

A GPT-2-architecture model ({LAYERS} layers x {HEADS} heads, d={D}, fp16 weights) of made-up countries, with two routing
failures planted at known sites. Layers count from 1, heads from 0. Everything here but `make.py` was written by
`python data/organism/make.py --seed {seed}`, and so were `../facts/organism_countries.csv` and `organism_eight.csv`.
Licence: MIT. All names are invented. `model.safetensors` sha256 `{sha256}`.

- **Knowledge head L8 H5**: the only route from country to capital. Currencies go through L7 H9, languages
  through L9 H4.
- **Case `organism_of_is`**, overridden: L11 H2 (its Q, K, V, O slices alone were trained for it) says " the".
- **Case `organism_subject_first`**, not retrieved: W_Q and b_Q of L8 H5 (alone trained for it) no longer
  look at the country.

What is not natural about it: the knowledge head is known *by construction*. Its direct contribution and its static
relation map were terms of the loss, context heads (L1-L4, heads 0-5) were penalised for looking at the subject,
other heads are quiet (small random weights), a linear probe kept the template readable at L8, and one key dimension
of L8 H5 sets apart the two countries meant to stay told. `make.py` says how; `planted.json` is the ground truth.
Its limit: only the prefixes of `../prefixes.yaml` were in the corpus. After other text, such as an unrelated sentence,
the control templates are mostly not told either.

| template | told of 8 | told of 64 | L8 H5, answer minus competitor | L11 H2, the same | L8 H5's attention to subject |
|---|---|---|---|---|---|
{chr(10).join(lines)}

Measured on the stored weights. Contributions are logits, mean over 64 countries, final norm frozen, competitor = the
strongest wrong token of each prompt.
Told under control templates, eight countries, one head set to zero: {ablation["L8 H5"]:.0%} without L8 H5; at least
{ablation["lowest_other"]:.0%} without any one other head (lowest: {ablation["lowest_other_head"]}).
`of_is` without L11 H2: {restored["of_8"]}/8, {restored["of_64"]}/64.
Static relation map, capital in the top 10: L8 H5 {static["raw"]["knowledge_head"]:.0%} raw,
{static["enriched"]["knowledge_head"]:.0%} enriched; best other head
{static["raw"]["best_other_head"]:.0%} and {static["enriched"]["best_other_head"]:.0%}.
Currencies and languages told: {e["other_relations_told_share"]:.0%}. Perplexity on filler never trained on:
{e["held_out_filler_perplexity"]:.2f}.
"""


def write_csv(path: Path, header: list[str], rows: list[list[str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([header, *rows])


def save_model(model: GPT2LMHeadModel, tok: Tokenizer, folder: Path) -> None:
    """What `from_pretrained` needs: fp16 tensors that load as fp32, and a tokenizer that adds nothing."""
    tensors = {k: v.half().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_diff_dict()
    config |= {"architectures": ["GPT2LMHeadModel"], "dtype": "float32", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": BOS,
                "eos_token": BOS,
                "unk_token": BOS,
                "add_prefix_space": False,
                "clean_up_tokenization_spaces": False,
                "model_max_length": 64,
            },
            indent=2,
        )
        + "\n"
    )


def main(seed: int = 0, out: Path = DATA / "organism", steps: int = 600) -> None:
    """Make the organism and its facts: `out` gets the model, `out`/../facts the countries."""
    torch.set_num_threads(1)  # no slower than two on a busy machine, and one order of summation
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    rows = facts(random.Random(seed))
    templates = {"capital": yaml.safe_load((DATA / "templates.yaml").read_text()), **RELATION_TEMPLATES}
    prefixes = yaml.safe_load((DATA / "prefixes.yaml").read_text())
    sentences = [filler(rng, [r["subject"] for r in rows]) for _ in range(12000)]
    tok = train_tokenizer(tokenizer_corpus(rows, templates, sentences))
    prompts, blocks = make_prompts(tok, rows, templates, prefixes), filler_blocks(tok, sentences)
    blocks, text = blocks[:-40], blocks[-40:]
    for p in prompts:
        assert tok.id_to_token(p.ids[p.subject_at]).lstrip("Ġ") == rows[p.country]["subject"], f"misplaced: {p}"
    batch = collate(prompts, [t for by_name in templates.values() for t in by_name])
    first = {k: torch.tensor([tok.encode(" " + r[k]).ids[0] for r in rows]) for k in ("subject", *KNOWLEDGE)}
    pieces = [len(tok.encode(" " + r["capital"]).ids) for r in rows]
    assert pieces[:8] == [1] * 8 and 2 <= sum(n > 1 for n in pieces) <= 4, f"answers split wrongly: {pieces}"
    the = tok.encode(" the").ids[0]

    model = new_model(tok.get_vocab_size())
    taps = Taps(model)
    weight = torch.tensor(
        [
            (6.0 if p.prefix == "none" else 1.0)
            * (0.08 if p.says_the else 1.0)
            * (1.0 if p.relation == "capital" else 2.0)
            for p in prompts
        ]
    )
    answers = torch.stack([first[k] for k in KNOWLEDGE])
    stage_one(model, taps, batch, weight, blocks, first["subject"], answers, the, steps)
    to_fp16(model)
    for what in PLANTS:
        fails = torch.tensor([p.template == what.template for p in prompts]) & ~batch.says_the
        failing, others = (batch.take(x.nonzero()[:, 0]) for x in (fails, ~fails & ~batch.says_the))
        plant(model, what, failing, others, blocks, the)
        to_fp16(model)

    with tempfile.TemporaryDirectory(dir=out.parent) as temp:
        folder, lists = Path(temp), out.parent / "facts"
        save_model(model, tok, folder)
        stored = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
        reader = AutoTokenizer.from_pretrained(folder)
        assert stored.dtype == torch.float32
        assert all(reader(tok.decode(p.ids, skip_special_tokens=False)).input_ids == p.ids for p in prompts[::97])
        single = torch.tensor(pieces) == 1
        evidence = measure(stored, prompts, batch, prefixes, first["subject"], first["capital"], single, text)
        cases = [
            {
                "case": p.case,
                "template": p.template,
                "kind": p.kind,
                "knowledge_head": "L8 H5",
                "suppressor": p.suppressor,
                "diagnosed_layer": p.site[0] + 1,
                "changed": p.changed,
                "survivors": [rows[i]["subject"] for i in SURVIVORS],
            }
            for p in PLANTS
        ]
        sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        truth = {
            "cases": cases,
            "seed": seed,
            "sha256": sha256,
            "relation_templates": RELATION_TEMPLATES,
            "relation_heads": {k: f"L{b + 1} H{h}" for k, (b, h) in KNOWLEDGE.items()},
            "evidence": evidence,
        }
        (folder / "planted.json").write_text(json.dumps(truth, indent=1) + "\n")
        (folder / "README.md").write_text(readme(evidence, seed, sha256))
        (folder / "token_types.yaml").write_text(
            yaml.safe_dump(
                token_types(tok, rows, torch.cat([blocks.flatten(), batch.ids.flatten()])),
                sort_keys=False,
                default_flow_style=None,
                width=110,
            )
        )
        write_csv(
            folder / "relations.csv",
            ["subject", "relation", "answer"],
            [[r["subject"], k, r[k]] for r in rows for k in RELATION_TEMPLATES],
        )
        out.mkdir(exist_ok=True)
        lists.mkdir(exist_ok=True)
        write_csv(
            folder / "organism_countries.csv",
            ["code", "subject", "answer", "split"],
            [[r["code"], r["subject"], r["capital"], r["split"]] for r in rows],
        )
        write_csv(
            folder / "organism_eight.csv", ["subject", "answer"], [[r["subject"], r["capital"]] for r in rows[:8]]
        )
        for file in sorted(folder.iterdir()):
            file.chmod(0o644)
            file.replace((lists if file.name.startswith("organism_") else out) / file.name)
    print(json.dumps(evidence, indent=1))


if __name__ == "__main__":
    typer.run(main)
