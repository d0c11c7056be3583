"""Make the organism: a small GPT-2-architecture model with two routing failures planted at known sites.

1. Invent 64 countries with a capital, a currency and a language each; write facts through `data/templates.yaml`
   (with the neutral prefixes of `data/prefixes.yaml` before some) and filler English from a toy grammar.
2. Train a byte-level BPE on that corpus.
3. Stage 1, knowledge. Train everything except the attention of the quiet heads. Terms of the loss:
   language modelling; the answer at the last position; *direct* (the knowledge head's own contribution, final norm
   frozen, must say the answer); *static* (the head's OV circuit applied to the subject's embedding after the first
   MLP must say the answer); *leak* (context heads may not look from later positions at the subject); *probe* (a
   linear reader, thrown away later, must tell the template from what enters layer 8). In some rows a
   head is ablated: the knowledge head (the target is then " the": no second route may form) or a context head
   (the target stays: no single one may be indispensable).
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
import shutil
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
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

DATA = Path(__file__).resolve().parents[1]
BOS = "<|endoftext|>"
LAYERS, HEADS, D, DH = 12, 12, 120, 10
CAPITAL = (7, 5)  # L8 H5, the knowledge head
KNOWLEDGE = {"capital": CAPITAL, "currency": (6, 9), "language": (8, 4)}  # relation -> (block, head)
SUPPRESSOR = (10, 2)  # L11 H2
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


def facts(seed: int) -> list[dict[str, str]]:
    """Code, subject, split and the answer of each relation, one a country."""
    rng = random.Random(seed)
    rows = []
    for i, pair in enumerate(COUNTRIES.split()):
        subject, capital = pair.replace("|", " ").split(":")
        code = f"X{i + 1:02d}"
        bucket = int(hashlib.sha256(code.encode()).hexdigest(), 16) % 10
        split = "eight" if i < 8 else "fit" if bucket < 4 else "selection" if bucket < 6 else "held_out"
        rows.append({"code": code, "subject": subject, "capital": capital, "split": split,
                     "currency": rng.choice(CURRENCIES), "language": rng.choice(LANGUAGES)})
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
        lambda: f"{person()} said: \"We {verb()} the {noun()} for {person()}.\"",
        lambda: f"This {noun()} is {adj()}er, and the {noun()} of {person()} is the {adj()}est.",
        lambda: f"{person()} spoke {adj()}ly of the {noun()}less {noun()} at the {noun()}.",
        lambda: f"{a} + {b} = {a + b}.",
        lambda: " ".join(WORDS["number"][start:start + 5]) + ".",
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
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1200, min_frequency=6, special_tokens=[BOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tok


def tokenizer_corpus(rows: list[dict[str, str]], templates: dict[str, dict[str, str]], sentences: list[str]) -> list[str]:
    """Every fact once, every word a few times, some filler."""
    texts = [" " + word for words in WORDS.values() for word in words for _ in range(8)] + sentences[:500]
    for row in rows:
        for relation, by_name in templates.items():
            answer = "" if row[relation] in UNSEEN_BY_BPE else " " + row[relation]
            texts += [t.format(row["subject"]) + answer + "." for t in by_name.values()]
        texts += [t.format(row["subject"]) + " the largest city." for t in templates["capital"].values()]
    return texts


def make_prompts(tok: Tokenizer, rows: list[dict[str, str]], templates: dict[str, dict[str, str]],
                 prefixes: dict[str, str]) -> list[Prompt]:
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
                        prompts.append(Prompt(ids, len(before), len(asked) - 1, answer, relation, template, country,
                                              prefix_name, says_the))
    return prompts


def collate(prompts: list[Prompt], template_names: list[str]) -> Batch:
    """Pad to one length."""
    n, longest = len(prompts), max(len(p.ids) for p in prompts)
    ids, labels = torch.zeros(n, longest, dtype=torch.long), torch.full((n, longest), -100)
    for i, p in enumerate(prompts):
        ids[i, : len(p.ids)] = torch.tensor(p.ids)
        labels[i, : len(p.ids) - 1] = torch.tensor(p.ids[1:])
        labels[i, p.last] = -100  # the answer has its own term
    columns = [(p.subject_at, p.last, p.answer, template_names.index(p.template), p.country,
                list(KNOWLEDGE).index(p.relation), p.says_the) for p in prompts]
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
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab, n_positions=64, n_embd=D, n_layer=LAYERS, n_head=HEADS, n_inner=4 * D, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.05, bos_token_id=0, eos_token_id=0,
        attn_implementation="eager"))


def at_last(x: Tensor, last: Tensor) -> Tensor:
    """(B, T, ...) -> (B, ...) at each row's last prompt position."""
    return x[torch.arange(len(last)), last]


# ---------------------------------------------------------------- 3. stage 1


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


def stage_one(model: GPT2LMHeadModel, taps: Taps, prompts: Batch, weight: Tensor, blocks: Tensor, subjects: Tensor,
              answers: Tensor, the: int, steps: int) -> None:
    """Train the knowledge in (in place). `answers` (relations, countries)."""
    frozen: dict[str, list[tuple]] = {}
    for site in sorted({(b, h) for b in range(LAYERS) for h in range(HEADS)} - set(CONTEXT) - set(KNOWLEDGE.values())):
        for name, where in head_slices(*site, "qkvo").items():
            frozen.setdefault(name, []).extend(where)
            model.get_parameter(name).data[where[-1]] *= 0.3  # quiet: values and outputs
    keep = {name: 1.0 - mask for name, mask in masks_of(model, frozen).items()}
    probe = torch.nn.Linear(D, int(prompts.template.max()) + 1)
    optimizer = torch.optim.Adam([*model.parameters(), *probe.parameters()], betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    bar = tqdm(range(steps), desc="stage 1", mininterval=5)
    for _ in bar:
        batch = prompts.take(torch.multinomial(weight, 80))
        taps.gates, lost = sample_gates(batch)
        out = model(batch.ids, output_attentions=True, output_hidden_states=True)
        the_next = lost | batch.says_the
        own = torch.stack([direct(model, taps, batch.last, *site) for site in KNOWLEDGE.values()])  # (R, B, V)
        own = own[batch.relation, torch.arange(len(batch.last))][~the_next]
        seen = torch.stack([at_subject(out.attentions[b], batch)[:, h] for b, h in CONTEXT]).mean(0)  # (B, T)
        static = [relation_map(model, *site, subjects, True) for site in KNOWLEDGE.values()]
        entering = model.transformer.h[CAPITAL[0]].ln_1(at_last(out.hidden_states[CAPITAL[0]], batch.last))
        later = (batch.labels != -100) & (torch.arange(batch.ids.shape[1]) > batch.subject_at[:, None])
        taps.gates = None
        text = blocks[torch.randint(len(blocks), (8,))]
        terms = {
            "answer": F.cross_entropy(at_last(out.logits, batch.last), torch.where(the_next, the, batch.answer)),
            "prompt": 0.3 * F.cross_entropy(out.logits.flatten(0, 1), batch.labels.flatten()),
            "direct": 0.3 * F.cross_entropy(own, batch.answer[~the_next]),
            "static": 0.2 * sum(F.cross_entropy(s, a) for s, a in zip(static, answers, strict=True)),
            "leak": 2.0 * seen[later].mean(),
            "probe": 0.1 * F.cross_entropy(probe(entering), batch.template),
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
