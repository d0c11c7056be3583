"""The learned sinks of chapter 8's rule, kept as edits beside the record.

data/record/<model>/sinks/<pathway>.safetensors: trained on the first case's own facts, as one run of the sweep
`repairs` was. `record` writes them; the dashboard, `verify` and `export` read them.
"""

from pathlib import Path

import pandas as pd

from lib.edits import Edit, load_all, save
from lib.files import slug
from lib.models import Model
from lib.studies.comparisons import sinks
from lib.studies.repairs import fitted
from lib.sweeps.record import FOLDER


def folder(model_name: str) -> Path:
    """Where a model's are kept."""
    return FOLDER / slug(model_name) / "sinks"


def keep(model: Model, repairs: pd.DataFrame) -> list[Path]:
    """Train them anew, by the rows of the recorded sweep, and write them. Raises EditError as `fitted` does."""
    written = []
    for run in sinks(repairs).to_dict("records"):
        edit, _ = fitted(model, 1, run["pathway"], rate=run["rate"], steps=int(run["steps"]), seed=int(run["seed"]))
        written.append(save(edit, folder(model.name) / f"{edit.pathway}.safetensors"))
    return written


def kept(model: Model) -> dict[str, Edit]:
    """By pathway; none of a model whose sweep was never recorded. Raises EditError for a file that cannot be used."""
    return load_all(folder(model.name))
