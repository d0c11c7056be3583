"""An exported sink is an ordinary folder: plain transformers says what the model with the edit says."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib import edits, models, sinks
from lib.errors import EditError
from lib.facts import load_cases, load_templates, prompts
from lib.forward import next_token_logits
from lib.press import export, sink_folder
from lib.recall import trainable


def learned(model, pathway):
    """A random sink of a named model's first case, with what is really told."""
    case = trainable(model, load_cases(model.name)[0])
    torch.manual_seed(5)
    values = {part: x + 0.1 * x.std() * torch.randn_like(x) for part, x in sinks.ordinary(model, pathway).items()}
    told = (False,) * len(case.facts)
    about = {"facts": case.facts, "template": load_templates()[case.template], "layer": 0, "seed": 0, "recipe": {}}
    edit = edits.make(model, values, pathway=pathway, told_before=told, **about)
    return replace(edit, told_before=tuple(edits.verify(model, edit)["told before"].tolist()))


@pytest.fixture(scope="module")
def edit(organism):
    return learned(organism, "sink_token")


@pytest.fixture(scope="module")
def folder(organism, edit, tmp_path_factory):
    return export.export(organism, edit, tmp_path_factory.mktemp("exports") / "sink")


def test_plain_transformers_says_what_the_edited_model_says(organism, edit, folder):
    tokenizer, module = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    asked = prompts(edit.facts, edit.template)
    with edits.applied(organism, edit) as changed, torch.no_grad():
        ours = next_token_logits(changed, asked)
        theirs = torch.cat([module(torch.tensor([tokenizer(p).input_ids])).logits[:, -1] for p in asked])
    rows, token = len(organism.weights.W_E), sink_folder.token_id(organism)
    assert (theirs[:, :rows] - ours).abs().max() < 1e-3
    assert tokenizer(asked[0]).input_ids == [token, *organism.token_ids(asked[0])]
    assert tokenizer.decode(tokenizer(asked[0]).input_ids, skip_special_tokens=True) == asked[0]
    assert (theirs.argmax(1) != token).all() and (theirs[:, token] < theirs.mean(1)).all()


def test_it_needs_nothing_of_this_book(folder, edit, tmp_path):
    """In another process, in another folder, that cannot import it."""
    script = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        "sys.modules['lib'] = None; t, m = T.from_pretrained(sys.argv[1]), M.from_pretrained(sys.argv[1])\n"
        "out = m.generate(**t(sys.argv[2], return_tensors='pt'), max_new_tokens=2, do_sample=False, pad_token_id=0)\n"
        "print(t.decode(out[0], skip_special_tokens=True))"
    )
    asked = prompts(edit.facts, edit.template)[0]
    command = [sys.executable, "-c", script, str(folder), asked]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(asked) and len(done.stdout.strip()) > len(asked)


def test_the_folder_is_verified_and_a_changed_row_is_found(organism, edit, folder, tmp_path):
    assert export.verify_folder(folder, base=organism)["as recorded"].all()
    assert models.load(str(folder)).bos == (sink_folder.token_id(organism),)
    with pytest.raises(EditError, match="was made with"):  # its beginning of text is the sink already
        edits.check(replace(models.load(str(folder)), weights_sha256=edit.base_sha256), edit)
    with pytest.raises(EditError, match="has a token <sink> already"):
        sink_folder.with_sink(models.load(str(folder)))


def test_after_a_token_that_stands_before_every_text_the_sink_comes_second(organism, tmp_path):
    model = replace(organism, bos=(organism.tokenizer.bos_token_id or 0,))
    tokenizer = sink_folder.with_sink(model)
    tokenizer.save_pretrained(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)("The capital").input_ids
    assert ids == [*model.bos, sink_folder.token_id(model), *model.pieces("The capital")]


def test_a_key_and_a_value_are_an_adapter_of_peft(organism, tmp_path):
    edit = learned(organism, "sink_kv")
    folder = export.export(organism, edit, tmp_path / "adapter")
    asked = prompts(edit.facts, edit.template)
    with edits.applied(organism, edit) as changed:
        ours = next_token_logits(changed, asked)
    base = AutoModelForCausalLM.from_pretrained(organism.module.config.name_or_path)
    adapted = PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        theirs = torch.cat([adapted(torch.tensor([organism.token_ids(p)])).logits[:, -1] for p in asked])
    assert (theirs - ours).abs().max() < 1e-3
    assert all(torch.equal(x, edit.values[part]) for part, x in edits.load(folder / export.EDIT).values.items())
    with pytest.raises(EditError, match="a prefix of peft would stand before that"):
        sink_folder.save_adapter(replace(organism, bos=(1,)), edit, tmp_path / "not")
    with pytest.raises(EditError, match="sink_kv cannot stand before every text as a row"):
        sink_folder.write(organism, edit, tmp_path / "not")


def test_a_row_in_the_middle_of_texts_is_not_exported_as_one_before_them(organism, tmp_path):
    edit = learned(organism, "sink_token")
    with pytest.raises(EditError, match="a row in the middle cannot stand before every text"):
        export.export(organism, replace(edit, recipe=edit.recipe | {"middle": True}), tmp_path / "not")
    assert not list(tmp_path.iterdir())
