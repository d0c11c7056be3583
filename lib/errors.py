"""Errors that a reader can act on: what was wrong, where, and what to do next; and what can be shown of any text."""

import unicodedata

UNSEEN = ("Cc", "Cs", "Cf", "Zl", "Zp")  # categories of characters


def printable(text: str) -> str:
    """Characters that nobody sees, or that make a terminal or a page show another, are written out; line ends, tabs and
    the joiners that some scripts need are kept."""
    odd = {c for c in text if unicodedata.category(c) in UNSEEN} - set("\n\t\u200c\u200d")
    return "".join(ascii(c)[1:-1] if c in odd else c for c in text)


class BookError(Exception):
    """Base of every error this package raises on purpose; the command line prints it without a traceback."""


class ModelError(BookError):
    """A model under study cannot be found, verified or understood."""


class DataError(BookError):
    """A file of facts, templates or cases is not what it should be."""


class CompletenessError(BookError):
    """The terms of a logit trace do not sum to the model's own logit."""


class ChapterError(BookError):
    """A chapter could not be run, built or checked."""


class EditError(BookError):
    """An edit cannot be read, or does not belong to the model at hand."""


class SweepError(BookError):
    """A sweep cannot be read, started or finished, or its store belongs to something else."""


class WorkerError(SweepError):
    """A worker of a cluster does not run this project as it is here."""


class ReleaseError(BookError):
    """A release cannot be made, checked or published."""
