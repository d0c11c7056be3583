"""What a release is called, and that everything says so; the set-up cell of the chapters; the workflows."""

import json
import re
import shutil
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from lib import __version__
from lib.__main__ import app
from lib.checkpoints.named import SPECS
from lib.errors import ChapterError, ReleaseError
from lib.files import ROOT
from lib.press import colab, release
from lib.press.execute import chapter_names
from lib.press.release import Repository, dressed, repository, setup_code

OURS = repository()
OTHER = Repository("https://github.com/someone/other-book", "v9.9.9")


def chapter(name: str) -> dict:
    return json.loads((ROOT / "book" / f"{name}.ipynb").read_text(encoding="utf-8"))


# one setting


def test_version_tag_citation_and_deposit_agree():
    assert release.disagreements() == [] and OURS.tag == f"v{__version__}"


def settings(folder: Path) -> Path:
    """A copy of the files that must agree."""
    for name in ("CITATION.cff", ".zenodo.json", "_config.yml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("CITATION.cff", f"version: {__version__}", "version: 9.9.9", "version in CITATION.cff is '9.9.9'"),
        ("CITATION.cff", "executable book", "book", "title in .zenodo.json"),
        ("CITATION.cff", "2026-11-23", "2026-11-24", "publication_date"),
        ("CITATION.cff", "Book team", "Other team", "creators"),
        ("CITATION.cff", "20061624", "1", "references in CITATION.cff"),
        (".zenodo.json", '"MIT"', '"CC0-1.0"', "license"),
        (".zenodo.json", "isDerivedFrom", "cites", "isDerivedFrom"),
        (".zenodo.json", f"tree/v{__version__}", "tree/main", "isSupplementTo"),
        ("_config.yml", f"branch: v{__version__}", "branch: v9.9.9", "the tag in _config.yml is 'v9.9.9'"),
        ("_config.yml", "qkv-book/", "someone/", "repository-code"),
    ],
)
def test_each_disagreement_is_named(tmp_path, name, old, new, said):
    assert release.disagreements(settings(tmp_path)) == []
    text = (tmp_path / name).read_text(encoding="utf-8")
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new), encoding="utf-8")
    assert any(said in line for line in release.disagreements(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"title": "x"}'])
def test_a_deposit_that_cannot_be_read(tmp_path, text):
    (settings(tmp_path) / ".zenodo.json").write_text(text)
    with pytest.raises(ReleaseError, match=r"cannot be read"):
        release.disagreements(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "title: x",
        "repository: {url: https://example.org/a/b, branch: v1}",
        "repository: {url: https://github.com/a}",
        "repository: {url: https://github.com/a/b, branch: main}",
        "repository: {url: https://github.com/a/b; rm, branch: v1}",
        "repository: {url: https://github.com/a/b, branch: v1$(rm)}",
    ],
)
def test_a_setting_that_colab_could_not_open(tmp_path, text):
    (tmp_path / "_config.yml").write_text(text)
    with pytest.raises(ReleaseError, match=r"give `url` as https://github.com/OWNER/NAME and `branch` as a tag"):
        repository(tmp_path / "_config.yml")


# badge and set-up cell


@pytest.mark.parametrize("name", chapter_names())
def test_each_chapter_opens_the_release_of_the_setting(name):
    """A chapter whose badge or set-up cell names another repository or tag differs from what the setting makes of it.
    Mend it with `python -m lib release-settings`."""
    notebook = chapter(name)
    assert dressed(notebook, name, OURS) == notebook
    assert dressed(notebook, name, OTHER) != notebook
    assert notebook["cells"][0]["source"][2] == (
        "[![Open in Colab](_static/open_in_colab.svg)](https://colab.research.google.com/github/qkv-book/"
        f"qkv-decomposition/blob/v{__version__}/book/{name}.ipynb)\n"
    )
    kinds = [c["metadata"].get("tags") for c in notebook["cells"][:3]]
    assert kinds == [None, ["remove-cell"], ["parameters"]], "title, then set-up, then parameters"


def test_another_setting_is_written_once_and_can_be_taken_back(tmp_path):
    copies = [Path(shutil.copy(ROOT / "book" / f"{name}.ipynb", tmp_path)) for name in chapter_names()]
    before = {path: path.read_bytes() for path in copies}
    assert release.write(tmp_path, OURS) == []
    assert release.write(tmp_path, OTHER) == chapter_names()
    for path in before:
        text = path.read_text(encoding="utf-8")
        assert text.count("someone/other-book") == 2 and "v9.9.9" in text
        assert OURS.url not in text and f"/{OURS.tag}/" not in text and f" {OURS.tag} " not in text
    assert release.write(tmp_path, OTHER) == []
    assert release.write(tmp_path, OURS) == chapter_names()
    assert {p: p.read_bytes() for p in before} == before


def test_the_form_field_offers_the_named_models():
    for name in chapter_names():
        (cell,) = (c for c in chapter(name)["cells"] if "parameters" in c["metadata"].get("tags", []))
        form = re.search(r'^model_name = "smollm2"  # @param (\[.*\]) \{allow-input: true\}$', cell["source"][0], re.M)
        assert set(json.loads(form[1])) == set(SPECS)


def test_the_theme_makes_its_button_from_the_same_setting():
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert config["launch_buttons"]["colab_url"] == "https://colab.research.google.com"


class Shell:
    """Stands for git and pip: keeps what it was asked, and answers with a status."""

    def __init__(self, git: int = 0, pip: int = 0) -> None:
        self.git, self.pip, self.asked = git, pip, []

    def getstatusoutput(self, command: str) -> tuple[int, str]:
        self.asked.append(command)
        return self.git, "fatal: Remote branch not found" if self.git else ""

    def run(self, command: list[str], **options) -> subprocess.CompletedProcess:
        self.asked.append(command)
        return subprocess.CompletedProcess(command, self.pip, "", "ERROR: no room" if self.pip else "")


@pytest.fixture
def in_colab(monkeypatch, tmp_path):
    """`google.colab` is loaded, the folder is new, and what set-up puts on the path is taken off again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def run_cell(monkeypatch, shell: Shell) -> None:
    monkeypatch.setattr(subprocess, "run", shell.run)
    monkeypatch.setattr(subprocess, "getstatusoutput", shell.getstatusoutput)
    exec(setup_code(OURS), {})


def test_outside_colab_nothing_is_done(monkeypatch):
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    shell, path = Shell(), list(sys.path)
    run_cell(monkeypatch, shell)
    assert shell.asked == [] and sys.path == path


def test_in_colab_the_tag_is_fetched_and_torch_is_held(monkeypatch, in_colab, capsys):
    shell = Shell()
    run_cell(monkeypatch, shell)
    folder = in_colab / f"qkv-decomposition-{OURS.tag}"
    fetch, install = shell.asked
    assert fetch == f"test -d '{folder}' || git clone -q --depth 1 -b {OURS.tag} {OURS.url} '{folder}'"
    assert sys.path[0] == str(folder)
    assert install[:4] == [sys.executable, "-m", "pip", "install"]
    assert install[-3:] == ["-r", str(ROOT / "requirements.txt"), f"torch=={version('torch')}"]
    assert "constraints.txt" not in " ".join(install)
    assert capsys.readouterr().out.endswith("Ready.\n")


def test_a_tag_that_cannot_be_fetched_stops(monkeypatch, in_colab):
    shell = Shell(git=128)
    with pytest.raises(AssertionError, match=r"could not be fetched; run this cell again\. git says: fatal: Remote"):
        run_cell(monkeypatch, shell)
    assert len(shell.asked) == 1, "nothing is installed"


def test_a_failing_installation_stops(monkeypatch, in_colab):
    with pytest.raises(ChapterError, match=r"(?s)could not install requirements.txt beside torch==.*no room.*Run this"):
        run_cell(monkeypatch, Shell(pip=1))


def test_a_package_replaced_while_in_use_asks_for_a_new_session(monkeypatch, in_colab):
    assert colab.outdated(colab.REQUIREMENTS) == []
    monkeypatch.setitem(sys.modules, "numpy", types.SimpleNamespace(__version__="1.0.0"))
    with pytest.raises(ChapterError, match=r"numpy was replaced while in use. Choose Runtime > Restart session"):
        run_cell(monkeypatch, Shell())


def test_the_real_shell_says_what_git_says(in_colab):
    """The cell as it is, with a repository that does not exist: git's own message comes through."""
    code = setup_code(Repository(Path(in_colab / "nowhere").as_uri(), "v1"))
    with pytest.raises(AssertionError, match=r"git says: .*nowhere"):
        exec(code, {})
    assert not list(in_colab.iterdir()), "no half clone"


def test_set_up_needs_nothing_but_python():
    """In Colab it is imported before anything of requirements.txt is installed."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from lib.press import colab; print([m for m in sys.modules])"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "numpy" not in done.stdout and "torch" not in done.stdout


def test_the_command_writes_and_checks(monkeypatch):
    cli = CliRunner()
    done = cli.invoke(app, ["release-settings", "--check", OURS.tag])
    assert done.exit_code == 0 and "no chapter changed, everything agrees" in done.output
    wrong = cli.invoke(app, ["release-settings", "--check", "v9.9.9"])
    assert f"the tag in _config.yml is '{OURS.tag}', not 'v9.9.9'" in str(wrong.exception)
    monkeypatch.setattr(release, "repository", lambda *_: OTHER)
    wrong = cli.invoke(app, ["release-settings", "--check", OTHER.tag])
    assert "badge or set-up cell of 01_static_diagnostics, " in str(wrong.exception)
    assert chapter("01_static_diagnostics") == dressed(chapter("01_static_diagnostics"), "01_static_diagnostics", OURS)


# the workflows

TEXTS = {p.stem: p.read_text(encoding="utf-8") for p in sorted((ROOT / ".github" / "workflows").iterdir())}
CONTENTS = {name: yaml.load(text, yaml.BaseLoader) for name, text in TEXTS.items()}  # else, `on` would be read as true


@pytest.fixture(params=TEXTS)
def workflow(request) -> tuple[str, dict]:
    return TEXTS[request.param], CONTENTS[request.param]


def test_every_action_is_pinned_by_commit(workflow):
    text, content = workflow
    used = [step["uses"] for job in content["jobs"].values() for step in job["steps"] if "uses" in step]
    pinned = re.findall(r"uses: ([\w-]+/[\w./-]+@[0-9a-f]{40}) # v\d+\.\d+\.\d+$", text, re.M)
    assert used == pinned and used, "40 digits, with the version in a comment"


def test_an_action_has_one_version_in_all_workflows():
    found = {}
    for name, at in re.findall(r"uses: (\S+)@(.*)", "\n".join(TEXTS.values())):
        found.setdefault(name, set()).add(at)
    assert all(len(versions) == 1 for versions in found.values()), found


def test_least_permissions(workflow):
    """None by default; who may write checks nothing out, so that no code of a change runs with that right."""
    text, content = workflow
    assert content["permissions"] == {} and "pull_request_target" not in text and "secrets." not in text
    for name, job in content["jobs"].items():
        writes = [p for p, level in job["permissions"].items() if level != "read"]
        assert "timeout-minutes" in job, name
        for step in job["steps"]:
            if "actions/checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] == "false" and not writes, name
            assert "${{" not in step.get("run", ""), "what others may name reaches a shell through env alone"


def test_what_the_workflows_call_exists(workflow):
    _, content = workflow
    targets = set(re.findall(r"^([.\w/-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    commands = [c.name or c.callback.__name__ for c in app.registered_commands]
    for job in content["jobs"].values():
        for step in job["steps"]:
            for words in re.findall(r"\bmake ([^#\n]+)", step.get("run", "")):
                assert {w for w in words.split() if "=" not in w} <= targets
            for command in re.findall(r"-m lib ([\w-]+)", step.get("run", "")):
                assert command in commands


def test_each_occasion_has_its_workflow():
    """Changes: tests, smoke, book. Nightly: kills, damage. Weekly: from scratch, links, Colab. Tags: the rest."""
    called = {
        name: " ".join(s.get("run", "") + s.get("uses", "") for j in c["jobs"].values() for s in j["steps"])
        for name, c in CONTENTS.items()
    }
    assert "pull_request" in CONTENTS["pull-request"]["on"] and "schedule" in CONTENTS["weekly"]["on"]
    assert CONTENTS["release"]["on"]["push"] == {"tags": ["v*"]}
    for name, wanted in {
        "pull-request": ["make test", "make smoke", "make book MODEL=organism"],
        "nightly": ["tests/kill.py --model organism --kills 20", "tests/fuzz.py --inputs 10000"],
        "weekly": ["make book", "make check", "make links", "make colab"],
        "release": ["make snapshot", "verify-snapshot", "gh release create", "deploy-pages"],
    }.items():
        assert all(word in called[name] for word in wanted), name
    assert "actions/cache" not in called["weekly"], "a cold build is cold"
