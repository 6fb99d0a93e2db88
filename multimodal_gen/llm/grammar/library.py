"""The grammar library (xgrammar), as the helper and the engine use it. Importing it takes seconds, and brings torch."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from multimodal_gen.llm.vocabulary import Vocabulary
from multimodal_gen.text import GrammarKind

if TYPE_CHECKING:
    import xgrammar as xg

ANY_OBJECT = '{"type": "object"}'
# JSON is written on one line, with these between its parts: models that may choose their white space can write it for
# ever.
SEPARATORS = (", ", ": ")
TRIAL_TOKENS = 128
MAX_TOKEN_S = 0.03  # CPU time; usual grammars take a hundredth of it


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


def try_out(compiled: xg.CompiledGrammar, vocabulary: Vocabulary) -> float | None:
    """Write two answers that match, of random tokens and of the shortest: the most CPU seconds that one token took;
    None where there is no first token at all.

    An ambiguous grammar compiles in no time, and then takes seconds for each token, and all answers of the engine with
    it.
    """
    rng = random.Random(0)
    lengths = np.array([len(token) for token in vocabulary.tokens])
    walks = [_walk(compiled, vocabulary, choose) for choose in (rng.choice, lambda ids: ids[lengths[ids].argmin()])]
    return None if walks[0] is None or walks[1] is None else max(walks[0], walks[1])


def _walk(compiled: xg.CompiledGrammar, vocabulary: Vocabulary, choose: Callable[[Any], Any]) -> float | None:
    import xgrammar as xg

    matcher, worst = xg.GrammarMatcher(compiled), 0.0
    mask = xg.allocate_token_bitmask(1, len(vocabulary.tokens))
    for at in range(TRIAL_TOKENS):
        xg.reset_token_bitmask(mask)
        started = time.process_time()
        matcher.fill_next_token_bitmask(mask)
        taken = time.process_time() - started
        allowed = np.unpackbits(mask.numpy().view(np.uint8), bitorder="little").view(bool)
        if not allowed.any():
            return None if at == 0 else worst
        allowed[list(vocabulary.eos_ids)] = False
        going_on = np.flatnonzero(allowed)
        if not going_on.size:
            break
        started = time.process_time()
        matcher.accept_token(int(choose(going_on)))
        worst = max(worst, taken + time.process_time() - started)
        if worst > MAX_TOKEN_S:
            break
    return worst
