"""Chat templates: how a checkpoint wants a conversation written down.

Only the checkpoint's own template runs, in jinja's sandbox, with bounds on what it writes and for how long. What users
wrote goes through it with their letters of control tokens marked, and comes out as text: no message can end itself or
speak for somebody else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.nodes

from multimodal_gen.errors import CorruptModel, InvalidValue, PromptTooLong
from multimodal_gen.llm.gguf_tokenizer import metadata
from multimodal_gen.llm.marks import Marks
from multimodal_gen.llm.sandbox import TemplateRefused, check_time, environment, time_limit
from multimodal_gen.llm.tokenizer import Tokenizer, read_config
from multimodal_gen.text import TextCard

TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE_CHARS = 1 << 20
MAX_RENDERED_CHARS = 16 << 20
RENDER_S = 5.0
# What an expression in a template may come to.
FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


@dataclass(frozen=True)
class ChatTemplate:
    """Made by `load`. Threads may share it."""

    source: str
    shown: str  # its file, for messages

    @classmethod
    def load(cls, card: TextCard) -> ChatTemplate | None:
        """The template that comes with a model; None where there is none.

        Raises: CorruptModel for one that jinja cannot read.
        """
        path = Path(card.path)
        found = _of_gguf(path) if card.format == "gguf" else source_of(path)
        if found is None:
            return None
        template = cls(*found)
        if len(template.source) > MAX_TEMPLATE_CHARS:
            raise CorruptModel(
                f"{template.shown}: a chat template of {len(template.source):,} characters is no template."
            )
        try:
            template._compiled  # noqa: B018 compiling is the check
        except (jinja2.TemplateError, RecursionError) as error:
            raise CorruptModel(f"{template.shown}: its chat template cannot be read: {str(error)[:200]}.") from None
        return template

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return environment().from_string(self.source)

    @cached_property
    def literals(self) -> str:
        """All that the template may write by itself, its pieces apart from one another."""
        tree = environment().parse(self.source)
        found = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
        found |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
        return "\0".join(sorted(found))

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        generate: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, with the beginning of the answer where `generate` asks for it.

        `messages` are as OpenAI's; a list of text parts counts as one text. `variables` reach the template beside them
        (`enable_thinking`). Raises: InvalidValue with param `messages` where the template refuses the conversation;
        PromptTooLong where it comes to more text than is ever taken.
        """
        given = {
            **_plain(variables or {}),
            "messages": [_message(message) for message in messages],
            "tools": _plain(list(tools or ())) or None,
        }
        marks = Marks.of(given, tokenizer, self.literals)
        text = self._render({**tokenizer.named, **marks.put(given), "add_generation_prompt": generate})
        if not marks.mark:
            return tokenizer.encode_rendered(text)
        return tokenizer.encode_parts(marks.parts(text))

    def _render(self, variables: dict[str, Any]) -> str:
        written, size = list[str](), 0
        try:
            with time_limit(RENDER_S):
                for part in self._compiled.generate(variables):
                    written.append(part)
                    size += len(part)
                    check_time()
                    if size > MAX_RENDERED_CHARS:
                        break
        except TemplateRefused as refused:
            raise InvalidValue(f"The model's chat template refuses this: {refused}.", param="messages") from None
        except FAULTS as error:
            # The template's author did not think of such a conversation; its words help whoever wrote the messages.
            raise InvalidValue(
                f"The model's chat template cannot write these messages down ({type(error).__name__}: "
                f"{str(error)[:200]}).",
                param="messages",
            ) from None
        if size > MAX_RENDERED_CHARS:
            raise PromptTooLong(
                f"The conversation comes to more than {MAX_RENDERED_CHARS:,} characters.", param="messages"
            )
        return "".join(written)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is null, and with one text for content: models of text have no other parts."""
    plain = {key: _plain(value) for key, value in message.items() if value is not None}
    content = plain.get("content")
    if isinstance(content, list):
        plain["content"] = "".join(map(_part, content))
    return plain


def _part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
    if not isinstance(text, str):
        raise InvalidValue("A message's content is a text, or a list of text parts.", param="messages")
    return text


def _plain(value: Any) -> Any:
    """JSON values only: objects have methods that a template could call."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise InvalidValue(f"Messages and tools hold JSON values, not {type(value).__name__}.", param="messages")


def _of_gguf(path: Path) -> tuple[str, str] | None:
    source = metadata(path, path.stat().st_mtime).get("tokenizer.chat_template")
    return (source, path.name) if isinstance(source, str) else None


def source_of(folder: Path) -> tuple[str, str] | None:
    """The template of a tokenizer's folder and its file's name for messages. Raises: CorruptModel."""
    file = folder / TEMPLATE_FILE
    if file.is_file():
        try:
            return file.read_text("utf-8"), f"{folder.name}/{TEMPLATE_FILE}"
        except (OSError, UnicodeDecodeError) as error:
            raise CorruptModel(f"{folder.name}/{TEMPLATE_FILE} cannot be read: {type(error).__name__}.") from None
    source = read_config(folder).get("chat_template")
    if isinstance(source, list):  # several by name
        source = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}.get(
            "default"
        )
    return (source, f"{folder.name}/tokenizer_config.json") if isinstance(source, str) else None
