"""Text to tokens and back, against transformers, and what a user's text may not do."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

from multimodal_gen.errors import CorruptModel, InvalidValue
from multimodal_gen.llm.gguf_tokenizer import PRE
from multimodal_gen.llm.tokenizer import Added, Tokenizer
from multimodal_gen.llm.vocabulary import byte_characters, spell
from multimodal_gen.text import TextCard
from tests.support.gguf_files import header, pair
from tests.support.gguf_files import text as gguf_text
from tests.support.llm import SMOLLM2, smollm2_card

pytestmark = [pytest.mark.unit]

TEXTS = [
    "",
    "Hello, world!",
    "  two  spaces\n\n\nand\tlines  ",
    "I'm sure they'LL say 12345 + 0.5e-3 = don't",
    "Größe, naïve, Ελλάδα, Привет, 你好世界, こんにちは, 🙂👩‍👩‍👧‍👦🇩🇪",
    "def f(x):\n    return {'a': [1, 2, 3], \"b\": x**2}  # comment\r\n",
    "<html><body>&nbsp;</body></html> \x00 \u202e RTL \ufeff",
    "a" * 300 + " " + "1" * 50,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(smollm2_card())


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer as a folder has it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer._control.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}})
    )
    return folder


def card_of(folder: Path) -> TextCard:
    return msgspec.structs.replace(smollm2_card(), path=str(folder), format="safetensors")


def test_a_gguf_tokenizer_gives_the_ids_of_transformers_own_reading(tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(SMOLLM2.parent), gguf_file=SMOLLM2.name)
    for text in TEXTS:
        # Theirs lacks the split of digits; single digits are how the vocabulary was made, so only words may differ.
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_folder_reads_as_the_gguf_file_it_came_from(tokenizer: Tokenizer, folder: Path) -> None:
    other = Tokenizer.load(card_of(folder))
    assert [other.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert other.named == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert other.vocabulary.digest == tokenizer.vocabulary.digest


def test_letters_of_control_tokens_in_a_text_stay_letters(tokenizer: Tokenizer) -> None:
    for text in ("<|im_end|>", "a<|im_start|>system\n", "<|endoftext|><repo_name>"):
        ids = tokenizer.encode(text)
        assert not set(ids) & tokenizer.special_ids
        assert tokenizer.decode(ids) == text
    assert set(tokenizer.encode_rendered("<|im_start|>hi<|im_end|>")) >= {1, 2}


def test_parts_mix_control_tokens_with_text_that_stays_text(tokenizer: Tokenizer) -> None:
    start, end = tokenizer.added["<|im_start|>"], tokenizer.added["<|im_end|>"]
    ids = tokenizer.encode_parts([start, "user\nhi<|im_end|>", end, "\n"])
    assert ids == [1, *tokenizer.encode("user\nhi<|im_end|>"), 2, *tokenizer.encode("\n")]
    strips = Added(2, "<|im_end|>", True, True, True)
    assert tokenizer.encode_parts(["hi  ", strips, " \nyou"]) == [*tokenizer.encode("hi"), 2, *tokenizer.encode("you")]


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidValue, match="surrogate"):
        tokenizer.encode("a\ud800b")


def test_tokens_beyond_the_models_vocabulary_are_refused() -> None:
    small = Tokenizer.load(msgspec.structs.replace(smollm2_card(), vocab_size=1000))
    assert small.encode(" the") == Tokenizer.load(smollm2_card()).encode(" the")
    with pytest.raises(InvalidValue, match="does not reach"):
        small.encode("Constantinople")


def test_token_bytes_join_to_the_text_they_came_from(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    vocabulary = tokenizer.vocabulary
    assert len(vocabulary.tokens) == 49152
    assert vocabulary.tokens[2] == b""
    assert vocabulary.tokens[500] == tokenizer.token_bytes(500)


def test_added_tokens_stand_without_spaces_where_that_is_asked(tokenizer: Tokenizer) -> None:
    ids = [1, *tokenizer.encode("user"), 2, 2, *tokenizer.encode(" x")]
    for spaces in (True, False):
        text = tokenizer.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=spaces)
        assert text == "<|im_start|>user<|im_end|><|im_end|> x"
        assert tokenizer.decode(ids, spaces_between_special_tokens=spaces) == "user x"
    # A tokenizer without a decoder joins by spaces.
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel

    backend = Backend(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.add_special_tokens(["<s>", "</s>"])
    words = Tokenizer(backend, 4, {}, (3,))
    assert words.decode([2, 3, 0, 1], skip_special_tokens=False) == "<s> </s> a b"
    assert words.decode([2, 3, 0, 1], skip_special_tokens=False, spaces_between_special_tokens=False) == "<s></s>a b"


def test_sentencepiece_tokens_are_spelled_as_bytes() -> None:
    assert spell("<0x0A>", "sentencepiece") == b"\n"
    assert spell("\u2581hi", "sentencepiece") == b" hi"
    assert spell("\u0120\u00e9", "byte-level") == b" \xe9"
    assert sorted(byte_characters().values()) == list(range(256))


def test_every_pre_tokenizer_of_the_table_keeps_every_byte() -> None:
    for words, _, _ in PRE.values():
        for text in TEXTS:
            cut = [word for word, _ in words().pre_tokenize_str(text)]
            assert b"".join(spell(word, "byte-level") for word in cut) == text.encode()


BYTES = sorted(byte_characters(), key=lambda character: byte_characters()[character])
TELLS: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": [*BYTES, "ab", "<s>", "<think>"],
    "tokenizer.ggml.token_type": [*[1] * 257, 3, 4],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 257,
    "tokenizer.ggml.add_bos_token": True,
}


def told_as(value: Any) -> tuple[int, bytes]:
    """(type, bytes) of a value, as the format has it."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, str):
        return 8, gguf_text(value)
    kind = 8 if isinstance(value[0], str) else 5
    items = b"".join(gguf_text(item) if kind == 8 else struct.pack("<i", item) for item in value)
    return 9, struct.pack("<IQ", kind, len(value)) + items


def gguf_card(folder: Path, **changes: Any) -> TextCard:
    """Of a file that has a tokenizer and nothing else; None takes a key away."""
    told = {**TELLS, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}
    path = folder / "small.gguf"
    pairs = [pair(key, *told_as(value)) for key, value in told.items() if value is not None]
    path.write_bytes(header(0, len(pairs)) + b"".join(pairs))
    return msgspec.structs.replace(smollm2_card(), path=str(path), vocab_size=259)


def test_a_gguf_tokenizer_adds_its_beginning_and_knows_its_kinds_of_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(gguf_card(tmp_path))
    assert tokenizer.encode("ab") == [257, 256]
    assert tokenizer.encode("ab", add_special=False) == [256]
    assert tokenizer.encode("<s><think>", add_special=False)[-1] == 258, "only control tokens are letters"
    assert 257 not in tokenizer.encode("<s>", add_special=False)
    assert tokenizer.special_ids == {257}
    assert tokenizer.named == {"bos_token": "<s>"}
    composed = tokenizer.encode("e\u0301", add_special=False)
    assert tokenizer.decode(composed) == "\u00e9", "qwen2 composes characters first"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": "llama"}, "kind 'llama'"),
        ({"model": None}, "no tokenizer.ggml.model"),
        ({"pre": "strange"}, "'strange', which is not known here"),
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"tokens": ["a", "a"], "token_type": [1, 1], "bos_token_id": 0}, "same token twice"),
        ({"token_type": [1]}, "one for each token"),
        ({"merges": ["ab"]}, "no merge of two tokens"),
        ({"merges": ["a zz"]}, "cannot be used"),
        ({"merges": 7}, "must be a list of texts"),
        ({"bos_token_id": 400}, "below 259"),
        ({"model": 3}, "must be text"),
    ],
)
def test_a_damaged_gguf_tokenizer_is_named(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(CorruptModel, match=why) as refused:
        Tokenizer.load(gguf_card(tmp_path, **changes))
    assert "small.gguf" in str(refused.value)


@pytest.mark.parametrize("damage", ["absent", "cut", "no json", "a folder"])
def test_a_damaged_folder_is_named(folder: Path, tmp_path: Path, damage: str) -> None:
    broken = tmp_path / "model"
    shutil.copytree(folder, broken)
    file = broken / "tokenizer.json"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "no json":
        file.write_bytes(b"\xff\x00")
    else:
        file.unlink()
        if damage == "a folder":
            file.mkdir()
    with pytest.raises(CorruptModel, match=r"model/tokenizer\.json"):
        Tokenizer.load(card_of(broken))
