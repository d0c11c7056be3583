"""Edits and dashboard as two repositories of a model hub: prepared in a folder, uploaded only when asked to.

    model/    a card for all (base model, results, checksums), and the source page's four edits, a folder each: the
              edit alone with its card, or the whole edited model as `export` writes it
    space/    the dashboard as a static page
    MANIFEST.sha256    what was prepared; a folder that was altered since is not uploaded

Nothing leaves the machine without --upload, a token and a yes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from lib import __version__, edits, models
from lib.edits import Edit
from lib.errors import ReleaseError
from lib.files import BUILD, file_sha256, slug
from lib.models import Model
from lib.press import check, release
from lib.press.archive import SUMS, sums
from lib.press.export import CARD, CHANGED, EDIT, card_data, export, new_folder
from lib.press.texts import fill
from lib.results import chapter_folder
from lib.sites import Site
from lib.studies.pathways import PAPER

MODEL, SPACE = "model", "space"
KINDS = {MODEL: None, SPACE: "static"}  # repository types, each prepared in a folder of its name, and their sdk
MAKER, EFFECTS = "03_four_pathways", "04_side_effects"  # chapters that make and measure the edits


def prepare(model_name: str, folder: Path, *, whole: bool = False) -> Path:
    """Write what would be uploaded into a new folder. whole: with the edited models themselves, half a gigabyte each
    for SmolLM2. Raises ReleaseError, EditError or ChapterError for what is missing, out of date or in the way."""
    folder = folder.expanduser().resolve()
    with new_folder(folder, ReleaseError) as ready:
        dashboard = BUILD / "dashboard" / f"{slug(model_name)}.html"
        if not dashboard.is_file():
            raise ReleaseError(
                f"there is no dashboard {dashboard}. Run `python -m lib dashboard --model {model_name}`."
            )
        model, values = models.use_device_of(models.load(model_name)), check.current_values(model_name)
        if lacking := [c for c in (MAKER, EFFECTS) if c not in values]:
            raise ReleaseError(
                f"there are no present results of {', '.join(lacking)}; run `python -m lib run --model {model_name}`."
            )
        trained = edits.load_all(chapter_folder(model_name, MAKER))
        if lacking := [name for name in PAPER if name not in trained]:
            raise ReleaseError(f"there is no edit for {', '.join(lacking)}; run chapter 3 on {model_name} again.")
        chosen = {name: trained[name] for name in PAPER}
        for name, edit in chosen.items():
            _write_edit(model, edit, ready / MODEL / name, whole=whole)
        (ready / MODEL / CARD).write_text(card(model, chosen, values, ready / MODEL, whole=whole), encoding="utf-8")
        (ready / SPACE).mkdir()
        shutil.copyfile(dashboard, ready / SPACE / "index.html")
        (ready / SPACE / CARD).write_text(space_card(model), encoding="utf-8")
        (ready / SUMS).write_bytes(_sums(ready))
    return folder


def card(model: Model, made: dict[str, Edit], values: dict[str, Any], folder: Path, *, whole: bool) -> str:
    """The model card of all edits: base model, results as a model index, checksums of the files in folder."""
    return fill(
        "edits_card.md",
        front=front_matter(model, made, values).to_yaml(),
        made=[
            (edit, CHANGED[name], Site(edit.layer), file_sha256(folder / name / EDIT)) for name, edit in made.items()
        ],
        trained=values[MAKER]["pathways"],
        measured=values[EFFECTS]["pathways"],
        whole=whole,
        model=model,
        version=__version__,
        record=release.SOURCE_RECORD,
        **_origin(model),
    )


def front_matter(model: Model, made: dict[str, Edit], values: dict[str, Any]) -> ModelCardData:
    """The card's front matter: what the hub reads of it, each result with the run that measured it."""
    trained, measured = values[MAKER]["pathways"], values[EFFECTS]["pathways"]
    results = []
    for pathway, edit in made.items():
        told, after = trained[pathway]["told_after"] / len(edit.facts), measured[pathway]
        held_out = after["held_out_told_after"] / after["held_out_facts"]
        results += [
            _result(pathway, "told", told, f"{len(edit.facts)} facts: {edit.template}", "trained"),
            _result(pathway, "held-out told", held_out, "countries that no edit was trained on", "held out"),
            _result(pathway, "perplexity", after["ppl_after"], "the book's passages", "measured"),
        ]
    return card_data(
        model,
        base_model_relation="finetune" if models.hub_id(model.name) else None,
        model_name=f"{_short_name(model)} edits",
        language="en",
        eval_results=results,
    )


def space_card(model: Model) -> str:
    """README.md of the static Space, with the settings that the hub reads."""
    return fill("space_card.md", **_origin(model))


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
        for kind, sdk in KINDS.items():
            url = hub.create_repo(repo, repo_type=kind, exist_ok=True, space_sdk=sdk)
            message = f"{kind} of the book's release {release.repository().tag}"
            hub.upload_folder(repo_id=repo, folder_path=folder / kind, repo_type=kind, commit_message=message)
            addresses.append(str(url))
            say(f"uploaded {kind}: {url}")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ReleaseError(_refusal(error, repo)) from error
    return addresses


def _refusal(error: Exception, repo: str) -> str:
    """What an upload's failure means and what to do about it. The token is not in it."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    said = {
        401: "the hub refused the token (401): it is wrong or was revoked. Make a new one that may write.",
        403: f"the hub does not let this token write to {repo} (403). Make one that may, or choose another.",
    }
    other = f"{repo} could not be uploaded: {reason}. What was uploaded before stays; run the same command again."
    return said.get(getattr(getattr(error, "response", None), "status_code", 0), other)


def _write_edit(model: Model, edit: Edit, folder: Path, *, whole: bool) -> None:
    edits.check(model, edit)
    if whole:
        export(model, edit, folder)
        return
    path = edits.save(edit, folder / EDIT)
    named = {"changed": CHANGED[edit.pathway], "site": Site(edit.layer), "sha256": file_sha256(path)}
    (folder / CARD).write_text(fill("edit_card.md", edit=edit, **named), encoding="utf-8")


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
    return sums({name: file_sha256(folder / name) for name in _names(folder)})


def _short_name(model: Model) -> str:
    """A model's name for others: of a folder on this machine, its last part."""
    return (models.hub_id(model.name) or model.name).rsplit("/", 1)[-1]


def _origin(model: Model) -> dict[str, object]:
    """What every card says of where the model and the book are from."""
    source = model.source if model.name in models.SPECS else _short_name(model)
    return {"name": _short_name(model), "source": source, "repository": release.repository()}
