"""What is asked of a language model, and what it gives: plain data, no torch, no behaviour.

The front tokenizes, settles every value and makes a `TextRequest`; the engine answers with `TextDelta`s as tokens come,
and one `TextFinished` at the end (`messages.py`).
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length"]
GrammarKind = Literal["json_schema", "json_object", "regex", "ebnf", "structural_tag"]

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_ROUTING_KEY = 256


class TextSampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the next token is chosen; the defaults change nothing. Checked by whoever makes one."""

    temperature: float = 1.0
    """0 takes the most likely token"""
    top_k: int = 0
    """candidates kept; 0: all"""
    top_p: float = 1.0
    """the smallest set of candidates with this much probability is kept (Holtzman et al., 2020)"""
    min_p: float = 0.0
    """candidates with less than this share of the best one's probability are dropped"""
    repetition_penalty: float = 1.0
    """of tokens in the prompt or the answer: positive logits are divided by it, negative ones multiplied (CTRL)"""
    presence_penalty: float = 0.0
    """taken off the logit of every token that the answer has"""
    frequency_penalty: float = 0.0
    """taken off for every time that the answer has it"""
    logit_bias: dict[int, float] = {}
    """token → added to its logit"""
    seed: int | None = None
    """None: drawn by the front. Choice i of a request uses its own stream of it"""


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """What the answer must match, compiled by the front's helper process."""

    kind: GrammarKind
    digest: str
    """of kind, source and tokenizer: equal grammars are one in every cache"""
    compiled: bytes
    """as the grammar library serialises it"""


class TextRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt and its n answers; complete, every value settled. Made by the front (`llm/asking.py`)."""

    id: str
    prompt: tuple[int, ...]
    """token ids, at least one"""
    max_tokens: int
    """of each answer; prompt and answer fit into the context together"""
    n: int = 1
    min_tokens: int = 0
    """end tokens and stops do not count before"""
    sampling: TextSampling = TextSampling()
    stop: tuple[str, ...] = ()
    """texts that end an answer, and are not part of it"""
    stop_token_ids: tuple[int, ...] = ()
    """besides the model's own end tokens"""
    include_stop: bool = False
    """leave the stop text in the answer"""
    ignore_eos: bool = False
    """go on after the model's end tokens"""
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logprobs: int | None = None
    """best candidates told of each token, besides its own log-probability; None: nothing is told"""
    prompt_logprobs: bool = False
    """tell those of the prompt's tokens, too (`echo` of completions)"""
    grammar: Grammar | None = None
    adapter: str | None = None
    """digest of a loaded adapter; None: the base model"""
    keep_prefix: int = 0
    """tokens at the start of the prompt whose KV stays in the prefix cache for good: a system prompt of our own"""
    priority: int = 0
    deadline_s: float | None = None
    """seconds that were left when this message was sent"""
    fair_key: str = ""
    routing_key: str | None = None
    """names requests that go well together; used by the policy of that name"""

    @property
    def cost(self) -> int:
        """Tokens that all answers may come to, prompt included: the unit of limits on what may wait."""
        return len(self.prompt) + self.n * self.max_tokens


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """What the model thought of one token of an answer, after penalties and biases, at temperature 1."""

    token_id: int
    logprob: float | None
    """natural logarithm; None for the first token of a prompt"""
    top: tuple[tuple[int, float], ...] = ()
    """the best candidates, best first"""


class TextUsage(msgspec.Struct, frozen=True):
    """Tokens of a request."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """of the prompt, whose KV was there already"""
    completion_tokens: int = 0
    """of all answers"""


class TextTimings(msgspec.Struct, frozen=True):
    """Where the time of one request went, in seconds."""

    queue: float = 0.0
    prefill: float = 0.0
    """from its first step to its first token"""
    decode: float = 0.0
    """from its first token to its last"""
    total: float = 0.0


class TextOutput(msgspec.Struct, frozen=True, kw_only=True):
    """One answer, as `LLM.generate` gives it."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None
    stop_reason: str | int | None = None
    """the stop text, or the id of the stop token, that ended it; None: the model's own end, or its limit"""
    usage: TextUsage = TextUsage()
    """of its request"""


class TextCard(msgspec.Struct, frozen=True, kw_only=True):
    """What the outside needs to know of a language model; filled by `llm.card.describe` without torch."""

    name: str
    family: str
    """row of `llm/models/registry.py`"""
    path: str
    """the model's folder, or its GGUF file"""
    format: Literal["safetensors", "gguf"]
    context: int
    """tokens that the model was made for"""
    vocab_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    parameters: int
    weight_bytes: int
    """of the files"""
    eos_ids: tuple[int, ...]
    bos_id: int | None = None
    chat: bool = False
    """whether it comes with a chat template"""
    defaults: TextSampling = TextSampling()
    """the checkpoint's own choice for what the user leaves open (generation_config.json)"""


class TextInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A language model that is loaded; made by `TextCore`."""

    device: str
    dtype: str
    backend: str
    """what computes its matrices and attention, in words"""
    parameters: int
    context: int
    """tokens that a prompt and its answer may have together: the model's, the setting's, or what the pages hold"""
    kv_pages: int
    kv_page_size: int
    chunk_tokens: int
    """of a step at most, besides one of each answer"""
    weight_bytes: int = 0
    """in memory, of this rank"""
    kv_bytes: int = 0
