"""What would be uploaded, and that nothing is without a token and a yes. The hub is a stand-in."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from typer.testing import CliRunner

from lib import edits
from lib.__main__ import app
from lib.errors import BookError, EditError, ReleaseError
from lib.press import check, export, hub, release
from lib.weights import PAPER
from tests.test_edits import an_edit

PATHWAY = {"told_before": 0, "told_after": 1, "ppl_before": 27.25, "ppl_after": 27.5}
PATHWAY |= {"held_out_facts": 57, "held_out_told_before": 7, "held_out_told_after": 9}
VALUES = {c: {"pathways": dict.fromkeys(PAPER, PATHWAY)} for c in (hub.MAKER, hub.EFFECTS)}
SECRET = "hf_secret"


def stand_in(patch: pytest.MonkeyPatch, **trouble: Exception) -> Mock:
    """Stands for HfApi from now on. trouble: what the call of this name raises."""
    api = Mock(spec=HfApi, **{"whoami.return_value": {"name": "me"}})
    api.create_repo.side_effect = lambda repo, *, repo_type, **_: f"hub:{repo_type}/{repo}"
    for name, error in trouble.items():
        getattr(api, name).side_effect = error
    patch.setattr(hub, "HfApi", Mock(return_value=api))
    return hub.HfApi


def refusal(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    """An error with as much of an answer as it reads."""
    answer = SimpleNamespace(status_code=status, headers={}, request=None, text="")
    return kind(f"{status}: {SECRET}", response=answer)


@pytest.fixture(scope="module")
def bench(organism, tmp_path_factory):
    """A finished run on the planted model: random edits, a dashboard, results."""
    build = tmp_path_factory.mktemp("build")
    for name in PAPER:
        edits.save(an_edit(organism, name, layer=9), build / "results" / "organism" / hub.MAKER / f"{name}.safetensors")
    (build / "dashboard").mkdir()
    (build / "dashboard" / "organism.html").write_text("<!doctype html><p>heads</p>")
    return build


@pytest.fixture
def run(bench, tmp_path, monkeypatch) -> Path:
    """A copy of it to tamper with."""
    build = Path(shutil.copytree(bench, tmp_path / "_build"))
    monkeypatch.setattr(hub.build, "BUILD", build)
    monkeypatch.setattr(hub, "chapter_folder", lambda model, chapter: build / "results" / model / chapter)
    monkeypatch.setattr(check, "current_values", lambda model: VALUES)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return build


@pytest.fixture
def prepared(run, tmp_path) -> Path:
    return hub.prepare("organism", tmp_path / "out")


def test_what_is_prepared(prepared, organism):
    names = {name for name, _ in hub.listing(prepared)}
    each = {f"model/{name}/{file}" for name in PAPER for file in ("edit.safetensors", "README.md")}
    assert names == each | {"model/README.md", "space/README.md", "space/index.html"}
    text = (prepared / "model" / "README.md").read_text(encoding="utf-8")
    for name in PAPER:
        path = prepared / "model" / name / "edit.safetensors"
        edit = edits.load(path)
        edits.check(organism, edit)
        assert f"[`{name}`]({name})" in text and f"`{hub.file_sha256(path)}`" in text and f"{edit.parameters:,}" in text
    assert "| 0, 1 | 7, 9 | 27.25, 27.50 |" in text and "the same of 57 countries" in text
    assert organism.weights_sha256 in text and release.SOURCE_RECORD in text
    assert [p.name for p in prepared.parent.iterdir() if p.name.startswith(".out")] == [], "no temporary folder is left"


def test_the_card_as_the_hub_reads_it(prepared):
    data = ModelCard.load(prepared / "model" / "README.md").data
    assert (data.base_model, data.license, data.model_name) == (None, "mit", "organism edits")
    datasets = {(r.metric_name.partition(",")[0], r.dataset_name) for r in data.eval_results}
    assert datasets == {
        ("told", "2 facts: The capital of {} is"),
        ("held-out told", "countries that no edit was trained on"),
        ("perplexity", "the book's passages"),
    }
    found = {(r.metric_name, r.metric_type, r.metric_value) for r in data.eval_results}
    assert ("told, v_only", "accuracy", 0.5) in found, "one of the two facts that these edits have"
    assert ("held-out told, full", "accuracy", round(9 / 57, 4)) in found
    assert ("perplexity, ffn", "perplexity", 27.5) in found and len(data.eval_results) == 3 * len(PAPER)


@pytest.mark.model
def test_the_card_names_the_base_model(smollm2, tmp_path):
    found = {name: an_edit(smollm2, name, layer=23) for name in ("v_only",)}
    data = hub.front_matter(smollm2, found, VALUES)
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and data.license == "apache-2.0"
    edits.save(found["v_only"], tmp_path / "v_only" / "edit.safetensors")
    text = hub.card(smollm2, found, VALUES, tmp_path, whole=True)
    # the hub allows no more characters
    assert len(hub.space_card(smollm2).partition("short_description: ")[2].partition("\n")[0]) <= 60
    assert "base_model_relation: finetune" in text and 'subfolder="v_only"' in text and "Apache-2.0" in text


def test_the_space_is_a_static_page(prepared):
    _, front, text = (prepared / "space" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    settings = yaml.safe_load(front)
    assert (settings["sdk"], settings["app_file"]) == ("static", "index.html")
    assert settings["title"] == "Head dashboard of organism"
    assert release.repository().url in text
    assert (prepared / "space" / "index.html").read_text() == "<!doctype html><p>heads</p>"


def test_whole_models_are_exports(run, tmp_path, organism):
    folder = hub.prepare("organism", tmp_path / "whole", whole=True)
    for name in PAPER:
        assert (folder / "model" / name / "model.safetensors").is_file()
    assert export.verify_folder(folder / "model" / "ffn", base=organism) is not None


def test_the_dry_run_lists_and_uploads_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", None)  # whoever reached for the hub would fail
    done = CliRunner().invoke(app, ["publish", str(tmp_path / "out"), "--model", "organism"])
    assert done.exit_code == 0, done.output
    assert "model/v_only/edit.safetensors" in done.output and "space/index.html" in done.output
    assert "11 files" in done.output and "a dry run, nothing was uploaded" in done.output
    again = CliRunner().invoke(app, ["publish", str(tmp_path / "out"), "--model", "organism"])
    assert again.exit_code == 0, "a prepared folder is listed again"


# uploading


def test_model_and_space_are_uploaded(prepared, monkeypatch):
    api, said = stand_in(monkeypatch), []
    hub.upload(prepared, "me/edits", f" {SECRET}\n", say=said.append)
    assert said[1:] == ["uploaded model: hub:model/me/edits", "uploaded space: hub:space/me/edits"]
    api.assert_called_once_with(token=SECRET)
    made = [call.kwargs for call in api.return_value.create_repo.call_args_list]
    assert [(m["repo_type"], m.get("space_sdk")) for m in made] == [("model", None), ("space", "static")]
    sent = [(c.kwargs["repo_type"], c.kwargs["folder_path"]) for c in api.return_value.upload_folder.call_args_list]
    assert sent == [("model", prepared / "model"), ("space", prepared / "space")]
    assert not any(SECRET in line for line in said)


def test_a_missing_token(prepared, monkeypatch):
    api = stand_in(monkeypatch)
    for token in ("", "  \n"):
        with pytest.raises(ReleaseError, match=r"there is no token. Make one that may write"):
            hub.upload(prepared, "me/edits", token)
    assert not api.called


@pytest.mark.parametrize(
    ("call", "trouble", "said"),
    [
        ("whoami", refusal(401), r"refused the token \(401\): it is wrong or was revoked"),
        ("create_repo", refusal(403), r"does not let this token write to me/edits \(403\)"),
        ("upload_folder", refusal(401), r"refused the token"),
        ("upload_folder", refusal(503), r"me/edits could not be uploaded: .*run the same command again"),
        ("create_repo", refusal(404, RepositoryNotFoundError), r"could not be uploaded: 404"),
        ("whoami", ConnectionError("no network"), r"could not be uploaded: no network"),
        ("create_repo", ValueError("bad name"), r"could not be uploaded: bad name"),
    ],
)
def test_a_refusal_says_what_to_do(prepared, monkeypatch, call, trouble, said):
    api = stand_in(monkeypatch, **{call: trouble})
    with pytest.raises(ReleaseError, match=said):
        hub.upload(prepared, "me/edits", SECRET, say=lambda _: None)
    assert api.return_value.method_calls[-1][0] == call, "nothing is tried after it"


def test_the_command_asks_before_it_uploads(prepared, monkeypatch):
    api = stand_in(monkeypatch)
    command = ["publish", str(prepared), "--model", "organism", "--upload", "--repo", "me/edits"]
    refused = CliRunner().invoke(app, command, input=f"{SECRET}\nn\n")
    assert refused.exit_code == 1 and not api.called and "everyone can see?" in refused.output
    assert SECRET not in refused.output
    empty = CliRunner().invoke(app, command, input="\ny\n")
    assert isinstance(empty.exception, ReleaseError) and "no token" in str(empty.exception) and not api.called
    done = CliRunner().invoke(app, command, input=f"{SECRET}\ny\n")
    assert done.exit_code == 0 and api.return_value.upload_folder.call_count == 2
    api.assert_called_once_with(token=SECRET)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    done = CliRunner().invoke(app, command, input="y\n")
    assert done.exit_code == 0 and "hf_of" not in done.output
    api.assert_called_with(token="hf_of_the_environment")


@pytest.mark.parametrize("repo", ["", "edits", "me/edits/x", "me/", "a b/c"])
def test_uploading_needs_a_name(prepared, repo):
    done = CliRunner().invoke(app, ["publish", str(prepared), "--upload", "--repo", repo])
    assert isinstance(done.exception, BookError) and "--repo OWNER/NAME" in str(done.exception)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model/full/README.md", lambda path: path.write_text("x")),
        ("model/full/README.md", Path.unlink),
        ("space/stray.txt", Path.touch),
    ],
)
def test_a_folder_that_was_altered_is_not_uploaded(prepared, monkeypatch, name, change):
    change(prepared / name)
    api = stand_in(monkeypatch)
    with pytest.raises(ReleaseError, match=f"{name} is not as it was prepared. Nothing is uploaded"):
        hub.upload(prepared, "me/edits", SECRET)
    assert not api.called


# what cannot be prepared


def test_a_folder_that_is_in_use(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ReleaseError, match="is not an empty folder; give a new name, nothing is overwritten"):
        hub.prepare("organism", tmp_path / "mine")
    with pytest.raises(ReleaseError, match="was not prepared by"):
        hub.listing(tmp_path / "mine")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dashboard/organism.html", "there is no dashboard .*lib dashboard --model organism"),
        (f"results/organism/{hub.MAKER}/ffn.safetensors", "there is no edit for ffn; run chapter 3 on organism again"),
    ],
)
def test_what_is_missing_is_named(run, tmp_path, name, said):
    (run / name).unlink()
    with pytest.raises(ReleaseError, match=said):
        hub.prepare("organism", tmp_path / "out")
    assert not (tmp_path / "out").exists()


BROKEN = {"pathways": {key: {**PATHWAY, "ppl_after": float("nan")} for key in PAPER}}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({hub.MAKER: VALUES[hub.MAKER]}, r"no present results of 04_side_effects; run `python -m lib run"),
        (dict.fromkeys(VALUES, BROKEN), "give nan as perplexity of full; run chapters 3 and 4 again"),
    ],
)
def test_results_that_are_out_of_date_or_no_numbers(run, tmp_path, monkeypatch, values, said):
    monkeypatch.setattr(check, "current_values", lambda model: values)
    with pytest.raises(ReleaseError, match=said):
        hub.prepare("organism", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_edit_of_another_model(run, tmp_path, organism):
    path = run / "results" / "organism" / hub.MAKER / "ffn.safetensors"
    edits.save(dataclasses.replace(an_edit(organism, "ffn", layer=9), base_sha256="1" * 64), path)
    with pytest.raises(EditError, match="another revision of organism"):
        hub.prepare("organism", tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
