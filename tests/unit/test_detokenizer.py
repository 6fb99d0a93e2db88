"""Text while it is written: whole characters, stops, groups."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from multimodal_gen.llm.detokenizer import MAX_PENDING, AnswerText, Detokenizer, DetokenizeRow, Piece
from multimodal_gen.llm.tokenizer import Tokenizer
from tests.support.llm import smollm2_card

pytestmark = [pytest.mark.unit]

TEXT = "Größe 你好 🙂👩‍👩‍👧‍👦🇩🇪 naïve — “quotes” \ufffd and\n\n\ttabs\x00 é"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(smollm2_card())


class Calls:
    """A decoder that counts its calls."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.calls = tokenizer, list[int]()

    def decode_batch(self, sequences: Sequence[Sequence[int]], **kwargs: bool) -> list[str]:
        self.calls.append(len(sequences))
        return self.tokenizer.decode_batch(sequences, **kwargs)


def write(tokenizer: Tokenizer, answer: AnswerText, ids: Sequence[int], at_once: int = 1) -> list[Piece]:
    """All pieces of an answer whose tokens come one by one."""
    detokenizer, pieces = Detokenizer(tokenizer), list[Piece]()
    for start in range(0, len(ids), at_once):
        now = ids[start : start + at_once]
        pieces += detokenizer.step([DetokenizeRow(answer, now, last=start + at_once >= len(ids))])
        if pieces[-1].stop is not None:
            break
    return pieces


def joined(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer: Tokenizer, at_once: int) -> None:
    for text in (TEXT, TEXT.replace("\ufffd", "?")):
        pieces = write(tokenizer, AnswerText(tokenizer.encode("Say:")), tokenizer.encode(text), at_once)
        assert joined(pieces) == text
    assert not any("\ufffd" in piece.text for piece in pieces), "no piece holds half a character"


def test_any_tokens_at_all_join_to_what_they_decode_to(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(49152) for _ in range(rng.randrange(1, 40))]
        for skip in (True, False):
            answer = AnswerText((), skip_special_tokens=skip)
            assert joined(write(tokenizer, answer, ids)) == tokenizer.decode(ids, skip_special_tokens=skip), ids


def test_bytes_that_never_become_a_character_are_told_after_a_few_tokens(tokenizer: Tokenizer) -> None:
    half = next(at for at, token in enumerate(tokenizer.vocabulary.tokens) if token in (b"\xf0", b"\xe2"))
    pieces = write(tokenizer, AnswerText(()), [half] * 100)
    assert joined(pieces) == "\ufffd" * 100
    assert max(len(piece.text) for piece in pieces) <= MAX_PENDING + 2


def test_rows_that_decode_alike_share_one_call_and_keep_their_order(tokenizer: Tokenizer) -> None:
    decoder = Calls(tokenizer)
    detokenizer = Detokenizer(decoder)
    words = [tokenizer.encode(f" word{i}") for i in range(8)]
    answers = [
        AnswerText((), skip_special_tokens=i % 2 == 0, spaces_between_special_tokens=i % 4 < 2) for i in range(8)
    ]
    pieces = detokenizer.step([DetokenizeRow(a, [1, *ids], last=True) for a, ids in zip(answers, words, strict=True)])
    assert [piece.text for piece in pieces] == [
        f" word{i}" if i % 2 == 0 else f"<|im_start|> word{i}" for i in range(8)
    ]
    assert decoder.calls == [4, 4, 4, 4], "two rows each, with their windows before and after"
    assert (detokenizer.groups, detokenizer.rows) == (4, 8)
    decoder.calls.clear()
    detokenizer.step([DetokenizeRow(AnswerText(()), ids) for ids in words])
    assert decoder.calls == [16], "all alike: one call"


@pytest.mark.parametrize(
    ("stops", "include", "expected", "stop"),
    [
        (("END",), False, "one two ", "END"),
        (("END",), True, "one two END", "END"),
        (("two", "one t"), False, "", "one t"),
        (("three", "\n\n"), False, "one two END ", "three"),
        (("nowhere",), False, "one two END three four", None),
        (("fours",), False, "one two END three four", None),
    ],
)
def test_a_stop_ends_the_answer_wherever_tokens_cut_it(
    tokenizer: Tokenizer, stops: tuple[str, ...], include: bool, expected: str, stop: str | None
) -> None:
    for at_once in (1, 2, 7):
        letters = [token for c in "one two END three four" for token in tokenizer.encode(c)]
        for ids in (tokenizer.encode("one two END three four"), letters):
            pieces = write(tokenizer, AnswerText((), stops=stops, include_stop=include), ids, at_once)
            assert joined(pieces) == expected
            assert pieces[-1].stop == stop


def test_the_beginning_of_a_stop_is_held_back_until_it_is_none(tokenizer: Tokenizer) -> None:
    letters = [tokenizer.encode(c)[0] for c in "a</b</s>"]
    pieces = write(tokenizer, AnswerText((), stops=("</s>",)), letters)
    assert [piece.text for piece in pieces] == ["a", "", "", "</b", "", "", "", ""]
    assert pieces[-1].stop == "</s>"
    whole = write(tokenizer, AnswerText((), stops=("</s>",)), letters[:7])
    assert [piece.text for piece in whole] == ["a", "", "", "</b", "", "", "</s"], "the end tells what was held back"


def test_stops_before_min_tokens_do_not_count(tokenizer: Tokenizer) -> None:
    detokenizer, answer = Detokenizer(tokenizer), AnswerText((), stops=("x",))
    x = tokenizer.encode("x")
    assert detokenizer.step([DetokenizeRow(answer, x, watch=False)]) == [Piece("x")]
    assert detokenizer.step([DetokenizeRow(answer, x)]) == [Piece("", "x")]


def test_the_prompt_is_context_of_the_first_token() -> None:
    vocab = [("<unk>", 0.0), ("\u2581Hi", -1.0), ("\u2581you", -1.0), ("<0xF0>", -9.0), ("<0x9F>", -9.0)]
    vocab += [("<0x99>", -9.0), ("<0x82>", -9.0)]
    backend = Backend(models.Unigram(vocab, 0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(backend, 7, {}, ())
    assert joined(write(tokenizer, AnswerText((1,)), [2, 3, 4, 5, 6, 1])) == " you🙂 Hi"
    assert joined(write(tokenizer, AnswerText(()), [2, 3, 4, 5, 6, 1])) == "you🙂 Hi"


def test_an_answer_that_ends_without_a_new_token_tells_the_rest(tokenizer: Tokenizer) -> None:
    detokenizer, answer = Detokenizer(tokenizer), AnswerText((), stops=("ab",))
    assert detokenizer.step([DetokenizeRow(answer, tokenizer.encode("a"))]) == [Piece("")]
    assert detokenizer.step([DetokenizeRow(answer, (), last=True)]) == [Piece("a")]
