"""Text to token ids and back, with the checkpoint's own tokenizer. No torch, no transformers.

Control tokens (`special` in tokenizer.json) steer the model: they mark who speaks and where an answer ends. In text
that a user wrote they are never read as tokens: `encode` takes their letters for letters. Only a chat template writes
them, through `encode_parts`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from multimodal_gen.errors import CorruptModel, InvalidValue
from multimodal_gen.llm.gguf_tokenizer import from_gguf
from multimodal_gen.llm.vocabulary import Spelling, Vocabulary, spell, spelling_of
from multimodal_gen.text import TextCard

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
MAX_FILE_BYTES = 256 << 20
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Added:
    """A token that is found in text before anything else is."""

    id: int
    content: str
    special: bool
    lstrip: bool  # takes the white space before it along
    rstrip: bool


class Tokenizer:
    """Made by `load`. Threads may share it."""

    def __init__(self, backend: Backend, vocab_size: int, named: dict[str, str], eos_ids: tuple[int, ...]) -> None:
        """`vocab_size`: tokens that the model has. `named`: bos_token and so on, as templates call them."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        # Reads letters of special tokens as text; the other one, made by the first template, does not.
        self._backend.encode_special_tokens = True
        self.vocab_size, self.named, self.eos_ids = vocab_size, named, eos_ids
        self.added = {
            token.content: Added(at, token.content, token.special, token.lstrip, token.rstrip)
            for at, token in backend.get_added_tokens_decoder().items()
        }
        self.special_ids = frozenset(token.id for token in self.added.values() if token.special)
        self._added_ids = {token.id: token.content for token in self.added.values()}

    @classmethod
    def load(cls, card: TextCard) -> Tokenizer:
        """The tokenizer beside a model's weights.

        Raises: CorruptModel naming the file, for one that is absent, damaged or of a kind that is not read here.
        """
        if card.format == "gguf":
            backend, named = from_gguf(Path(card.path))
        else:
            backend, named = backend_of(Path(card.path)), named_tokens(Path(card.path))
        return cls(backend, card.vocab_size, named, card.eos_ids)

    # --- to ids ---------------------------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of a text that somebody wrote. `add_special`: with what the tokenizer puts around every text (a
        beginning token, with some models). Raises: InvalidValue for text that is no Unicode."""
        return self._checked(self._backend, text, add_special)

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of what a template wrote without a user's letters of control tokens in it: those that are there
        are control tokens."""
        return self._checked(self._control, text, False)

    def encode_parts(self, parts: Sequence[str | Added]) -> list[int]:
        """Token ids of text and control tokens in turn; no letters become a control token."""
        ids = list[int]()
        for before, part, after in zip([None, *parts], parts, [*parts[1:], None], strict=False):
            if isinstance(part, Added):
                ids.append(part.id)
                continue
            if isinstance(before, Added) and before.rstrip:
                part = part.lstrip()
            if isinstance(after, Added) and after.lstrip:
                part = part.rstrip()
            if part:
                ids += self.encode(part, add_special=False)
        return ids

    def _checked(self, backend: Backend, text: str, add_special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidValue("The text holds half of a surrogate pair, which is no character.") from None
        # In a batch of one: six times as fast, without offsets, and other threads run meanwhile.
        ids = backend.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
        if ids and max(ids) >= self.vocab_size:
            token = backend.id_to_token(max(ids))
            raise InvalidValue(f"The text holds {token!r}, a token that this model's vocabulary does not reach to.")
        return ids

    @cached_property
    def _control(self) -> Backend:
        backend = copy.deepcopy(self._backend)
        backend.encode_special_tokens = False
        return backend

    # --- to text --------------------------------------------------------------------------------------------------

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """One text; ids that the tokenizer does not have are nothing."""
        return self.decode_batch(
            [ids], skip_special_tokens=skip_special_tokens, spaces_between_special_tokens=spaces_between_special_tokens
        )[0]

    def decode_batch(
        self, sequences: Sequence[Sequence[int]], *, skip_special_tokens: bool, spaces_between_special_tokens: bool
    ) -> list[str]:
        """One text for each sequence, in one call of the library.

        `spaces_between_special_tokens` leaves them as the tokenizer's decoder puts them; without, added tokens stand
        without a space between them and the next.
        """
        if spaces_between_special_tokens or skip_special_tokens:
            return self._backend.decode_batch([*map(list, sequences)], skip_special_tokens=skip_special_tokens)
        runs, owners = list[list[int]](), list[int]()
        pieces: list[list[str]] = [[] for _ in sequences]
        for owner, ids in enumerate(sequences):
            for added, run in groupby(ids, self._added_ids.__contains__):
                if added:
                    pieces[owner].append("".join(self._added_ids[token] for token in run))
                else:
                    pieces[owner].append("")
                    owners.append(owner)
                    runs.append(list(run))
        texts = iter(self._backend.decode_batch(runs, skip_special_tokens=False)) if runs else iter(())
        return ["".join(piece or next(texts) for piece in row) for row in pieces]

    # --- single tokens --------------------------------------------------------------------------------------------

    @cached_property
    def _spelling(self) -> Spelling:
        return spelling_of(self._backend.to_str())

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text: not always whole characters. Nothing for an id that the tokenizer does not
        have."""
        if token_id in self._added_ids:
            return self._added_ids[token_id].encode()
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else spell(token, self._spelling)

    def token_text(self, token_id: int) -> str:
        """The same as text, with U+FFFD for what is no character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """All tokens as bytes, as grammars need them: special ones are empty, since no text holds them."""
        tokens = [b""] * self.vocab_size
        for token, at in self._backend.get_vocab(with_added_tokens=False).items():
            if at < self.vocab_size:
                tokens[at] = spell(token, self._spelling)
        for added in self.added.values():
            if added.id < self.vocab_size:
                tokens[added.id] = b"" if added.special else added.content.encode()
        return Vocabulary(tuple(tokens), self.eos_ids)


def backend_of(folder: Path) -> Backend:
    """The library's tokenizer of a folder. Raises: CorruptModel."""
    data = _read(folder, TOKENIZER_FILE)
    if data is None:
        raise CorruptModel(
            f"{folder.name}/{TOKENIZER_FILE} is missing; without it, text cannot become tokens. Download it, or write "
            "it with transformers' AutoTokenizer(...).save_pretrained."
        )
    try:
        return Backend.from_buffer(data)
    except Exception as error:  # noqa: BLE001 the library raises bare exceptions
        raise CorruptModel(f"{folder.name}/{TOKENIZER_FILE} cannot be read: {str(error)[:200]}.") from None


def named_tokens(folder: Path) -> dict[str, str]:
    """bos_token and so on, of tokenizer_config.json. Raises: CorruptModel."""
    content = read_config(folder)
    named = {}
    for name in NAMED:
        token = content.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            named[name] = token
    return named


def read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; empty where there is none. Raises: CorruptModel."""
    data = _read(folder, CONFIG_FILE)
    try:
        content = {} if data is None else json.loads(data)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CorruptModel(f"{folder.name}/{CONFIG_FILE} is damaged: it is no JSON object. Download it again.")
    return content


def _read(folder: Path, name: str) -> bytes | None:
    path = folder / name
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CorruptModel(f"{folder.name}/{name} has more than {MAX_FILE_BYTES >> 20} MiB.")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CorruptModel(f"{folder.name}/{name} cannot be read: {error.strerror}.") from None
