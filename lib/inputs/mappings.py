"""YAML and JSON as a schema says: what is read, and every fault in one sentence."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from lib.errors import BookError, DataError


def is_file(path: Path) -> bool:
    """Whether there is such a file; no name makes it raise."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def load_mapping(path: Path, entry: Any = Any) -> dict[str, Any]:
    """A YAML file that maps names to entries, each as `entry` says: any type that pydantic can check. Raises DataError
    where the file is missing, empty or something else, with every fault."""
    content = read_yaml(path)
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path} is empty or not a mapping of names to entries.")
    return validated(dict[str, entry], content, str(path))


class _Yaml(yaml.SafeLoader):
    """YAML without what hides in it: references, of which a few make gigabytes, and a name that stands twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1} refers to another place (*); repeat it")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {twice[0]!r} stands twice; keep one")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, error: type[BookError] = DataError) -> Any:
    """What a YAML file holds: texts, numbers, lists and mappings. Raises the error where it is missing, larger than a
    megabyte, or no YAML; a tag that would make something else is refused."""
    if not is_file(path):
        raise error(f"there is no file {path}.")
    try:
        if path.stat().st_size > 2**20:
            raise error(f"{path} is larger than a megabyte; facts go into a file of their own.")
        return yaml.load(path.read_text(encoding="utf-8-sig"), _Yaml)
    except RecursionError:
        raise error(f"{path} is no YAML: it is nested too deeply.") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OSError) as fault:
        raise error(f"{path} is no YAML: {' '.join(str(fault).split())}") from fault


def validated(schema: Any, content: Any, where: str, error: type[BookError] = DataError) -> Any:
    """The content as the schema says: a pydantic model, or any type that pydantic can check. Raises the error, which
    says where the content stands and, in one sentence, all that is wrong with it."""
    try:
        return TypeAdapter(schema).validate_python(content)
    except ValidationError as invalid:
        known = ", ".join(getattr(schema, "model_fields", ()))
        faults = "; ".join(_fault(fault, known) for fault in invalid.errors())
        raise error(f"{where}: {faults}.") from invalid


def _fault(fault: Any, known: str) -> str:
    """One fault that pydantic found. known: the fields that the outermost entry may have."""
    where, kind = ".".join(map(str, fault["loc"])), fault["type"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {where!r}" + (f" (known: {known})" if known else "")
    if kind == "value_error":  # of a validator of ours, which says what to do
        return f"{where}: {fault['ctx']['error']}" if where else str(fault["ctx"]["error"])
    said = {"missing": f"{where} is missing", "too_short": f"{where} is empty; give at least one value"}
    return said.get(kind, f"{where or 'it'}: {fault['msg']}, not {fault['input']!r:.200}")
