"""A model and facts of one's own: what was found, to print, to read as a page, and to repair (`lib.diagnose`).

    own = lib.diagnose("smollm2", "mine.csv", "The capital of {} is")
    print(own)
    own.repair("sink_kv")
    own.report("report.html")          # one file: no script, no network

Whatever a user gave stands in the page as escaped text, and in no figure.
"""

import base64
import io
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from lib import edits, models
from lib.checkpoints.named import SPECS
from lib.errors import BookError, DataError, printable
from lib.facts import Fact, load_facts, read_case
from lib.files import BUILD, commit, slug, write_atomically
from lib.models import Model
from lib.press.texts import TEMPLATES, environment
from lib.results import read
from lib.show import figures
from lib.show.sentences import say
from lib.studies import own_facts, own_repairs, scoring
from lib.studies.own_facts import Findings, Say
from lib.studies.own_repairs import Repair
from lib.sweeps import load, record
from lib.sweeps.runs import frame

ADVICE = "Give a folder that you may write to."
RULES = {"chapter 2": "the rule used here, chapter 2's", "joined": "chapter 7's joined rule"}
RELATION = (
    "model facts_file template told known facts knowledge_head failure_kind cause pathway repaired held_out commit"
)
Facts = str | Path | Mapping[str, str] | Iterable[Fact | tuple[str, str]]


class Own:
    """What was found on one's own facts. repaired: the last repair, if one was asked."""

    def __init__(self, findings: Findings, facts_name: str, progress: Say) -> None:
        self.findings, self.facts_name, self._say = findings, facts_name, progress
        self.repaired: Repair | None = None

    def __str__(self) -> str:
        return str(self.findings)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = ((escape(name), escape(plain(value))) for name, value in self.findings.rows())
        rows = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in cells)
        return f'<table class="dataframe"><tbody>{rows}</tbody></table>'

    def repair(self, pathway: str, *, seed: int = 0) -> Repair:
        """Train a pathway and ask what it changes. Raises EditError where there is nothing to repair."""
        self.repaired = own_repairs.repair(self.findings, pathway, seed=seed, say=self._say)
        return self.repaired

    def ways(self) -> pd.DataFrame:
        """A row a way of asking (way, kind, told, n): wordings, of all facts; what was tried on those that fail; a
        repair, of the held-out ones."""
        found, rows = self.findings, list[tuple[str, str, int, int]]()
        for row in found.asked.itertuples():
            name = (str(row.name), "control") if row.Index else ("in question", "failing")
            rows.append((*name, int(row.told), int(row.n)))
        if cause := found.cause:
            rows += [(f"prefix: {name}", "prefix", told, cause.asked) for name, (_, told) in cause.prefixes.items()]
            rows += [(f"end {i}", "end", told, cause.asked) for i, told in enumerate(cause.ends.values(), start=1)]
        if self.repaired and len(self.repaired.held):
            counts = self.repaired.counts
            rows.append((f"{counts['pathway']}, held out", "repair", counts["repaired"], counts["untold"]))
        return pd.DataFrame(rows, columns=["way", "kind", "told", "n"])

    def report(self, path: str | Path) -> Path:
        """Write the page, and return its path. Raises DataError where it cannot be written."""
        return write_atomically(html_path(path), self.page(), error=DataError, advice=ADVICE)

    def page(self) -> str:
        """The report: one HTML file, complete in itself."""
        found, space = self.findings, environment(TEMPLATES).overlay(autoescape=True, finalize=plain)
        pictures = {"told": picture(figures.told_by_way(self.ways()))}
        pictures |= {"curves": picture(figures.cumulative_curves([d]))} if (d := found.diagnosis) else {}
        about = {"own": self, "found": found, "pictures": pictures, "commit": commit()}
        return space.get_template("report.html").render(scores=planted_scores(found.model), **about)

    def numbers(self) -> dict[str, Any]:
        """What chapter 10 reports."""
        found, repair = self.findings, self.repaired
        out = {"facts": len(found.states), "untold": len(found.failed), "control": found.best_control.told}
        out |= {name: found.count(name) for name in ("told", "known")} | {"diagnosed": bool(found.diagnosis)}
        out |= {"left_out": found.left_out, "where": found.say("where"), "why": found.say("why")}
        if found.verdict and found.cause:
            out |= {"knowledge_head": str(found.verdict.knowledge_head), "failure_kind": found.verdict.failure_kind}
            out["cause"] = found.cause.name
        if repair:
            names = {"repaired": "repaired", "held_out": "untold", "trained": "facts", "trained_told": "told_after"}
            out |= {name: repair.counts[key] for name, key in names.items()}
        said = str(repair) if repair else f"Nothing is repaired; failure: {found.say('failure')}."
        return out | {"repair": said, "cost": say("own", "cost", r=repair)}

    def write(self, output: Path | None = None, as_json: Path | None = None) -> list[str]:
        """Write the page, the edit of a repair beside it, and the JSON; what was written, in words."""
        name = slug(Path(self.facts_name).stem) or "facts"
        path = self.report(output or BUILD / "diagnose" / slug(self.findings.model.name) / f"{name}.html")
        lines = [f"report: {path}"]
        if self.repaired:
            edit = path.with_name(f"{path.stem}-{self.repaired.edit.pathway}.safetensors")
            edits.save(self.repaired.edit, edit)
            lines.append(f"edit: {edit}; python -m lib verify {edit} asks it again")
        if as_json:
            found = self.findings.as_json() | ({"repair": self.repaired.as_json()} if self.repaired else {})
            text = json.dumps(found, ensure_ascii=False, indent=1, default=str)
            lines.append(f"json: {write_atomically(as_json, text, error=DataError, advice=ADVICE)}")
        return lines


def diagnose(
    model: str | Model, facts: Facts, template: str, controls: Sequence[str] = (), *, say: Say = lambda text: None
) -> Own:
    """What `lib.diagnose` does. facts: a file, the name of one in data/facts, pairs or a dictionary."""
    listed, name = _listed(facts)
    if isinstance(controls, str):
        raise DataError("controls are a list of wordings; put this one in brackets.")
    loaded = models.use_device_of(models.load(model) if isinstance(model, str) else model)
    figures.style()
    start = time.perf_counter()
    found = own_facts.diagnose(loaded, listed, template, controls, say=say)
    say(f"diagnosed in {time.perf_counter() - start:.0f} s")
    return Own(found, name, say)


def ask(model: str, facts: str | Path, template: str, controls: Sequence[str], *, say: Say) -> Own:
    """The same for the command line; a path is that of a case."""
    if isinstance(facts, str):
        return diagnose(model, facts, template, controls, say=say)
    read = read_case(facts)
    first, *others = (read.templates[name] for name in (read.case.template, *read.case.controls))
    own = diagnose(model, read.case.large, template or first, controls or others, say=say)
    own.facts_name = facts.name
    return own


def _listed(facts: Facts) -> tuple[tuple[Fact, ...], str]:
    """The facts, and what they are called."""
    if isinstance(facts, str | Path):
        return load_facts(facts), str(facts)
    pairs = facts.items() if isinstance(facts, Mapping) else facts
    try:
        listed = tuple(f if isinstance(f, Fact) else Fact(*map(str.strip, f)) for f in pairs)
    except TypeError:
        raise DataError("facts are a file, a dictionary, or pairs of two texts, subject and answer.") from None
    if not listed or len({f.subject for f in listed}) < len(listed):
        raise DataError("facts need at least one pair, and each subject once.")
    return listed, "facts"


def html_path(path: str | Path) -> Path:
    """The path of a page. Raises DataError for another ending."""
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise DataError(f"{path} is no name of a report: give one that ends in .html; an edit is written beside it.")
    return Path(path)


def planted_scores(model: Model) -> list[dict[str, Any]]:
    """What the rules score on planted failures (chapter 7), from the records that there are: of this model if it has
    one, of the default model and of the organism."""
    rows = []
    for name in dict.fromkeys((model.name, "smollm2", "organism")):
        try:
            table = scoring.summarise(frame(record.read(load("plants", model_name=name)).rows)).set_index("rule")
        except (BookError, OSError):
            continue
        ends = {"low": "kind and site low", "share": "kind and site", "high": "kind and site high", "layer": "layer"}
        for rule, label in RULES.items():
            shares = {key: float(table.loc[rule, column]) for key, column in ends.items()}
            rows.append({"model": name, "rule": label, "n": int(table.n[rule]), **shares})
    return rows


def relations() -> pd.DataFrame:
    """What chapter 10 reported of other facts, by `make relations` kept in data/record/<model>/relations: a row a run.
    Raises ChapterError for a file that is no results of the model."""
    rows = []
    for name in SPECS:
        for path in sorted((record.FOLDER / name / "relations").glob("*.json")):
            run = read(name, SPECS[name].sha256, "10_your_model", path)
            rows.append(run["values"] | {"commit": run["provenance"]["commit"][:7]})
    return pd.DataFrame(rows, columns=RELATION.split())


def picture(figure: Figure) -> str:
    """A figure as a data URI; the same figure gives the same bytes."""
    out = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "book"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def plain(value: Any) -> Any:
    """A text as it can be shown; anything else, markup included, as it is."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
