"""Names of places in a model. People count layers from 1 and heads from 0 (`L10 H8`, as the paper does);
code counts both from 0. This module owns the conversion, so that nobody does it by hand."""

import re
from dataclasses import dataclass

_TEXT = re.compile(r"L(?P<layer>\d+) ?(?:H(?P<head>\d+)|(?P<mlp>MLP))?")


@dataclass(frozen=True, order=True)
class Site:
    """One head (`L10 H8`), one MLP (`L10 MLP`) or a whole layer (`L10`).

    layer: 0-based index of the block. head: 0-based index of the head, or None. mlp: True for the block's MLP.
    """

    layer: int
    head: int | None = None
    mlp: bool = False

    def __post_init__(self) -> None:
        if self.layer < 0 or (self.head is not None and (self.head < 0 or self.mlp)):
            raise ValueError(f"not a place in a model: layer={self.layer}, head={self.head}, mlp={self.mlp}")

    def __str__(self) -> str:
        part = " MLP" if self.mlp else "" if self.head is None else f" H{self.head}"
        return f"L{self.layer + 1}{part}"

    @classmethod
    def parse(cls, text: str) -> "Site":
        """`L10 H8`, `L10H8`, `L10 MLP` or `L10` -> Site. Raises ValueError on anything else (`L0 H1` included)."""
        match = _TEXT.fullmatch(text.strip())
        if not match or int(match["layer"]) < 1:
            raise ValueError(
                f"{text!r} names no site; write 'L10 H8', 'L10 MLP' or 'L10' (layers count from 1, heads from 0)"
            )
        return cls(int(match["layer"]) - 1, int(match["head"]) if match["head"] else None, bool(match["mlp"]))
