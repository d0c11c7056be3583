"""The learned sinks of chapter 8's rule, kept as edits beside the record.

data/record/<model>/sinks/<pathway>.safetensors: trained on the first case's own facts, as one run of the sweep
`repairs` was. `record` writes them; the dashboard, `verify` and `export` read them.
"""

from pathlib import Path

import pandas as pd

from lib.edits import Edit, load_all, save
from lib.facts import load_cases, load_templates
from lib.files import slug
from lib.models import Model
from lib.studies.comparisons import sinks
from lib.studies.repairs import fitted
from lib.sweeps.record import FOLDER


def folder(model_name: str) -> Path:
    """Where a model's are kept."""
    return FOLDER / slug(model_name) / "sinks"


def keep(model: Model, repairs: pd.DataFrame, *, missing: bool = False) -> list[Path]:
    """Train them anew, by the rows of the recorded sweep, and write them. missing: only those that are not there.
    Raises EditError as `fitted` does."""
    written = []
    for run in sinks(repairs).to_dict("records"):
        path = folder(model.name) / f"{run['pathway']}.safetensors"
        if not (missing and path.is_file()):
            made = fitted(model, 1, run["pathway"], rate=run["rate"], steps=int(run["steps"]), seed=int(run["seed"]))
            written.append(save(made[0], path))
    return written


def kept(model: Model) -> dict[str, Edit]:
    """By pathway, those of the first case that is studied now; none of a case of one's own, or of a model whose sweep
    was never recorded. Raises EditError for a file that cannot be used."""
    template = load_templates()[load_cases(model.name)[0].template]
    return {name: edit for name, edit in load_all(folder(model.name)).items() if edit.template == template}
