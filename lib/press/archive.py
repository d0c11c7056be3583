"""One archive of a whole run, to deposit: the book, its numbers, its edits, its source; and the check of an archive.

    collect   everything that belongs in it, or an error that names what is missing or out of date
    pack      a ZIP archive that depends on names, contents and one date alone: sorted, uncompressed (compressors
              differ from version to version), one mode and one date for all files. The same run gives the same bytes.
    inspect   compares each file with MANIFEST.sha256, then packs the contents again and compares the archives byte by
              byte. So every byte is vouched for: contents by their sums, and the rest because it follows from them.

Who can rewrite the whole archive can rewrite its manifest too: against that stands the archive's own sum, which is
written beside it and belongs into the record of the deposit.
"""

import hashlib
import io
import json
import re
import subprocess
import zipfile
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from statistics import mode
from typing import Any, NamedTuple

from lib import __version__, edits
from lib.checkpoints.fetching import weights_sha256
from lib.checkpoints.named import canonical
from lib.errors import ReleaseError
from lib.files import BUILD, ROOT, slug, write_atomically
from lib.press import build, check, execute, release
from lib.press.texts import entries, fill
from lib.results import chapter_folder, results_path
from lib.weights import PAPER

SUMS, MANIFEST = "MANIFEST.sha256", "MANIFEST.json"
AT_THE_TOP = ("LICENSE", "NOTICE", "CITATION.cff", ".zenodo.json")  # beside source/, where a depositor looks for them
_PART = r"(?!\.\.?(/|$))[^/\\:\0]+"
SAFE = re.compile(f"{_PART}(/{_PART})+")  # a name that unpacks into its own folder, on any system
CONTENTS = entries("archive_contents.yaml")


class Inspected(NamedTuple):
    """What became of a check. faults: a line each, as `missing: book.pdf`; manifest: MANIFEST.json, {} if it cannot be
    trusted; files: how many there are."""

    faults: tuple[str, ...]
    manifest: dict[str, Any]
    files: int


def snapshot(model_name: str, output: Path | None = None, *, say: Callable[[str], None] = print) -> Path:
    """Write the archive of a model's last run, and its sum beside it. Raises ReleaseError or ChapterError for what
    is missing or out of date, and where nothing can be written."""
    model_name = canonical(model_name)
    if wrong := release.disagreements():
        raise ReleaseError("the release does not agree with itself: " + "; ".join(wrong) + ".")
    build.build(model_name, say=say)  # refuses chapters that are missing or out of date, and builds what is out of date
    files = collect(model_name)
    manifest = provenance(model_name, files)
    if manifest["changes"]:
        say("the work tree differs from its commit, which the manifest says: " + ", ".join(manifest["changes"]))
    folder = f"{release.repository().name}-{__version__}-{slug(model_name)}"
    data = pack(complete(files, manifest), folder, datetime.fromisoformat(manifest["date"]))
    path = output or BUILD / f"{folder}.zip"
    total = hashlib.sha256(data).hexdigest()
    for file, content in {path: data, sidecar(path): f"{total}  {path.name}\n".encode()}.items():
        write_atomically(file, content, error=ReleaseError, advice="Choose another place with --output.")
    say(f"{path}: {manifest['files']:,} files, {len(data) / 1e6:,.1f} MB, sha256 {total}")
    return path


def collect(model_name: str) -> dict[str, bytes]:
    """Contents of the archive by name, all but the manifests. Raises ReleaseError for what is missing or outdated, and
    ChapterError for results that another model's run has left there."""
    check.current_values(model_name)
    chapters, html, results = execute.chapter_names(), BUILD / "html", BUILD / "results" / slug(model_name)
    pdf, dashboard = BUILD / "book.pdf", build.dashboard_path(model_name)
    needed = [("book", "build", html / "index.html"), ("dashboard", "dashboard", dashboard), ("PDF", "pdf", pdf)]
    for what, command, path in needed:
        command = f"python -m lib {command} --model {model_name}"
        if not path.is_file():
            raise ReleaseError(f"the {what} is missing: there is no {path}. Run `{command}` first.")
        if path == pdf and (stamp := BUILD / "html.key").is_file() and path.stat().st_mtime < stamp.stat().st_mtime:
            raise ReleaseError(f"the PDF, {pdf}, is older than the book it should be made from. Run `{command}` again.")
    found = {"book.pdf": pdf, "dashboard.html": dashboard} | _edits(model_name, chapters)
    found |= {f"html/{n}": p for n, p in under(html).items()}
    found |= {f"results/{n}": p for n, p in under(results).items() if p.suffix != ".safetensors"}
    for chapter in chapters:
        found[f"executed/{chapter}.ipynb"] = execute.executed_path(model_name, chapter)
        found[f"results/{chapter}.json"] = results_path(model_name, chapter)
    source = {n: ROOT / n for n in _git("ls-files", "-z").split("\0") if (ROOT / n).is_file()}  # not deleted ones
    if lacking := [name for name in AT_THE_TOP if name not in source]:
        raise ReleaseError(f"the repository has no {', '.join(lacking)}, and a deposit needs it; commit it.")
    found |= {f"source/{name}": path for name, path in source.items()}
    found |= {n: p for n, p in source.items() if n in AT_THE_TOP or n.startswith("LICENSES/")}
    return {name: path.read_bytes() for name, path in found.items()}


def provenance(model_name: str, files: dict[str, bytes]) -> dict[str, Any]:
    """MANIFEST.json: what made the archive. Nothing in it depends on when it is made."""
    repo = release.repository()
    runs = {c: json.loads(files[f"results/{c}.json"])["provenance"] for c in execute.chapter_names()}
    kept = ("commit", "python", "packages", "start", "seconds")
    return {
        "title": "QKV Decomposition for Transformer XAI: an executable book",
        "version": __version__,
        "repository": repo.url,
        "tag": repo.tag,
        "commit": _git("rev-parse", "HEAD").strip(),
        "date": datetime.fromtimestamp(int(_git("log", "-1", "--format=%ct")), UTC).isoformat(),
        "changes": [line.strip() for line in _git("status", "--porcelain").splitlines()],
        "model": model_name,
        "weights_sha256": weights_sha256(model_name),
        "chapters": {chapter: {key: run[key] for key in kept} for chapter, run in runs.items()},
        "derived_from": release.SOURCE_RECORD,
        "contents": CONTENTS,
        "files": len(files) + 3,  # and README.md, MANIFEST.json, MANIFEST.sha256
    }


def complete(files: dict[str, bytes], manifest: dict[str, Any]) -> dict[str, bytes]:
    """The contents with README.md, MANIFEST.json and, last of all, the sums of all of them."""
    files = files | {
        "README.md": fill("archive_readme.md", run=manifest, contents=CONTENTS).encode(),
        MANIFEST: (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode(),
    }
    return files | {SUMS: sums(digests(files))}


def digests(files: dict[str, bytes]) -> dict[str, str]:
    """sha256 of each content, by name."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def sums(digests: dict[str, str]) -> bytes:
    """MANIFEST.sha256 of some digests by name, in the form of `sha256sum`."""
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()


def pack(files: dict[str, bytes], folder: str, date: datetime) -> bytes:
    """A ZIP archive of the contents in one folder. The same arguments give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(f"{folder}/{name}", date.astimezone(UTC).timetuple()[:6])
            entry.create_system, entry.external_attr = 3, 0o100644 << 16  # a plain file that everyone may read
            archive.writestr(entry, files[name])
    return buffer.getvalue()


def verify(path: Path) -> Inspected:
    """Check an archive on disk, against the sum beside it too if there is one. Raises ReleaseError as `inspect`."""
    beside = sidecar(path)
    try:
        data = path.read_bytes()
        written = beside.read_text(encoding="utf-8").split()[:1] if beside.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        what = f"{path} or the sum beside it cannot be read"
        raise ReleaseError(f"{what}: {error}. Give an archive that exists.") from error
    found, total = inspect(data), hashlib.sha256(data).hexdigest()
    if found.faults or written in ([], [total]):
        return found
    return found._replace(faults=(f"damaged: its sha256 is {total}, and {beside.name} says {written[0]}",))


def inspect(data: bytes) -> Inspected:
    """Check an archive. Raises ReleaseError for what is no archive, is cut short, or would write outside its folder."""
    folder, files, unreadable = _unpack(data)
    listed = {line[66:]: line[:64] for line in files.get(SUMS, b"").decode(errors="replace").splitlines()}
    present = digests({name: content for name, content in files.items() if name != SUMS})
    names = {
        "wrong": unreadable | {name for name, total in present.items() if listed.get(name, total) != total},
        "missing": ({SUMS, MANIFEST} | listed.keys()) - files.keys() - unreadable,
        "extra": present.keys() - listed.keys() if SUMS in files else set(),
    }
    if not any(names.values()) and files[SUMS] != sums(present):
        names["wrong"] = {SUMS}  # the same sums, written otherwise
    if faults := tuple(f"{what}: {name}" for what in names for name in sorted(names[what])):
        return Inspected(faults, {}, len(files))
    manifest = json.loads(files[MANIFEST])
    again = pack(files, folder, datetime.fromisoformat(manifest["date"]))
    return Inspected(() if data == again else (_first_difference(data, again),), manifest, len(files))


def sidecar(path: Path) -> Path:
    """The file beside an archive that holds its sum."""
    return path.with_name(path.name + ".sha256")


def under(folder: Path) -> dict[str, Path]:
    """The files of a folder and of those in it, by their names from there on, sorted."""
    return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}


def _unpack(data: bytes) -> tuple[str, dict[str, bytes], set[str]]:
    """The one folder of an archive, the contents of its files by name, and names of those that cannot be read."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        entries = archive.infolist()
    except Exception as error:  # zipfile meets damage with errors of many kinds
        fault = f"this is no ZIP archive, or it was cut short or damaged ({error})"
        raise ReleaseError(f"{fault}. Get it again.") from error
    if sum(entry.file_size for entry in entries) > len(data):  # stored, but some bytes counted for many files
        raise ReleaseError("the archive would unpack to more than it is, as none of a snapshot does. Do not unpack it.")
    if outside := [entry.filename for entry in entries if not SAFE.fullmatch(entry.filename)]:
        raise ReleaseError(f"the archive holds {outside[0]!r}, which is no file in its folder. Do not unpack it.")
    folders = [entry.filename.partition("/")[0] for entry in entries]
    folder = mode(folders or [""])
    names, files = [entry.filename.removeprefix(folder + "/") for entry in entries], {}
    for name, entry in zip(names, entries, strict=True):
        with suppress(Exception):  # a wrong checksum, a header that does not fit, a size beyond the end, and more
            if entry.compress_type == zipfile.ZIP_STORED:  # as all of a snapshot is
                files[name] = archive.read(entry)
    return folder, files, set(names) - files.keys()


def _first_difference(data: bytes, again: bytes) -> str:
    """Where an archive differs from the one that its contents make."""
    place = next(i for i, (is_now, was) in enumerate(zip_longest(data, again)) if is_now != was)
    with zipfile.ZipFile(io.BytesIO(again)) as archive:
        before = [e.filename for e in archive.infolist() if e.header_offset <= place < archive.start_dir]
    where = f"byte {place:,}, at {before[-1]}" if before else f"byte {place:,}, in the list of files at its end"
    return f"damaged: {where}, is not what the contents make it: the archive was altered, or packed otherwise"


def _edits(model_name: str, chapters: list[str]) -> dict[str, Path]:
    """The edits of the chapter that makes them, the source page's four pathways at least. Raises ReleaseError."""
    paths = {p.stem: p for c in chapters for p in sorted(chapter_folder(model_name, c).glob("*.safetensors"))}
    if lacking := [name for name in PAPER if name not in paths]:
        remedy = f"Run `python -m lib run 3 --model {model_name} --force`."
        raise ReleaseError(f"there is no edit of {model_name} for {', '.join(lacking)}. {remedy}")
    for path in paths.values():
        if edits.load(path).base_sha256 != weights_sha256(model_name):
            raise ReleaseError(f"{path} belongs to other weights than {model_name} has now; run chapter 3 again.")
    return {f"edits/{name}.safetensors": path for name, path in paths.items()}


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        fault = f"{ROOT} is no git checkout with a commit ({error}), and a snapshot names its commit"
        raise ReleaseError(f"{fault}. Make it in a clone.") from error
