"""Execute each chapter by itself as Colab would: `make colab`, or `python tests/simulate_colab.py --help`.

1. A new virtual environment has torch, a kernel and a module `google.colab`, and nothing else of the book.
2. The repository's address is redirected to a copy of this checkout's last commit, under the tag of `_config.yml`.
3. Each chapter's notebook, alone in a new folder, is executed there. Its set-up cell does the rest: it fetches the
   tag and installs requirements.txt, without the pins.
4. Afterwards torch must be the one that was there before.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lib.files import ROOT, slug
from lib.press import execute, release

KERNEL = "colab-simulated"
START = "import google.colab\n"  # Colab's kernel has it loaded before the first cell runs


def call(*words: object, **options) -> str:
    done = subprocess.run([*map(str, words)], text=True, capture_output=True, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout.strip()


def environment(place: Path) -> Path:
    """The Python of a new environment like Colab's: torch and a kernel, and `google.colab`."""
    call(sys.executable, "-m", "venv", place / "venv")
    python = place / "venv" / "bin" / "python"
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    torch = next(line for line in pins.splitlines() if line.startswith("torch=="))
    call(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", torch, "ipykernel")
    stub = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")) / "google" / "colab"
    stub.mkdir(parents=True)
    (stub / "__init__.py").touch()
    startup = place / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00-colab.py").write_text(START, encoding="utf-8")
    return python


def published(place: Path, repo: release.Repository) -> Path:
    """A bare copy of this checkout's last commit, under the tag that the set-up cell asks for."""
    bare = place / "published.git"
    call("git", "clone", "--quiet", "--bare", ROOT, bare)
    call("git", "-C", bare, "tag", "--force", repo.tag, call("git", "rev-parse", "HEAD", cwd=ROOT))
    return bare


def kernel(place: Path, python: Path) -> None:
    """A kernel of the new environment, for papermill of this one."""
    spec = place / "jupyter" / "kernels" / KERNEL
    spec.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": KERNEL, "language": "python"}))


def variables(place: Path, python: Path, bare: Path, repo: release.Repository) -> dict[str, str]:
    """The environment of the kernel: nothing of this checkout, git sent to the copy, no model fetched before."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PIP_CONSTRAINT")}
    redirect = {"COUNT": "1", "KEY_0": f"url.{bare.as_uri()}.insteadOf", "VALUE_0": repo.url}
    return {
        **kept,
        **{f"GIT_CONFIG_{k}": v for k, v in redirect.items()},
        "IPYTHONDIR": str(place / "ipython"),
        "JUPYTER_PATH": str(place / "jupyter"),
        "QKV_CACHE": str(place / "cache"),
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
    }


def alone(
    chapter: str, model_name: str, place: Path, bare: Path, env: dict[str, str], repo: release.Repository
) -> None:
    """One chapter, as the tag has it, alone in a new folder. Its results must stand in the clone that it made."""
    content = place / chapter
    content.mkdir()
    notebook = content / f"{chapter}.ipynb"
    notebook.write_text(call("git", "-C", bare, "show", f"{repo.tag}:book/{chapter}.ipynb"), encoding="utf-8")
    words = [notebook, content / "done.ipynb", "-p", "model_name", model_name, "-k", KERNEL, "--cwd", content]
    call(sys.executable, "-m", "papermill", *words, "--no-progress-bar", env=env, cwd=content)
    clone = content / f"{repo.name}-{repo.tag}"
    assert (clone / "_build" / "results" / slug(model_name) / f"{chapter}.json").is_file(), f"no results in {clone}"


def torch_version(python: Path) -> str:
    """Version and file, so that a reinstalled one is another."""
    code = "import importlib.metadata as m; print(m.version('torch'), m.distribution('torch')._path.stat().st_ino)"
    return call(python, "-I", "-c", code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="*", help="by number or name; all if none is given")
    parser.add_argument("--model", default="organism", help="organism (default), smollm2, gpt2, or a hub id")
    words = parser.parse_args()
    chapters, repo = execute.choose_chapters(words.chapters), release.repository()
    if changed := call("git", "status", "--porcelain", cwd=ROOT):
        print(f"only what is committed is tested; not these changes:\n{changed}")
    with tempfile.TemporaryDirectory(prefix="colab-") as temporary:
        place, start = Path(temporary), time.perf_counter()
        python, bare = environment(place), published(place, repo)
        kernel(place, python)
        env, before = variables(place, python, bare, repo), torch_version(python)
        print(f"environment with torch {before.split()[0]}: {time.perf_counter() - start:.0f} s", flush=True)
        for chapter in chapters:
            start = time.perf_counter()
            alone(chapter, words.model, place, bare, env, repo)
            assert torch_version(python) == before, f"{chapter} replaced torch"
            print(f"{chapter} on {words.model}: {time.perf_counter() - start:.0f} s", flush=True)
        installed = call(python, "-I", "-m", "pip", "list", "--format=freeze")
        names = {line.split("==")[0]: line.split("==")[1] for line in installed.splitlines()}
        print("installed: " + ", ".join(f"{n} {names[n]}" for n in ("transformers", "transformer-lens", "numpy")))
    print(f"{len(chapters)} passed, 0 failed")


if __name__ == "__main__":
    main()
