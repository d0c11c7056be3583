"""What a chapter does first in Colab: install what the book needs, beside Colab's own torch.

The set-up cell of each chapter fetches the book at its tag and calls `install`. Nothing but Python's own library is
there at that moment, so this file imports nothing else.
"""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from lib.errors import ChapterError

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"


def install(requirements: Path = REQUIREMENTS) -> None:
    """Install the requirements, as ranges, with torch held at the version that is there: a gigabyte is not fetched
    again, and it goes on fitting the machine's GPU. Raises ChapterError with pip's last words, or where a package
    that is already in use was replaced, which takes a new session."""
    print("Installing what the book needs; the first time this takes two minutes or so.", flush=True)
    keep = f"torch=={version('torch')}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, "-r", str(requirements), keep], capture_output=True, text=True)
    if done.returncode:
        raise ChapterError(
            f"pip could not install {requirements.name} beside {keep}:\n{done.stderr.strip()[-1500:]}\n"
            "Run this cell again; if it fails again, choose Runtime > Disconnect and delete runtime, and start anew."
        )
    if replaced := outdated(requirements):
        raise ChapterError(
            f"{', '.join(replaced)} was replaced while in use. Choose Runtime > Restart session, then Runtime > Run "
            "all; nothing needs to be installed again."
        )
    print("Ready.")


def outdated(requirements: Path) -> list[str]:
    """The required packages that this session has loaded in another version than the one that is installed now."""
    names = re.findall(r"^[A-Za-z0-9_-]+", requirements.read_text(encoding="utf-8"), re.M)
    loaded = {name: getattr(sys.modules.get(name.replace("-", "_")), "__version__", None) for name in names}
    return [name for name, used in loaded.items() if used is not None and used != version(name)]
