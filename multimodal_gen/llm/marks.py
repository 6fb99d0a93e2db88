"""Marks before control tokens that users wrote, so that a template's own are told from them when it has run.

A marked token stays whole: a template that looks for `</think>` in an old answer finds it, and what comes after it is
not touched. The mark is a character that nobody used; the token behind it becomes text again, and a lone mark (a
template may cut texts) vanishes.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from multimodal_gen.errors import InvalidValue
from multimodal_gen.llm.tokenizer import Added, Tokenizer

# Characters without a meaning by definition, then those of private use.
CANDIDATES = (range(0xFDD0, 0xFDF0), range(0xF0000, 0xFFFFE))


@dataclass(frozen=True)
class Marks:
    """Made for one conversation by `of`."""

    tokens: dict[str, Added]  # that steer the model
    found: re.Pattern[str]  # any of them
    mark: str  # empty where there is nothing to mark

    @classmethod
    def of(cls, given: Any, tokenizer: Tokenizer, literals: str) -> Marks:
        """For what users gave (JSON values). `literals`: what the template may write by itself; added tokens that it
        writes are control tokens, too, whatever tokenizer.json calls them.

        Raises: InvalidValue where no character is left for the mark."""
        tokens = {
            content: token
            for content, token in tokenizer.added.items()
            if token.special or (content in literals and not content.isspace())
        }
        found = _pattern(tuple(tokens))
        texts = list(_texts(given))
        if not tokens or not any(found.search(text) for text in texts):
            return cls(tokens, found, "")
        mark = next(_free("".join(texts), literals), None)
        if mark is None:
            raise InvalidValue("The text uses every character for private use; leave one out.", param="messages")
        return cls(tokens, found, mark)

    def put(self, given: Any) -> Any:
        """The same with marks before control tokens, in values and names."""
        if not self.mark:
            return given
        if isinstance(given, str):
            return self.found.sub(f"{self.mark}\\g<0>", given)
        if isinstance(given, dict):
            return {self.put(key): self.put(value) for key, value in given.items()}
        return [self.put(item) for item in given] if isinstance(given, list) else given

    def parts(self, text: str) -> list[str | Added]:
        """What a template wrote, as text and its own control tokens in turn."""
        text = text.replace(_escaped(self.mark), self.mark)
        pattern = f"{self.mark}({self.found.pattern})|({self.found.pattern})|{self.mark}"
        parts, run, at = list[str | Added](), list[str](), 0
        for match in re.finditer(pattern, text, re.IGNORECASE):
            run.append(text[at : match.start()])
            at = match.end()
            if match[2] in self.tokens:
                parts += [*self._letters("".join(run)), self.tokens[match[2]]]
                run.clear()
            else:
                run.append(match[1] or match[2] or "")
        return [*parts, *self._letters("".join([*run, text[at:]]))]

    def _letters(self, text: str) -> Iterator[str]:
        """Text in pieces that no added token fits into: those that are not special would be found in it."""
        at = 0
        for match in self.found.finditer(text):
            token = self.tokens.get(match[0])
            if token is not None and not token.special:
                yield text[at : match.start() + 1]
                at = match.start() + 1
        if text[at:]:
            yield text[at:]


@lru_cache(maxsize=8)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the tokens, the longest first; in any case of letters, since templates may change that."""
    longest = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)", re.IGNORECASE)


def _texts(given: Any) -> Iterator[str]:
    if isinstance(given, str):
        yield given
    elif isinstance(given, dict):
        for key, value in given.items():
            yield key
            yield from _texts(value)
    elif isinstance(given, list):
        for item in given:
            yield from _texts(item)


def _free(texts: str, literals: str) -> Iterator[str]:
    """Characters that neither users nor the template have, as they are or as JSON escapes them."""
    used = set(texts) | set(literals)
    for code in itertools.chain(*CANDIDATES):
        if chr(code) not in used and _escaped(chr(code)) not in texts:
            yield chr(code)


def _escaped(mark: str) -> str:
    """As JSON in ASCII has it."""
    return json.dumps(mark)[1:-1]
