"""A few damaged files for every reader, and sizes that are claimed; `tests/fuzz.py` tries many more every night."""

import io
import json
import resource
import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import edits, models
from lib.errors import BookError, EditError, ModelError, ReleaseError
from lib.press import archive
from tests import fuzz
from tests.test_edits import forged

SEVERAL = 60
WATCH = fuzz.Watch()
KINDS = ("facts, csv", "facts, tsv", "facts, json", "facts, jsonl", "case", "templates", "sweep", "record", "results")
KINDS += ("edit", "archive", "model folder", "GGUF")
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def forms(place) -> dict[str, fuzz.Format]:
    return fuzz.real_files(place)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused_and_nothing_else(forms, place, kind, tmp_path, monkeypatch):
    monkeypatch.setenv("QKV_CACHE", str(tmp_path))
    assert set(forms) == set(KINDS)
    counts, faults = fuzz.tried(forms[kind], range(SEVERAL // (4 if kind in fuzz.SLOW else 1)), WATCH, place)
    assert not faults and counts["refused"]


def test_a_fault_would_be_seen(place, tmp_path, monkeypatch):
    monkeypatch.setenv("QKV_CACHE", str(tmp_path))

    def read(folder: Path) -> None:
        (folder.parent / "x").write_text("")
        raise KeyError("no error of ours")

    form = fuzz.Format({"a": b"abc"}, read)
    assert fuzz.outcome(form, 0, WATCH, place / "inputs" / "one").startswith("written: ")
    form = fuzz.Format({"a": b"abc"}, lambda folder: {}["no error of ours"])
    assert fuzz.outcome(form, 0, WATCH, place / "inputs" / "one") == "KeyError: 'no error of ours'"


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_an_edit_whose_header_holds_anything(forms, place, data):
    whole = edits.load(_put(place / "e.safetensors", forms["edit"].files["edit.safetensors"]))
    field = data.draw(
        st.sampled_from(["pathway", "layer", "facts", "template", "told_before", "seed", "bos", "recipe"])
    )
    try:
        edits.load(forged(place / "forged.safetensors", whole, **{field: data.draw(ANY)}))
    except EditError as error:
        assert "\n" not in str(error) and "\x1b" not in str(error)


def _put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("length", [10 * 2**30, 2**63 - 1, 2**64 - 1])
def test_a_header_or_a_tensor_that_claims_gigabytes_is_refused_at_once(forms, tmp_path, length):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    claims = json.dumps({"a": {"dtype": "F32", "shape": [length // 4], "data_offsets": [0, length]}}).encode()
    for content in (struct.pack("<Q", length) + b"{}", struct.pack("<Q", len(claims)) + claims):
        with pytest.raises(EditError, match=r"cannot be read: .* It is no safetensors file, or was cut short"):
            edits.load(_put(tmp_path / "e.safetensors", content))
        with pytest.raises(ModelError):
            models.load(str(fuzz.put(forms["model folder"].files | {"model.safetensors": content}, tmp_path / "m")))
    gguf = forms["GGUF"].files["a.gguf"]
    for at in (8, 16):  # how many tensors there are, and how many entries of the header
        changed = gguf[:at] + struct.pack("<Q", length) + gguf[at + 8 :]
        with pytest.raises(ModelError):
            models.load(str(_put(tmp_path / "a.gguf", changed)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


def bomb(files: int) -> bytes:
    """An archive of stored files that all begin at one place: each counts the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr("f/a", bytes(100_000))
        made.filelist *= files
        made._didModify = True
    return buffer.getvalue()


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused():
    with pytest.raises(ReleaseError, match="would unpack to more than it is"):
        archive.inspect(bomb(1000))
    compressed = io.BytesIO()
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("f/a", bytes(10_000_000))
    with pytest.raises(BookError, match="would unpack to more than it is"):
        archive.inspect(compressed.getvalue())
