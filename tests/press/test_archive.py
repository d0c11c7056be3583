"""The archive to deposit: the same run gives the same bytes, and no byte of it can change unseen."""

import dataclasses
import hashlib
import io
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lib import edits, files, results
from lib.__main__ import app
from lib.errors import BookError, EditError, ReleaseError
from lib.press import archive as deposit
from lib.press import build, check, execute, release
from lib.weights import PAPER
from tests.press.test_execute import notebook
from tests.test_edits import an_edit

DATE = datetime(2026, 11, 23, 7, 22, 46, tzinfo=UTC)
MANIFEST = {"title": "t", "version": "1", "model": "s", "commit": "c0ffee", "changes": [], "weights_sha256": "0" * 64}
MANIFEST |= {"date": DATE.isoformat()}
FILES = {"html/index.html": b"<p>one</p>", "edits/v_only.safetensors": bytes(range(256)), "source/a b.py": b"x = 1\n"}


def packed(files: dict[str, bytes] = FILES, *, folder: str = "book-1-s", date: datetime = DATE) -> bytes:
    return deposit.pack(deposit.complete(files, MANIFEST | {"date": date.isoformat()}), folder, date)


def faults(data: bytes) -> str:
    """What the check says of an archive, as one text; "" if it passes."""
    try:
        return "; ".join(deposit.inspect(data).faults)
    except ReleaseError as error:
        return str(error)


# no byte can change unseen


def test_every_single_byte_of_an_archive_is_vouched_for():
    """Each byte in turn, all of them: in one run its lowest bit is flipped, in another all its bits."""
    data = packed({"a/one.txt": b"content", "two.bin": b"\0\xff"})
    assert faults(data) == ""
    for flip in (0x01, 0xFF):
        for place in range(len(data)):
            wrong = data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :]
            assert faults(wrong), f"byte {place} of {len(data)} changed unseen"


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 255))
def test_any_other_value_of_any_byte(place, flip):
    data = packed()
    place %= len(data)
    assert faults(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])


@pytest.mark.parametrize("name", sorted(deposit.complete(FILES, MANIFEST)))
def test_a_wrong_byte_of_a_file_is_named_by_the_file(name):
    data = packed()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entry = archive.getinfo(f"book-1-s/{name}")
        start = entry.header_offset + 30 + len(entry.filename.encode())
        assert data[start : start + entry.file_size] == archive.read(entry)
    for place in random.Random(0).sample(range(start, start + entry.file_size), 5):
        assert faults(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]) == f"wrong: {name}"


def test_a_wrong_byte_between_the_files_is_placed():
    data = packed()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entry = archive.getinfo("book-1-s/html/index.html")
    place = entry.header_offset + 10  # the time in its local header, which zipfile does not read
    wrong = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    assert faults(wrong).startswith(f"damaged: byte {place:,}, at book-1-s/html/index.html, is not what")


@pytest.mark.parametrize("extra", [b"\0", b"PK", b"x" * 70_000])
def test_bytes_before_and_after_are_found(extra):
    assert faults(extra + packed()) and faults(packed() + extra)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_archive(share):
    data = packed()
    with pytest.raises(ReleaseError, match="no ZIP archive, or it was cut short or damaged"):
        deposit.inspect(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda files: files.update({"html/index.html": b"else"}), "wrong: html/index.html"),
        (lambda files: files.pop("html/index.html"), "missing: html/index.html"),
        (lambda files: files.update({"html/evil.js": b""}), "extra: html/evil.js"),
        (lambda files: files.pop(deposit.SUMS), f"missing: {deposit.SUMS}"),
        (lambda files: files.pop(deposit.MANIFEST), f"missing: {deposit.MANIFEST}"),
        (lambda files: files.update({deposit.SUMS: files[deposit.SUMS] + b"\n"}), "missing: "),
        (
            lambda files: files.update({deposit.SUMS: b"\n".join(files[deposit.SUMS].splitlines()[::-1]) + b"\n"}),
            f"wrong: {deposit.SUMS}",
        ),
    ],
)
def test_contents_exchanged_with_their_checksum_are_named(change, fault):
    """The checksums inside the archive fit, its manifest does not."""
    files = deposit.complete(FILES, MANIFEST)
    change(files)
    assert faults(deposit.pack(files, "book-1-s", DATE)) == fault


@pytest.mark.parametrize("name", ["../evil", "book-1-s/../../evil", "/etc/evil", "C:\\evil", "book-1-s\\evil", "alone"])
def test_a_path_outside_the_folder_is_refused(name):
    buffer = io.BytesIO(packed())
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"x")
    with pytest.raises(ReleaseError, match=r"which is no file in its folder. Do not unpack it"):
        deposit.inspect(buffer.getvalue())


def test_a_second_entry_of_the_same_name_and_a_compressed_copy_are_found():
    """The copy: sound contents in an archive that another program packed, and not what was deposited."""
    buffer = io.BytesIO(packed())
    with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(zipfile.ZipInfo("book-1-s/html/index.html"), FILES["html/index.html"])
    assert faults(buffer.getvalue())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in deposit.complete(FILES, MANIFEST).items():
            archive.writestr(f"book-1-s/{name}", content)
    assert faults(buffer.getvalue())


# the same contents, the same bytes


@given(st.permutations(sorted(FILES)), st.integers(-14, 14))
def test_the_archive_depends_on_contents_and_date_alone(order, hours):
    elsewhere = DATE.astimezone(timezone(timedelta(hours=hours)))
    files = deposit.complete(FILES, MANIFEST)
    assert deposit.pack(dict(sorted(files.items(), reverse=True)), "f", elsewhere) == deposit.pack(files, "f", DATE)
    assert packed({name: FILES[name] for name in order}) == packed()


def test_another_clock_and_time_zone_change_nothing(monkeypatch):
    before = packed()
    monkeypatch.setenv("TZ", "Asia/Seoul")
    time.tzset()
    try:
        monkeypatch.setattr(time, "time", lambda: 0.0)
        assert packed() == before
    finally:
        monkeypatch.undo()
        time.tzset()


def test_the_bytes_are_those_of_the_format():
    """Written by hand from PKWARE's application note. A change here makes every archive of before fail its check."""
    day, clock = (2026 - 1980) << 9 | 11 << 5 | 23, 7 << 11 | 22 << 5 | 46 // 2
    crc = 0x71BEEFF9  # of the one byte "b"
    common = struct.pack("<HHHHHLLLHH", 20, 0, 0, clock, day, crc, 1, 1, 3, 0)
    local = b"PK\x03\x04" + common + b"f/a" + b"b"
    central = b"PK\x01\x02" + bytes([20, 3]) + common + struct.pack("<HHHLL", 0, 0, 0, 0o100644 << 16, 0) + b"f/a"
    end = b"PK\x05\x06" + struct.pack("<HHHHLLH", 0, 0, 1, 1, len(central), len(local), 0)
    assert deposit.pack({"a": b"b"}, "f", DATE) == local + central + end


def test_sha256sum_reads_the_manifest(tmp_path):
    with zipfile.ZipFile(io.BytesIO(packed())) as archive:
        archive.extractall(tmp_path)
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", deposit.SUMS], cwd=tmp_path / "book-1-s", capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, b"")


# a whole run


SAVE = """
import json, pathlib, sys
path = pathlib.Path('../_build/results') / model_name / '01_a.json'
path.parent.mkdir(parents=True, exist_ok=True)
print(path.resolve(), sys.prefix + '/lib')
facts = {'model': model_name, 'source': '', 'weights_sha256': '0' * 64, 'lib': '0', 'commit': 'c', 'python': '3',
         'packages': {}, 'bos': '', 'seed': 0, 'threads': 1, 'start': '', 'seconds': 1}
path.write_text(json.dumps({'provenance': facts, 'values': {'seed': seed}}))
"""
CONFIG = """
title: t
execute: {execute_notebooks: 'off'}
repository: {url: https://github.com/someone/some-book, branch: v1}
sphinx: {extra_extensions: [lib.press.theme], config: {html_math_renderer: mathml}}
"""


def git(folder: Path, *words: str) -> None:
    subprocess.run(
        ["git", "-c", "user.name=n", "-c", "user.email=e", *words], cwd=folder, check=True, capture_output=True
    )


OURS = release.repository()


def point_at(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """The rooms work on the book in this folder."""
    places = {"ROOT": folder, "BUILD": folder / "_build", "BOOK": folder / "book"}
    for room in (build, check, execute, deposit, release, results):
        for name, value in (places | {"weights_sha256": lambda name: "0" * 64}).items():
            patch.setattr(room, name, value, raising=False)
    patch.setattr(release, "disagreements", lambda: [])
    patch.setattr(release, "repository", lambda: OURS)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_gpt2_model) -> Path:
    """A small book of its own, in git, run and built, with edits, a dashboard and a PDF."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "_config.yml").write_text(CONFIG)
    (folder / "_toc.yml").write_text("format: jb-book\nroot: book/index\nchapters:\n  - file: book/01_a\n")
    (folder / ".gitignore").write_text("_build/\n.jupyter_cache/\n__pycache__/\n")
    for name in (*deposit.AT_THE_TOP, "LICENSES/CC0-1.0.txt", *execute.PINS, "lib/__init__.py", "data/facts.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name if name.isupper() else "")
    (folder / "book").mkdir()
    chapter = notebook(folder, "01_a", SAVE, saves=False)
    content = json.loads(chapter.read_text())
    content["cells"].insert(0, {"cell_type": "markdown", "id": "t", "metadata": {}, "source": ["# A chapter, $x$"]})
    chapter.write_text(json.dumps(content))
    (folder / "book" / "index.md").write_text("# A book\n")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "all")
    with pytest.MonkeyPatch.context() as patch:
        point_at(folder, patch)
        execute.run("s", ["01_a"], say=lambda _: None)
        for name in PAPER:
            edit = an_edit(tiny_gpt2_model, name)
            edits.save(edit, folder / "_build" / "results" / "s" / "01_a" / f"{name}.safetensors")
        build.build("s", say=lambda _: None)
    (folder / "_build" / "dashboard").mkdir()
    (folder / "_build" / "dashboard" / "s.html").write_text("<p>heads</p>")
    (folder / "_build" / "book.pdf").write_bytes(b"%PDF-1.7")
    return folder


@pytest.fixture
def run(made, tmp_path, monkeypatch) -> Path:
    """A copy of it to tamper with."""
    folder = Path(shutil.copytree(made, tmp_path / "book"))
    point_at(folder, monkeypatch)
    return folder


@pytest.mark.slow
def test_a_snapshot_made_twice_is_the_same_to_the_byte(made, run, tmp_path):
    """Also after the book was built anew, file times moved on, and everything was touched."""
    first = deposit.snapshot("s", tmp_path / "one.zip", say=lambda _: None).read_bytes()
    again = deposit.snapshot("s", tmp_path / "two.zip", say=lambda _: None).read_bytes()
    assert first == again
    build.build("s", force=True, say=lambda _: None)
    for path in (run / "_build" / "book.pdf", run / "LICENSE"):
        os.utime(path, (time.time() + 99, time.time() + 99))
    assert deposit.snapshot("s", tmp_path / "three.zip", say=lambda _: None).read_bytes() == first
    found = deposit.verify(tmp_path / "one.zip")
    assert not found.faults and found.files == found.manifest["files"] and found.manifest["changes"] == []
    for folder in (made, run, Path(sys.prefix)):
        assert str(folder).encode() not in first, "no path of this machine"
    assert b"_build/results/s/01_a.json" in first, "which the chapter printed"
    names = {n.partition("/")[2] for n in zipfile.ZipFile(tmp_path / "one.zip").namelist()}
    assert {f"edits/{name}.safetensors" for name in PAPER} < names
    assert {"html/index.html", "html/book/01_a.html", "book.pdf", "dashboard.html", "executed/01_a.ipynb"} < names
    assert {"results/01_a.json", "source/book/01_a.ipynb", "LICENSE", "LICENSES/CC0-1.0.txt", "NOTICE"} < names
    for name in deposit.CONTENTS:
        assert any(n.startswith(name) for n in names), f"{name} is promised in README.md"
    checked = CliRunner().invoke(app, ["verify-snapshot", str(tmp_path / "one.zip")])
    assert checked.exit_code == 0 and f"all {len(names)} files are as they were made" in checked.output
    data = bytearray(first)
    data[first.index(b"%PDF-1.7")] ^= 1
    (tmp_path / "one.zip").write_bytes(data)
    checked = CliRunner().invoke(app, ["verify-snapshot", str(tmp_path / "one.zip")])
    assert checked.exit_code == 1 and "wrong: book.pdf\n" in checked.output


def test_a_dirty_work_tree_is_said(run, tmp_path):
    (run / "LICENSE").write_text("changed")
    (run / "stray.py").write_text("")
    (run / "book" / "index.md").unlink()
    (run / "book" / "index.md").write_text("# A book\n")
    said: list[str] = []
    path = deposit.snapshot("s", tmp_path / "a.zip", say=said.append)
    found = deposit.verify(path)
    assert not found.faults and found.manifest["changes"] == ["M LICENSE", "?? stray.py"]
    assert "the work tree differs from its commit, which the manifest says: M LICENSE, ?? stray.py" in said
    with zipfile.ZipFile(path) as archive:
        (readme,) = (archive.read(n).decode() for n in archive.namelist() if n.count("/") == 1 and "README" in n)
        assert "work tree that differs from that commit" in readme
        assert archive.read(archive.namelist()[0].partition("/")[0] + "/source/LICENSE") == b"changed"
    git(run, "commit", "-qam", "more")
    (run / "stray.py").unlink()
    clean = deposit.verify(deposit.snapshot("s", tmp_path / "b.zip", say=lambda _: None))
    assert clean.manifest["changes"] == [] and clean.manifest["commit"] != found.manifest["commit"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("_build/book.pdf", r"the PDF is missing: .*Run `python -m lib pdf --model s` first"),
        ("_build/dashboard/s.html", r"the dashboard is missing: .*Run `python -m lib dashboard --model s` first"),
        ("_build/executed/s/01_a.ipynb", r"not executed on s since its inputs changed: 01_a\. Run"),
        ("_build/results/s/01_a.json", r"not executed on s since its inputs changed: 01_a\. Run"),
        ("_build/results/s/01_a/ffn.safetensors", r"no edit of s for ffn\. Run `python -m lib run 3 --model s"),
        ("NOTICE", r"the repository has no NOTICE, and a deposit needs it"),
        (".git/HEAD", r"no git checkout with a commit .*Make it in a clone"),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_written(run, tmp_path, path, said):
    (run / path).unlink()
    with pytest.raises(BookError, match=said):
        deposit.snapshot("s", tmp_path / "out" / "a.zip", say=lambda _: None)
    assert not (tmp_path / "out").exists()


def add_a_fact(run: Path) -> None:
    (run / "data" / "new.txt").write_text("other facts")


def rename_the_model(run: Path) -> None:
    path = run / "_build" / "results" / "s" / "01_a.json"
    path.write_text(path.read_text().replace('"model": "s"', '"model": "other"'))


def age_the_pdf(run: Path) -> None:
    earlier = (run / "_build" / "html.key").stat().st_mtime - 1
    os.utime(run / "_build" / "book.pdf", (earlier, earlier))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (add_a_fact, r"not executed on s since its inputs changed: 01_a"),
        (rename_the_model, r"was made by other .*, not by s"),
        (age_the_pdf, r"the PDF, .*, is older than the book it should be made from. Run"),
    ],
)
def test_what_is_out_of_date_or_of_another_model(run, tmp_path, spoil, said):
    spoil(run)
    with pytest.raises(BookError, match=said):
        deposit.snapshot("s", tmp_path / "a.zip", say=lambda _: None)


def test_edits_of_other_weights_or_damaged(run, tmp_path, tiny_gpt2_model):
    path = run / "_build" / "results" / "s" / "01_a" / "full.safetensors"
    edits.save(dataclasses.replace(an_edit(tiny_gpt2_model, "full"), base_sha256="1" * 64), path)
    with pytest.raises(ReleaseError, match="belongs to other weights than s has now; run chapter 3 again"):
        deposit.snapshot("s", tmp_path / "a.zip", say=lambda _: None)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(EditError, match="cut short or altered"):
        deposit.snapshot("s", tmp_path / "a.zip", say=lambda _: None)


def test_no_room_and_a_release_that_contradicts_itself(run, tmp_path, monkeypatch):
    (tmp_path / "a_file").write_text("")
    with pytest.raises(ReleaseError, match="Choose another place with --output"):
        deposit.snapshot("s", tmp_path / "a_file" / "a.zip", say=lambda _: None)
    monkeypatch.setattr(release, "disagreements", lambda: ["version in CITATION.cff is '2', not '1'"])
    with pytest.raises(ReleaseError, match=r"does not agree with itself: version in CITATION.cff"):
        deposit.snapshot("s", tmp_path / "a.zip", say=lambda _: None)


# the check of a file


def test_the_sum_beside_an_archive_must_fit(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(packed())
    assert not deposit.verify(path).faults, "no sum, no objection"
    deposit.sidecar(path).write_text(f"{hashlib.sha256(packed()).hexdigest()}  a.zip\n")
    assert not deposit.verify(path).faults
    path.write_bytes(packed({"html/index.html": b"another book, sound in itself"}))
    assert "a.zip.sha256 says" in deposit.verify(path).faults[0]


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_archive(tmp_path, content):
    path = tmp_path / "a.zip"
    path.write_bytes(content)
    result = CliRunner().invoke(app, ["verify-snapshot", str(path)])
    assert result.exit_code == 1
    assert isinstance(result.exception, ReleaseError | SystemExit)


def test_an_archive_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.zip", tmp_path):
        with pytest.raises(ReleaseError, match="Give an archive that exists"):
            deposit.verify(path)


def test_every_file_of_the_repository_has_a_licence():
    notice = (files.ROOT / "NOTICE").read_text(encoding="utf-8")
    for name in re.findall(r"LICENSES/[\w.-]+\.txt", notice):
        assert (files.ROOT / name).stat().st_size > 4000, "the licence in full"
    assert "Hugging Face" in notice and release.SOURCE_RECORD in notice
