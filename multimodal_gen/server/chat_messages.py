"""Messages of a chat, checked, as chat templates want them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from multimodal_gen.errors import InvalidJson, InvalidValue, UnknownParameter, UnsupportedParameter, did_you_mean
from multimodal_gen.server.json_body import MAX_DEPTH, check_tree
from multimodal_gen.server.schemas import Unknown, shown

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""role of a client's message → of the template's"""

_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning"}
# What clients send back of an assistant's message that means nothing to a model.
_IDLE = {"refusal", "annotations", "parsed", "id", "index"}
_PARTS_ELSEWHERE = ("image_url", "input_image", "input_audio", "audio_url", "video_url", "file")
MAX_TEMPLATE_KWARGS = 16
MAX_KWARG_CHARS = 256
# Variables that a template gets from us.
_OURS = {
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize",
    "bos_token", "eos_token", "unk_token", "pad_token", "range", "raise_exception", "strftime_now", "loop", "self",
}  # fmt: skip


def read_messages(messages: Sequence[Mapping[str, Any]], unknown: Unknown) -> list[dict[str, Any]]:
    """Messages with one text each, arguments of tool calls as objects, and no field that a template does not know.

    Raises: UnknownParameter, UnsupportedParameter, InvalidValue, naming the place.
    """
    if not messages:
        raise InvalidValue("'messages' is empty: a chat begins with one message at least.", param="messages")
    return [_message(message, f"messages[{at}]", unknown) for at, message in enumerate(messages)]


def _message(message: Mapping[str, Any], place: str, unknown: Unknown) -> dict[str, Any]:
    given = {name: value for name, value in message.items() if value is not None and name not in _IDLE}
    strange = next((name for name in given if name not in _FIELDS), None)
    if strange is not None and unknown == "error":
        raise UnknownParameter(
            f"Unknown field {strange[:64]!a} in {place}.{did_you_mean(strange[:64], _FIELDS)}", param=place
        )
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidValue(f"{place}.role must be one of {', '.join(ROLES)}, got {shown(role)}.", param=f"{place}.role")
    read: dict[str, Any] = {"role": ROLES[role], "content": _content(given.get("content"), f"{place}.content")}
    for name in ("name", "tool_call_id", "reasoning_content", "reasoning"):
        if name in given:
            key = "reasoning_content" if name == "reasoning" else name
            read[key] = _text(given[name], f"{place}.{name}")
    if "tool_calls" in given:
        if role != "assistant":
            raise InvalidValue(f"{place}.tool_calls: only an assistant calls tools.", param=f"{place}.tool_calls")
        read["tool_calls"] = _calls(given["tool_calls"], f"{place}.tool_calls")
    elif "content" not in given and role != "assistant":
        raise InvalidValue(f"{place}.content is missing.", param=f"{place}.content")
    return read


def _content(content: object, place: str) -> str:
    """One text of a text, of a list of parts, or of nothing."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidValue(f"{place} must be a text, or a list of parts, got {shown(content)}.", param=place)
    return "".join(_part(part, f"{place}[{at}]") for at, part in enumerate(content))


def _part(part: object, place: str) -> str:
    if not isinstance(part, dict):
        raise InvalidValue(f"{place} must be an object such as {{'type': 'text', 'text': …}}.", param=place)
    kind = part.get("type")
    if kind in _PARTS_ELSEWHERE:
        raise UnsupportedParameter(
            f"{place} is of type {kind!r}: this server's language model reads text.", param=place
        )
    if kind not in ("text", "input_text", "output_text", "refusal"):
        raise InvalidValue(f"{place}.type must be 'text', got {shown(kind)}.", param=place)
    return _text(part.get("refusal" if kind == "refusal" else "text"), f"{place}.text")


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise InvalidValue(f"{place} must be a text, got {shown(value)}.", param=place)
    return value


def _calls(calls: object, place: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise InvalidValue(f"{place} must be a list, got {shown(calls)}.", param=place)
    return [_call(call, f"{place}[{at}]") for at, call in enumerate(calls)]


def _call(call: object, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise InvalidValue(f"{place} must be an object with a 'function'.", param=place)
    name = _text(function.get("name"), f"{place}.function.name")
    written = _text(function.get("arguments", "{}"), f"{place}.function.arguments")
    try:
        arguments = json.loads(written)
        if isinstance(arguments, dict):
            check_tree(arguments)
    except (ValueError, RecursionError, InvalidJson):
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidValue(
            f"{place}.function.arguments must be a JSON object, as text, nested {MAX_DEPTH} deep at most and without "
            "lone surrogates.",
            param=place,
        )
    read: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("id") is not None:
        read["id"] = _text(call["id"], f"{place}.id")
    return read


def template_variables(kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a client may set in the checkpoint's chat template: a few plain values. Raises: InvalidValue."""
    kwargs = kwargs or {}
    if len(kwargs) > MAX_TEMPLATE_KWARGS:
        raise InvalidValue(
            f"'chat_template_kwargs' may hold at most {MAX_TEMPLATE_KWARGS} values.", param="chat_template_kwargs"
        )
    for name, value in kwargs.items():
        if not name.isidentifier() or len(name) > 64 or name.startswith("_") or name in _OURS:
            raise InvalidValue(
                f"'chat_template_kwargs' may not set {name[:64]!a}; it is for switches such as 'enable_thinking'.",
                param="chat_template_kwargs",
            )
        if not isinstance(value, (bool, int, float, str, type(None))) or len(str(value)) > MAX_KWARG_CHARS:
            raise InvalidValue(
                f"'chat_template_kwargs' holds plain values of at most {MAX_KWARG_CHARS} characters; {name!r} is none.",
                param="chat_template_kwargs",
            )
    return dict(kwargs)
