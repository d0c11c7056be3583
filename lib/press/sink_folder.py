"""A learned sink as an ordinary model: one more row of the vocabulary, and a tokenizer that puts it before every text.

1  the sink's id is the tokenizer's next one: a row that the model has and no token uses, or one row more
2  embedding and unembedding are written apart; the sink is said no more than the token that neutral text makes least
   likely, whose unembedding it gets
3  the tokenizer gets the token `<sink>` and puts it, after what it puts itself, before every text

So `from_pretrained` and `generate` in plain transformers, TransformerLens and what reads the same files need nothing of
this book. A learned key and value have no row: as a prefix-tuning adapter of `peft` they stand before everything that
is read, so that form (`save_adapter`) is for models whose tokenizer puts nothing before a text.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lib.edits import Edit, applied
from lib.errors import EditError
from lib.forward import pack, streams
from lib.models import Model
from lib.sinks import KEYS, ROW
from lib.training import neutral_windows

TOKEN = "<sink>"
WINDOW = 32  # tokens of the neutral windows that show which token is least likely


def write(model: Model, edit: Edit, folder: Path) -> None:
    """Model and tokenizer with a `sink_token` edit. Raises EditError for another pathway (a key and value have no row
    in a vocabulary) or place (no tokenizer puts it there), and for a tokenizer that takes no further token."""
    if ROW not in edit.values or edit.recipe.get("middle"):
        what = "a row in the middle" if ROW in edit.values else edit.pathway
        raise EditError(f"{what} cannot stand before every text as a row; export a sink_token, or share the edit file.")
    tokenizer = with_sink(model)
    with_row(model, edit, token_id(model)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def with_sink(model: Model) -> PreTrainedTokenizerBase:
    """A copy of the model's tokenizer that puts the sink before every text, after what it puts there itself."""
    tokenizer = model.tokenizer
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise EditError(f"the tokenizer of {model.name} ({type(tokenizer).__name__}) takes no further token.")
    copy: Any = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    if TOKEN in copy.get_vocab():
        raise EditError(f"the tokenizer of {model.name} has a token {TOKEN} already: a sink was put there before.")
    copy.add_tokens([AddedToken(TOKEN, special=True, normalized=False)], special_tokens=True)
    before = [*copy.convert_ids_to_tokens(list(model.bos)), TOKEN]
    copy.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*before, "$A"],
        pair=[*before, "$A", "$B"],
        special_tokens=[(token, copy.convert_tokens_to_ids(token)) for token in before],
    )
    return copy


def token_id(model: Model) -> int:
    """The sink's id in an exported folder: the tokenizer's next one."""
    return max(model.tokenizer.get_vocab().values()) + 1


@torch.no_grad()
def with_row(model: Model, edit: Edit, token: int) -> PreTrainedModel:
    """The model with the sink's embedding at a token's row, its last one or one more."""
    weights, state = model.weights, dict(model.module.state_dict())
    rows = max(len(weights.W_E), token + 1)
    names = {part: f"{name}.weight" for part, name in _embeddings(model.module).items()}
    for part, table in (("input", weights.W_E), ("output", weights.W_U.T)):
        more = table.new_zeros(rows - len(table), table.shape[1])
        state[names[part]] = torch.cat((table, more))
    state[names["input"]][token] = edit.values[ROW]
    if token >= len(weights.W_E):
        state[names["output"]][token] = weights.W_U[:, least_likely(model)]
    config = type(model.module.config).from_dict(model.module.config.to_dict())
    config.vocab_size, config.tie_word_embeddings = rows, False
    new = AutoModelForCausalLM.from_config(config, dtype=weights.W_E.dtype)
    new.load_state_dict(state)
    new.generation_config = model.module.generation_config
    return new.eval()


def _embeddings(module: PreTrainedModel) -> dict[str, str]:
    """The names of a model's embedding and unembedding modules."""
    wanted = {"input": module.get_input_embeddings(), "output": module.get_output_embeddings()}
    by_id = {id(part): name for name, part in module.named_modules()}
    return {key: by_id[id(part)] for key, part in wanted.items()}


@torch.no_grad()
def least_likely(model: Model) -> int:
    """The token that neutral text makes least likely: of the lowest mean logit."""
    windows, _ = neutral_windows(model, WINDOW)
    end = model.weights.n_layers
    final = streams(model, pack(model, windows[:8]), [end])[end]
    return int((model.weights.norm_final(final).mean(0) @ model.weights.W_U).argmin())


def save_adapter(model: Model, edit: Edit, folder: Path) -> Path:
    """A `sink_kv` edit as a prefix-tuning adapter of one virtual token: `PeftModel.from_pretrained(base, folder)`. peft
    keeps keys and values of all layers in one row, key and value in turns, with the key/value heads of the model; these
    keys are as the model keeps them, after any norm, and at position 0 not rotated. Raises EditError for another
    pathway, and where the tokenizer puts something before a text, because peft's prefix stands before that too."""
    if KEYS not in edit.values:
        raise EditError(f"{edit.pathway} is no key and value of every layer; export the edit itself.")
    if model.bos:
        raise EditError(
            f"{model.name} puts {model.before_texts} before every text, and a prefix of peft would stand before that; "
            "use the edit file with `python -m lib verify`."
        )
    with applied(model, edit) as changed:
        fixed = [block.attn.sink for block in changed.weights.blocks]
    row = torch.cat([x.flatten() for sink in fixed if sink for x in (sink.key, sink.value)])[None]
    weights = model.weights
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "num_virtual_tokens": 1,
        "num_layers": weights.n_layers,
        "num_attention_heads": weights.n_kv_heads,
        "token_dim": weights.n_kv_heads * weights.d_head,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "base_model_name_or_path": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"prompt_embeddings": row.contiguous().cpu()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder
