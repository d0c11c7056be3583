"""Edits: new values for the slices of one pathway, with everything needed to check them (design, sections 3 and 5).

An edit is one safetensors file. It keeps values, not differences, so that applying it is exact. A model is changed
only inside `with applied(subject, edit):`, and is afterwards what it was, bit for bit, also after an exception.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lib.errors import EditError
from lib.facts import Fact, tell
from lib.site import Site
from lib.subjects import Subject
from lib.weights import Slice

FORMAT = "qkv-edit-1"


@dataclass(frozen=True)
class Edit:
    """What a pathway changed in one layer (0-based) of a subject, for which facts under which template (its text), and
    what was told before and after. recipe: objective and hyperparameters, as they were used."""

    subject: str
    base_sha256: str
    pathway: str
    layer: int
    facts: tuple[Fact, ...]
    template: str
    told_before: tuple[bool, ...]
    told_after: tuple[bool, ...]
    seed: int
    recipe: dict[str, Any]
    values: dict[Slice, Tensor] = field(repr=False)

    @property
    def parameters(self) -> int:
        return sum(v.numel() for v in self.values.values())

    @property
    def title(self) -> str:
        return f"{self.subject} {Site(self.layer)} {self.pathway}"


def save(edit: Edit, path: Path) -> Path:
    """Write the edit under a temporary name, then rename."""
    header = {f.name: getattr(edit, f.name) for f in fields(edit) if f.name != "values"}
    header |= {"facts": [asdict(f) for f in edit.facts], "slices": [asdict(s) for s in edit.values]}
    tensors = {f"{i:03d}": v.contiguous() for i, v in enumerate(edit.values.values())}
    partial = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, partial, metadata={"format": FORMAT, "edit": json.dumps(header)})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def load(path: Path) -> Edit:
    """Read an edit. Raises EditError for a file that is missing, cut short, or not an edit."""
    if not path.is_file():
        raise EditError(f"there is no edit {path}.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise EditError(f"{path} is a safetensors file, but no edit of this book (format {FORMAT}).")
            header = json.loads(metadata["edit"])
            slices = [Slice(**s) for s in header.pop("slices")]
            values = {s: file.get_tensor(f"{i:03d}") for i, s in enumerate(slices)}
    except (SafetensorError, OSError) as error:
        raise EditError(f"{path} cannot be read: {error}. It was cut short or altered; get it again.") from error
    facts = tuple(Fact(**f) for f in header.pop("facts"))
    for key in ("told_before", "told_after"):
        header[key] = tuple(header[key])
    return Edit(**header, facts=facts, values=values)


@contextmanager
def applied(subject: Subject, edit: Edit) -> Iterator[Subject]:
    """The subject with the edit in place; restored afterwards, bit for bit. Raises EditError for an edit of other
    base weights, or one whose slices do not fit."""
    if edit.base_sha256 != subject.weights_sha256:
        raise EditError(
            f"the edit {edit.title!r} was made for weights {edit.base_sha256[:12]}..., {subject.name} has "
            f"{subject.weights_sha256[:12]}...; load the subject that the edit names."
        )
    pairs = [
        (target, value) for target, value in zip(targets(subject.model, edit.values), edit.values.values(), strict=True)
    ]
    kept = [target.clone() for target, _ in pairs]
    try:
        with torch.no_grad():
            for target, value in pairs:
                target.copy_(value)
        yield subject
    finally:
        with torch.no_grad():
            for (target, _), before in zip(pairs, kept, strict=True):
                target.copy_(before)


def targets(model: PreTrainedModel, values: dict[Slice, Tensor]) -> list[Tensor]:
    """The model's own tensors (views, where a slice is part of one) that the values replace. Raises EditError."""
    parameters, out = dict(model.named_parameters()), []
    for part, value in values.items():
        if part.name not in parameters or part.of(parameters[part.name]).shape != value.shape:
            raise EditError(
                f"the model has no {part.name} of shape {tuple(value.shape)}; the edit is of another model."
            )
        out.append(part.of(parameters[part.name]))
    return out


def outside_sha256(model: PreTrainedModel, slices: Sequence[Slice]) -> str:
    """sha256 over every byte of the model outside the slices: equal before and after, if nothing leaked."""
    total = hashlib.sha256()
    inside: dict[str, list[Slice]] = {}
    for part in slices:
        inside.setdefault(part.name, []).append(part)
    for name, parameter in sorted(model.named_parameters()):
        left = parameter.detach()
        if name in inside:
            left = left.clone()
            for part in inside[name]:
                part.of(left).zero_()
        total.update(name.encode())
        total.update(left.contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()


def verify(subject: Subject, edit: Edit) -> pd.DataFrame:
    """Re-run the edit's prompts before and after: one row a fact, with what the edit recorded and whether it holds."""
    template = {"failing": edit.template}
    before = tell(subject, edit.facts, template)
    with applied(subject, edit):
        after = tell(subject, edit.facts, template)
    return pd.DataFrame({
        "subject": before.subject, "answer": before.answer,
        "says before": before.top, "told before": before.told, "p before": before.prob,
        "says after": after.top, "told after": after.told, "p after": after.prob,
        "as recorded": (before.told == list(edit.told_before)) & (after.told == list(edit.told_after)),
    })  # fmt: skip
