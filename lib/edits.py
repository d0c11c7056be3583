"""Edits: new values for the slices of one pathway, with everything needed to check them.

make            values as an edit, with what the model tells with them in place
save, load      one safetensors file; it holds values, not differences, so that applying it is exact
applied         the model with the edit: only inside `with applied(model, edit):`, and afterwards it is what it was,
                bit for bit, also after an exception
check, verify   whether it belongs to a model; whether its prompts come out as it recorded
outside_sha256  the proof that nothing else was changed
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pandas as pd
import safetensors.torch
import torch
from pydantic import ConfigDict, Json, create_model
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from lib.checkpoints.named import public_name
from lib.errors import EditError, ModelError
from lib.facts import Fact, validated
from lib.files import file_sha256, write_atomically
from lib.models import Model
from lib.models import load as load_model
from lib.recall import tell
from lib.sinks import check as check_sink
from lib.sinks import standing
from lib.sites import Site
from lib.weights import PATHWAYS, SINKS, Slice, pathway_slices, places

FORMAT = "qkv-edit-3"


@dataclass(frozen=True)
class Edit:
    """What a pathway changed in one layer (0-based; of a sink: 0) of a model, for which facts under which template (its
    text), and what was told before and after. bos: the tokens that stood before every text, without a sink. recipe:
    objective and hyperparameters, as they were used."""

    model_name: str
    base_sha256: str
    pathway: str
    layer: int
    facts: tuple[Fact, ...]
    template: str
    told_before: tuple[bool, ...]
    told_after: tuple[bool, ...]
    seed: int
    bos: tuple[int, ...]
    recipe: dict[str, Any]
    values: dict[Slice, Tensor] = field(repr=False)

    @property
    def parameters(self) -> int:
        return sum(v.numel() for v in self.values.values())

    @property
    def title(self) -> str:
        where = "" if self.pathway in SINKS else f"{Site(self.layer)} "
        return f"{self.model_name} {where}{self.pathway}"


_ENTRIES: dict[str, Any] = {name: (kind, ...) for name, kind in get_type_hints(Edit).items() if name != "values"}
_ENTRIES |= {"told_before": (tuple, ...), "told_after": (tuple, ...), "slices": (tuple[Slice, ...], ...)}
_Header = create_model("_Header", __config__=ConfigDict(extra="forbid", strict=True), **_ENTRIES)  # of a file


def make(model: Model, values: dict[Slice, Tensor], **about: Any) -> Edit:
    """The values as an edit, with what the whole model tells afterwards, measured on the model itself. about: the
    fields of `Edit` from pathway to recipe, but told_after. Raises EditError as `check` does."""
    told = {"told_before": about["told_before"], "told_after": about["told_before"]}
    draft = Edit(public_name(model.name), model.weights_sha256, bos=model.bos, values=values, **{**about, **told})
    with applied(model, draft) as changed:
        after = tell(changed, draft.facts, {"failing": draft.template})
    return replace(draft, told_after=tuple(after.told.tolist()))


def save(edit: Edit, path: Path) -> Path:
    """Write the edit whole or not at all. Raises EditError for one that `load` would refuse, or if it cannot write."""
    _check_content(edit, f"{path} is not written")
    header = {f.name: getattr(edit, f.name) for f in fields(edit) if f.name != "values"}
    header |= {"facts": [asdict(f) for f in edit.facts], "slices": [asdict(s) for s in edit.values]}
    tensors = {f"{i:03d}": v.contiguous() for i, v in enumerate(edit.values.values())}
    content = _in_order(safetensors.torch.save(tensors, metadata={"format": FORMAT, "edit": json.dumps(header)}))
    advice = f"It needs {len(content):,} bytes in a folder that you may write to."
    return write_atomically(path, content, error=EditError, advice=advice)


def _in_order(content: bytes) -> bytes:
    """A safetensors file with sorted entries in its header, where the library leaves those of the metadata to chance:
    the same edit has the same sum."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def load(path: Path) -> Edit:
    """Read an edit; nothing is ever unpickled. Raises EditError for a file that is missing, no safetensors file, cut
    short or altered, no edit, or one that contradicts itself."""
    if not path.is_file():
        raise EditError(f"there is no edit {path}. Give the .safetensors file that a chapter or an export wrote.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise EditError(f"{path} is a safetensors file, but no edit of this book (format {FORMAT}).")
            names: list[str] = file.keys()
            tensors = {name: file.get_tensor(name).to(torch.get_default_device()) for name in names}
    except (SafetensorError, OSError) as error:
        raise EditError(
            f"{path} cannot be read: {error}. It is no safetensors file, or was cut short or altered; get it again."
        ) from error
    damaged = f"{path} has a damaged header, it was altered, get it again"
    header = dict(validated(Json[_Header], metadata.get("edit"), damaged, EditError))
    slices, header["model_name"] = header.pop("slices"), public_name(header["model_name"])  # once it was a path
    keys = [f"{i:03d}" for i in range(len(slices))]
    if set(tensors) != set(keys) or len(set(slices)) != len(slices):
        raise EditError(f"{damaged}: {len(tensors)} tensors for {len(set(slices))} slices.")
    if odd := [part for part in slices if (part.start is None) != (part.stop is None)]:
        raise EditError(f"{damaged}: {odd[0]} gives a start or an end alone.")
    edit = Edit(**header, values={part: tensors[key] for part, key in zip(slices, keys, strict=True)})
    _check_content(edit, f"{path} cannot be used")
    return edit


def save_all(edits: dict[str, Edit], folder: Path) -> list[Path]:
    """One file a pathway."""
    return [save(edit, folder / f"{name}.safetensors") for name, edit in edits.items()]


def load_all(folder: Path) -> dict[str, Edit]:
    """The edits of a folder by pathway, in the book's order of pathways; empty if there is none."""
    paths = {name: folder / f"{name}.safetensors" for name in PATHWAYS}
    return {name: load(path) for name, path in paths.items() if path.is_file()}


def listing(folder: Path) -> pd.DataFrame:
    """The edits of a folder with their sizes and checksums."""
    paths = sorted(folder.glob("*.safetensors"))
    rows = [(p.name, f"{p.stat().st_size:,}", file_sha256(p)) for p in paths]
    return pd.DataFrame(rows, columns=["file", "bytes", "sha256"])


def rerun(model: Model, folder: Path) -> dict[str, bool]:
    """Of each edit file of a folder, by pathway: read back and put into the model, does it tell what it recorded?"""
    return {name: bool(verify(model, edit)["as recorded"].all()) for name, edit in load_all(folder).items()}


def base_model(edit: Edit, name: str | None = None) -> Model:
    """The model that an edit was made for, by the name that is given, or else the one in its header. Which it is the
    checksum decides (`check`). Raises ModelError, with what to give, where the header's name leads to none here."""
    try:
        return load_model(name or edit.model_name)
    except ModelError as error:
        if name:
            raise
        lack = f"the model {edit.model_name!r} that the edit was made for cannot be had by that name"
        raise ModelError(f"{lack}; give its folder, .gguf file or hub id with --model ({error})") from error


@contextmanager
def applied(model: Model, edit: Edit) -> Iterator[Model]:
    """The model with the edit in place; `restored` afterwards. What it gives is to be asked: with a sink it reads every
    text otherwise than the model that was given. Raises EditError as `check` does, before any change."""
    check(model, edit)
    sink = {"middle": bool(edit.recipe.get("middle"))}
    with standing(model, edit.values, **sink) if edit.pathway in SINKS else written(model.module, edit.values) as other:
        yield other or model


@contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Whatever is written into a model's own tensors meanwhile is undone, bit for bit, also after an exception."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in zip(tensors, before, strict=True):
                tensor.copy_(values)


@contextmanager
def written(model: PreTrainedModel, values: dict[Slice, Tensor]) -> Iterator[None]:
    """Values in the model's own weights; `restored` afterwards. Raises EditError as `targets` does."""
    own = targets(model, values)
    with restored(own):
        with torch.no_grad():
            for place, value in zip(own, values.values(), strict=True):
                place.copy_(value)
        yield


def check(model: Model, edit: Edit) -> None:
    """Raises EditError unless the edit was made for these very weights, and holds sound values for exactly the slices
    of its pathway in its layer. Names are not compared: the same weights under another path are the same model."""
    _check_content(edit, "the edit cannot be applied")
    if edit.base_sha256 != model.weights_sha256:
        sums = f"{edit.base_sha256[:12]}..., not {model.weights_sha256[:12]}..."
        kind, remedy = "model than", f"give the one it was made for, {edit.model_name}, with --model"
        if edit.model_name in (model.name, public_name(model.name)):
            kind, remedy = "revision of", "get the revision that it was made for, or train it anew on this one"
        raise EditError(f"the edit {edit.title!r} is for another {kind} {model.name} (weights {sums}); {remedy}.")
    if edit.bos != model.bos:
        stood = "".join(map(model.token_text, edit.bos)) or "nothing"
        raise EditError(
            f"the edit {edit.title!r} was made with {stood} before every text, and {model.name} puts "
            f"{model.before_texts} there; load it as {edit.model_name}."
        )
    if edit.pathway in SINKS:
        check_sink(model, edit.values)
    else:
        targets(model.module, edit.values)
    try:
        wanted = pathway_slices(model.module, edit.layer, edit.pathway)
    except ValueError as error:
        raise EditError(f"the edit {edit.title!r} names a place that {model.name} lacks: {error}.") from error
    if odd := sorted(set(wanted) ^ set(edit.values), key=str):
        verb = "lacks" if odd[0] in wanted else "also holds"
        raise EditError(
            f"the edit {edit.title!r} {verb} {odd[0]}; its pathway is {', '.join(map(str, wanted))}. "
            "It was altered; get it again."
        )


def targets(model: PreTrainedModel, values: dict[Slice, Tensor]) -> list[Tensor]:
    """The model's own tensors (views, where a slice is part of one) that the values replace. Raises EditError."""
    parameters = dict(model.named_parameters())
    for part, value in values.items():
        whole, fault = parameters.get(part.name), ""
        if whole is None:
            fault = f"the model has no parameter {part.name}"
        elif not part.fits(whole):
            has = f"columns 0 to {whole.shape[-1]}" if part.every is None else f"rows 0 to {len(whole)}"
            fault = f"{part.name} has the {has}, and the edit is for {part}"
        elif ((own := part.of(whole)).shape, own.dtype) != (value.shape, value.dtype):
            held = f"the edit's values have {tuple(value.shape)} in {value.dtype}"
            fault = f"{part} has the shape {tuple(own.shape)} in {own.dtype}, and {held}"
        if fault:
            raise EditError(f"{fault}; the edit is of another model, or was altered.")
    return places(model, values)


def outside_sha256(model: PreTrainedModel, slices: Sequence[Slice]) -> str:
    """sha256 over every byte of the model outside the slices: equal before and after, if nothing leaked."""
    sums = _sums_outside(model, slices, {})
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def _sums_outside(model: PreTrainedModel, slices: Sequence[Slice], known: dict[str, str]) -> dict[str, str]:
    """sha256 of each parameter, the slices in it set to zero. known: of whole parameters, which are not read again."""
    sums = dict[str, str]()
    for name, parameter in model.named_parameters():
        inside = [part for part in slices if part.name == name]
        if name in known and not inside:
            sums[name] = known[name]
            continue
        left = parameter.detach().clone() if inside else parameter.detach()
        for part in inside:
            part.of(left).zero_()
        sums[name] = hashlib.sha256(left.contiguous().view(torch.uint8).cpu().numpy().data).hexdigest()
    return sums


def _sums_before(model: Model, slices: Sequence[Slice]) -> dict[str, str]:
    """`_sums_outside` of the model before an edit. A whole parameter is read for this once in the life of the model:
    every edit is compared with what it was then, so that what an earlier one left behind would also be seen."""
    cut = {part.name for part in slices}
    known = model.memory.setdefault(_sums_before, {})
    sums = _sums_outside(model.module, slices, known)
    known |= {name: value for name, value in sums.items() if name not in cut}
    return sums


def outside_bytes(model: PreTrainedModel, slices: Sequence[Slice]) -> int:
    """How many bytes `outside_sha256` vouches for."""
    inside = places(model, [part for part in slices if part.name in dict(model.named_parameters())])
    return sum(p.nbytes for p in model.parameters()) - sum(part.nbytes for part in inside)


def verify(model: Model, edit: Edit, *, edited: Model | None = None) -> pd.DataFrame:
    """Re-run the edit's prompts before and after: one row a fact, with what the edit recorded and whether it holds.
    edited: a model that has the edit in its weights, to ask instead of the one with the edit applied. Raises
    EditError if a byte outside the slices differs between before and after."""
    template, slices = {"failing": edit.template}, tuple(edit.values)
    before, outside = tell(model, edit.facts, template), _sums_before(model, slices)
    with applied(model, edit) if edited is None else nullcontext(edited) as changed:
        exported = edited is not None and edit.pathway in SINKS  # with a row more, which who exports it compares
        if not exported and _sums_outside(changed.module, slices, {}) != outside:
            raise EditError(f"with the edit {edit.title!r}, {changed.name} differs from its base outside the slices.")
        after = tell(changed, edit.facts, template)
    asked = [
        table[["top", "told", "prob"]].set_axis([f"says {when}", f"told {when}", f"p {when}"], axis=1)
        for when, table in (("before", before), ("after", after))
    ]
    recorded = (before.told == list(edit.told_before)) & (after.told == list(edit.told_after))
    return pd.concat([before[["subject", "answer"]], *asked, recorded.rename("as recorded")], axis=1)


def _check_content(edit: Edit, what: str) -> None:
    """Raises EditError for what is wrong with an edit whatever the model. what: the start of the sentence."""
    if fault := _fault(edit):
        raise EditError(f"{what}: {fault}. Get the edit again, or train it anew.")


def _fault(edit: Edit) -> str | None:
    if edit.pathway not in PATHWAYS:
        return f"its pathway {edit.pathway!r} is none of {', '.join(PATHWAYS)}"
    if edit.layer < 0:
        return f"its layer {edit.layer} is negative; layers count from 0"
    if edit.template.count("{}") != 1:
        return f"its template {edit.template!r} has {edit.template.count('{}')} holes {{}} for the subject, not one"
    if not edit.facts or not edit.values:
        return f"it holds {len(edit.facts)} facts and {len(edit.values)} tensors; it needs some of both"
    for name, told in (("told_before", edit.told_before), ("told_after", edit.told_after)):
        if len(told) != len(edit.facts) or not all(isinstance(t, bool) for t in told):
            return f"its {name} is {list(told)}; it must be true or false for each of its {len(edit.facts)} facts"
    for part, value in edit.values.items():
        if odd := int((~value.isfinite()).sum()):
            return f"its values for {part} hold NaN or infinity in {odd:,} of {value.numel():,} places"
    return None


def outside_unchanged(model: Model, edit: Edit) -> bool:
    """Whether every byte outside the slice is the same with the edit in place as without: each is read once more."""
    before = _sums_before(model, tuple(edit.values))
    with applied(model, edit):
        return _sums_outside(model.module, tuple(edit.values), {}) == before
