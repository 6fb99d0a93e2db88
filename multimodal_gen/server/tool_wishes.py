"""`tools` and `tool_choice` of a chat, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from multimodal_gen.errors import InvalidValue, UnsupportedParameter, did_you_mean
from multimodal_gen.llm.parsers.tools.base import Tool
from multimodal_gen.server.schemas import shown

MAX_TOOLS = 128
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class ToolWish:
    """What the model may call. `offered` says what it is told of; `allowed` what it may call now."""

    offered: tuple[Tool, ...] = ()
    allowed: tuple[Tool, ...] = ()
    mode: Literal["none", "auto", "required"] = "none"
    parallel: bool = True


def read_tools(
    tools: Sequence[Mapping[str, Any]] | None, choice: str | Mapping[str, Any] | None, parallel: bool | None
) -> ToolWish:
    """Raises: InvalidValue, UnsupportedParameter, naming the place."""
    read = tuple(_tool(tool, f"tools[{at}]") for at, tool in enumerate(_few(tools or ())))
    names = [tool.name for tool in read]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidValue(f"Two tools are called {twice!r}.", param="tools")
    if not read:
        if choice not in (None, "none", "auto"):
            raise InvalidValue("'tool_choice' needs 'tools' to choose from.", param="tool_choice")
        if parallel is not None and tools is None:
            raise InvalidValue("'parallel_tool_calls' needs 'tools'.", param="parallel_tool_calls")
        return ToolWish()
    several = parallel is not False
    if choice is None or choice == "auto":
        return ToolWish(read, read, "auto", several)
    if choice == "none":
        return ToolWish()
    if choice == "required":
        return ToolWish(read, read, "required", several)
    named = _named(choice)
    found = tuple(tool for tool in read if tool.name == named)
    if not found:
        raise InvalidValue(
            f"'tool_choice' names {named[:64]!a}, which is not among 'tools'.{did_you_mean(named[:64], names)}",
            param="tool_choice",
        )
    return ToolWish(read, found, "required", parallel=False)


def _few(tools: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    if len(tools) > MAX_TOOLS:
        raise InvalidValue(f"'tools' may hold at most {MAX_TOOLS} functions, got {len(tools):,}.", param="tools")
    return tools


def _tool(tool: Mapping[str, Any], place: str) -> Tool:
    function = tool.get("function")
    if tool.get("type") != "function":
        raise UnsupportedParameter(
            f"{place}.type must be 'function', got {shown(tool.get('type'))}: this server calls nothing by itself.",
            param=f"{place}.type",
        )
    if not isinstance(function, dict):
        raise InvalidValue(f"{place}.function must be an object.", param=f"{place}.function")
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidValue(
            f"{place}.function.name must be 1 to 64 letters, digits, '_', '.' or '-', got {shown(name)}.",
            param=f"{place}.function.name",
        )
    if not isinstance(description, (str, type(None))):
        raise InvalidValue(f"{place}.function.description must be a text.", param=f"{place}.function.description")
    strict = function.get("strict")
    if not isinstance(strict, (bool, type(None))):
        raise InvalidValue(f"{place}.function.strict must be true or false.", param=f"{place}.function.strict")
    return Tool(
        name, description or "", _schema(function.get("parameters"), f"{place}.function.parameters"), bool(strict)
    )


def _schema(schema: object, place: str) -> dict[str, Any]:
    """The schema of a function's arguments; none means that it takes none."""
    if schema is None or schema == {}:
        return {"type": "object", "properties": {}}
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise InvalidValue(f"{place} must be a JSON schema of type 'object', got {shown(schema)}.", param=place)
    # Beside a reference, no type can be said.
    return schema if "type" in schema or "$ref" in schema else {"type": "object", **schema}


def _named(choice: str | Mapping[str, Any]) -> str:
    """The function that a client insists on."""
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(choice, Mapping) or choice.get("type") != "function" or not isinstance(name, str):
        raise InvalidValue(
            "'tool_choice' must be 'auto', 'none', 'required' or an object such as "
            f'{{"type": "function", "function": {{"name": …}}}}, got {shown(choice)}.',
            param="tool_choice",
        )
    return name
