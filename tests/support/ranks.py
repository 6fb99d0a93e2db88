"""Ranks as real processes: started once, then told which function to run as which mesh.

    with Ranks(4) as ranks:
        results = ranks.run(Degrees(tp=2), "tests.dist.cases:sums", seed=3)   # one dict of tensors per rank

A function gets the mesh and the keywords and returns tensors. Ranks that a mesh does not need sit idle.
"""

from __future__ import annotations

import importlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from multimodal_gen.parallel.degrees import Degrees

ROOT = Path(__file__).parents[2]
CONNECT_S = 60.0  # for an operation between ranks
CALL_S = 150.0  # for one function


class Ranks:
    """A pool of processes."""

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mmgen-ranks-")
        self._calls = 0
        self._size = size
        self._processes: list[subprocess.Popen[str]] = []

    def _start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.support.ranks"]
        self._processes = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=environment, text=True
            )
            for _ in range(self._size)
        ]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()
        self._folder.cleanup()

    def kill(self) -> None:
        """End all of them; the next call starts others."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self._processes = []

    def run(self, degrees: Degrees, function: str, **arguments: Any) -> list[dict[str, Any]]:
        """Call `module:function(mesh, **arguments)` on every rank of a mesh; the tensors that each returned.

        Raises: AssertionError with the traceback of the first rank that failed.
        """
        from safetensors.torch import load_file

        if not self._processes:
            self._start()
        self._calls += 1
        base = Path(self._folder.name) / str(self._calls)
        members = self._processes[: degrees.world]
        assert len(members) == degrees.world, f"{degrees.world} ranks of {len(self._processes)}"
        for rank, process in enumerate(members):
            assert process.stdin is not None
            order = {
                "function": function,
                "arguments": arguments,
                "degrees": asdict(degrees),
                "rank": rank,
                "store": f"{base}.store",
                "result": f"{base}.{rank}.safetensors",
            }
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        self._await(members)
        return [load_file(f"{base}.{rank}.safetensors") for rank in range(degrees.world)]

    def _await(self, members: list[subprocess.Popen[str]]) -> None:
        deadline = time.monotonic() + CALL_S
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(members):
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    self.kill()
                    raise AssertionError(f"ranks {[key.data for key in selector.get_map().values()]} did not answer")
                for key, _ in ready:
                    answer = members[key.data].stdout
                    assert answer is not None
                    line = answer.readline().strip()
                    if line != "done":
                        self.kill()  # the others may wait for it in a collective
                        raise AssertionError(f"rank {key.data}: {json.loads(line) if line else 'it died'}")
                    selector.unregister(key.fileobj)


def serve() -> None:
    """A rank: one order per line of stdin, one answer per line of stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    for line in sys.stdin:
        try:
            _obey(json.loads(line))
            answer = "done"
        except Exception:  # noqa: BLE001 - told to the test
            answer = json.dumps(traceback.format_exc())
        answers.write(answer + "\n")
        answers.flush()


def _obey(order: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file

    from multimodal_gen.parallel.mesh import Mesh

    degrees = Degrees(**order["degrees"])
    store = torch.distributed.FileStore(order["store"], degrees.world)
    mesh = Mesh.connect(degrees, order["rank"], store, torch.device("cpu"), CONNECT_S)
    module, name = order["function"].split(":")
    function: Callable[..., dict[str, torch.Tensor]] = vars(importlib.import_module(module))[name]
    result = function(mesh, **order["arguments"])
    mesh.control.barrier()  # nobody leaves while another still needs its connections
    save_file({key: tensor.clone().contiguous() for key, tensor in result.items()}, order["result"])


if __name__ == "__main__":
    serve()
