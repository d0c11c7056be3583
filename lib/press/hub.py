"""Edits and dashboard as two repositories of a model hub: prepared in a folder, uploaded only when asked to.

    model/    a card for all (base model, results, checksums), and the source page's four edits, a folder each: the
              edit alone with its card, or the whole edited model as `export` writes it
    space/    the dashboard as a static page
    MANIFEST.sha256    what was prepared; a folder that was altered since is not uploaded

Nothing leaves the machine without --upload, a token and a yes.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from lib import edits, models
from lib.checkpoints import named
from lib.edits import Edit
from lib.errors import ReleaseError
from lib.files import file_sha256
from lib.models import Model
from lib.press import build, check, release
from lib.press.archive import SUMS, sums, under
from lib.press.export import CARD, EDIT, card_data, copy_terms, export, new_folder
from lib.press.texts import fill
from lib.results import chapter_folder
from lib.weights import PAPER

MODEL, SPACE = "model", "space"
KINDS = {MODEL: None, SPACE: "static"}  # repository types, each prepared in a folder of its name, and their sdk
MAKER, EFFECTS = "03_four_pathways", "04_side_effects"  # chapters that make and measure the edits


def prepare(model_name: str, folder: Path, *, whole: bool = False) -> Path:
    """Write what would be uploaded into a new folder. whole: with the edited models themselves, half a gigabyte each
    for SmolLM2. Raises ReleaseError, EditError or ChapterError for what is missing, out of date or in the way."""
    folder = folder.expanduser().resolve()
    with new_folder(folder, ReleaseError) as ready:
        page = build.dashboard_path(model_name)
        if not page.is_file():
            raise ReleaseError(f"there is no dashboard {page}. Run `python -m lib dashboard --model {model_name}`.")
        model, values = models.use_device_of(models.load(model_name)), check.current_values(model_name)
        if lacking := ", ".join(c for c in (MAKER, EFFECTS) if c not in values):
            remedy = f"run `python -m lib run --model {model_name}`"
            raise ReleaseError(f"there are no present results of {lacking}; {remedy}.")
        trained = edits.load_all(chapter_folder(model_name, MAKER))
        if lacking := ", ".join(name for name in PAPER if name not in trained):
            raise ReleaseError(f"there is no edit for {lacking}; run chapter 3 on {model_name} again.")
        chosen = {name: trained[name] for name in PAPER}
        for name, edit in chosen.items():
            if whole:
                export(model, edit, ready / MODEL / name)
                continue
            edits.check(model, edit)
            path = edits.save(edit, ready / MODEL / name / EDIT)
            text = fill("edit_card.md", edit=edit, sha256=file_sha256(path))
            path.with_name(CARD).write_text(text, encoding="utf-8")
        (ready / MODEL / CARD).write_text(card(model, chosen, values, ready / MODEL, whole=whole), encoding="utf-8")
        copy_terms(model, ready / MODEL, "Modified: the tensors that each card names.")
        (ready / SPACE).mkdir()
        shutil.copyfile(page, ready / SPACE / "index.html")
        (ready / SPACE / CARD).write_text(space_card(model), encoding="utf-8")
        (ready / SUMS).write_bytes(_sums(ready))
    return folder


def card(model: Model, made: dict[str, Edit], values: dict[str, Any], folder: Path, *, whole: bool) -> str:
    """The model card of all edits: base model, results as a model index, checksums of the files in folder."""
    front = front_matter(model, made, values).to_yaml()
    totals = {name: file_sha256(folder / name / EDIT) for name in made}
    results = {"trained": values[MAKER]["pathways"], "measured": values[EFFECTS]["pathways"]}
    return fill("edits_card.md", front=front, made=made, sums=totals, whole=whole, **results, **_origin(model))


def front_matter(model: Model, made: dict[str, Edit], values: dict[str, Any]) -> ModelCardData:
    """The card's front matter: what the hub reads of it, each result with the run that measured it."""
    trained, measured = values[MAKER]["pathways"], values[EFFECTS]["pathways"]
    results = []
    for pathway, edit in made.items():
        told, after = trained[pathway]["told_after"] / len(edit.facts), measured[pathway]
        held_out = after["held_out_told_after"] / after["held_out_facts"]
        for metric, value, dataset, split in (
            ("told", told, f"{len(edit.facts)} facts: {edit.template}", "trained"),
            ("held-out told", held_out, "countries that no edit was trained on", "held out"),
            ("perplexity", after["ppl_after"], "the book's passages", "measured"),
        ):
            if not math.isfinite(value):
                found = f"the results give {value} as {metric} of {pathway}"
                raise ReleaseError(f"{found}; run chapters 3 and 4 again, then publish.")
            data, kind = ("text", "perplexity") if metric == "perplexity" else ("facts", "accuracy")
            # the hub keeps datasets of one kind apart by their split alone
            result = EvalResult("text-generation", data, dataset, kind, round(value, 4), dataset_split=split)
            result.metric_name = f"{metric}, {pathway}"
            results.append(result)
    relation, name = "finetune" if named.hub_id(model.name) else None, f"{_origin(model)['name']} edits"
    return card_data(model, base_model_relation=relation, model_name=name, language="en", eval_results=results)


def space_card(model: Model) -> str:
    """README.md of the static Space, with the settings that the hub reads."""
    return fill("space_card.md", **_origin(model))


def listing(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes (bytes) of what would be uploaded. Raises ReleaseError for a folder that `prepare` did not write,
    or that was altered since."""
    if not (folder / SUMS).is_file():
        raise ReleaseError(f"{folder} was not prepared by `python -m lib publish`, or not wholly; give a new folder.")
    was, now = (folder / SUMS).read_bytes(), _sums(folder)
    if was != now:
        changed = ", ".join(sorted({line[66:].decode() for line in {*was.splitlines()} ^ {*now.splitlines()}}))
        advice = "Nothing is uploaded; prepare a new folder."
        raise ReleaseError(f"in {folder}, {changed} is not as it was prepared. {advice}")
    return [(name, path.stat().st_size) for name, path in under(folder).items() if name != SUMS]


def upload(folder: Path, repo: str, token: str, *, say: Callable[[str], None] = print) -> None:
    """Upload a prepared folder to the model repository and the Space of this name; made if need be. Raises ReleaseError
    for a folder that was altered, a token that is missing or refused, or no network."""
    listing(folder)
    if not token.strip():
        raise ReleaseError(
            "there is no token. Make one that may write, at huggingface.co/settings/tokens, and set HF_TOKEN or type "
            "it when asked; it is never written anywhere."
        )
    hub = HfApi(token=token.strip())
    try:
        say(f"signed in as {hub.whoami()['name']}")
        for kind, sdk in KINDS.items():
            url = hub.create_repo(repo, repo_type=kind, exist_ok=True, space_sdk=sdk)
            message = f"{kind} of the book's release {release.repository().tag}"
            hub.upload_folder(repo_id=repo, folder_path=folder / kind, repo_type=kind, commit_message=message)
            say(f"uploaded {kind}: {url}")
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        said = {
            401: "the hub refused the token (401): it is wrong or was revoked. Make a new one that may write.",
            403: f"the hub does not let this token write to {repo} (403). Make one that may, or choose another.",
        }
        other = f"{repo} could not be uploaded: {reason}. What was uploaded before stays; run the same command again."
        status = getattr(getattr(error, "response", None), "status_code", 0)
        raise ReleaseError(said.get(status, other)) from error


def _sums(folder: Path) -> bytes:
    return sums({name: file_sha256(path) for name, path in under(folder).items() if name != SUMS})


def _origin(model: Model) -> dict[str, Any]:
    """Where the model and the book are from, for all cards. A folder on this machine is called by its last part."""
    name = (named.hub_id(model.name) or model.name).rsplit("/", 1)[-1]
    source = model.source if named.spec_of(model.name) else name
    book = {"repository": release.repository(), "record": release.SOURCE_RECORD}
    return {"model": model, "name": name, "source": source, **book}
