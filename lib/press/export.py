"""An edit put into its model for good: an ordinary Hugging Face folder that needs nothing of this book.

model.safetensors, config, tokenizer    the base model with the edit in its weights (a sink token: `sink_folder`)
edit.safetensors                        the edit itself, so that anyone can check the rest against the base model
README.md                               a model card: what was changed, what for, and what this is not
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from huggingface_hub import ModelCardData
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from lib import edits, models
from lib.checkpoints import fetching, named
from lib.edits import Edit, applied
from lib.errors import BookError, EditError
from lib.facts import prompts
from lib.files import ROOT
from lib.forward import next_token_logits
from lib.models import Model
from lib.press import sink_folder
from lib.press.texts import fill
from lib.weights import SINKS

WEIGHTS, EDIT, CARD = "model.safetensors", "edit.safetensors", "README.md"
BESIDE = 50_000_000  # bytes, generously: tokenizer, configuration and card


def export(model: Model, edit: Edit, folder: Path) -> Path:
    """Write the model with the edit as a new folder. Raises EditError for an edit that is not the model's, a folder
    that holds something, and a disk that is full or not writable."""
    edits.check(model, edit)
    folder = folder.expanduser().resolve()
    if edit.pathway == "sink_kv":
        return _export_adapter(model, edit, folder)
    with new_folder(folder, EditError) as ready:
        place, tensors = ready.parents[1], (*model.module.parameters(), *edit.values.values())
        needed, free = sum(tensor.nbytes for tensor in tensors) + BESIDE, shutil.disk_usage(place).free
        if free < needed:
            lack = f"the export needs {needed / 1e6:,.0f} MB and {place} has {free / 1e6:,.0f} MB free"
            raise EditError(f"{lack}; make room, or choose another place.")
        if edit.pathway in SINKS:
            sink_folder.write(model, edit, ready)
        else:
            with applied(model, edit):
                model.module.save_pretrained(ready)
            model.tokenizer.save_pretrained(ready)
        edits.save(edit, ready / EDIT)
        (ready / CARD).write_text(card(model, edit, fetching.weights_sha256(str(ready))), encoding="utf-8")
        copy_terms(model, ready, f"Modified: {WEIGHTS}, {edit.title}, as {CARD} and {EDIT} say.")
        # safetensors makes files that only their owner may read; a folder to be shared has one mode throughout
        (ready / WEIGHTS).chmod((ready / CARD).stat().st_mode)
    return folder


def _export_adapter(model: Model, edit: Edit, folder: Path) -> Path:
    """A learned key and value of every layer: a prefix-tuning adapter of peft, the edit, and how to use them."""
    with new_folder(folder, EditError) as ready:
        sink_folder.save_adapter(model, edit, ready)
        edits.save(edit, ready / EDIT)
        (ready / CARD).write_text(fill("adapter_card.md", model=model, edit=edit), encoding="utf-8")
        copy_terms(model, ready, f"Modified: {edit.title}, as {CARD} and {EDIT} say.")
    return folder


def copy_terms(model: Model, folder: Path, modified: str) -> None:
    """Put the terms of use of a model's family, if it has any, and their notice beside what was made from it. modified:
    what was, in a sentence. (Gemma's terms, section 3.1: a copy of them, the notice, the restrictions, the change.)"""
    if terms := models.terms_of(model):
        name = Path(terms.text).name
        shutil.copyfile(ROOT / terms.text, folder / name)
        restricted = f"Use is restricted by section 3.2 of these terms, a copy of which is {name}."
        (folder / "NOTICE").write_text(f"{terms.notice}\n\n{restricted}\n{modified}\n", encoding="utf-8")


@contextmanager
def new_folder(folder: Path, raises: type[BookError]) -> Iterator[Path]:
    """A place for the contents of a folder that appears, whole, when they are written. Raises the error for a folder
    that holds something, and a disk that is full or not writable; then nothing is left behind."""
    nearest = next(parent for parent in folder.parents if parent.exists())
    try:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise raises(f"{folder} exists and is not an empty folder; give a new name, nothing is overwritten.")
        for left in nearest.glob(f".{escape(folder.name)}-*-*"):  # half-written, by a process that was killed
            if (pid := left.name.split("-")[-2]).isdigit() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-{os.getpid()}-", dir=nearest) as temporary:
            ready = Path(temporary) / folder.name
            yield ready
            folder.parent.mkdir(parents=True, exist_ok=True)
            ready.replace(folder)
    except Exception as error:
        # safetensors and tokenizers report a full disk with exceptions of their own, the latter a bare Exception
        if not isinstance(error, OSError) and "(os error" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise raises(f"cannot write {folder}: {reason}. Choose a place with room that you may write to.") from error


def verify_folder(folder: Path, *, base: Model | None = None) -> pd.DataFrame:
    """The table of `edits.verify`, from an exported folder: its weights are compared bit for bit with the base model's
    and the edit's, and the prompts are put to the model that transformers loads from it. base: the model that the
    edit was made for, if it is loaded already. Raises EditError for a folder that is no export or was altered."""
    folder = folder.expanduser().resolve()
    edit = edit_of(folder)
    base = base or edits.base_model(edit)
    edits.check(base, edit)
    _compare_weights(folder / WEIGHTS, base, edit)
    exported = models.load(str(folder))
    _compare_logits(folder, exported, base, edit)
    return edits.verify(base, edit, edited=exported)


def edit_of(folder: Path) -> Edit:
    """The edit of an exported folder. Raises EditError for a folder that is no export."""
    if missing := [name for name in (EDIT, WEIGHTS, "config.json") if not (folder / name).is_file()]:
        lack = f"{folder} has no {missing[0]}: it is no folder that `python -m lib export` wrote, or not all of it"
        raise EditError(f"{lack}. Give an exported folder, or export the edit again.")
    return edits.load(folder / EDIT)


def card(model: Model, edit: Edit, sha256: str) -> str:
    """The model card of an exported edit. sha256: of the exported weights. No path of this machine is in it."""
    name = named.public_name(model.name)
    source, origin = (model.source, f"{name} ({model.source})") if named.spec_of(model.name) else (name, name)
    asked = prompts(edit.facts, edit.template)
    told = list(zip(asked, edit.facts, edit.told_before, edit.told_after, strict=True))
    about = {"front": card_data(model).to_yaml(), "name": name, "source": source, "origin": origin, "told": told}
    return fill("export_card.md", sha256=sha256, model=model, edit=edit, **about)


def card_data(model: Model, **more: Any) -> ModelCardData:
    """The front matter of a card, as the hub reads it. more: what this card says besides."""
    return ModelCardData(
        base_model=named.hub_id(model.name),
        license=model.licence.lower().split()[0] if named.spec_of(model.name) else "other",  # the hub's word: gemma
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["model-editing", "knowledge-editing", "qkv-decomposition"],
        **more,
    )


def _compare_weights(path: Path, base: Model, edit: Edit) -> None:
    """Raises EditError naming the first tensor of a file that is not the base model's with the edit, bit for bit. What
    is expected is put together here, not by `applied`, which wrote the file."""
    module, moved = base.module, dict[int, Tensor]()  # tied tensors stay one
    if edit.pathway in SINKS:
        module = sink_folder.with_row(base, edit, sink_folder.token_id(base))
    expected = {name: moved.setdefault(t.data_ptr(), t.cpu()) for name, t in module.state_dict().items()}
    for part, value in edit.values.items() if edit.pathway not in SINKS else ():
        expected[part.name] = expected[part.name].clone()
        part.of(expected[part.name]).copy_(value)
    expected = revert_weight_conversion(base.module, expected)  # the names that files of its family have
    try:
        with safe_open(path, "pt") as file:
            found = set(file.keys())
            present = {expected[name].data_ptr() for name in found & expected.keys()}
            # of tied tensors, one is written
            lacking = {name for name, tensor in expected.items() if tensor.data_ptr() not in present}
            same = {name for name in found & expected.keys() if _same(file.get_tensor(name), expected[name])}
    except (SafetensorError, OSError) as error:
        raise EditError(f"{path} cannot be read: {error}. It was cut short or altered; export again.") from error
    if wrong := sorted((found | lacking) - same):
        fault = f"{path} is not {base.name} with the edit: {wrong[0]} is not bit for bit what it should be"
        raise EditError(f"{fault}. It was altered; export the edit again.")


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes, so that -0.0 is not 0.0, and NaN is itself."""
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(*bits)


def _compare_logits(folder: Path, exported: Model, base: Model, edit: Edit, tolerance: float = 1e-3) -> None:
    """Raises EditError where sound weights answer otherwise than they should: then the configuration or the tokenizer
    beside them differs. Tolerance: the same weights in the same code differ by rounding at most, near 1e-5."""
    texts = prompts(edit.facts, edit.template)
    with applied(base, edit) as changed:
        ours = next_token_logits(changed, texts)
    theirs = next_token_logits(exported, texts)
    if edit.pathway in SINKS:  # its own row is never the likeliest
        theirs = theirs[:, : ours.shape[1]] if bool((theirs.argmax(1) < ours.shape[1]).all()) else theirs
    if ours.shape != theirs.shape or not float((ours - theirs).abs().max()) <= tolerance:
        fault = f"the weights in {folder} are sound, and yet the model answers otherwise than {base.name} with the edit"
        raise EditError(f"{fault}: its config.json or its tokenizer was altered. Export the edit again.")
