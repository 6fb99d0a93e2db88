"""Prompts as token ids in the chat template of a checkpoint's tokenizer, for text encoders that are chat models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from multimodal_gen.errors import CorruptModel
from multimodal_gen.llm.sandbox import environment
from multimodal_gen.llm.template import source_of
from multimodal_gen.llm.tokenizer import TOKENIZER_FILE, backend_of, named_tokens


class Reader(Protocol):
    """Reads one turn of a user, as the beginning of an answer wants it."""

    def __call__(self, prompt: str, max_length: int | None) -> list[int]:
        """Token ids, cut to `max_length`."""


def load(folder: Path) -> Reader:
    """The reader of a tokenizer/ folder. Raises: CorruptModel."""
    source = source_of(folder)
    if source is None or not (folder / TOKENIZER_FILE).is_file():
        return OfTransformers(folder)  # whose classes know older layouts
    return OfFile(backend_of(folder), *source, named_tokens(folder))


class OfFile:
    """By tokenizer.json and the template, as transformers would read them."""

    def __init__(self, backend: Tokenizer, source: str, shown: str, named: dict[str, str]) -> None:
        """`named`: bos_token and so on. Raises: CorruptModel for a template that jinja cannot read."""
        import jinja2

        backend.no_padding()
        self._backend, self._named = backend, named
        try:
            self._template = environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise CorruptModel(f"{shown}: its chat template cannot be read: {str(error)[:200]}.") from None

    def __call__(self, prompt: str, max_length: int | None) -> list[int]:
        text = self._template.render(
            **self._named,
            messages=[{"role": "user", "content": prompt}],
            tools=None,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        if max_length is None:
            self._backend.no_truncation()
        else:
            self._backend.enable_truncation(max_length)
        ids: list[int] = self._backend.encode(text).ids
        return ids


class OfTransformers:
    """By whatever class transformers has for the folder."""

    def __init__(self, folder: Path) -> None:
        """Raises: CorruptModel."""
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CorruptModel(f"{folder} cannot be loaded: {error}") from None

    def __call__(self, prompt: str, max_length: int | None) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        ids: list[int] = self._tokenizer(text, truncation=max_length is not None, max_length=max_length).input_ids
        return ids
