"""What an answer must look like: JSON of a schema, a regular expression, a grammar, calls of tools: one rule of all
that a request asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from multimodal_gen.config import ServerConfig
from multimodal_gen.errors import InvalidValue, UnknownParameter, UnsupportedParameter
from multimodal_gen.llm.front import TextFront
from multimodal_gen.llm.parsers.reasoning import ReasoningFormat, after_reasoning, reasoning_format
from multimodal_gen.llm.parsers.tools.registry import ToolFormat, forced, offered, tool_format
from multimodal_gen.server.schemas import shown
from multimodal_gen.server.text_schemas import TextWish
from multimodal_gen.server.tool_wishes import ToolWish
from multimodal_gen.text import GrammarKind


@dataclass(frozen=True)
class Forms:
    """How this server's model writes what is not plain text."""

    tools: ToolFormat | None
    reasoning: ReasoningFormat | None

    @classmethod
    def of(cls, config: ServerConfig, front: TextFront | None) -> Forms:
        """As the settings say, else as the model's chat template shows. Raises: ConfigError."""
        source = None if front is None or front.template is None else front.template.source
        return cls(tool_format(config.tool_call_parser, source), reasoning_format(config.reasoning_parser, source))


@dataclass(frozen=True)
class Rule:
    """A grammar that is still to be compiled."""

    kind: GrammarKind
    source: str
    param: str  # the field that it comes from


@dataclass(frozen=True)
class Shape:
    """How answers are written and read."""

    rule: Rule | None = None
    tools: ToolFormat | None = None  # None: no calls are looked for


def read_rule(wish: TextWish) -> Rule | None:
    """The one rule for the text of an answer. Raises: InvalidValue, UnsupportedParameter, naming the field."""
    rules = []
    form = _response_format(wish.response_format)
    if form is not None:
        rules.append(form)
    if wish.regex is not None:
        rules.append(Rule("regex", wish.regex, "regex"))
    if wish.ebnf is not None:
        rules.append(Rule("ebnf", wish.ebnf, "ebnf"))
    if len(rules) > 1:
        raise InvalidValue(
            f"An answer can follow one rule: give {rules[0].param!r} or {rules[1].param!r}, not both.",
            param=rules[1].param,
        )
    return rules[0] if rules else None


def _response_format(form: Mapping[str, Any] | None) -> Rule | None:
    if form is None:
        return None
    kind = form.get("type")
    known: dict[str, set[str]] = {
        "text": set(), "json_object": {"schema"}, "json_schema": {"json_schema"}, "structural_tag": {"format"},
    }  # fmt: skip
    if not isinstance(kind, str) or kind not in known:
        raise InvalidValue(
            f"response_format.type must be one of {', '.join(known)}, got {shown(kind)}.", param="response_format"
        )
    strange = next((name for name in form if name not in known[kind] | {"type"}), None)
    if strange is not None:
        raise UnknownParameter(f"Unknown field {strange[:64]!a} in response_format.", param="response_format")
    if kind == "text":
        return None
    if kind == "json_object" and form.get("schema") is None:
        return Rule("json_object", "", "response_format")
    if kind == "structural_tag":
        if not isinstance(form.get("format"), dict):
            raise InvalidValue("response_format.format must be an object.", param="response_format")
        return Rule("structural_tag", _dumped({"type": "structural_tag", "format": form["format"]}), "response_format")
    schema = form.get("schema") if kind == "json_object" else _schema(form.get("json_schema"))
    if not isinstance(schema, dict):
        raise InvalidValue(
            f"The schema of response_format must be an object, got {shown(schema)}.", param="response_format"
        )
    return Rule("json_schema", _dumped(schema), "response_format")


def _schema(named: object) -> object:
    """OpenAI puts a name around the schema. Whatever `strict` says, answers match."""
    if not isinstance(named, dict):
        raise InvalidValue("response_format.json_schema must be an object with a 'schema'.", param="response_format")
    strange = next((name for name in named if name not in {"name", "description", "schema", "strict"}), None)
    if strange is not None:
        raise UnknownParameter(
            f"Unknown field {strange[:64]!a} in response_format.json_schema.", param="response_format"
        )
    return named.get("schema")


def shape(
    rule: Rule | None,
    wish: ToolWish,
    form: ToolFormat | None,
    reasoning: ReasoningFormat | None,
    *,
    inside: bool,
) -> Shape:
    """What answers must match altogether. `form`: how the model writes calls; `reasoning`: what it may write before;
    `inside`: whether its answer starts there.

    Raises: UnsupportedParameter.
    """
    if wish.mode != "none" and form is None:
        raise UnsupportedParameter("This server offers no tools to its model (--tool-call-parser none).", param="tools")
    written, matched = _calls(wish, form, rule)
    if matched is None:
        if rule is None or reasoning is None:
            return Shape(rule, written)
        matched = _as_tag(rule)
    if reasoning is not None:
        matched = after_reasoning(reasoning, matched, inside=inside)
    param = rule.param if rule is not None and written is None else "tools"
    return Shape(Rule("structural_tag", _dumped({"type": "structural_tag", "format": matched}), param), written)


def _calls(
    wish: ToolWish, form: ToolFormat | None, rule: Rule | None
) -> tuple[ToolFormat | None, dict[str, Any] | None]:
    """How calls are written, and the part of a structural tag that says so; None where nothing has to be forced."""
    if wish.mode == "none" or form is None:
        return None, None
    written, calls = forced(form, wish.allowed, parallel=wish.parallel)
    if wish.mode == "required":
        return written, calls
    if rule is not None:  # calls, or an answer that matches
        return written, {"type": "or", "elements": [calls, _as_tag(rule)]}
    if not any(tool.strict for tool in wish.allowed):
        return form, None
    free = offered(form, wish.allowed, parallel=wish.parallel)
    if free is not None:
        return form, free
    # No mark tells calls from text, so a text is what does not begin like one.
    return written, {"type": "or", "elements": [calls, {"type": "regex", "pattern": r"[^\[{\s](.|\n)*"}]}


def _as_tag(rule: Rule) -> dict[str, Any]:
    """A rule as part of a structural tag."""
    if rule.kind == "json_schema":
        return {"type": "json_schema", "json_schema": json.loads(rule.source)}
    if rule.kind == "json_object":
        return {"type": "json_schema", "json_schema": {"type": "object"}}
    if rule.kind == "regex":
        return {"type": "regex", "pattern": rule.source}
    if rule.kind == "ebnf":
        return {"type": "grammar", "grammar": rule.source}
    tag = json.loads(rule.source)["format"]
    assert isinstance(tag, dict)
    return tag


def _dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
