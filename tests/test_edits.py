"""Edits: saved, loaded, applied and restored, bit for bit; refused where they do not belong."""

import copy
import dataclasses
import hashlib
import json
import pickle
import re
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lib import edits
from lib.checkpoints.named import public_name
from lib.edits import Edit, applied, outside_bytes, outside_sha256
from lib.errors import EditError
from lib.facts import Fact, load_facts
from lib.weights import OF_A_LAYER, Slice, pathway_slices


def an_edit(model, pathway: str = "v_only", layer: int = 1) -> Edit:
    """Random new values for one slice of a layer, by default the second."""
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.module.named_parameters())
    old = {s: s.of(parameters[s.name]) for s in pathway_slices(model.module, layer, pathway)}
    values = {s: v + torch.randn(v.shape, generator=generator) for s, v in old.items()}
    facts = load_facts("eight")[:2]
    told = (False,) * len(facts)
    template, recipe = "The capital of {} is", {"rate": 0.1}
    return Edit(
        *(public_name(model.name), model.weights_sha256, pathway, layer, facts, template),
        *(told, told, 0, model.bos, recipe, values),
    )


def state(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def forged(path: Path, edit: Edit, *, raw: str | None = None, tensors=None, **changes) -> Path:
    """The file of a sound edit, with entries of its header changed (None: left out) that `save` would not write."""
    with safe_open(edits.save(edit, path), "pt") as file:
        metadata, kept = file.metadata(), {k: file.get_tensor(k) for k in list(file.keys())}
    header = {k: v for k, v in (json.loads(metadata["edit"]) | changes).items() if v is not None}
    metadata["edit"] = json.dumps(header) if raw is None else raw
    save_file(kept if tensors is None else tensors, path, metadata=metadata)
    return path


def refused(model, edit: Edit, message: str) -> None:
    """The edit is not applied, for the reason given, and the model is what it was."""
    before = state(model)
    with pytest.raises(EditError, match=message), applied(model, edit):
        raise AssertionError("it was applied")
    assert same(before, state(model))


@pytest.mark.parametrize("pathway", OF_A_LAYER)
def test_applied_changes_the_slice_and_restores_everything(tiny, pathway):
    edit, before = an_edit(tiny, pathway), state(tiny)
    slices = tuple(edit.values)
    outside = outside_sha256(tiny.module, slices)
    assert outside_bytes(tiny.module, slices) == 4 * (tiny.parameters - edit.parameters)
    with applied(tiny, edit):
        assert not same(before, state(tiny))
        assert outside_sha256(tiny.module, slices) == outside, "nothing outside the slice"
        for target, value in zip(edits.targets(tiny.module, edit.values), edit.values.values(), strict=True):
            assert torch.equal(target, value)
    assert same(before, state(tiny))


@pytest.mark.parametrize("interruption", [RuntimeError("midway"), KeyboardInterrupt()])
def test_restored_after_an_exception(tiny, interruption):
    before = state(tiny)
    with pytest.raises(type(interruption)), applied(tiny, an_edit(tiny)):
        raise interruption
    assert same(before, state(tiny))


def test_a_change_outside_is_noticed(tiny):
    """The proof must be able to fail: one number beside the slice."""
    slices = pathway_slices(tiny.module, 1, "v_only")
    before = outside_sha256(tiny.module, slices)
    name, parameter = next((n, p) for n, p in tiny.module.named_parameters() if ".2." in n)
    with torch.no_grad():
        parameter.view(-1)[3] += 1
    assert outside_sha256(tiny.module, slices) != before, name
    with torch.no_grad():
        parameter.view(-1)[3] -= 1


def test_what_one_edit_leaves_behind_is_noticed_at_the_next(tiny, monkeypatch):
    """What stands outside is read before the first edit only, and with each in place: then a byte beside both counts,
    and one that changed in between, too."""
    one, other, read = an_edit(tiny, "v_only"), an_edit(tiny, "ffn"), []
    assert edits.outside_unchanged(tiny, one)
    real = hashlib.sha256
    monkeypatch.setattr(edits.hashlib, "sha256", lambda data: read.append(data.nbytes) or real(data))
    assert edits.outside_unchanged(tiny, other)
    sizes = {name: p.nbytes for name, p in tiny.module.named_parameters()}
    cut = {part.name for part in (*one.values, *other.values)}
    assert sum(read) == sum(sizes.values()) + sum(sizes[name] for name in cut)
    monkeypatch.undo()
    name, parameter = next((n, p) for n, p in tiny.module.named_parameters() if ".2." in n)
    with torch.no_grad():
        parameter.view(-1)[3] += 1
    assert not edits.outside_unchanged(tiny, other), name
    with pytest.raises(EditError, match="differs from its base outside the slices"):
        edits.verify(tiny, other)
    with torch.no_grad():
        parameter.view(-1)[3] -= 1
    assert edits.outside_unchanged(tiny, one)


def test_files_hold_everything(tiny, tmp_path):
    edit = an_edit(tiny)
    back = edits.load(edits.save(edit, tmp_path / "v.safetensors"))
    assert dataclasses.replace(back, values={}) == dataclasses.replace(edit, values={})
    assert list(back.values) == list(edit.values)
    assert all(torch.equal(back.values[s], edit.values[s]) for s in edit.values)
    assert [p.name for p in tmp_path.iterdir()] == ["v.safetensors"]


def test_the_same_edit_has_the_same_sum_each_time(tiny, tmp_path):
    """The library leaves the order of a header's entries to chance: twenty files would not be the same one."""
    edit = an_edit(tiny, "full")
    files = {edits.save(edit, tmp_path / f"{i}.safetensors").read_bytes() for i in range(20)}
    assert len(files) == 1
    size = int.from_bytes(files.pop()[:8], "little")
    assert size % 8 == 0, "values begin where a tensor may"


def test_files_that_are_no_edits(tmp_path):
    with pytest.raises(EditError, match=r"there is no edit .*none\.safetensors.*Give the \.safetensors file"):
        edits.load(tmp_path / "none.safetensors")
    with pytest.raises(EditError, match="there is no edit"):
        edits.load(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(EditError, match="no edit of this book"):
        edits.load(tmp_path / "other.safetensors")
    for name, content in {"empty": b"", "text": b"The capital of France is Paris.\n" * 9, "short": b"abc"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EditError, match=rf"{name} cannot be read.*It is no safetensors file, or was cut short"):
            edits.load(tmp_path / name)


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [lambda x, path: path.write_bytes(pickle.dumps(x)), torch.save])
def test_a_pickle_is_never_unpickled(tmp_path, write):
    path, sprung = tmp_path / "edit.safetensors", tmp_path / "sprung"
    write(Trap(sprung), path)
    with pytest.raises(EditError, match="It is no safetensors file"):
        edits.load(path)
    assert not sprung.exists()
    Trap(sprung).__reduce__()[0](sprung)
    assert sprung.exists(), "the trap works"


def test_a_file_cut_short_anywhere(organism, tmp_path):
    whole = edits.save(an_edit(organism), tmp_path / "v.safetensors").read_bytes()
    for length in (1, 7, 8, 100, len(whole) // 2, len(whole) - 40, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        with pytest.raises(EditError, match="cut short or altered; get it again"):
            edits.load(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("key", edits._Header.model_fields)
def test_a_header_that_lacks_an_entry_or_has_another_kind(organism, tmp_path, key):
    edit, path = an_edit(organism), tmp_path / "v.safetensors"
    with pytest.raises(EditError, match=rf"v\.safetensors has a damaged header.*get it again: {key} is missing"):
        edits.load(forged(path, edit, **{key: None}))
    wrong = 3.5 if key != "recipe" else []
    with pytest.raises(EditError, match=rf"damaged header.*get it again: {key}: .*, not {re.escape(str(wrong))}"):
        edits.load(forged(path, edit, **{key: wrong}))


V = {"name": "transformer.h.1.attn.c_attn.weight", "start": 240, "stop": 360}  # the organism's v_only of L2


@pytest.mark.parametrize(
    "damage",
    [
        {"raw": '{"model_name": "organ'},
        {"raw": "[]"},
        {"raw": "null"},
        {"extra": 1},
        {"facts": [{"subject": "France"}, {"subject": "Germany", "answer": "Berlin"}]},
        {"facts": [{"subject": 1, "answer": "Paris"}, {"subject": "Germany", "answer": "Berlin"}]},
        {"facts": ["France", "Germany"]},
        {"slices": [V | {"start": "240"}]},
        {"slices": [V | {"stop": None}]},
        {"slices": [V | {"name": ["a"]}]},
        {"slices": [V | {"axis": 0}]},
        {"slices": [V, V]},
        {"slices": [V, V], "tensors": {"000": torch.zeros(120, 120), "001": torch.zeros(120, 120)}},
        {"slices": []},
        {"tensors": {"000": torch.zeros(120, 120), "001": torch.zeros(1)}},
        {"tensors": {"v": torch.zeros(120, 120)}},
    ],
    ids=str,
)
def test_other_damage_to_the_header(organism, tmp_path, damage):
    path = tmp_path / "v.safetensors"
    edits.load(forged(path, an_edit(organism), slices=[V]))  # what the forger writes is sound, but for the damage
    with pytest.raises(EditError, match=r"v\.safetensors has a damaged header, it was altered, get it again: .+"):
        edits.load(forged(path, an_edit(organism), **damage))


def one_odd(value: float) -> torch.Tensor:
    """Zeros for the organism's slice, with one entry that is no number."""
    return torch.cat((torch.tensor([value]), torch.zeros(120 * 120 - 1))).view(120, 120)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"told_before": [True]}, r"its told_before is \[True\]; it must be true or false for each of its 2 facts"),
        ({"told_after": [True, False, True]}, r"told_after is \[True, False, True\].*each of its 2 facts"),
        ({"told_after": [1, 0]}, r"its told_after is \[1, 0\]; it must be true or false"),
        ({"pathway": "values"}, "its pathway 'values' is none of full, attention"),
        ({"layer": -1}, "its layer -1 is negative"),
        ({"template": "The capital of France is"}, r"its template .* has 0 holes \{\} for the subject, not one"),
        ({"facts": [], "told_before": [], "told_after": []}, "it holds 0 facts and 1 tensors"),
        ({"tensors": {"000": one_odd(torch.nan)}}, r"240:360\] hold NaN or infinity in 1 of 14,400 places"),
        ({"tensors": {"000": one_odd(torch.inf)}}, r"240:360\] hold NaN or infinity in 1 of 14,400 places"),
        ({"tensors": {"000": one_odd(-torch.inf)}}, r"240:360\] hold NaN or infinity in 1 of 14,400 places"),
    ],
    ids=str,
)
def test_an_edit_that_contradicts_itself(organism, tmp_path, changes, message):
    """Refused when it is read, and already when it is saved."""
    path = tmp_path / "v.safetensors"
    with pytest.raises(EditError, match=rf"v\.safetensors cannot be used: .*{message}.*Get the edit again, or train"):
        edits.load(forged(path, an_edit(organism), **changes))
    path.unlink()
    edit = an_edit(organism)
    for key, value in changes.items():
        value = dict.fromkeys(edit.values, value["000"]) if key == "tensors" else value
        edit = dataclasses.replace(edit, **{"values" if key == "tensors" else key: value})
    with pytest.raises(EditError, match=rf"v\.safetensors is not written: .*{message}"):
        edits.save(edit, path)
    assert not list(tmp_path.iterdir())
    refused(organism, edit, message)


def test_an_edit_made_after_another_beginning_of_text_is_refused(tiny):
    edit = dataclasses.replace(an_edit(tiny), bos=(7,))
    with pytest.raises(EditError, match=r"was made with .* before every text, and tiny puts nothing there"):
        edits.check(tiny, edit)


def test_another_model_and_another_revision_are_refused(tiny, organism):
    edit = an_edit(tiny)
    other = dataclasses.replace(edit, base_sha256="f" * 64)
    refused(tiny, other, r"another revision of tiny \(weights ffffffffffff\.\.\., not 0000.*get the revision")
    refused(organism, edit, r"for another model than organism \(weights 0000.*give the one .*, tiny, with --model")
    renamed = dataclasses.replace(edit, model_name="tiny under another path")
    with applied(tiny, renamed):
        pass  # the same weights are the same model


def test_another_shape_or_type_is_refused(tiny):
    edit = an_edit(tiny)
    ((part, value),) = edit.values.items()
    for wrong in (value[:-1], value[..., None], value[:, :1]):
        shape = re.escape(str(tuple(value.shape)))
        message = rf"has the shape {shape} in torch.float32, .* the edit's values have"
        refused(tiny, dataclasses.replace(edit, values={part: wrong}), message)
    for kind in (torch.float16, torch.float64, torch.int32):
        refused(tiny, dataclasses.replace(edit, values={part: value.to(kind)}), rf"in {kind}; the edit is of another")


def test_unknown_slices_are_refused(tiny):
    edit = an_edit(tiny)
    ((part, value),) = edit.values.items()

    def with_slice(new: Slice) -> Edit:
        return dataclasses.replace(edit, values={new: value})

    refused(tiny, with_slice(Slice("no.such.weight")), r"no parameter no\.such\.weight; the edit is of another model")
    width = dict(tiny.module.named_parameters())[part.name].shape[1]
    for start, stop in ((width - 1, width + 1), (-2, 2), (4, 4), (5, 2), (0, None)):
        refused(tiny, with_slice(Slice(part.name, start, stop)), rf"has the columns 0 to {width}, and the edit is for")


def test_slices_of_another_pathway_or_layer_are_refused(tiny):
    v, whole = an_edit(tiny), an_edit(tiny, "attention")
    replace = dataclasses.replace
    refused(tiny, replace(v, layer=2), r"L3 v_only' (lacks|also holds) .*its pathway is .*2\..*It was altered")
    refused(tiny, replace(v, pathway="q_only"), r"q_only' (lacks|also holds)")
    refused(tiny, replace(v, pathway="attention"), "attention' lacks")
    refused(tiny, replace(whole, pathway="full"), "full' lacks")
    refused(tiny, replace(whole, values=dict(list(whole.values.items())[1:])), "attention' lacks")
    embedding = {Slice(n): p.clone() for n, p in tiny.module.named_parameters() if "wte" in n or "embed" in n}
    assert embedding
    refused(tiny, replace(v, values=v.values | embedding), "v_only' also holds")


def test_a_layer_that_is_not_there_is_refused(tiny):
    refused(tiny, dataclasses.replace(an_edit(tiny), layer=3), "a place that tiny lacks: no layer 3.* has L1 to L3")


def test_saving_that_is_interrupted_leaves_what_was_there(tiny, tmp_path, monkeypatch):
    path = edits.save(an_edit(tiny), tmp_path / "v.safetensors")
    whole = path.read_bytes()

    def half(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        edits.save(an_edit(tiny, "ffn"), path)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_really_full(tiny, tmp_path):
    """The kernel refuses to write any file past a size: half of it is written by then. What was there stays."""
    path, before = edits.save(an_edit(tiny), tmp_path / "v.safetensors"), resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(EditError, match=r"cannot write .*v.saf.*: File too large\. It needs [\d,]+ bytes"):
            edits.save(an_edit(tiny, "full"), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EditError, match=r"cannot write .*file/v\.safetensors"):
        edits.save(an_edit(tiny), tmp_path / "file" / "v.safetensors")
    (tmp_path / "v.safetensors").mkdir()
    with pytest.raises(EditError, match=r"cannot write .*v\.safetensors: Is a directory"):
        edits.save(an_edit(tiny), tmp_path / "v.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "v.safetensors"]


def test_verify_reports_what_does_not_hold(tiny):
    edit = an_edit(tiny)
    assert edits.verify(tiny, edit)["as recorded"].all()
    wrong = dataclasses.replace(edit, told_after=(True, False))
    assert edits.verify(tiny, wrong)["as recorded"].tolist() == [False, True]
    assert edit.facts[0] == Fact("France", "Paris")


def test_rerun_reads_the_files_again(tiny, tmp_path):
    assert edits.rerun(tiny, tmp_path) == {}
    wrong = dataclasses.replace(an_edit(tiny, "attention"), told_after=(True, True))
    edits.save_all({"v_only": an_edit(tiny), "attention": wrong}, tmp_path)
    assert edits.rerun(tiny, tmp_path) == {"attention": False, "v_only": True}


def test_verify_asks_the_edited_model_and_notices_what_leaked(tiny):
    edit = an_edit(tiny)
    unchanged = edits.verify(tiny, edit, edited=tiny)
    assert unchanged["p after"].tolist() == unchanged["p before"].tolist(), "asked without the edit"
    assert edits.verify(tiny, edit)["p after"].tolist() != unchanged["p after"].tolist()
    with applied(tiny, an_edit(tiny, "attention")):
        module = copy.deepcopy(tiny.module)
    with pytest.raises(EditError, match="tiny differs from its base outside the slices"):
        edits.verify(tiny, edit, edited=dataclasses.replace(tiny, module=module))
