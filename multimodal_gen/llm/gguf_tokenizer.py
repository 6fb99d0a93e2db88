"""The tokenizer that a GGUF file carries: byte-level BPE, with the ways of cutting text into words of a table."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from multimodal_gen.errors import CorruptModel
from multimodal_gen.weights.gguf_header import read_gguf

MODEL = "gpt2"  # llama.cpp's name of byte-level BPE
CONTROL, USER_DEFINED = 3, 4  # token_type
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt2() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits() -> PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(numbers: str) -> PreTokenizer:
    words = pre_tokenizers.Split(Regex(_WORDS % numbers), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# tokenizer.ggml.pre → (how words are cut, what is done to a text first, whether a word that is a token needs no merges)
PRE: dict[str, tuple[Callable[[], PreTokenizer], Callable[[], Normalizer] | None, bool]] = {
    "gpt-2": (_gpt2, None, False),
    "smollm": (_digits, None, False),
    "llama-bpe": (lambda: _split("{1,3}"), None, True),
    "qwen2": (lambda: _split(""), normalizers.NFC, False),
}
ALIASES = {"default": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}


@lru_cache(maxsize=2)
def metadata(path: Path, changed: float) -> dict[str, Any]:
    """What a GGUF file says of itself; read once for tokenizer and template. `changed`: the file's mtime."""
    return read_gguf(path, path.name).metadata


def from_gguf(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """(tokenizer, its named tokens: bos_token and so on).

    Raises: CorruptModel naming the file, for a vocabulary that is absent, damaged or of a kind not read here.
    """
    told = _Told(path)
    kind = told.text("model")
    if kind != MODEL:
        raise CorruptModel(
            f"{path.name}: a tokenizer of kind {kind!r} is not read here, only {MODEL!r} (byte-level BPE)."
        )
    pre = told.text("pre", "default")
    if ALIASES.get(pre, pre) not in PRE:
        raise CorruptModel(
            f"{path.name}: its tokenizer cuts text into words as {pre!r}, which is not known here, only "
            f"{', '.join(PRE)}."
        )
    words, normalizer, whole_words = PRE[ALIASES.get(pre, pre)]
    tokens, merges = told.texts("tokens"), [_pair(merge, path) for merge in told.texts("merges")]
    vocab = {token: at for at, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CorruptModel(f"{path.name} is damaged: its vocabulary has the same token twice.")
    try:
        backend = Tokenizer(BPE(vocab, merges, fuse_unk=False, byte_fallback=False, ignore_merges=whole_words))
    except Exception as error:  # noqa: BLE001 the library raises bare exceptions
        raise CorruptModel(f"{path.name}: its vocabulary cannot be used: {str(error)[:200]}.") from None
    backend.pre_tokenizer, backend.decoder = words(), decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer()
    _add(backend, tokens, told.kinds(len(tokens)))
    named = {name: tokens[at] for name, key in NAMED.items() if (at := told.id(key, len(tokens))) is not None}
    _wrap(backend, told, named, vocab)
    return backend, named


def _add(backend: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        found = [AddedToken(token, normalized=False) for token, own in zip(tokens, kinds, strict=True) if own == kind]
        if special:
            backend.add_special_tokens(found)
        else:
            backend.add_tokens(found)


def _wrap(backend: Tokenizer, told: _Told, named: dict[str, str], vocab: dict[str, int]) -> None:
    """Put what the model wants around every text."""
    before = [named["bos_token"]] if told.flag("add_bos_token") and "bos_token" in named else []
    after = [named["eos_token"]] if told.flag("add_eos_token") and "eos_token" in named else []
    if before or after:
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=[(token, vocab[token]) for token in {*before, *after}]
        )


def _pair(merge: str, path: Path) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not space or not left or not right:
        raise CorruptModel(f"{path.name} is damaged: {merge[:40]!r} is no merge of two tokens.")
    return left, right


class _Told:
    """Keys of `tokenizer.ggml`, with their types checked."""

    def __init__(self, path: Path) -> None:
        try:
            self._all = metadata(path, path.stat().st_mtime)
        except OSError as error:
            raise CorruptModel(f"{path.name} cannot be read: {error.strerror}.") from None
        self._path = path

    def _get(self, key: str, default: Any = None) -> Any:
        value = self._all.get(f"tokenizer.ggml.{key}", default)
        if value is None:
            raise CorruptModel(f"{self._path.name} has no tokenizer.ggml.{key}: it carries no whole tokenizer.")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "text")
        return value

    def texts(self, key: str) -> list[str]:
        value = self._get(key)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, "a list of texts")
        return value

    def kinds(self, count: int) -> list[int]:
        value = self._get("token_type", [1] * count)
        if not isinstance(value, list) or len(value) != count or not all(type(item) is int for item in value):
            raise self._wrong("token_type", f"{count:,} whole numbers, one for each token")
        return value

    def id(self, key: str, count: int) -> int | None:
        value = self._get(f"{key}_token_id", -1)
        if type(value) is not int or value >= count:
            raise self._wrong(f"{key}_token_id", f"a token's id, below {count:,}")
        return value if value >= 0 else None

    def flag(self, key: str) -> bool:
        return self._get(key, False) is True

    def _wrong(self, key: str, wanted: str) -> CorruptModel:
        return CorruptModel(f"{self._path.name} is damaged: tokenizer.ggml.{key} must be {wanted}.")
