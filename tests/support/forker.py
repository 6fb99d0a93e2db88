"""A Python that has imported what `mmgen` imports, and forks for every command that it is sent.

Importing takes seconds, a fork none. Each command still has a process, a folder, an environment and streams of its
own. Started by `mmgen.py`: each line of stdin is an order, each line of stdout its exit code. Without threads, so that
a fork is whole.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

IMPORTS = (
    "torch",
    "transformers",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.schedulers.scheduling_unipc_multistep",
    "multimodal_gen.engine.local",
    "multimodal_gen.engine.local_text",
    "multimodal_gen.llm.core",
)


def preload() -> None:
    """What takes long to import; nothing here may start a thread."""
    for module in IMPORTS:
        importlib.import_module(module)
    getattr(sys.modules["transformers"], "UMT5EncoderModel")  # noqa: B009  its modules are imported by names
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{threads} threads after importing: a fork would lose them"


def obey(order: dict[str, Any]) -> None:
    """Become the command; never returns."""
    from multimodal_gen.cli.main import main

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(max(1, int(order["timeout"])))
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    for number, (path, flags) in enumerate(
        ((order["stdin"], os.O_RDONLY), (order["stdout"], os.O_WRONLY), (order["stderr"], os.O_WRONLY))
    ):
        file = os.open(path, flags)
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    code = 1
    try:
        code = main(order["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run() -> None:
    """Fork for every order until stdin ends."""
    preload()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            obey(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    run()
