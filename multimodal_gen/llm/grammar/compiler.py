"""Grammars for requests: checked, compiled once in the helper process, kept for those who ask again. No torch."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import threading
from collections import OrderedDict
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from typing import Any

from multimodal_gen.errors import GenerationFailed, InvalidValue, MmgenError, QueueFull
from multimodal_gen.llm.grammar.orders import Compiled, Refused
from multimodal_gen.llm.grammar.process import HelperProcess
from multimodal_gen.llm.grammar.schema import MAX_DEPTH, SchemaRefused, settle
from multimodal_gen.llm.tokenizer import Tokenizer
from multimodal_gen.text import Grammar, GrammarKind, TextCard

MAX_SOURCE_CHARS = 1 << 16
MAX_KEPT, MAX_KEPT_BYTES = 256, 256 << 20
MAX_WAITING = 64
START_S = 60.0  # for the helper's import, on the slowest machine

log = logging.getLogger(__name__)

_WHAT = {
    "json_schema": "The JSON schema",
    "json_object": "The JSON grammar",
    "regex": "The regular expression",
    "ebnf": "The grammar",
    "structural_tag": "The structural tag",
}


class GrammarCompiler:
    """One for each front. Requests for the same grammar share one compilation, also while it runs. Thread-safe."""

    def __init__(self, card: TextCard, tokenizer: Tokenizer, timeout_s: float = 1.5) -> None:
        """`timeout_s`: for one grammar. The helper is started by `prepare`, or by the first grammar."""
        assert card.vocab_size == tokenizer.vocab_size, "the tokenizer is the model's"
        self._tokenizer, self._timeout_s = tokenizer, timeout_s
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Future[Grammar | Refused]] = OrderedDict()
        self._bytes = 0
        self._closed = False
        self.compilations = 0  # so far, for metrics and tests
        self._helper: HelperProcess | None = None

    def prepare(self) -> None:
        """Start the helper, which prepares itself in the background: a server does, so that no request waits."""
        with self._lock:
            self._running()

    async def compile(self, kind: GrammarKind, source: str, param: str) -> Grammar:
        """A grammar, without blocking the loop.

        `source`: the schema as JSON, the expression, the EBNF or the structural tag as JSON; nothing for json_object.
        `param`: the field that it comes from. Raises: InvalidValue naming the field, for what is wrong, cannot be
        enforced or takes too long; QueueFull; GenerationFailed where the helper died.
        """
        future, limit = self._order(kind, source, param), START_S + self._timeout_s * MAX_WAITING
        try:
            # Others may wait for it, too: one who leaves does not end it.
            answer = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), limit)
        except asyncio.TimeoutError:
            raise self._stuck() from None
        return self._told(answer, kind, param)

    def compile_now(self, kind: GrammarKind, source: str, param: str) -> Grammar:
        """The same for programs without a loop."""
        try:
            answer = self._order(kind, source, param).result(START_S + self._timeout_s * MAX_WAITING)
        except NotInTime:
            raise self._stuck() from None
        return self._told(answer, kind, param)

    def close(self) -> None:
        """End the helper; whoever waits is refused."""
        with self._lock:
            self._closed = True
            helper = self._helper
        if helper is not None:
            helper.kill()

    @property
    def helper_pid(self) -> int | None:
        """The helper process; None: none was started."""
        return None if self._helper is None else self._helper.pid

    def _running(self) -> HelperProcess:
        """The helper, started if need be; the lock is held."""
        assert not self._closed, "nothing is asked of a closed front"
        if self._helper is None or self._helper.ended:
            self._helper = HelperProcess(lambda: self._tokenizer.vocabulary)
        return self._helper

    def _order(self, kind: GrammarKind, source: str, param: str) -> Future[Grammar | Refused]:
        settled = _settled(kind, source, param)
        text = "\0".join((kind, settled, self._tokenizer.vocabulary.digest))
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        with self._lock:
            if digest in self._kept:
                self._kept.move_to_end(digest)
                return self._kept[digest]
            helper = self._running()
            if helper.waiting >= MAX_WAITING:
                raise QueueFull("Too many grammars are being compiled; try again soon.", retry_after=1.0)
            future: Future[Grammar | Refused] = Future()
            self._kept[digest] = future
            self.compilations += 1
        ordered = helper.compile(kind, settled, self._timeout_s)
        ordered.add_done_callback(lambda done: self._keep(digest, kind, future, done.result()))
        return future

    def _keep(
        self, digest: str, kind: GrammarKind, future: Future[Grammar | Refused], answer: Compiled | Refused
    ) -> None:
        """What came of an order: good grammars stay, the oldest go when there are too many."""
        with self._lock:
            if isinstance(answer, Refused):
                del self._kept[digest]
            else:
                self._bytes += len(answer.data)
                self._evict()
        future.set_result(
            answer if isinstance(answer, Refused) else Grammar(kind=kind, digest=digest, compiled=answer.data)
        )

    def _evict(self) -> None:
        for digest, future in list(self._kept.items()):
            if len(self._kept) <= MAX_KEPT and self._bytes <= MAX_KEPT_BYTES:
                return
            if future.done():
                old = future.result()
                self._bytes -= len(old.compiled) if isinstance(old, Grammar) else 0
                del self._kept[digest]

    def _told(self, answer: Grammar | Refused, kind: GrammarKind, param: str) -> Grammar:
        if isinstance(answer, Grammar):
            return answer
        if answer.reason == "wrong":
            raise InvalidValue(
                f"{_WHAT[kind]} in {param!r} cannot be used: {answer.words[:300].rstrip('.')}.", param=param
            )
        if answer.reason == "died":
            raise GenerationFailed("The process that compiles grammars ended; the next request starts it anew.")
        much = f"more than {self._timeout_s:g} s" if answer.reason == "slow" else "more memory than it may have"
        raise InvalidValue(f"{_WHAT[kind]} in {param!r} takes {much} to compile; make it simpler.", param=param)

    def _stuck(self) -> MmgenError:
        log.error("the process that compiles grammars is stuck; killing it")
        if self._helper is not None:
            self._helper.kill()
        return GenerationFailed("The process that compiles grammars did not answer; the next request starts it anew.")


def _settled(kind: GrammarKind, source: str, param: str) -> str:
    """What is compiled. Raises: InvalidValue."""
    if len(source) > MAX_SOURCE_CHARS:
        raise InvalidValue(
            f"{_WHAT[kind]} in {param!r} has {len(source):,} characters; at most {MAX_SOURCE_CHARS:,} are compiled.",
            param=param,
        )
    try:
        if kind == "json_object":
            return ""
        if kind == "json_schema":
            return settle(source)
        source.encode()
        return _settled_tags(source) if kind == "structural_tag" else source
    except UnicodeEncodeError:
        words = "it holds half of a surrogate pair, which is no character"
    except SchemaRefused as refused:
        words = str(refused)
    raise InvalidValue(f"{_WHAT[kind]} in {param!r} cannot be used: {words}.", param=param)


def _settled_tags(source: str) -> str:
    """A structural tag whose schemas are settled. Raises: SchemaRefused."""
    try:
        form = json.loads(source)
    except (ValueError, RecursionError):
        raise SchemaRefused("it is no JSON, or nested too deep") from None
    return json.dumps(_settled_form(form, 0))


def _settled_form(form: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise SchemaRefused(f"it is nested more than {MAX_DEPTH} deep")
    if isinstance(form, list):
        return [_settled_form(item, depth + 1) for item in form]
    if not isinstance(form, dict):
        return form
    if form.get("type") == "json_schema":
        return {**form, "json_schema": json.loads(settle(json.dumps(form.get("json_schema"))))}
    return {name: _settled_form(value, depth + 1) for name, value in form.items()}
