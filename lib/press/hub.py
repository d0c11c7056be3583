"""Edits and dashboard as two repositories of a model hub: prepared in a folder, uploaded only when asked to.

    model/    a card for all (base model, results, checksums), and the source page's four edits, a folder each: the
              edit alone with its card, or the whole edited model as `export` writes it
    space/    the dashboard as a static page
    MANIFEST.sha256    what was prepared; a folder that was altered since is not uploaded

Nothing leaves the machine without --upload, a token and a yes.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from lib import __version__, edits, models
from lib.edits import Edit
from lib.errors import ReleaseError
from lib.files import BUILD, slug
from lib.models import Model
from lib.press import check, release
from lib.press.archive import SUMS
from lib.press.export import CARD, CHANGED, EDIT, export
from lib.results import chapter_folder
from lib.sites import Site
from lib.studies.pathways import PAPER

MODEL, SPACE = "model", "space"
KINDS = {MODEL: "model", SPACE: "space"}
MAKER, EFFECTS = "03_four_pathways", "04_side_effects"  # chapters that make and measure the edits
TEMPLATE = """---
{front}
---

# {name}: one layer, four edits

Four edits of one layer of {source},
from the book *QKV Decomposition for Transformer XAI*: {url} at `{tag}`.
Each retrains a slice of one layer on the same facts under one wording, and leaves every other parameter as it was.

| edit | changes | parameters | told | held-out told | perplexity | sha256 |
|---|---|---|---|---|---|---|
{rows}

Each number before and after. Told: of {n} facts, those whose answer's first token is the most likely next token.
Held-out told: the same of {held} countries that no edit was trained on. The book says how these were measured, what
they can resolve, and what they leave out.

## Use

{use}

## What this is not

Research artefacts, not better models. Each edit was fitted to {n} prompts; other wordings, other facts and running text
change with them, as chapter 4 of the book measures. Do not use them where answers matter.

## Licence

{licence}, as the base model, whose weights have sha256 `{base_sha256}`.
What was changed: the tensors that each card names. Work that the book rebuilds: {record}. Written by `lib` {version}.
"""
ALONE = """Each folder holds `edit.safetensors`: new values for some tensors, not a model. In a checkout of the book,

    python -m lib verify {pathway}/edit.safetensors       # loads the base model, checks, asks before and after
    python -m lib export {pathway}/edit.safetensors DIR   # writes the whole edited model"""
WHOLE = """Each folder holds a whole model, and `edit.safetensors`, which proves what was changed:

    AutoModelForCausalLM.from_pretrained("OWNER/NAME", subfolder="{pathway}")
    python -m lib verify {pathway}                        # in a checkout of the book, tensor by tensor"""
EDIT_CARD = """# {title}

New values for {changed} of {site}: {parameters:,} parameters, in {tensors}.
Told before {before} of {n}, after {after} of {n}, under `{template}`.
For the weights with sha256 `{base_sha256}`.

`edit.safetensors` has sha256 `{sha256}`. See the card above for what it does besides.
"""
SPACE_CARD = """---
title: {title}
emoji: 🔎
colorFrom: indigo
colorTo: blue
sdk: static
app_file: index.html
pinned: false
license: cc-by-4.0
short_description: Every attention head of {name}
---

Every attention head of {source}, before and after each edit.
One page without a server, from the book *QKV Decomposition for Transformer XAI*: {url} at `{tag}`.
"""


def prepare(model_name: str, folder: Path, *, whole: bool = False) -> Path:
    """Write what would be uploaded into a new folder. whole: with the edited models themselves, half a gigabyte each
    for SmolLM2. Raises ReleaseError, EditError or ChapterError for what is missing, out of date or in the way."""
    folder = folder.expanduser().resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ReleaseError(f"{folder} exists and is not an empty folder; give a new name, nothing is overwritten.")
    dashboard = BUILD / "dashboard" / f"{slug(model_name)}.html"
    if not dashboard.is_file():
        raise ReleaseError(f"there is no dashboard {dashboard}. Run `python -m lib dashboard --model {model_name}`.")
    loaded, values = models.use_device_of(models.load(model_name)), check.current_values(model_name)
    if lacking := [c for c in (MAKER, EFFECTS) if c not in values]:
        raise ReleaseError(
            f"there are no present results of {', '.join(lacking)}; run `python -m lib run --model {model_name}`."
        )
    found = edits.load_all(chapter_folder(model_name, MAKER))
    if lacking := [name for name in PAPER if name not in found]:
        raise ReleaseError(f"there is no edit for {', '.join(lacking)}; run chapter 3 on {model_name} again.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            ready = Path(temporary) / folder.name
            for name in PAPER:
                _write_edit(loaded, found[name], ready / MODEL / name, whole=whole)
            text = card(loaded, {name: found[name] for name in PAPER}, values, ready / MODEL, whole=whole)
            (ready / MODEL / CARD).write_text(text, encoding="utf-8")
            (ready / SPACE).mkdir()
            shutil.copyfile(dashboard, ready / SPACE / "index.html")
            (ready / SPACE / CARD).write_text(space_card(loaded), encoding="utf-8")
            (ready / SUMS).write_bytes(_sums(ready))
            ready.replace(folder)
    except OSError as error:
        raise ReleaseError(f"cannot write {folder}: {error.strerror or error}. Choose another place.") from error
    return folder


def card(model: Model, found: dict[str, Edit], values: dict[str, Any], folder: Path, *, whole: bool) -> str:
    """The model card of all edits: base model, results as a model index, checksums of the files in folder."""
    trained, measured = values[MAKER]["pathways"], values[EFFECTS]["pathways"]
    first = next(iter(found.values()))
    rows = [
        f"| [`{name}`]({name}) | {CHANGED[name]} of {Site(edit.layer)} | {edit.parameters:,} "
        f"| {trained[name]['told_before']}, {trained[name]['told_after']} "
        f"| {measured[name]['held_out_told_before']}, {measured[name]['held_out_told_after']} "
        f"| {measured[name]['ppl_before']:.2f}, {measured[name]['ppl_after']:.2f} "
        f"| `{_sha256(folder / name / EDIT)}` |"
        for name, edit in found.items()
    ]
    repo, name = release.repository(), _name(model)
    return TEMPLATE.format(
        front=front_matter(model, found, values).to_yaml(),
        name=name,
        source=_source(model),
        url=repo.url,
        tag=repo.tag,
        rows="\n".join(rows),
        n=len(first.facts),
        held=measured[first.pathway]["held_out_facts"],
        use=(WHOLE if whole else ALONE).format(pathway="v_only"),
        licence=model.licence,
        version=__version__,
        base_sha256=model.weights_sha256,
        record=release.SOURCE_RECORD,
    )


def front_matter(model: Model, found: dict[str, Edit], values: dict[str, Any]) -> ModelCardData:
    """The card's front matter: what the hub reads of it, each result with the run that measured it."""
    trained, measured = values[MAKER]["pathways"], values[EFFECTS]["pathways"]
    results = []
    for name, edit in found.items():
        told, after = trained[name]["told_after"] / len(edit.facts), measured[name]
        held_out = after["held_out_told_after"] / after["held_out_facts"]
        results += [
            _result(name, "told", told, f"{len(edit.facts)} facts: {edit.template}", "trained"),
            _result(name, "held-out told", held_out, "countries that no edit was trained on", "held out"),
            _result(name, "perplexity", after["ppl_after"], "the book's passages", "measured"),
        ]
    named = model.name in models.SPECS
    hub = models.hub_id(model.name)
    return ModelCardData(
        base_model=hub,
        base_model_relation="finetune" if hub else None,
        model_name=f"{_name(model)} edits",
        license=model.licence.lower() if named else "other",
        library_name="transformers",
        language="en",
        pipeline_tag="text-generation",
        tags=["model-editing", "knowledge-editing", "qkv-decomposition"],
        eval_results=results,
    )


def space_card(model: Model) -> str:
    """README.md of the static Space, with the settings that the hub reads."""
    repo, name = release.repository(), _name(model)
    title = f"Head dashboard of {name}"
    return SPACE_CARD.format(title=json.dumps(title), name=name, source=_source(model), url=repo.url, tag=repo.tag)


def listing(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes (bytes) of what would be uploaded. Raises ReleaseError for a folder that `prepare` did not write,
    or that was altered since."""
    if not (folder / SUMS).is_file():
        raise ReleaseError(f"{folder} was not prepared by `python -m lib publish`, or not wholly; give a new folder.")
    if (folder / SUMS).read_bytes() != (now := _sums(folder)):
        was = set((folder / SUMS).read_text(encoding="utf-8").splitlines())
        changed = sorted({line.partition("  ")[2] for line in was ^ set(now.decode().splitlines())})
        raise ReleaseError(
            f"in {folder}, {', '.join(changed)} is not as it was prepared. Nothing is uploaded; prepare a new folder."
        )
    return [(name, (folder / name).stat().st_size) for name in _names(folder)]


def upload(
    folder: Path, repo: str, token: str, *, api: Callable[..., HfApi] = HfApi, say: Callable[[str], None] = print
) -> list[str]:
    """Upload a prepared folder to the model repository and the Space of this name; made if need be. Returns their
    addresses. Raises ReleaseError for a folder that was altered, a token that is missing or refused, or no network."""
    listing(folder)
    if not token.strip():
        raise ReleaseError(
            "there is no token. Make one that may write, at huggingface.co/settings/tokens, and set HF_TOKEN or type "
            "it when asked; it is never written anywhere."
        )
    hub, addresses = api(token=token.strip()), []
    try:
        say(f"signed in as {hub.whoami()['name']}")
        for part, kind in KINDS.items():
            sdk = "static" if kind == "space" else None
            url = hub.create_repo(repo, repo_type=kind, exist_ok=True, space_sdk=sdk)
            message = f"{part} of the book's release {release.repository().tag}"
            hub.upload_folder(repo_id=repo, folder_path=folder / part, repo_type=kind, commit_message=message)
            addresses.append(str(url))
            say(f"uploaded {part}: {url}")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ReleaseError(_refusal(error, repo)) from error
    return addresses


def _refusal(error: Exception, repo: str) -> str:
    """What an upload's failure means and what to do about it. The token is not in it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub refused the token (401): it is wrong or was revoked. Make a new one that may write."
    if status == 403:
        return (
            f"the hub does not let this token write to {repo} (403). Make one that may write there, or choose another."
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{repo} could not be uploaded: {reason}. What was uploaded before stays; run the same command again."


def _write_edit(model: Model, edit: Edit, folder: Path, *, whole: bool) -> None:
    edits.check(model, edit)
    if whole:
        export(model, edit, folder)
        return
    path = edits.save(edit, folder / EDIT)
    text = EDIT_CARD.format(
        title=edit.title,
        changed=CHANGED[edit.pathway],
        site=Site(edit.layer),
        parameters=edit.parameters,
        tensors=", ".join(f"`{s}`" for s in edit.values),
        before=sum(edit.told_before),
        after=sum(edit.told_after),
        n=len(edit.facts),
        template=edit.template,
        base_sha256=edit.base_sha256,
        sha256=_sha256(path),
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def _result(name: str, metric: str, value: float, dataset: str, split: str) -> EvalResult:
    """split: what keeps two datasets of one kind apart for the hub, which looks at no name."""
    if not math.isfinite(value):
        raise ReleaseError(f"the results give {value} as {metric} of {name}; run chapters 3 and 4 again, then publish.")
    kind = "perplexity" if metric == "perplexity" else "accuracy"
    return EvalResult(
        task_type="text-generation",
        dataset_type="text" if kind == "perplexity" else "facts",
        dataset_name=dataset,
        dataset_split=split,
        metric_type=kind,
        metric_name=f"{metric}, {name}",
        metric_value=round(value, 4),
    )


def _names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p != folder / SUMS)


def _sums(folder: Path) -> bytes:
    """MANIFEST.sha256 of a folder, in the form of `sha256sum`."""
    return "".join(f"{_sha256(folder / name)}  {name}\n" for name in _names(folder)).encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(model: Model) -> str:
    """A subject's name for others: of a folder on this machine, its last part."""
    hub = models.hub_id(model.name)
    return (hub or model.name).rsplit("/", 1)[-1]


def _source(model: Model) -> str:
    return model.source if model.name in models.SPECS else _name(model)
