"""Tools for models whose chat template knows none: what they need to know stands in the system message, and calls and
results in ordinary ones, in the format of Hermes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from multimodal_gen.llm.parsers.tools.base import Tool
from multimodal_gen.llm.parsers.types import dumped

_INTRODUCTION = """You may call functions to help with the user's request. They are described as JSON schemas within \
<tools></tools>:
<tools>
%s
</tools>

To call one, answer with its name and arguments as JSON within <tool_call></tool_call>:
<tool_call>
{"name": "NAME", "arguments": {}}
</tool_call>"""


def knows_tools(template: str) -> bool:
    """Whether a chat template does something with tools."""
    return "tools" in template


def instructed(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The same conversation without `tools`, `tool_calls` and the role `tool`."""
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    told = _INTRODUCTION % "\n".join(dumped(tool.listed()) for tool in tools)
    if plain and plain[0]["role"] == "system":
        first = {**plain[0], "content": f"{plain[0]['content']}\n\n{told}"}
        return [first, *plain[1:]]
    return [{"role": "system", "content": told}, *plain]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in message.items() if name not in ("tool_calls", "tool_call_id")}
    if message["role"] == "tool":
        return {**kept, "role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [
        "<tool_call>\n" + dumped({name: call["function"][name] for name in ("name", "arguments")}) + "\n</tool_call>"
        for call in message.get("tool_calls", ())
    ]
    return {**kept, "content": "\n".join([*filter(None, [message["content"]]), *calls])}
