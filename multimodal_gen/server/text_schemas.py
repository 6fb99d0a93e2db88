"""The requests for text: OpenAI's fields, ours, and which of their values we honour. As in `schemas`, types are strict,
`null` means the default, and nothing is clamped or ignored.

What is inside of messages, tools and formats is read by `chat_messages`, `tool_wishes` and `text_formats`; bounds of
numbers are checked by `llm.asking`.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from multimodal_gen.errors import UnsupportedParameter
from multimodal_gen.request import MAX_SEED
from multimodal_gen.server.schemas import Unknown, validated
from multimodal_gen.text import MAX_CHOICES, MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOPS


class TextWish(BaseModel):
    """What chats and completions may say alike. Field descriptions appear in /openapi.json and /docs."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str | None = Field(
        None, description="Id from /v1/models, or `id:adapter` for an adapter of it; default: the language model."
    )
    max_tokens: int | None = Field(None, description="Tokens of each answer at most.")
    n: int | None = Field(None, description=f"Answers, 1 (default) to {MAX_CHOICES}.")
    temperature: float | None = Field(None, description="0 takes the likeliest token; default: the checkpoint's.")
    top_p: float | None = Field(None, description="Smallest set of candidates of this probability; 0 to 1.")
    frequency_penalty: float | None = Field(None, description="-2 to 2, default 0: for every time a token came.")
    presence_penalty: float | None = Field(None, description="-2 to 2, default 0: for tokens that came at all.")
    logit_bias: dict[str, float] | None = Field(
        None, description=f"Token id → -100 to 100, added to its logit; at most {MAX_LOGIT_BIAS:,}."
    )
    seed: int | None = Field(None, description=f"0 to {MAX_SEED}; answer i uses its own stream of it; default: random.")
    stop: str | list[str] | None = Field(None, description=f"Up to {MAX_STOPS} texts that end an answer.")
    stream: bool | None = Field(None, description="Answer with server-sent events; default false.")
    stream_options: dict[str, Any] | None = Field(
        None, description="`include_usage`: a last chunk tells the usage. Needs `stream`."
    )
    user: str | None = Field(None, max_length=512, description="Your end user: users share the machine fairly.")
    safety_identifier: str | None = Field(None, max_length=512, description="Same as `user`, and wins over it.")

    top_k: int | None = Field(None, description="Candidates kept; 0 and -1: all; default: the checkpoint's.")
    min_p: float | None = Field(None, description="Candidates with less than this share of the best one's are dropped.")
    repetition_penalty: float | None = Field(None, description="Of tokens of prompt and answer; 1: none.")
    min_tokens: int | None = Field(None, description="Before, neither end tokens nor stops count; default 0.")
    stop_token_ids: list[int] | None = Field(None, description="Tokens that end an answer, besides the model's own.")
    include_stop_str_in_output: bool | None = Field(None, description="Leave the stop text in; default false.")
    ignore_eos: bool | None = Field(None, description="Go on after the model's end token; default false.")
    skip_special_tokens: bool | None = Field(None, description="Leave control tokens out of texts; default true.")
    spaces_between_special_tokens: bool | None = Field(None, description="As the tokenizer puts them; default true.")
    response_format: dict[str, Any] | None = Field(
        None, description='`{"type": "text" | "json_object" | "json_schema" | "structural_tag", …}`.'
    )
    regex: str | None = Field(None, description="The whole answer matches this regular expression.")
    ebnf: str | None = Field(None, description="The whole answer matches this grammar, from its rule `root`.")
    lora_path: str | None = Field(None, description="Name of a loaded adapter, or a path of one under --lora-root.")
    priority: int | None = Field(None, description="-100 to the server's --max-priority: higher runs first; default 0.")
    deadline_s: float | None = Field(
        None, description="Seconds after which the answer is worthless: the request is dropped with 504."
    )


class ChatWish(TextWish):
    """`POST /v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(description="The conversation; see docs/openai_api.md.")
    max_completion_tokens: int | None = Field(None, description="Same as `max_tokens`; default: what the context has.")
    logprobs: bool | None = Field(None, description="Tell log-probabilities of the answer's tokens; default false.")
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description=f"Best candidates of each token, 0 to {MAX_LOGPROBS}; needs `logprobs`.",
    )
    tools: list[dict[str, Any]] | None = Field(None, description="Functions that the model may call.")
    tool_choice: str | dict[str, Any] | None = Field(
        None, description="`auto` (default), `none`, `required`, or one function."
    )
    parallel_tool_calls: bool | None = Field(None, description="Several calls in one answer; default true.")
    separate_reasoning: bool | None = Field(
        None, description="Tell the reasoning as `reasoning_content` (default), or as it is written in `content`."
    )
    stream_reasoning: bool | None = Field(
        None, description="Tell the reasoning as it comes (default), or all at once before the answer."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Switches of the model's chat template, such as `enable_thinking`; plain values only."
    )
    metadata: dict[str, Any] | None = Field(None, description="Accepted; this server stores nothing.")
    store: Literal[False] | None = Field(None, description="This server stores nothing.")
    prompt_cache_key: str | None = Field(None, description="Accepted; what begins alike is found without it.")
    service_tier: Literal["auto", "default"] | None = Field(None, description="There is one tier.")
    modalities: list[Literal["text"]] | None = Field(None, description="Text only.")


class CompletionWish(TextWish):
    """`POST /v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]] = Field(
        description="A text, token ids, or a list of either, each of which gets its `n` answers."
    )
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description=f"Tell log-probabilities, and of 0 to {MAX_LOGPROBS} candidates."
    )
    echo: bool | None = Field(None, description="Begin each answer with its prompt; default false.")


class TokenizeWish(BaseModel):
    """`POST /v1/tokenize`: a text, or a conversation."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str | None = Field(None, description="Id from /v1/models; default: the language model.")
    prompt: str | None = Field(None, description="A text.")
    messages: list[dict[str, Any]] | None = Field(None, description="A conversation, instead of `prompt`.")
    tools: list[dict[str, Any]] | None = Field(None, description="Functions, beside `messages`.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="As in chats, beside `messages`.")
    add_special_tokens: bool | None = Field(
        None, description="With what the tokenizer puts around every text; default true. Not beside `messages`."
    )
    add_generation_prompt: bool | None = Field(
        None, description="With the beginning of the answer; default true. Only beside `messages`."
    )
    return_token_strs: bool | None = Field(None, description="Tell the text of each token, too; default false.")


class DetokenizeWish(BaseModel):
    """`POST /v1/detokenize`."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str | None = Field(None, description="Id from /v1/models; default: the language model.")
    tokens: list[int] = Field(description="Token ids.")
    skip_special_tokens: bool | None = Field(None, description="Leave control tokens out; default false.")


TEXT_FIELDS = frozenset().union(
    *(wish.model_fields for wish in (ChatWish, CompletionWish, TokenizeWish, DetokenizeWish))
)
_NO_EMBEDDINGS = "prompts are text or token ids; tensors of clients are never read"
_CHECKPOINTS_ONLY = "only the checkpoint's own template is used"
_USE_TOOLS = "use 'tools' and 'tool_choice'"
_TEXT_ONLY = "this server's language model reads and writes text"
# Field → what to do instead; fields that OpenAI or other servers know and we do not.
UNSUPPORTED: dict[str, str] = {
    "functions": _USE_TOOLS,
    "function_call": _USE_TOOLS,
    "best_of": "ask for 'n' answers and choose among them",
    "suffix": "write what comes after into the prompt",
    "audio": _TEXT_ONLY,
    "web_search_options": "this server searches nothing",
    "prediction": "there is nothing that it would speed up",
    "reasoning_effort": 'use chat_template_kwargs, such as {"enable_thinking": false}, if the model\'s template has it',
    "verbosity": "say in the prompt how long the answer should be",
    "chat_template": _CHECKPOINTS_ONLY,
    "prompt_embeds": _NO_EMBEDDINGS,
    "input_embeds": _NO_EMBEDDINGS,
    "prompt_ids": "give token ids as 'prompt'",
    "mm_processor_kwargs": "there are no processors to set up",
    "logits_processors": "no code of clients is run",
    "custom_logit_processor": "no code of clients is run",
    "use_beam_search": "answers are sampled; ask for 'n' of them",
    "guided_json": 'use response_format {"type": "json_schema", …}',
    "guided_regex": "use 'regex'",
    "guided_grammar": "use 'ebnf'",
}
_EITHER = {
    "stop": "a text, or a list of texts",
    "prompt": "a text, a list of token ids, or a list of either",
    "tool_choice": "'auto', 'none', 'required' or {\"type\": \"function\", \"function\": {\"name\": …}}",
    "logit_bias": "an object of token ids and numbers",
    "modalities": "[\"text\"]",
}  # fmt: skip
Wish = TypeVar("Wish", ChatWish, CompletionWish, TokenizeWish, DetokenizeWish)


def read_wish(body: dict[str, Any], schema: type[Wish], unknown: Unknown) -> tuple[Wish, list[str]]:
    """The request in a JSON object, and the names of unknown fields where those are only worth a warning.

    Raises: UnknownParameter, UnsupportedParameter; the InvalidValue family, naming the field.
    """
    for name, advice in UNSUPPORTED.items():
        harmless = name == "best_of" and body.get(name) == (body.get("n") or 1)
        if body.get(name) is not None and not harmless:
            raise UnsupportedParameter(f"{name!r} is not supported: {advice}.", param=name)
    known = {name: value for name, value in body.items() if name not in UNSUPPORTED}
    return validated(known, schema, unknown, _EITHER)
