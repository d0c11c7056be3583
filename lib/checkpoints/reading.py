"""Read a model's files, or refuse them: every tensor is a sound one of theirs, and each of theirs has its place.

Only safetensors and GGUF are read, never pickle; remote code is never run.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any
from unittest.mock import patch

import gguf as gguf_format
import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import modeling_gguf_pytorch_utils as gguf_reading
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from lib.checkpoints.named import SPECS
from lib.errors import BookError, ModelError
from lib.weights import check_family, check_options

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


class Header(gguf_format.GGUFReader):
    """What a GGUF file says of itself and of its tensors. Its hundred thousand words are slices of a plain array, which
    take less time than those of a mapped file."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.view(np.ndarray) if name == "data" else value)


@dataclass(frozen=True)
class Files:
    """Where a model's files are. gguf: the name of its GGUF file, if that is what it is."""

    name: str
    folder: Path
    gguf: str | None = None

    @property
    def where(self) -> Path:
        return self.folder / (self.gguf or "")

    @cached_property
    def header(self) -> gguf_format.GGUFReader:
        """Of its GGUF file."""
        return gguf_format.GGUFReader(str(self.where.absolute()))

    @property
    def options(self) -> dict[str, Any]:
        """What transformers must be told to read these. A GGUF file in full: its name is looked for elsewhere."""
        source = {"gguf_file": str(self.where.absolute())} if self.gguf else {}
        return {"local_files_only": True, "trust_remote_code": False, **source}

    @cached_property
    def config(self) -> Any:
        """What config.json, or a GGUF file, says. Raises ModelError for one that cannot be read, of another family, or
        of weights that are packed."""
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
        stored = 2 if str(getattr(self.config, "dtype", None)) in ("torch.bfloat16", "torch.float16") else 4
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


def read(files: Files, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Module (in evaluation mode, no gradients) and tokenizer. Raises ModelError unless every tensor is a sound one of
    the files, and every one of theirs is in it."""
    set_verbosity_error()  # what it would warn of is refused here
    if not files.gguf:
        disable_progress_bar()  # a cached model loads in a moment; a bar would only litter the chapters
    checked = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    source = files.options if files.gguf else files.options | {"use_safetensors": True}
    with _gguf_asked_once(), files.reading():
        config = files.config
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


@contextmanager
def _gguf_asked_once() -> Iterator[None]:
    """transformers reads a GGUF file's header five times (seconds each: it holds the vocabulary) and makes a table
    of tensors' names for every module of the model: the first of each is kept, until this ends."""
    with patch.multiple(
        gguf_format, GGUFReader=cache(Header), get_tensor_name_map=cache(gguf_format.get_tensor_name_map)
    ):
        yield


def _not_float(files: Files) -> str | None:
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
