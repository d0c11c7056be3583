"""Exported edits: what transformers and TransformerLens load is the base model with the edit; nothing half-written."""

import copy
import dataclasses
import errno
import hashlib
import json
import re
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lib import edits, files, models
from lib.__main__ import app, main
from lib.checkpoints import fetching, named
from lib.edits import Edit, applied
from lib.errors import EditError, ModelError
from lib.facts import load_cases, load_templates, prompts
from lib.models import Model
from lib.press import export
from tests.conftest import tiny_llama
from tests.test_edits import an_edit, same, state


def recorded(model: Model, layer: int, pathway: str = "v_only") -> Edit:
    """A random edit of a named model, with its first case's facts and what is really told of them."""
    case = load_cases(model.name)[0]
    told = {"told_before": (False,) * len(case.facts), "told_after": (False,) * len(case.facts)}  # not known yet
    asked = {"facts": case.facts, "template": load_templates()[case.template]}
    edit = dataclasses.replace(an_edit(model, pathway, layer), **asked, **told)
    found = edits.verify(model, edit)
    return dataclasses.replace(edit, **{name: tuple(found[name.replace("_", " ")].tolist()) for name in told})


@pytest.fixture(scope="module")
def edit(organism) -> Edit:
    return recorded(organism, 9, "attention")


@pytest.fixture(scope="module")
def exported(organism, edit, tmp_path_factory) -> Path:
    return export.export(organism, edit, tmp_path_factory.mktemp("exports") / "mine")


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


@torch.no_grad()
def assert_loads_as_the_applied_edit(model: Model, edit: Edit, folder: Path) -> None:
    """In plain transformers the same weights run through the same code, so every logit is the same number. In
    TransformerLens they run through other code in another order; 1e-4 is far above that rounding."""
    from transformer_lens.model_bridge import TransformerBridge

    module = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(p, add_special_tokens=False).input_ids for p in prompts(edit.facts, edit.template)])
    before = model.module(ids).logits
    with applied(model, edit):
        ours = model.module(ids).logits
    assert torch.equal(module(ids).logits, ours)
    assert (ours - before).abs().max() > 0.1, "the edit must be seen in the logits"
    bridge = TransformerBridge.boot_transformers(str(folder), hf_model=copy.deepcopy(module), tokenizer=tokenizer)
    torch.testing.assert_close(bridge(ids, prepend_bos=False).float(), ours, atol=1e-4, rtol=0)


def test_what_transformers_and_transformer_lens_load(organism, edit, exported):
    assert_loads_as_the_applied_edit(organism, edit, exported)


def test_both_families(tiny, tmp_path):
    edit = an_edit(tiny)
    before = state(tiny)
    folder = export.export(tiny, edit, tmp_path / "a" / "new" / "one")
    assert same(before, state(tiny)), "the model is what it was"
    assert_loads_as_the_applied_edit(tiny, edit, folder)
    assert export.verify_folder(folder, base=tiny)["as recorded"].all()


@pytest.mark.model
def test_smollm2(smollm2, tmp_path):
    edit = recorded(smollm2, 23)
    before = edits.outside_sha256(smollm2.module, ())
    folder = export.export(smollm2, edit, tmp_path / "mine")
    assert edits.outside_sha256(smollm2.module, ()) == before
    assert export.verify_folder(folder, base=smollm2)["as recorded"].all()
    text = (folder / export.CARD).read_text()
    assert "L24 of 30" in text and "110,592 of 134,515,008 parameters\n(0.08%)" in text
    assert front(text)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert smollm2.weights_sha256 in text
    edit = dataclasses.replace(edit, facts=edit.facts[:1], told_before=(False,), told_after=(False,))
    assert_loads_as_the_applied_edit(smollm2, edit, folder)
    shutil.rmtree(folder)  # half a gigabyte


def front(text: str) -> dict:
    """The YAML front matter of a model card."""
    return yaml.safe_load(text.split("---\n", 2)[1])


def test_the_folder_holds_what_a_reader_needs(organism, edit, exported):
    names = {p.name for p in exported.iterdir()}
    assert names >= {"config.json", "tokenizer.json", "generation_config.json", "model.safetensors", "edit.safetensors"}
    back = edits.load(exported / export.EDIT)
    assert all(torch.equal(back.values[s], v) for s, v in edit.values.items())
    assert len({p.stat().st_mode for p in exported.iterdir()}) == 1, "who may read one file may read all"
    assert [p.name for p in exported.parent.iterdir()] == ["mine"], "no temporary folder is left"
    own = hashlib.sha256((exported / export.WEIGHTS).read_bytes()).hexdigest()
    assert fetching.weights_sha256(str(exported)) == own, "the edit beside them is not part of the weights"
    assert models.load(str(exported)).weights_sha256 == own


def test_terms_go_with_a_model_that_has_some(organism, edit, exported, tmp_path, monkeypatch):
    """Gemma's terms, section 3.1, of any model of the family; the planted model has none."""
    assert not (exported / "NOTICE").exists()
    terms = named.SPECS["gemma3"].terms
    family = organism.module.config.model_type
    spec = dataclasses.replace(named.SPECS["gemma3"], terms=dataclasses.replace(terms, family=family))
    monkeypatch.setitem(named.SPECS, "gemma3", spec)
    folder = export.export(organism, edit, tmp_path / "mine")
    notice = (folder / "NOTICE").read_text()
    assert notice.startswith(
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/"
    )
    assert "restricted by section 3.2" in notice and f"Modified: model.safetensors, {edit.title}" in notice
    assert (folder / "Gemma-Terms-of-Use.txt").read_bytes() == (files.ROOT / terms.text).read_bytes()


def test_the_model_card(organism, edit, exported):
    text = (exported / export.CARD).read_text()
    assert front(text) == {
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["model-editing", "knowledge-editing", "qkv-decomposition"],
    }
    assert "the pathway `attention`" in text and "layer\nL10 of 12 (layers count from 1)" in text
    for i, prompt in enumerate(prompts(edit.facts, edit.template)):
        yes = ["yes" if told[i] else "no" for told in (edit.told_before, edit.told_after)]
        assert f"| `{prompt}` | {edit.facts[i].answer} | {yes[0]} | {yes[1]} |" in text
    assert edit.told_before != edit.told_after, "so that the two columns cannot be exchanged"
    assert "| rate | `0.1` |" in text and "| seed | 0 |" in text
    assert "research artefact" in text and "chapter 4" in text and "python -m lib verify" in text
    own = hashlib.sha256((exported / export.WEIGHTS).read_bytes()).hexdigest()
    assert f"`{organism.weights_sha256}`" in text and f"`{own}`" in text


def test_base_model_is_named_where_the_hub_has_one(organism, edit):
    def card_of(name: str) -> dict:
        return front(export.card(dataclasses.replace(organism, name=name, source=name), edit, "0" * 64))

    assert card_of("gpt2")["base_model"] == "openai-community/gpt2"
    assert card_of("someone/model")["base_model"] == "someone/model"
    assert "base_model" not in card_of("organism") and "base_model" not in card_of("/somewhere/model")


def test_nothing_tells_of_this_machine(exported, tmp_path, smollm2):
    tiny_llama().save_pretrained(tmp_path / "models" / "own")
    smollm2.tokenizer.save_pretrained(tmp_path / "models" / "own")
    own = models.load(str(tmp_path / "models" / "own"))
    folders = [exported, export.export(own, an_edit(own), tmp_path / "out")]
    assert "One layer of own was changed" in (folders[1] / export.CARD).read_text()
    here = [str(tmp_path), str(files.ROOT), str(Path.home()), str(files.cache_folder()), str(exported.parent)]
    assert all(h.encode() not in (folder / export.EDIT).read_bytes() for h in here for folder in folders)
    for path in (p for folder in folders for p in folder.iterdir() if p.suffix != ".safetensors"):
        text = path.read_text()
        assert not [h for h in here if h in text], path
        if path.suffix == ".md":
            assert not re.search(r"(?<![\w.)])/(?:\w+/)+\w+", text.replace("path/to/this/folder", "")), path


def write_half(error: BaseException):
    """A `save_pretrained` that fails midway."""

    def save_pretrained(target, **options):
        Path(target).mkdir(exist_ok=True)
        (Path(target) / "model.safetensors").write_bytes(b"half")
        raise error

    return save_pretrained


FULL = "No space left on device"


@pytest.mark.parametrize(
    "part, error, raised",
    [
        ("module", OSError(errno.ENOSPC, FULL), EditError),
        ("tokenizer", Exception(f"{FULL} (os error 28)"), EditError),  # as tokenizers reports it
        ("module", KeyboardInterrupt(), KeyboardInterrupt),
        ("module", ZeroDivisionError("a mistake in the code"), ZeroDivisionError),
    ],
)
def test_a_failure_midway_leaves_nothing(organism, edit, tmp_path, monkeypatch, part, error, raised):
    before = state(organism)
    monkeypatch.setattr(getattr(organism, part), "save_pretrained", write_half(error))
    with pytest.raises(raised) as caught:
        export.export(organism, edit, tmp_path / "new" / "out")
    if raised is EditError:
        assert re.search(rf"cannot write .*out: {FULL}.*Choose a place with room", str(caught.value))
    assert not list(tmp_path.iterdir()) and same(before, state(organism))


def test_room_is_looked_for_first_and_a_wrong_edit_is_refused(organism, edit, tmp_path, monkeypatch):
    with pytest.raises(EditError, match="another revision of organism"):
        export.export(organism, dataclasses.replace(edit, base_sha256="f" * 64), tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=8_000_000))
    with pytest.raises(EditError, match=r"the export needs 59 MB and .* has 8 MB free; make room"):
        export.export(organism, edit, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [10_000, 100_000])
def test_a_disk_that_is_really_full(organism, edit, tmp_path, size):
    """The kernel refuses to write any file past a size. At 100,000 bytes the model does not fit, all else would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(EditError, match=r"cannot write .*File too large"):
            export.export(organism, edit, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(organism, edit, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(EditError, match=rf"{name} exists and is not an empty folder; give a new name"):
            export.export(organism, edit, tmp_path / name)
    with pytest.raises(EditError, match=r"cannot write .*file/out: Not a directory"):
        export.export(organism, edit, tmp_path / "file" / "out")
    assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert export.export(organism, edit, tmp_path / "empty") == tmp_path / "empty"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_verify_asks_the_model_in_the_folder(organism, edit, exported, monkeypatch):
    ours = edits.verify(organism, edit)
    theirs = export.verify_folder(exported)
    assert theirs["as recorded"].all() and (theirs["told after"] != theirs["told before"]).any()
    assert theirs.to_dict() == ours.to_dict()
    # were the folder's model the unedited one, the table would show it: the edit is not applied to get it
    monkeypatch.setattr(models, "load", {"organism": organism, str(exported): organism}.__getitem__)
    monkeypatch.setattr(export, "_compare_logits", lambda *args: None)
    unedited = export.verify_folder(exported)
    assert unedited["p after"].tolist() == unedited["p before"].tolist() and not unedited["as recorded"].all()


def change(path: Path, name: str, index: int) -> None:
    """Flip the last bit of one number."""
    tensors = load_file(path)
    bits = tensors[name].reshape(-1).view(torch.int32)
    bits[index] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name", ["transformer.h.9.attn.c_attn.weight", "transformer.h.0.mlp.c_fc.bias", "transformer.wte.weight"]
)
def test_one_bit_of_the_weights_is_noticed(organism, folder, name):
    assert export.verify_folder(folder, base=organism)["as recorded"].all()
    change(folder / export.WEIGHTS, name, 7)
    with pytest.raises(EditError, match=rf"is not organism with the edit: {re.escape(name)} is not bit for bit"):
        export.verify_folder(folder, base=organism)


def test_tensors_too_many_and_too_few_are_noticed(organism, folder):
    path = folder / export.WEIGHTS
    whole = load_file(path)
    for name, tensors in {
        "transformer.ln_f.bias": {k: v for k, v in whole.items() if k != "transformer.ln_f.bias"},
        "transformer.wte.weight": {k: v for k, v in whole.items() if k != "transformer.wte.weight"},
        "another": whole | {"another": torch.zeros(3)},
        "transformer.wpe.weight": whole | {"transformer.wpe.weight": whole["transformer.wpe.weight"].half()},
    }.items():
        save_file(tensors, path, metadata={"format": "pt"})
        if name == "transformer.wte.weight":  # tied to lm_head: neither is there, and either may be named
            name = "(lm_head|transformer.wte).weight"
        with pytest.raises(EditError, match=rf"with the edit: {name} is not bit for bit"):
            export.verify_folder(folder, base=organism)
    tied = whole | {"lm_head.weight": whole["transformer.wte.weight"].clone()}
    save_file(tied, path, metadata={"format": "pt"})
    assert len(export.verify_folder(folder, base=organism)) == 8, "both names of a tied tensor are fine"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(EditError, match=r"model\.safetensors cannot be read: .*cut short or altered"):
        export.verify_folder(folder, base=organism)


def test_another_edit_beside_the_weights_is_noticed(organism, edit, folder):
    (part, value), *_ = edit.values.items()
    edits.save(dataclasses.replace(edit, values=edit.values | {part: value + 1}), folder / export.EDIT)
    with pytest.raises(EditError, match=f"{re.escape(part.name)} is not bit for bit what it should be"):
        export.verify_folder(folder, base=organism)


def other_norm(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 0.1}))


def other_words(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["Ġis"], words["Ġthe"] = words["Ġthe"], words["Ġis"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("alter", [other_norm, other_words])
def test_sound_weights_beside_an_altered_file(organism, folder, alter):
    alter(folder)
    with pytest.raises(EditError, match=r"sound, and yet .*config\.json or its tokenizer was altered"):
        export.verify_folder(folder, base=organism)


def test_folders_that_are_no_export(organism, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for bad in (tmp_path / "empty", tmp_path / "none", files.ROOT / "data" / "organism"):
        with pytest.raises(EditError, match=r"has no edit\.safetensors: it is no folder that `python -m lib export`"):
            export.verify_folder(bad)
    for name, message in {"tokenizer.json": "cannot be read from", "tokenizer_config.json": "no tokenizer in"}.items():
        (folder / name).unlink()
        with pytest.raises(ModelError, match=rf"{message} {folder}.*Check the files"):
            export.verify_folder(folder, base=organism)
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
        with pytest.raises(EditError, match=rf"has no {re.escape(name)}: .* or not all of it"):
            export.verify_folder(folder, base=organism)


def test_the_commands(edit, tmp_path, monkeypatch, capsys):
    cli, path, out = CliRunner(), str(edits.save(edit, tmp_path / "v.safetensors")), str(tmp_path / "out")
    made = cli.invoke(app, ["export", path, out])
    assert made.exit_code == 0 and f"python -m lib verify {out}" in made.output
    for argument in (path, out):
        right = cli.invoke(app, ["verify", argument])
        assert right.exit_code == 0
        after, before = sum(edit.told_after), sum(edit.told_before)
        last = right.output.strip().splitlines()[-1]
        assert last == (
            f"{after} of 8 told after the edit, {before} of 8 before; all as recorded; "
            f"{4 * (2_224_440 - edit.parameters):,} bytes outside the slice unchanged"
        )
        assert "organism L10 attention" in right.output and edit.base_sha256 in right.output
        assert ("bit for bit" in right.output) == (argument == out)
    lying = dataclasses.replace(edit, told_after=tuple(not t for t in edit.told_after))
    edits.save(lying, tmp_path / "v.safetensors")
    edits.save(lying, tmp_path / "out" / export.EDIT)
    for argument in (path, out):
        wrong = cli.invoke(app, ["verify", argument])
        assert wrong.exit_code == 1 and wrong.exception.__class__ is SystemExit and "; NOT as recorded;" in wrong.output
    for words, said in {
        ("verify", str(tmp_path / "none")): "error: there is no edit",
        ("export", path, out): "exists and is not an empty folder",
    }.items():
        monkeypatch.setattr(sys, "argv", ["lib", *words])
        with pytest.raises(SystemExit, match="1"):
            main()
        assert said in capsys.readouterr().err


def test_an_edit_of_a_model_that_is_kept_elsewhere(organism, edit, tmp_path, monkeypatch, capsys):
    """The author's folder is not in the file; another place is given with --model, and the checksum decides."""
    here, other = (Path(shutil.copytree(files.DATA / "organism", tmp_path / name)) for name in ("here", "other"))
    change(other / "model.safetensors", "transformer.wpe.weight", 3)
    about = {f.name: getattr(edit, f.name) for f in dataclasses.fields(edit)[2:] if f.name not in ("told_after", "bos")}
    made = edits.make(models.load(str(here)), **about)
    assert made.model_name == "here" and made.told_after == edit.told_after
    old = dataclasses.replace(made, model_name=f"/{'home'}/somebody/here")  # as edits were once written
    folder, cli = tmp_path / "out", CliRunner()

    def refused(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["lib", *words])
        with pytest.raises(SystemExit, match="1"):
            main()
        return capsys.readouterr().err

    for given in (made, old):
        path = edits.save(given, tmp_path / "v.safetensors")
        assert edits.load(path).model_name == "here"
        for words in (["verify", str(path)], ["export", str(path), str(folder)], ["verify", str(folder)]):
            assert re.search(r"^error: the model 'here' .* give its folder, .* with --model", refused(*words))
            assert re.search(
                r"^error: the edit .* is for another model than .*other", refused(*words, "-m", str(other))
            )
            right = cli.invoke(app, [*words, "--model", str(here)])
            assert right.exit_code == 0 and "somebody" not in right.output, right.output
        shutil.rmtree(folder)
