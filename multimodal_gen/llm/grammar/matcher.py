"""Grammars in the engine: where each answer is in its own, and which tokens may follow."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from multimodal_gen.errors import GenerationFailed
from multimodal_gen.llm.grammar.library import tokenizer_info
from multimodal_gen.llm.tokenizer import Tokenizer
from multimodal_gen.text import Grammar

if TYPE_CHECKING:
    import xgrammar as xg

KEPT = 64


class Matchers:
    """Opens grammars for answers; keeps those that were used last, as the library has them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._kept: OrderedDict[str, xg.CompiledGrammar] = OrderedDict()

    def prepare(self) -> None:
        """Import the library in the background: otherwise the first grammar, and all that runs then, waits for it."""
        threading.Thread(target=lambda: self._info, name="grammar-import", daemon=True).start()

    def open(self, grammar: Grammar) -> Callable[[], Matcher]:
        """What makes the beginning of an answer. Raises: GenerationFailed for a grammar of another vocabulary or
        version of the library."""
        import xgrammar as xg

        compiled = self._kept.get(grammar.digest)
        if compiled is None:
            try:
                compiled = xg.CompiledGrammar.deserialize_json(grammar.compiled.decode(), self._info)
            except (RuntimeError, ValueError) as error:
                raise GenerationFailed(
                    f"The compiled grammar does not fit this engine ({type(error).__name__}): front and engine must "
                    "have the same model and the same version of xgrammar."
                ) from None
            self._kept[grammar.digest] = compiled
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(grammar.digest)
        return lambda: Matcher(xg.GrammarMatcher(compiled))

    @cached_property
    def _info(self) -> xg.TokenizerInfo:
        return tokenizer_info(self._tokenizer.vocabulary)


class Matcher:
    """One answer's place in its grammar."""

    def __init__(self, matcher: xg.GrammarMatcher) -> None:
        self._matcher = matcher

    def fill(self, mask: Any, row: int) -> bool:
        """Write which tokens may follow into a row of an int32 bit mask [rows, V / 32]; False: all of them."""
        return self._matcher.fill_next_token_bitmask(mask, row)

    def accept(self, token_id: int) -> None:
        """The answer has one more token. Raises: GenerationFailed where the grammar has no place for it."""
        if not self._matcher.accept_token(token_id):
            raise GenerationFailed(f"Token {token_id} was chosen, for which the answer's grammar has no place.")

    @property
    def finished(self) -> bool:
        """Whether the grammar is complete, and was left by an end token: nothing can follow."""
        return self._matcher.is_terminated()
