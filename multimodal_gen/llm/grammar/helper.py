"""The helper process that compiles grammars, for as long as the front lives.

It imports the library once and never compiles itself: each order runs in a fork, whose memory and time are limited and
which is killed when they are used up. A schema that never ends costs its own fork, and nobody waits for an import.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import signal
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from multimodal_gen.llm.grammar import library
from multimodal_gen.llm.grammar.orders import (
    HEADER,
    Answer,
    Compile,
    Compiled,
    Prepare,
    Ready,
    Refused,
    pack,
    read_order,
)
from multimodal_gen.llm.vocabulary import Vocabulary

PR_SET_PDEATHSIG = 1
FORKS = 2  # at once
MEMORY_BYTES = 1 << 30  # of a fork, beside what it inherits
MAX_COMPILED_BYTES = 16 << 20
_WARNING = re.compile(r"Warning: (.*)")
_PLACE = re.compile(r"^\[[\d:]+\] \S+: ")


def main() -> int:
    """Serve orders until the front goes away; returns the exit code."""
    _die_with(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sink = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    first = read_order(_exactly(0, HEADER.unpack(_exactly(0, HEADER.size))[0]))
    assert isinstance(first, Prepare), "the first order says what is compiled for"
    info = library.tokenizer_info(first.vocabulary)
    _write(sink, pack(Ready()))
    return _Helper(info, first.vocabulary, sink).run()


@dataclass
class _Fork:
    order: Compile
    pid: int
    pipe: int
    deadline: float
    said: bytearray = field(default_factory=bytearray)


class _Helper:
    def __init__(self, info: Any, vocabulary: Vocabulary, sink: int) -> None:
        self._info, self._vocabulary, self._sink = info, vocabulary, sink
        self._waiting: deque[Compile] = deque()
        self._forks: dict[int, _Fork] = {}  # by pipe

    def run(self) -> int:
        while True:
            while self._waiting and len(self._forks) < FORKS:
                self._start(self._waiting.popleft())
            ends = [fork.deadline for fork in self._forks.values()]
            left = max(0.0, min(ends) - time.monotonic()) if ends else None
            ready, _, _ = select.select([0, *self._forks], [], [], left)
            if 0 in ready and not self._hear():
                for fork in self._forks.values():
                    os.kill(fork.pid, signal.SIGKILL)
                return 0
            for pipe in ready:
                if pipe in self._forks:
                    self._listen(self._forks[pipe])
            for fork in [fork for fork in self._forks.values() if fork.deadline <= time.monotonic()]:
                os.kill(fork.pid, signal.SIGKILL)
                self._end(fork, Refused(fork.order.id, "slow"))

    def _hear(self) -> bool:
        """One order from the front; False: it went away."""
        try:
            order = read_order(_exactly(0, HEADER.unpack(_exactly(0, HEADER.size))[0]))
        except EOFError:
            return False
        assert isinstance(order, Compile), "what is compiled for was said before"
        self._waiting.append(order)
        return True

    def _start(self, order: Compile) -> None:
        reading, writing = os.pipe()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                os.close(reading)
                _die_with(parent)
                _write(writing, pack(_carry_out(order, self._info, self._vocabulary)))
                code = 0
            os._exit(code)
        os.close(writing)
        self._forks[reading] = _Fork(order, pid, reading, time.monotonic() + order.limit_s)

    def _listen(self, fork: _Fork) -> None:
        part = os.read(fork.pipe, 1 << 20)
        fork.said += part
        if not part:
            self._end(fork, None)

    def _end(self, fork: _Fork, answer: Answer | None) -> None:
        """Give the answer on; None: the fork's own, if it is whole."""
        os.close(fork.pipe)
        del self._forks[fork.pipe]
        _, status = os.waitpid(fork.pid, 0)
        if answer is not None:
            _write(self._sink, pack(answer))
        elif status == 0:
            _write(self._sink, bytes(fork.said))
        else:
            _write(self._sink, pack(Refused(fork.order.id, "large")))  # out of memory, or of the stack


def _carry_out(order: Compile, info: Any, vocabulary: Vocabulary) -> Answer:
    """In the fork."""
    import xgrammar as xg

    _limit_memory()
    with tempfile.TemporaryFile() as told:
        os.dup2(told.fileno(), 2)
        try:
            compiler = xg.GrammarCompiler(info, max_threads=1, cache_enabled=False)
            compiled = library.compile_grammar(compiler, order.kind, order.source)
        except MemoryError:
            return Refused(order.id, "large")
        except Exception as error:  # noqa: BLE001 whatever the library raises is about what it was given
            return Refused(order.id, "large" if "bad_alloc" in str(error) else "wrong", _words(str(error)))
        # What the library does not honour, it tells on standard error and goes on.
        told.seek(0)
        ignored = _WARNING.search(told.read(1 << 16).decode("utf-8", "replace"))
    if ignored is not None:
        return Refused(order.id, "wrong", ignored[1].strip())
    data = compiled.serialize_json().encode()
    if len(data) > MAX_COMPILED_BYTES:
        return Refused(order.id, "large")
    seconds = library.try_out(compiled, vocabulary)
    if seconds is None:
        return Refused(order.id, "wrong", "no answer can match it")
    if seconds > library.MAX_TOKEN_S:
        return Refused(order.id, "wrong", "it is too ambiguous: there are too many ways to read one answer")
    return Compiled(order.id, data)


def _words(message: str) -> str:
    """An error of the library without its place in the library."""
    first = _PLACE.sub("", message.strip().splitlines()[0]) if message.strip() else "it cannot be read"
    return re.sub(r"^Check failed: .*? is false: ", "", first)


def _limit_memory() -> None:
    if sys.platform == "linux":
        import resource

        with open("/proc/self/statm") as file:
            own = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY_BYTES, own + MEMORY_BYTES))


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(1)


def _exactly(source: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = os.read(source, size - len(data))
        if not part:
            raise EOFError("the front went away")
        data += part
    return bytes(data)


def _write(sink: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(sink, rest) :]
