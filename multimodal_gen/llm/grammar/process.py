"""The grammar helper as the front sees it: orders go in, futures are answered."""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import msgspec

from multimodal_gen.environment import worker_environment
from multimodal_gen.llm.grammar.orders import (
    HEADER,
    MAX_MESSAGE_BYTES,
    Answer,
    Compile,
    Compiled,
    Prepare,
    Ready,
    Refused,
    pack,
    read_answer,
)
from multimodal_gen.llm.vocabulary import Vocabulary
from multimodal_gen.text import GrammarKind

PACKAGE = Path(__file__).resolve().parents[2]
# This very package, and nothing from the current folder: see engine/process.py.
LAUNCH = """
import sys
sys.path = [sys.argv[1], *filter(None, sys.path)]
import multimodal_gen
sys.path.pop(0)
from multimodal_gen.llm.grammar.helper import main
sys.exit(main())
"""

log = logging.getLogger(__name__)


class HelperProcess:
    """One helper, from its start to its end. It is started at once and prepares itself in the background."""

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        """`vocabulary` is called in another thread: finding all tokens takes a moment."""
        self._vocabulary = vocabulary
        self._orders: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._waiting: dict[int, Future[Compiled | Refused]] = {}
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._ended = False
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(PACKAGE.parent)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**worker_environment(), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        for name, work in (("read", self._read), ("write", self._write)):
            threading.Thread(target=work, name=f"grammar-{name}", daemon=True).start()

    @property
    def ended(self) -> bool:
        """Whether it answers nothing any more."""
        return self._ended

    @property
    def waiting(self) -> int:
        """Orders without an answer."""
        return len(self._waiting)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def compile(self, kind: GrammarKind, source: str, limit_s: float) -> Future[Compiled | Refused]:
        """Refused with `died` where it has ended, or ends before it answers."""
        future: Future[Compiled | Refused] = Future()
        with self._lock:
            order = Compile(next(self._ids), kind, source, limit_s)
            if self._ended:
                future.set_result(Refused(order.id, "died"))
                return future
            self._waiting[order.id] = future
        self._orders.put(pack(order))
        return future

    def kill(self) -> None:
        """End it; what waits is refused."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def _write(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None, "the process was started with a pipe"
        with contextlib.suppress(BrokenPipeError), pipe:
            order: bytes | None = pack(Prepare(self._vocabulary()))
            while order is not None:
                pipe.write(order)
                pipe.flush()
                order = self._orders.get()

    def _read(self) -> None:
        try:
            while (answer := self._answer()) is not None:
                if not isinstance(answer, Ready):
                    with self._lock:
                        future = self._waiting.pop(answer.id)
                    future.set_result(answer)
        except (msgspec.DecodeError, KeyError) as error:
            log.error("the grammar helper does not make sense (%s)", type(error).__name__)
        self._end()

    def _answer(self) -> Answer | None:
        """None: the helper has ended."""
        pipe = self._process.stdout
        assert pipe is not None, "the process was started with a pipe"
        header = pipe.read(HEADER.size)
        if len(header) < HEADER.size:
            return None
        (length,) = HEADER.unpack(header)
        if length > MAX_MESSAGE_BYTES:
            raise msgspec.DecodeError(f"an answer of {length} bytes")
        payload = pipe.read(length)
        return read_answer(payload) if len(payload) == length else None

    def _end(self) -> None:
        with self._lock:
            self._ended = True
            waiting, self._waiting = self._waiting, {}
        self.kill()
        code = self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._orders.put(None)
        log.debug("the grammar helper has ended with exit code %d", code)
        for at, future in waiting.items():
            future.set_result(Refused(at, "died"))
