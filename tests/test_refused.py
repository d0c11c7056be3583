"""A model that is not what it says is refused, by the name of the tensor, option or file, in one sentence: each way of
breaking a sound folder, through `models.load` and through the command line."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.tensor_mapping import get_tensor_name_map
from safetensors.torch import load_file, save_file

from lib import models
from lib.__main__ import main
from lib.checkpoints import fetching, named
from lib.errors import ModelError
from lib.weights import check_view, view
from tests.conftest import tiny_gpt2, tiny_llama

Tensors = dict[str, torch.Tensor]
Arrays = dict[str, np.ndarray]
MAKERS = {
    "llama": tiny_llama,
    "tied": lambda **sizes: tiny_llama(tie_word_embeddings=True, **sizes),
    "gpt2": tiny_gpt2,
    "cross": lambda **sizes: tiny_gpt2(add_cross_attention=True, **sizes),
}
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="session")
def sound(tmp_path_factory, organism) -> Callable[[str], Path]:
    """A sound folder of a tiny random model, made once."""
    root = tmp_path_factory.mktemp("sound")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            MAKERS[name](vocab_size=len(organism.tokenizer)).save_pretrained(root / name)
            organism.tokenizer.save_pretrained(root / name)
        return root / name

    return folder


@pytest.fixture
def copy(sound, tmp_path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(sound(name), tmp_path / "mine"))


def tensors(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        changed = change(load_file(folder / "model.safetensors"))
        save_file({k: v.contiguous() for k, v in changed.items()}, folder / "model.safetensors", {"format": "pt"})

    return edit


def config(**options: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(old | options))

    return edit


def prefixed(prefix: str) -> Callable[[Path], None]:
    return tensors(lambda state: {prefix + name: t for name, t in state.items()})


def without(pattern: str) -> Callable[[Path], None]:
    return tensors(lambda state: {name: t for name, t in state.items() if not re.search(pattern, name)})


def plus(**more: torch.Tensor) -> Callable[[Path], None]:
    return tensors(lambda state: state | {name.replace("__", "."): t for name, t in more.items()})


def one(name: str, value: float) -> Callable[[Path], None]:
    """One number of a tensor set to a value."""

    def change(state: Tensors) -> Tensors:
        state[name].view(-1)[5] = value
        return state

    return tensors(change)


def cast(kind: torch.dtype) -> Callable[[Path], None]:
    return tensors(lambda state: state | {Q: state[Q].to(kind)})


def packed(state: Tensors) -> Tensors:
    return {(k.replace("weight", "qweight") if k == Q else k): (v.int() if k == Q else v) for k, v in state.items()}


def file(name: str, text: str | None = None, source: str | None = None) -> Callable[[Path], None]:
    """A file written, moved there from another name, or deleted."""

    def edit(folder: Path) -> None:
        if source:
            shutil.move(folder / source, folder / name)
        elif text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(text)

    return edit


def both(*edits: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [edit(folder) for edit in edits] and None


INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00002.safetensors"
LISTED = json.dumps({"metadata": {}, "weight_map": {"a": SHARD, "b": "model-00002-of-00002.safetensors"}})
BROKEN: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "compiled": ("llama", prefixed("_orig_mod."), r"_orig_mod\.lm_head\.weight .*compiled model; save its `_orig_mod`"),
    "wrapped": ("gpt2", prefixed("module."), r"module\.transformer\.h\.0.*wrapped model.*save its `module`"),
    "peft": ("llama", prefixed("base_model.model."), r"base_model\.model\..*adapter.*`merge_and_unload\(\)`"),
    "adapter beside": ("llama", plus(model__layers__0__self_attn__q_proj__lora_A__weight=torch.ones(2)), "lora_A.*mer"),
    "adapter alone": ("llama", file("adapter_config.json", "{}"), r"adapter_config\.json.*`merge_and_unload\(\)`"),
    "tied, not said": ("tied", config(tie_word_embeddings=False), r"lm_head\.weight is missing.*tie_word_embeddings"),
    "gpt2 untied": ("gpt2", config(tie_word_embeddings=False), r"lm_head\.weight is missing.*tie_word_embeddings"),
    "not tied": ("llama", config(tie_word_embeddings=True), r"lm_head\.weight is not the embedding.*correct tie_wor"),
    "head lost": ("llama", without("lm_head"), r"lm_head\.weight is missing: its head was not saved"),
    "embedding lost": ("tied", without("embed_tokens"), "(embed_tokens|lm_head).* is missing"),
    "layer lost": ("llama", without(r"layers\.1\."), r"model\.layers\.1\.\S+ and 8 more is missing.*right ones"),
    "tensor lost": ("gpt2", without(r"h\.2\.ln_1\.bias"), r"transformer\.h\.2\.ln_1\.bias is missing"),
    "layers beyond": ("llama", config(num_hidden_layers=2), r"layers\.2\.\S+ and 8 more has no.*only 2 layers; corr"),
    "gpt2 beyond": ("gpt2", config(n_layer=2), r"transformer\.h\.2\.\S+ and .*only 2 layers; correct"),
    "layers too few": ("llama", config(num_hidden_layers=4), r"layers\.3\.\S+ and 8 more is missing"),
    "another's tensor": ("llama", plus(model__layers__0__extra__weight=torch.ones(2)), r"extra\.weight has no p"),
    "mis-sized": ("llama", config(intermediate_size=40), r"down_proj\.weight has the shape \[32, 48\].*\[32, 40\]"),
    "another vocabulary": ("gpt2", config(vocab_size=90), r"wte\.weight has the shape \[\d+, 32\].*\[90, 32\]"),
    "nan": ("llama", one(Q, float("nan")), rf"{Q} holds NaN or infinity in 1 of 1,024 places; get the file again"),
    "infinite": ("gpt2", one("transformer.h.1.ln_2.bias", float("-inf")), r"ln_2\.bias holds NaN or infinity in 1 of"),
    "nan unread": ("gpt2", one("transformer.wpe.weight", float("nan")), r"wpe\.weight holds NaN or infinity in 1 of"),
    "packed": ("llama", tensors(packed), r"q_proj\.qweight has no place.*packed; give the model before"),
    "8 bit": ("llama", cast(torch.int8), rf"{Q} is kept as I8: its weights are packed; give the model before"),
    "float 8": ("llama", cast(torch.float8_e4m3fn), rf"{Q} is kept as F8_E4M3"),
    "quantised": ("llama", config(quantization_config={"quant_method": "gptq"}), r"quantised \(gptq\); give the model"),
    "unknown method": ("llama", config(quantization_config={"quant_method": "new"}), r"quantised \(new\)"),
    "no method": ("llama", config(quantization_config={"bits": 4}), r"quantised \(an unnamed method\)"),
    "only a gguf": ("llama", file("model.GGUF", source="model.safetensors"), r"but model\.GGUF; give that file"),
    "no json": ("llama", file("config.json", "{"), r"cannot be read from .*config.*JSON.*Check the files"),
    "a json list": ("llama", file("config.json", "[]"), "cannot be read from .*Check the files"),
    "no config": ("llama", file("config.json"), r"cannot be read from .*config\.json.*Check the files"),
    "no family": ("llama", config(model_type=None), "cannot be read from .*Check the files"),
    "unheard of": ("llama", config(model_type="new"), "cannot be read from .*`new`.*Check the files"),
    "code": ("llama", config(model_type="new", auto_map={"AutoConfig": "a.B"}), "cannot be read from .*custom code"),
    "a word for a number": ("llama", config(num_hidden_layers="two"), "num_hidden_layers.*expected int, got str"),
    "negative": ("llama", config(num_hidden_layers=-1), r"layers\.0\.\S+ and .* no place.*-1 layers"),
    "heads": ("llama", config(num_attention_heads=3), "cannot be read from .*not a multiple of .*heads"),
    "activation": ("llama", config(hidden_act="new"), "cannot be read from .*new"),
    "rope": ("llama", config(rope_parameters={"rope_type": "new"}), "cannot be read from .*new"),
    "dtype": ("llama", config(dtype="new"), "cannot be read from .*no attribute 'new'"),
    "old dtype": ("llama", config(dtype=None, torch_dtype="new"), "cannot be read from .*no attribute 'new'"),
    "other weights": ("llama", config(transformers_weights="a.safetensors"), "cannot be read from .*a.safetensors"),
    "stray shard": ("llama", file(SHARD, "x"), rf"{SHARD} is a stray part: model\.safetensors stands beside it"),
    "no index": ("llama", file(SHARD, source="model.safetensors"), rf"{SHARD} is a stray part: .*index\.json"),
    "shard lost": ("llama", both(file(SHARD, source="model.safetensors"), file(INDEX, LISTED)), "-of-00002.* is not"),
    "bad index": ("llama", both(file(SHARD, source="model.safetensors"), file(INDEX, "{}")), "cannot be r.*weight_map"),
    "inverse layer": ("gpt2", config(scale_attn_by_inverse_layer_idx=True), "sets scale_attn_by_inverse_layer_idx to"),
    "not scaled": ("gpt2", config(scale_attn_weights=False), "sets scale_attn_weights to False"),
    "cross": ("cross", lambda folder: None, "sets add_cross_attention to True"),
    "small vocabulary": (
        "llama",
        both(config(vocab_size=90), tensors(lambda s: {k: v[:90] if len(v) > 90 else v for k, v in s.items()})),
        r"tokenizer in .* knows [\d,]+ tokens and the model has rows for 90",
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_sound_folder_is_taken(sound, name):
    """The control: what is refused below is refused for what was done to it."""
    if name != "cross":
        assert models.load(str(sound(name))).parameters > 0


@pytest.mark.parametrize("way", BROKEN)
def test_a_broken_folder_is_refused(copy, way):
    family, damage, message = BROKEN[way]
    folder = copy(family)
    damage(folder)
    with pytest.raises(ModelError, match=f"(?s){message}") as caught:
        models.load(str(folder))
    said = str(caught.value)
    assert "mine" in said and "\n" not in said and len(said) < 500, said


def lm_head_of(state: Tensors) -> Tensors:
    return state | {"lm_head.weight": state["transformer.wte.weight"].clone()}


def of_the_hub(state: Tensors) -> Tensors:
    """As GPT-2 stands on the hub: no prefix, masks kept as buffers."""
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8) for i in range(3)}
    more = masks | {"h.0.attn.masked_bias": torch.tensor(-1e4)}
    return {name.removeprefix("transformer."): t for name, t in state.items()} | more


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gpt2", tensors(lm_head_of)),
        ("gpt2", tensors(of_the_hub)),
        ("tied", tensors(lambda state: {k.removeprefix("model."): v for k, v in state.items()})),
        ("llama", plus(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))),
        ("llama", tensors(lambda state: {k: v.double() for k, v in state.items()})),
        ("llama", config(pretraining_tp=2)),
        ("gpt2", config(reorder_and_upcast_attn=True)),
        ("llama", file("adapter_model.safetensors", "beside it, and never read")),
    ],
)
def test_what_legitimately_differs_is_taken(sound, copy, name, change):
    folder = copy(name)
    change(folder)
    expected = models.load(str(sound(name))).module.state_dict()
    for key, found in models.load(str(folder)).module.state_dict().items():
        assert torch.equal(found, expected[key]), key


def test_parts_with_their_index_are_taken(sound, tmp_path):
    whole = models.load(str(sound("llama")))
    whole.module.save_pretrained(tmp_path, max_shard_size="200KB")
    whole.tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(models.load(str(tmp_path)).weights.W_U, whole.weights.W_U)


@pytest.mark.parametrize("way", ["compiled", "tied, not said", "nan", "quantised", "adapter alone", "no json"])
def test_the_command_line_says_it_in_one_sentence(copy, monkeypatch, capsys, way):
    family, damage, message = BROKEN[way]
    folder = copy(family)
    damage(folder)
    monkeypatch.setattr(sys, "argv", ["lib", "fetch", str(folder)])
    with pytest.raises(SystemExit, match="1"):
        main()
    err = capsys.readouterr().err
    assert re.search(message, err) and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


def write_gguf(path: Path, model: models.Model, change: Callable[[Arrays], Arrays] = lambda arrays: arrays) -> Path:
    """A tiny Llama as llama.cpp keeps it: its names, and the rows of queries and keys in its order."""
    c, writer = model.module.config, gguf.GGUFWriter(path, arch="llama")
    for name, value in {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "head_count": c.num_attention_heads,
        "head_count_kv": c.num_key_value_heads,
        "vocab_size": c.vocab_size,
        "layer_norm_rms_eps": c.rms_norm_eps,
        "tokenizer_model": "gpt2",
        "token_list": [word for word, _ in sorted(model.tokenizer.get_vocab().items(), key=lambda item: item[1])],
        "token_types": [1] * c.vocab_size,
        "token_merges": [
            " ".join(m) for m in json.loads(model.tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        ],
    }.items():
        getattr(writer, f"add_{name}")(value)
    names, arrays = get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers), {}
    for name, tensor in model.module.state_dict().items():
        heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads}.get(name.split(".")[-2][0] * ("self" in name))
        rows = tensor.view(heads, 2, -1, 32).transpose(1, 2).reshape(tensor.shape) if heads else tensor
        arrays[names.get_name(name.removesuffix(".weight")) + ".weight"] = rows.contiguous().numpy()
    for name, array in change(arrays).items():
        writer.add_tensor(name, array)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    return path


@pytest.fixture(scope="module")
def whole(sound) -> models.Model:
    return models.load(str(sound("llama")))


def test_a_gguf_file_by_whatever_name(whole, tmp_path, monkeypatch):
    """In the hub's cache a file is called by its sum, and links have its name."""
    path = write_gguf(tmp_path / "a.gguf", whole)
    (tmp_path / "blobs").mkdir()
    blob = Path(shutil.copy(path, tmp_path / "blobs" / "0a1b2c"))
    (tmp_path / "link.gguf").symlink_to(blob)
    shutil.copy(path, tmp_path / "b.GGUF")
    assert named.canonical(str(tmp_path / "link.gguf")) == str(tmp_path / "link.gguf")
    (tmp_path / "blobs" / "a.gguf").write_text("another of that name, where the user happens to be")
    monkeypatch.chdir(tmp_path / "blobs")
    for name in (path, blob, tmp_path / "link.gguf", tmp_path / "b.GGUF", "../a.gguf"):
        found = models.load(str(name))
        for key, tensor in whole.module.state_dict().items():
            assert torch.equal(found.module.state_dict()[key], tensor), (name, key)
        assert found.token_ids("The capital") == whole.token_ids("The capital")
        assert fetching.n_layers(str(name)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {k: v for k, v in a.items() if k != "blk.1.attn_q.weight"}, rf"{Q} is missing"),
        (lambda a: a | {"rope_freqs.weight": np.ones(4, np.float32)}, r"rope_freqs\.weight has no place.*scaled"),
        (lambda a: a | {"blk.0.attn_q.bias": np.ones(32, np.float32)}, r"blk\.0\.attn_q\.bias has no place"),
        (lambda a: a | {"blk.3.attn_q.weight": np.ones((32, 32), np.float32)}, r"blk\.3\.\S+ .*only 3 layers"),
        (
            lambda a: a | {"blk.1.attn_q.weight": a["blk.1.attn_q.weight"] * np.nan},
            rf"{Q} holds NaN or infinity in 1,024",
        ),
        (
            lambda a: a | {"blk.1.ffn_up.weight": np.ones((40, 32), np.float32)},
            r"up_proj\.weight has the shape \[40, 32",
        ),
    ],
)
def test_a_gguf_file_with_other_tensors_is_refused(whole, tmp_path, change, message):
    with pytest.raises(ModelError, match=rf"mine\.gguf is refused: .*{message}"):
        models.load(str(write_gguf(tmp_path / "mine.gguf", whole, change)))


def test_a_file_that_is_no_gguf(sound):
    with pytest.raises(ModelError, match=r"model\.safetensors is a file, and no GGUF file\. Give the folder"):
        models.load(str(sound("llama") / "model.safetensors"))


OPTIONS = [  # what the two families' code reads of a configuration beside sizes and what modules are made of
    (tiny_gpt2, {"scale_attn_weights": False}),
    (tiny_gpt2, {"scale_attn_by_inverse_layer_idx": True}),
    (tiny_llama, {"is_causal": False}),
]


@pytest.mark.parametrize(("make", "option"), OPTIONS)
def test_an_option_that_the_view_does_not_read_cannot_slip_under_it(make, option, monkeypatch):
    """Also where the configuration is not asked, and with small weights, as a model is drawn at first: attention is
    then nearly even, whatever divides it."""
    monkeypatch.setattr("lib.weights.check_options", lambda *args: None)
    plain, other = (make(vocab_size=512, initializer_range=0.02, **o).eval() for o in ({}, option))
    tokens = torch.tensor([[5, 17, 300, 2]])
    assert check_view(plain, view(plain), tokens) <= 1e-5
    with pytest.raises(ModelError, match="the weight view does not reproduce the model"):
        check_view(other, view(other), tokens)


def test_the_view_is_held_to_the_logits_and_to_nan(monkeypatch):
    module = tiny_llama(vocab_size=512).eval()
    tokens, seen = torch.tensor([[5, 17]]), view(module)
    object.__setattr__(seen, "W_U", seen.W_U * 1.001)
    with pytest.raises(ModelError, match=r"relative error 0\.001 in the logits \(allowed 0\.0001\)"):
        check_view(module, seen, tokens)
    with torch.no_grad():
        module.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(ModelError, match=r"relative error nan in the hidden state 2 of 3"):
        check_view(module, view(module), tokens)
