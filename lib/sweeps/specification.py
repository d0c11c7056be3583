"""A specification: a model, an experiment of `lib.studies`, and grids of its parameters; each combination is a run."""

import json
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from lib.checkpoints.fetching import n_layers
from lib.checkpoints.named import canonical, spec_of, split
from lib.errors import SweepError
from lib.facts import load_cases, read_yaml, validated
from lib.files import ROOT
from lib.sweeps.experiments import complete

SPECS = ROOT / "data" / "sweeps"
_NUMBER = re.compile(r"[-+]?[\d.]+([eE][-+]?\d+)?")
Values = Annotated[list[JsonValue], BeforeValidator(lambda v: v if isinstance(v, list) else [v]), Field(min_length=1)]
Grid = Annotated[dict[str, Values], Field(min_length=1)]


class Tolerance(BaseModel):
    """How far a run may come out from the recorded one, on another kind of processor: words and what is true or false
    not at all, whole numbers by `counts`, others by `absolute` and a share of themselves (`relative`). columns: the
    largest difference of those with such a name (`*_n`), the first that fits; looser: more room for runs of one
    parameter, `name=value`. lengths: by how much a list, such as a curve by step, may be longer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    relative: Annotated[float, Field(ge=0)] = 1e-3
    absolute: Annotated[float, Field(ge=0)] = 1e-3
    counts: Annotated[int, Field(ge=0)] = 0
    columns: dict[str, Annotated[float, Field(ge=0)]] = {}
    lengths: Annotated[int, Field(ge=0)] = 0
    looser: dict[str, dict[str, Annotated[float, Field(ge=0)]]] = {}

    def for_run(self, parameters: dict[str, Any]) -> "Tolerance":
        """With the columns that are looser for such a run before the others."""
        found = [self.looser.get(f"{name}={value}", {}) for name, value in parameters.items()]
        first = {column: room for columns in found for column, room in columns.items()}
        return self.model_copy(update={"columns": first | {k: v for k, v in self.columns.items() if k not in first}})


class Spec(BaseModel):
    """A sweep. grid: parameter -> values, or one value; every combination is run, with every seed (parameter `seed`)
    if there are any. `layer` counts from 1 and may be `all` or `every 3` (L3, L6, ...). also: further grids for the
    same table. seconds: of one run, a guess until some are done."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    model: Annotated[str, AfterValidator(canonical)]
    run: str
    grid: Grid
    seeds: list[int] = []
    also: list[Grid] = []
    chosen_seeds: Annotated[int, Field(ge=1)] = 10
    note: str = ""
    seconds: Annotated[float, Field(gt=0)] | None = None
    tolerance: Tolerance = Tolerance()


def load(source: str | Path, *, model_name: str | None = None) -> Spec:
    """The specification of a YAML file, or of data/sweeps/NAME.yaml. model_name: instead of the one that it names.
    Raises SweepError for what is no specification, with every fault."""
    path = Path(source) if str(source).endswith((".yaml", ".yml")) else SPECS / f"{source}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in SPECS.glob("*.yaml")))
        raise SweepError(f"there is no specification {path}; give a .yaml file, or one of {known}.")
    content = read_yaml(path, SweepError)
    if not isinstance(content, dict):
        raise SweepError(f"{path} is no mapping; it needs name, model, run and grid.")
    if "subject" in content:
        raise SweepError(f"{path} has the key `subject`, which is called `model` now.")
    content |= {"model": model_name} if model_name else {}
    instead = validated(dict[str, dict[str, Any]], content.pop("instead", {}), f"{path}, instead", SweepError)
    if unknown := [name for name in instead if spec_of(name) is None]:
        raise SweepError(f"{path}, instead: data/models.yaml has no model {unknown[0]!r}; give a name that it has.")
    content |= instead.get(split(str(content.get("model")))[0], {})
    return validated(Spec, content, f"{path} is no specification of a sweep", SweepError)


def expand(spec: Spec) -> list[dict[str, Any]]:
    """The parameters of every run, defaults included, each once; the first parameter of a grid changes slowest, the
    seed fastest. Raises SweepError for parameters that the experiment does not take, and layers that are not there."""
    runs: dict[str, dict[str, Any]] = {}
    for grid in (spec.grid, *spec.also):
        if spec.seeds and "seed" in grid:
            raise SweepError(f"{spec.name}: seed stands in a grid and in seeds; keep one.")
        axes = {name: _axis(spec, name, values) for name, values in grid.items()}
        axes |= {"seed": spec.seeds} if spec.seeds else {}
        for combination in product(*axes.values()):
            parameters = complete(spec.run, dict(zip(axes, combination, strict=True)))
            runs.setdefault(key(parameters), parameters)
    return list(runs.values())


def key(parameters: dict[str, Any]) -> str:
    """What two runs of one sweep share only if they are the same."""
    return json.dumps(parameters, sort_keys=True)


def _axis(spec: Spec, name: str, values: list[Any]) -> list[Any]:
    """The values of one parameter; `case: all` are those of the model, counted from 1, and of others those that it
    has. Raises SweepError for a number that YAML takes for text, and a value given twice."""
    if name == "case":
        there = range(1, len(load_cases(spec.model)) + 1)
        return list(there) if values == ["all"] else [case for case in values if case in there]
    if name == "layer":
        return list(dict.fromkeys(layer for value in values for layer in _layers(spec, value)))
    for value in values:
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            raise SweepError(f"{spec.name}: {name} is the text {value!r}; YAML needs the point, as in 1.0e-3.")
    if len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
        raise SweepError(f"{spec.name}: a value of {name} stands twice in {values}; keep one.")
    return values


def _layers(spec: Spec, value: Any) -> list[int]:
    """`all`, `every 3`, `L10` or 10 -> layers counted from 1. Raises SweepError for one that the model lacks."""
    layers = range(1, n_layers(spec.model) + 1)
    if value == "all":
        return list(layers)
    if every := re.fullmatch(r"every ([1-9]\d*)", str(value)):
        step = int(every[1])
        return list(layers[step - 1 :: step])
    number = re.fullmatch(r"L?(\d+)", str(value))
    if not number:
        raise SweepError(f"{spec.name}: layer {value!r} is none; write 10, L10, all, or every 3 (they count from 1).")
    if int(number[1]) not in layers:
        raise SweepError(f"{spec.name}: there is no layer {value}: {spec.model} has L1 to L{layers[-1]}.")
    return [int(number[1])]


def further(spec: Spec, grids: Sequence[Grid]) -> Spec:
    """The sweep `<name>-seeds` of the grids that follow from a finished sweep, which name their seeds themselves."""
    changes = {"name": f"{spec.name}-seeds", "grid": grids[0], "also": list(grids[1:]), "seeds": []}
    return spec.model_copy(update=changes)
