"""The grammar library (xgrammar), as the helper and the engine use it. Importing it takes seconds, and brings torch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from multimodal_gen.llm.vocabulary import Vocabulary
from multimodal_gen.text import GrammarKind

if TYPE_CHECKING:
    import xgrammar as xg

ANY_OBJECT = '{"type": "object"}'
# JSON is written on one line, with these between its parts: models that may choose their white space can write it for
# ever.
SEPARATORS = (", ", ": ")


def tokenizer_info(vocabulary: Vocabulary) -> xg.TokenizerInfo:
    """The vocabulary as the library has it; the same on both sides."""
    import xgrammar as xg

    return xg.TokenizerInfo(
        list(vocabulary.tokens),
        xg.VocabType.RAW,
        vocab_size=len(vocabulary.tokens),
        stop_token_ids=list(vocabulary.eos_ids),
    )


def compile_grammar(compiler: xg.GrammarCompiler, kind: GrammarKind, source: str) -> xg.CompiledGrammar:
    """Raises: RuntimeError and others of the library, whose words begin with a place in its source."""
    if kind == "json_schema":
        return compiler.compile_grammar(_of_schema(source))
    if kind == "json_object":
        return compiler.compile_grammar(_of_schema(ANY_OBJECT))
    if kind == "regex":
        return compiler.compile_regex(source)
    if kind == "ebnf":
        return compiler.compile_grammar(source)
    return compiler.compile_structural_tag(json.dumps(_without_schemas(json.loads(source))))


def _of_schema(schema: str) -> xg.Grammar:
    import xgrammar as xg

    return xg.Grammar.from_json_schema(schema, any_whitespace=False, separators=SEPARATORS, strict_mode=False)


def _without_schemas(form: Any) -> Any:
    """A structural tag whose schemas have become grammars: by itself, the library lets them have any white space."""
    if isinstance(form, list):
        return [_without_schemas(item) for item in form]
    if not isinstance(form, dict):
        return form
    if form.get("type") == "json_schema" and form.get("style", "json") == "json":
        return {"type": "grammar", "grammar": str(_of_schema(json.dumps(form.get("json_schema"))))}
    return {name: _without_schemas(value) for name, value in form.items()}


def can_start(compiled: xg.CompiledGrammar, vocab_size: int) -> bool:
    """Whether there is a first token at all."""
    import xgrammar as xg

    mask = xg.allocate_token_bitmask(1, vocab_size)
    if not xg.GrammarMatcher(compiled).fill_next_token_bitmask(mask):
        return True
    return bool(mask.any())
