"""An edit put into its model for good: an ordinary Hugging Face folder that needs nothing of this book.

model.safetensors, config, tokenizer    the base model with the edit in its weights
edit.safetensors                        the edit itself, so that anyone can check the rest against the base model
README.md                               a model card: what was changed, what for, and what this is not
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from huggingface_hub import ModelCardData
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lib import __version__, edits, models
from lib.edits import Edit, applied
from lib.errors import EditError
from lib.facts import prompts
from lib.forward import next_token_logits
from lib.models import Model
from lib.sites import Site

WEIGHTS, EDIT, CARD = "model.safetensors", "edit.safetensors", "README.md"
BESIDE = 50_000_000  # bytes, generously: tokenizer, configuration and card
CHANGED = {
    "full": "the whole block with its norms",
    "attention": "the attention: queries, keys, values, output and their biases",
    "ffn": "the MLP",
    "v_only": "the value matrix",
    "q_only": "the query matrix",
    "k_only": "the key matrix",
}
TEMPLATE = """---
{front}
---

# {name}, edited: {site} {pathway}

One layer of {origin} was changed, to make it tell the facts below under one wording: {changed} of layer
{site} of {layers} (layers count from 1), the pathway `{pathway}`. These are {parameters:,} of {total:,} parameters
({share:.2%}), in {tensors}. Every other parameter is the base model's, bit for bit.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
    tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")

## What it was edited for

{before} of {n} prompts are told before the edit, {after} of {n} after it. Told: the first token of the answer is the
most likely next token, with no special token added to the prompt.

| prompt | answer | told before | told after |
|---|---|---|---|
{told}

## Recipe

The slice alone was trained with Adam on the cross-entropy of the answers, plus `kl_weight` times the KL divergence
from the base model on neutral passages, until every fact was told with the margin or the steps ran out.

| setting | value |
|---|---|
{recipe}

## What this is not

This is a research artefact, not a better model. The edit was fitted to these prompts; other wordings, other facts and
running text may have changed with them. Its side effects are measured in chapter 4 of the book *QKV Decomposition for
Transformer XAI*, from which it comes; nothing else was evaluated. Do not use it where answers matter.

## How to verify

In a checkout of the book, `python -m lib verify DIR` loads the base model, compares every tensor of this folder with
it and with `edit.safetensors`, bit for bit, and puts the prompts to both models.

| weights | sha256 |
|---|---|
| base: {source} | `{base_sha256}` |
| this `model.safetensors` | `{sha256}` |

Written by `lib` {version}.
"""


def export(model: Model, edit: Edit, folder: Path) -> Path:
    """Write the model with the edit as a new folder, under a temporary name beside it, then rename. Raises EditError
    for an edit that is not the subject's, a folder that holds something, and a disk that is full or not writable."""
    edits.check(model, edit)
    folder = folder.expanduser().resolve()
    nearest = next(parent for parent in folder.parents if parent.exists())
    try:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise EditError(f"{folder} exists and is not an empty folder; give a new name, nothing is overwritten.")
        _expect_space(nearest, model, edit)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=nearest) as temporary:
            ready = Path(temporary) / folder.name
            _write(model, edit, ready)
            folder.parent.mkdir(parents=True, exist_ok=True)
            ready.replace(folder)
    except Exception as error:
        # safetensors and tokenizers report a full disk with exceptions of their own, the latter a bare Exception
        if not isinstance(error, OSError) and "(os error" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise EditError(f"cannot write {folder}: {reason}. Choose a place with room that you may write to.") from error
    return folder


def verify_folder(folder: Path, *, base: Model | None = None) -> pd.DataFrame:
    """The table of `edits.verify`, from an exported folder: its weights are compared bit for bit with the base model's
    and the edit's, and the prompts are put to the model that transformers loads from it. base: the model that the
    edit names, if it is loaded already. Raises EditError for a folder that is no export or was altered."""
    folder = folder.expanduser().resolve()
    edit = edit_of(folder)
    base = base or models.load(edit.model_name)
    edits.check(base, edit)
    _compare_weights(folder / WEIGHTS, base, edit)
    exported = models.load(str(folder))
    _compare_logits(folder, exported, base, edit)
    return edits.verify(base, edit, edited=exported)


def edit_of(folder: Path) -> Edit:
    """The edit of an exported folder. Raises EditError for a folder that is no export."""
    if missing := [name for name in (EDIT, WEIGHTS, "config.json") if not (folder / name).is_file()]:
        raise EditError(
            f"{folder} has no {missing[0]}: it is no folder that `python -m lib export` wrote, or not all of it. "
            "Give an exported folder, or export the edit again."
        )
    return edits.load(folder / EDIT)


def card(model: Model, edit: Edit, sha256: str) -> str:
    """The model card of an exported edit. sha256: of the exported weights. No path of this machine is in it."""
    hub = models.hub_id(model.name)
    named = model.name in models.SPECS
    name = model.name if named or hub else Path(model.name).name
    source = model.source if named else name
    data = ModelCardData(
        base_model=hub,
        license=model.licence.lower() if named else "other",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["model-editing", "knowledge-editing", "qkv-decomposition"],
    )
    told = [
        f"| `{_cell(prompt)}` | {_cell(fact.answer)} | {_yes(before)} | {_yes(after)} |"
        for prompt, fact, before, after in zip(
            prompts(edit.facts, edit.template), edit.facts, edit.told_before, edit.told_after, strict=True
        )
    ]
    return TEMPLATE.format(
        front=data.to_yaml(),
        name=name,
        site=Site(edit.layer),
        layers=model.weights.n_layers,
        pathway=edit.pathway,
        changed=CHANGED[edit.pathway],
        parameters=edit.parameters,
        total=model.parameters,
        share=edit.parameters / model.parameters,
        tensors=", ".join(f"`{s}`" for s in edit.values),
        told="\n".join(told),
        before=sum(edit.told_before),
        after=sum(edit.told_after),
        n=len(edit.facts),
        recipe="\n".join(f"| {k} | {_cell(v)} |" for k, v in {**edit.recipe, "seed": edit.seed}.items()),
        origin=f"{name} ({source})" if named else name,
        source=source,
        version=__version__,
        base_sha256=model.weights_sha256,
        sha256=sha256,
    )


def _write(model: Model, edit: Edit, folder: Path) -> None:
    with applied(model, edit):
        model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    edits.save(edit, folder / EDIT)
    sha256 = models.weights_sha256(str(folder))
    (folder / CARD).write_text(card(model, edit, sha256), encoding="utf-8")
    # safetensors makes files that only their owner may read; a folder to be shared has one mode throughout
    (folder / WEIGHTS).chmod((folder / CARD).stat().st_mode)


def _expect_space(place: Path, model: Model, edit: Edit) -> None:
    needed = sum(p.nbytes for p in model.module.parameters()) + sum(v.nbytes for v in edit.values.values()) + BESIDE
    free = shutil.disk_usage(place).free
    if free < needed:
        raise EditError(
            f"the export needs {needed / 1e6:,.0f} MB and {place} has {free / 1e6:,.0f} MB free; "
            "make room, or choose another place."
        )


def _compare_weights(path: Path, base: Model, edit: Edit) -> None:
    """Raises EditError naming the first tensor of a file that is not the base model's with the edit, bit for bit. What
    is expected is put together here, not by `applied`, which wrote the file."""
    moved: dict[int, Tensor] = {}  # tied tensors stay one
    expected = {name: moved.setdefault(t.data_ptr(), t.cpu()) for name, t in base.module.state_dict().items()}
    for part, value in edit.values.items():
        expected[part.name] = expected[part.name].clone()
        part.of(expected[part.name]).copy_(value)
    try:
        with safe_open(path, "pt") as file:
            wrong = _first_difference(file, expected)
    except (SafetensorError, OSError) as error:
        raise EditError(f"{path} cannot be read: {error}. It was cut short or altered; export again.") from error
    if wrong:
        raise EditError(
            f"{path} is not {base.name} with the edit: {wrong} is not bit for bit what it should be. It was altered; "
            "export the edit again."
        )


def _first_difference(file: Any, expected: dict[str, Tensor]) -> str | None:
    """Name of the first tensor that a safetensors file lacks, has too many, or holds otherwise; None if none does."""
    found = set(file.keys())
    present = {expected[name].data_ptr() for name in found & expected.keys()}
    lacking = {name for name, t in expected.items() if t.data_ptr() not in present}  # of tied tensors, one is written
    for name in sorted(found | lacking):
        if name in lacking or name not in expected or not _same(file.get_tensor(name), expected[name]):
            return name
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes, so that -0.0 is not 0.0, and NaN is itself."""
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(*bits)


def _compare_logits(folder: Path, exported: Model, base: Model, edit: Edit, tolerance: float = 1e-3) -> None:
    """Raises EditError where sound weights answer otherwise than they should: then the configuration or the tokenizer
    beside them differs. Tolerance: the same weights in the same code differ by rounding at most, near 1e-5."""
    texts = prompts(edit.facts, edit.template)
    with applied(base, edit):
        ours = next_token_logits(base, texts)
    theirs = next_token_logits(exported, texts)
    if ours.shape != theirs.shape or not float((ours - theirs).abs().max()) <= tolerance:
        raise EditError(
            f"the weights in {folder} are sound, and yet the model answers otherwise than {base.name} with the edit: "
            "its config.json or its tokenizer was altered. Export the edit again."
        )


def _cell(value: object) -> str:
    """A value as the text of one cell of a Markdown table."""
    return str(value).replace("|", "\\|").replace("\n", "\\n")


def _yes(told: bool) -> str:
    return "yes" if told else "no"
