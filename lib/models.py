"""Models under study: loaded, and checked against the weight view before anyone uses them.

What a model may be, and where its files come from, is the matter of `lib.checkpoints`. A text gets before it what the
model's own tokenizer puts there (`Model.bos`), and nothing else is ever added.
"""

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.checkpoints.fetching import locate, weights_sha256
from lib.checkpoints.named import FORCED, SPECS, Terms, spec_of, split
from lib.checkpoints.reading import read
from lib.errors import DataError, ModelError
from lib.weights import Weights, check_view, view

# Scripts written without spaces: Thai, Lao, Burmese, Khmer, kana, Chinese characters
SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Model:
    """A loaded model under study, its tokenizer, its weight view, and where they came from. bos: what stands before
    every text. middle: the last of these stands in its middle instead (a control, `lib.sinks`). memory: what studies
    keep of it between their runs (`studies.once_a_model`)."""

    name: str
    source: str
    licence: str
    weights_sha256: str
    parameters: int
    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights: Weights
    bos: tuple[int, ...] = ()
    middle: bool = False
    memory: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def plain_name(self) -> str:
        """Its name without what forces a beginning of text."""
        return split(self.name)[0]

    @property
    def device(self) -> torch.device:
        return self.weights.W_E.device

    def token_ids(self, text: str) -> list[int]:
        """Token ids of a text as the model reads it: after its beginning-of-text token, where it has one."""
        return self.begun(self.pieces(text))

    def begun(self, pieces: list[int]) -> list[int]:
        """A text's pieces with what stands before them, or in their middle."""
        if not self.middle:
            return [*self.bos, *pieces]
        half = (len(pieces) + 1) // 2
        return [*self.bos[:-1], *pieces[:half], self.bos[-1], *pieces[half:]]

    def pieces(self, text: str) -> list[int]:
        """Token ids of a text with nothing before it."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @staticmethod
    def joined(before: str, text: str) -> str:
        """A text and the word after it: with a space between, but before a script that is written without."""
        return f"{before}{'' if SPACELESS.match(text) else ' '}{text}"

    def word(self, text: str, after: str = "is") -> list[int]:
        """Token ids of a word where it stands after others, `joined` to them: what `after` lacks of both together.
        So it is also right for tokenizers that put a space before every text (Llama 2's)."""
        alone, both = self.pieces(after), self.pieces(self.joined(after, text))
        shared = next((i for i, pair in enumerate(zip(alone, both, strict=False)) if pair[0] != pair[1]), len(alone))
        return both[shared:]

    def first_token(self, answer: str, prompt: str = "is") -> int:
        """Id of the first token of an answer written after a prompt."""
        return self.word(answer, prompt)[0]

    def windows(self, text: str, size: int) -> list[list[int]]:
        """A long text in windows of `size` tokens, each read as a text of its own; the last one may be shorter, and has
        at least two tokens."""
        pieces, step = self.pieces(text), size - len(self.bos)
        cut = [self.begun(pieces[start : start + step]) for start in range(0, len(pieces), step)]
        return [window for window in cut if len(window) > 1]

    def token_text(self, token: int) -> str:
        if token == len(self.weights.W_E):
            return "<sink>"  # of `lib.sinks`
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
    spec, sha256, files = spec_of(name), weights_sha256(name), locate(name)
    module, tokenizer = read(files, dtype or precision_that_fits(files.fp32_bytes(), memory_at_hand(device)))
    parameters = sum(p.numel() for p in module.parameters())
    if spec and parameters != spec.parameters:
        raise ModelError(f"{name} has {parameters:,} parameters, expected {spec.parameters:,}. {files.remedy()}")
    module.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides its signature
    source, licence = (spec.source, spec.licence) if spec else (name, "as its author says")
    bos = beginning(tokenizer, FORCED.get(split(name)[1]))
    model = Model(name, source, licence, sha256, parameters, module, tokenizer, view(module), bos)
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


def beginning(tokenizer: PreTrainedTokenizerBase, forced: bool | None = None) -> tuple[int, ...]:
    """The tokens before a text: what the tokenizer puts there by itself (Gemma, Llama: one; SmolLM2, GPT-2: none).
    forced: its beginning-of-text token, or nothing. Raises ModelError where it has no such token."""
    if forced and tokenizer.bos_token_id is None:
        raise ModelError("this model's tokenizer has no beginning-of-text token; leave out `@bos` after its name.")
    if forced is not None:
        return (tokenizer.bos_token_id,) if forced else ()
    whole, alone = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    return tuple(whole[: next(i for i in range(len(whole) + 1) if whole[i : i + len(alone)] == alone)])


def terms_of(model: Model) -> Terms | None:
    """The terms of use under which a model stands, and everything that is made from it; None where there are none."""
    family = model.module.config.model_type
    return next((spec.terms for spec in SPECS.values() if spec.terms and spec.terms.family == family), None)


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
