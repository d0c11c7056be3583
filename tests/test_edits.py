"""Edits: saved, loaded, applied and restored, bit for bit; refused where they do not belong."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from lib import edits
from lib.edits import Edit, applied, outside_sha256
from lib.errors import EditError
from lib.facts import Fact, load_facts
from lib.pathways import slice_values
from lib.weights import PATHWAYS, Slice, pathway_slices


def an_edit(subject, pathway: str = "v_only") -> Edit:
    """Random new values for one slice of layer 2."""
    generator = torch.Generator().manual_seed(0)
    values = slice_values(subject, pathway_slices(subject.model, 1, pathway))
    values = {s: v + torch.randn(v.shape, generator=generator) for s, v in values.items()}
    facts = load_facts("eight")[:2]
    told = (False,) * len(facts)
    template, recipe = "The capital of {} is", {"rate": 0.1}
    return Edit(
        subject.name, subject.weights_sha256, pathway, 1, facts, template, told, told, 0, recipe, values
    )  # fmt: skip


def state(subject) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in subject.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("pathway", PATHWAYS)
def test_applied_changes_the_slice_and_restores_everything(tiny, pathway):
    edit, before = an_edit(tiny, pathway), state(tiny)
    slices = tuple(edit.values)
    outside = outside_sha256(tiny.model, slices)
    with applied(tiny, edit):
        assert not same(before, state(tiny))
        assert outside_sha256(tiny.model, slices) == outside, "nothing outside the slice"
        for target, value in zip(edits.targets(tiny.model, edit.values), edit.values.values(), strict=True):
            assert torch.equal(target, value)
    assert same(before, state(tiny))


def test_restored_after_an_exception(tiny):
    before = state(tiny)
    with pytest.raises(RuntimeError, match="midway"), applied(tiny, an_edit(tiny)):
        raise RuntimeError("midway")
    assert same(before, state(tiny))


def test_a_change_outside_is_noticed(tiny):
    """The proof must be able to fail: one number beside the slice."""
    slices = pathway_slices(tiny.model, 1, "v_only")
    before = outside_sha256(tiny.model, slices)
    name, parameter = next((n, p) for n, p in tiny.model.named_parameters() if ".2." in n)
    with torch.no_grad():
        parameter.view(-1)[3] += 1
    assert outside_sha256(tiny.model, slices) != before, name
    with torch.no_grad():
        parameter.view(-1)[3] -= 1


def test_files_hold_everything(tiny, tmp_path):
    edit = an_edit(tiny)
    back = edits.load(edits.save(edit, tmp_path / "v.safetensors"))
    for field in dataclasses.fields(Edit):
        if field.name != "values":
            assert getattr(back, field.name) == getattr(edit, field.name), field.name
    assert list(back.values) == list(edit.values)
    assert all(torch.equal(back.values[s], edit.values[s]) for s in edit.values)
    assert [p.name for p in tmp_path.iterdir()] == ["v.safetensors"]


def test_bad_files(tiny, tmp_path):
    with pytest.raises(EditError, match="there is no edit"):
        edits.load(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(EditError, match="no edit of this book"):
        edits.load(tmp_path / "other.safetensors")
    whole = edits.save(an_edit(tiny), tmp_path / "v.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(EditError, match="cut short or altered"):
        edits.load(tmp_path / "cut.safetensors")


def test_other_weights_and_other_shapes_are_refused(tiny):
    edit, before = an_edit(tiny), state(tiny)
    other = dataclasses.replace(edit, base_sha256="f" * 64)
    with (
        pytest.raises(EditError, match=r"made for weights ffff.*load the subject that the edit names"),
        applied(tiny, other),
    ):
        pass
    strange = dataclasses.replace(edit, values={Slice("no.such.weight"): torch.zeros(2)})
    with pytest.raises(EditError, match=r"no no\.such\.weight of shape \(2,\)"), applied(tiny, strange):
        pass
    assert same(before, state(tiny))


def test_verify_reports_what_does_not_hold(tiny):
    edit = an_edit(tiny)
    assert edits.verify(tiny, edit)["as recorded"].all()
    wrong = dataclasses.replace(edit, told_after=(True, False))
    assert edits.verify(tiny, wrong)["as recorded"].tolist() == [False, True]
    assert edit.facts[0] == Fact("France", "Paris")
