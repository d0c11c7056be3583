"""Probes, passages and other relations were written before any edit existed, and stay as they were."""

import hashlib
import re

import pandas as pd
import yaml

from lib.facts import load_facts
from lib.files import DATA

LINES = [line.split(maxsplit=1) for line in (DATA / "FROZEN.sha256").read_text().splitlines()]


def test_nothing_frozen_has_changed():
    names = {name for _, name in LINES}
    assert {"probes.yaml", "more_probes.yaml", "relations.csv"} < names
    assert {f"passages/{p.name}" for p in (DATA / "passages").glob("*.txt")} < names
    for wanted, name in LINES:
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == wanted, name


def test_probes_are_twenty_five_and_sixty_more_and_name_no_country():
    probes, more = (yaml.safe_load((DATA / f"{name}.yaml").read_text()) for name in ("probes", "more_probes"))
    assert (len(probes["capability"]), len(probes["unrelated"])) == (15, 10)
    further = [item for items in more.values() for item in items]
    items = probes["capability"] + probes["unrelated"] + further
    assert len(further) >= 60 and len({item["id"] for item in items}) == len({i["prompt"] for i in items}) == len(items)
    names = {word for f in load_facts("countries") for word in (f.subject, f.answer)}
    text = " ".join(item["prompt"] for item in items)
    assert not [n for n in names if re.search(rf"\b{re.escape(n)}\b", text)]


def test_measured_and_training_passages_are_apart_and_long_enough(smollm2):
    measured, neutral = (
        [p.read_text() for p in sorted((DATA / "passages").glob(pattern))] for pattern in ("measure_*", "neutral_*")
    )
    assert len(measured) >= 6 and sum(len(smollm2.token_ids(t)) for t in measured) >= 4000

    def grams(texts):
        return {tuple(w[i : i + 8]) for t in texts for w in [t.lower().split()] for i in range(len(w) - 7)}

    assert not grams(measured) & grams(neutral)


def test_relations_are_of_the_eight():
    table = pd.read_csv(DATA / "relations.csv")
    assert set(table.subject) == {f.subject for f in load_facts("eight")}
    assert table.template.str.count(r"\{\}").eq(1).all() and table.answer.str.strip().ne("").all()
