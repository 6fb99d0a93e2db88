"""What the front of a language model needs beside the engine: once per server, or per `LLM`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from multimodal_gen.config import EngineConfig
from multimodal_gen.text import TextCard

if TYPE_CHECKING:
    from multimodal_gen.llm.grammar.compiler import GrammarCompiler
    from multimodal_gen.llm.template import ChatTemplate
    from multimodal_gen.llm.tokenizer import Tokenizer

GRAMMAR_SECONDS = 1.5  # where no server says otherwise


@dataclass(frozen=True, eq=False)
class TextFront:
    """Made by `open`; `close` ends the helper process of the grammars."""

    card: TextCard
    tokenizer: Tokenizer
    template: ChatTemplate | None  # None: the checkpoint brings none, so there is no chat
    grammars: GrammarCompiler

    @classmethod
    def open(cls, card: TextCard, config: EngineConfig, grammar_timeout_s: float = GRAMMAR_SECONDS) -> TextFront:
        """Read the tokenizer and the template.

        Raises: CorruptModel, UnsupportedParameter for what no tokenizer of ours can read.
        """
        from multimodal_gen.llm.grammar.compiler import GrammarCompiler
        from multimodal_gen.llm.template import ChatTemplate
        from multimodal_gen.llm.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(card)
        template = ChatTemplate.load(card) if card.chat else None
        return cls(card, tokenizer, template, GrammarCompiler(card, tokenizer, grammar_timeout_s))

    def close(self) -> None:
        """End the helper process."""
        self.grammars.close()
