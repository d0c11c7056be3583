"""Kernels that need not import what takes seconds to import: each is forked from a server that has done so.

The server is multiprocessing's own, one for this process, and gone with it. It holds packages and no module of lib/,
so each kernel loads the present ones; it has computed nothing and has one thread, which makes its forks safe. Dask's
workers come from it too. On other systems than Linux, where such forks are not safe, kernels start as they always do.
"""

import multiprocessing
import os
import sys
import threading
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from jupyter_client.provisioning import LocalProvisioner

FORKS = sys.platform == "linux"
# What lib/ imports, but pandas, which starts a thread
PACKAGES = ["torch", "gguf", "peft", "scipy.stats", "matplotlib.figure", "distributed", "ipykernel.kernelapp", "typer"]
PACKAGES += [f"transformers.{name}" for name in ("modeling_utils", "tokenization_utils_tokenizers")]
PACKAGES += [f"transformers.models.{name}" for name in ("gpt2.modeling_gpt2", "llama.modeling_llama")]
AT_IMPORT = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # as ipykernel sets it


def warm_up() -> None:
    """Start the server, unless it runs; it imports while this process goes on."""
    if FORKS:
        before = dict(os.environ)
        os.environ.update(AT_IMPORT)
        try:
            multiprocessing.set_forkserver_preload(PACKAGES)
            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)


class Forked(LocalProvisioner):
    """What starts and ends a kernel, for jupyter_client."""

    async def launch_kernel(self, cmd: list[str], **options: Any) -> Any:
        log, environment, folder = options["stdout"].name, options["env"], options["cwd"]
        process = _Process(target=_serve, args=(cmd[cmd.index("-f") :], environment, folder, log))
        process.start()
        self.process = process  # type: ignore[assignment]  # with the names that it needs of subprocess's
        self.pid = self.pgid = process.pid
        self.cwd = folder
        return self.connection_info


class _Process(ForkServerProcess):
    """With the names that subprocess gives."""

    stdin = stdout = stderr = None

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self) -> int | None:
        self.join()
        return self.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid or 0, number)


def _serve(arguments: list[str], environment: dict[str, str], folder: str, log: str) -> None:
    """In the new process: be a kernel, with a log in place of a terminal, until told to end or left alone."""
    os.setsid()
    with Path(log).open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    import torch
    from ipykernel.kernelapp import IPKernelApp

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    for name in [name for name in sys.modules if name.startswith("tqdm.auto")]:
        del sys.modules[name]  # it is another bar within a notebook, and lib/ is to find that one
    IPKernelApp.launch_instance(argv=[*arguments, f"--IPKernelApp.parent_handle={os.getppid()}"])


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)
