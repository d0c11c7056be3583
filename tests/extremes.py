"""Two models at the ends of what can be told: one that tells everything, one that knows nothing. Their folders.

    python tests/extremes.py random FOLDER [--full]     a GPT-2 with random weights
    python tests/extremes.py telling FOLDER [--full]    one that tells its case's facts under every wording

The second is made by hand. A country's token is flagged in one direction, at which the first head looks; its value
turns the country's embedding into its capital's, far louder than all else. Nothing else is written. Both have SmolLM2's
tokenizer. full: of GPT-2's own size, otherwise three layers of four heads.
"""

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lib import models
from lib.facts import load_cases

SMALL = {"n_layer": 3, "n_head": 4, "n_embd": 128, "n_positions": 256}
NO_WORDS = {"bos_token_id": None, "eos_token_id": None}  # of GPT-2, which this vocabulary has not
LOUD = 60.0  # of what is copied, beside embeddings of unit length


def random(vocabulary: int, **sizes: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(**{"vocab_size": vocabulary, "initializer_range": 0.05, **NO_WORDS, **sizes})
    ).eval()


@torch.no_grad()
def telling(vocabulary: int, pairs: dict[int, int], **sizes: int) -> GPT2LMHeadModel:
    """pairs: the token that ends a subject, and the one that begins its answer."""
    model = random(vocabulary, **sizes)
    first, d = model.transformer.h[0].attn, model.config.n_embd
    for name, p in model.named_parameters():
        if not name.endswith("wte.weight") and "ln_" not in name:
            p.mul_(1e-3)
    words = torch.randn(vocabulary, d)
    words[:, 0] = 0
    words /= words.norm(dim=1, keepdim=True)
    subjects, answers = torch.tensor(list(pairs)), torch.tensor(list(pairs.values()))
    words[subjects, 0] = 2.0
    model.transformer.wte.weight.copy_(words)
    seen = model.transformer.h[0].ln_1(words[subjects])  # (subject, d), as the head sees them
    width = d // model.config.n_head
    left, sizes_, right = torch.linalg.svd(torch.linalg.lstsq(seen, words[answers] * LOUD).solution)
    first.c_attn.weight[0, d : d + width] = 8.0  # the key: the flag
    first.c_attn.bias[:width] = 8.0  # the query: the same everywhere
    first.c_attn.weight[:, 2 * d : 2 * d + width] = left[:, :width] * sizes_[:width]
    first.c_proj.weight[:width] = right[:width]
    return model


def make(kind: str, folder: Path, *, full: bool = False) -> Path:
    """A folder of one of the two."""
    sizes, tokenizer = {} if full else SMALL, models.load("smollm2").tokenizer
    if kind == "random":
        model = random(len(tokenizer), **sizes)
    else:
        facts = load_cases("any")[0].facts
        first = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
        pairs = {first(prefix + f.subject)[-1]: first(" " + f.answer)[0] for f in facts for prefix in ("", " ")}
        model = telling(len(tokenizer), pairs, **sizes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("kind", choices=("random", "telling"))
    options.add_argument("folder", type=Path)
    options.add_argument("--full", action="store_true")
    given = options.parse_args()
    print(make(given.kind, given.folder, full=given.full))
