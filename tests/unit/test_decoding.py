"""Rows become pixels piece by piece, between the denoising steps of others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.core import EngineCore
from multimodal_gen.engine.decoding import Decode, Decoding
from multimodal_gen.engine.host import Host, _Running
from multimodal_gen.engine.ranks import Ranks
from multimodal_gen.media.arrays import to_numpy
from multimodal_gen.messages import Event, Failed, Finished, Frames, Gauges, Progress
from multimodal_gen.parallel.mesh import Mesh
from multimodal_gen.pipelines import registry
from multimodal_gen.pipelines.contract import Row
from multimodal_gen.request import ImageRequest, SamplingParams, VideoRequest
from multimodal_gen.resolve import resolve

pytestmark = [pytest.mark.unit]

CONFIG = EngineConfig(dtype="float32")
CARD = registry.describe(CONFIG)


@pytest.fixture(scope="module")
def core() -> EngineCore:
    return EngineCore(CARD, CONFIG)


def request(name: str, steps: int) -> ImageRequest:
    params = SamplingParams(width=64, height=64, seed=1, num_inference_steps=steps)
    made = resolve(request_id=name, prompt="a rocket", params=params, card=CARD, max_cost=10**9)
    assert isinstance(made, ImageRequest)
    return made


def slow(core: EngineCore, monkeypatch: pytest.MonkeyPatch, *, step_s: float, piece_s: float, pieces: int) -> list[str]:
    """Have the clock say that steps and pieces take so long; what is done, in order."""
    now, done = [0.0], list[str]()
    denoise, decode = core.pipeline.denoise, core.pipeline.decode
    monkeypatch.setattr(core, "_clock", lambda: now[0])

    def timed_step(rows: list[Row]) -> None:
        denoise(rows)
        now[0] += step_s
        done.append("step")

    def timed_pieces(row: Row) -> Iterator[np.ndarray | None]:
        for _ in range(pieces - 1):
            now[0] += piece_s
            done.append("piece")
            yield None
        now[0] += piece_s
        done.append("piece")
        yield from (piece for piece in decode(row) if piece is not None)

    monkeypatch.setattr(core.pipeline, "denoise", timed_step)
    monkeypatch.setattr(core.pipeline, "decode", timed_pieces)
    return done


def run(core: EngineCore, *requests: ImageRequest) -> list[Event]:
    events: list[Event] = []
    for each in requests:
        events += core.add(each)
    while not core.idle:
        events += core.step()
    return events


def test_no_step_waits_for_a_whole_decode_that_is_longer_than_a_step(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = slow(core, monkeypatch, step_s=1.0, piece_s=0.5, pieces=40)
    events = run(core, request("short", 1), request("long", 30))
    # A piece may begin as long as they have not taken longer than a step together.
    steps = [index for index, what in enumerate(done) if what == "step"]
    assert max(after - before for before, after in itertools.pairwise(steps)) == 1 + 3
    assert [e.request_id for e in events if isinstance(e, Finished)] == ["short", "long"]
    assert len(steps) == 30


def test_a_short_decode_is_done_before_the_next_step(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    done = slow(core, monkeypatch, step_s=5.0, piece_s=0.5, pieces=4)
    run(core, request("short", 1), request("long", 3))
    assert done == ["step", *["piece"] * 4, "step", "step", *["piece"] * 4]


def test_with_nothing_else_to_do_pieces_follow_one_another(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    done = slow(core, monkeypatch, step_s=0.1, piece_s=5.0, pieces=6)
    run(core, request("only", 2))
    assert done == ["step", "step", *["piece"] * 6]


def test_every_piece_is_told_of_though_it_leaves_nothing(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    done = slow(core, monkeypatch, step_s=0.1, piece_s=5.0, pieces=6)
    core.add(request("only", 1))
    while not core.idle:
        before = len(done)
        gauges = [event for event in core.step() if isinstance(event, Gauges)]
        assert len(gauges) == len(done) - before == 1
        assert gauges[0].step_rows == (done[-1] == "step")


def test_a_cancelled_row_stops_between_two_pieces(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    done = slow(core, monkeypatch, step_s=1.0, piece_s=1.0, pieces=6)
    core.add(request("gone", 1))
    while "piece" not in done:
        list(core.step())
    assert isinstance(core.cancel("gone")[0], Failed)
    assert core.idle
    assert done.count("piece") == 1
    events = run(core, request("next", 2))
    assert len([e for e in events if isinstance(e, Progress)]) == 2


def test_weights_that_leave_for_a_stage_are_not_sent_back_and_forth(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(core.pipeline.memory), "alternates", property(lambda memory: False))
    done = slow(core, monkeypatch, step_s=1.0, piece_s=5.0, pieces=4)
    run(core, request("short", 1), request("long", 2))
    assert done == ["step", *["piece"] * 4, "step", *["piece"] * 4]


def video(*, stream: bool) -> Decode:
    settings = {
        "id": "v", "model": "m", "prompt": "p", "negative_prompt": None, "width": 4, "height": 2, "guidance_scale": 1.0,
        "num_inference_steps": 1, "seeds": (1,), "max_sequence_length": 8, "num_frames": 9, "fps": 8,
    }  # fmt: skip
    pieces = (np.full((count, 2, 4, 3), count, np.uint8) for count in (1, 4, 4))
    return Decode(Row(VideoRequest(**settings, stream_frames=stream), 0), pieces)


def test_frames_leave_as_they_are_made_and_none_are_kept() -> None:
    decode, left = video(stream=True), list[Frames]()
    while not decode.done:
        frames = decode.advance(("transformer",))
        assert frames is not None
        left.append(frames)
    assert [(f.begin, f.pixels.shape) for f in left] == [(0, (1, 2, 4, 3)), (1, (4, 2, 4, 3)), (5, (4, 2, 4, 3))]
    assert {f.merged for f in left} == {("transformer",)}
    assert not decode.kept


def test_frames_that_nobody_wants_at_once_come_as_one_video() -> None:
    decode = video(stream=False)
    while not decode.done:
        assert decode.advance(()) is None
    assert to_numpy(decode.output).shape == (9, 2, 4, 3)


def test_turns_end_when_decoding_has_taken_as_long_as_the_last_step() -> None:
    decoding = Decoding()
    assert not decoding.due(0.0, steps=True)
    decoding.step(0.0)
    decoding.waiting.append(video(stream=True))
    assert decoding.due(1.0, steps=True)
    assert decoding.due(2.0, steps=True)
    assert not decoding.due(2.5, steps=True)
    assert decoding.due(9.0, steps=False)


def test_steps_of_text_between_two_turns_are_no_time_of_a_step_or_of_decoding() -> None:
    decoding = Decoding()
    decoding.step(0.0)  # takes 2 s
    decoding.others_took(10.0)
    decoding.waiting.append(video(stream=True))
    assert decoding.due(12.0, steps=True)  # a piece of 1 s
    decoding.others_took(10.0)
    assert decoding.due(23.0, steps=True), "1 s of 2"
    decoding.others_took(10.0)
    assert not decoding.due(35.5, steps=True), "2.5 s of 2"


def test_a_host_knows_pieces_from_steps_and_takes_the_time_of_text_off(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(core, monkeypatch, step_s=1.0, piece_s=1.0, pieces=3)
    host = Host(None, None, CONFIG, Ranks(Mesh.solo()), lambda: 14.0)
    host.pictures, pieces = core, list[bool]()
    core.add(request("only", 2))
    while not host.idle:
        host.begin_turn()
        list(host.step())
        pieces += [host._running.piece] if host._running else []
    assert pieces == [False, False, True, True]  # after the last one nothing is left to do
    monkeypatch.setattr(core, "decoding", Decoding([video(stream=True)]))
    core.decoding.step(1.0)  # takes 3 s
    host._running = _Running("text", 4.0, frozenset(("pictures", "text")), 0, False)
    host.begin_turn()
    assert core.decoding.due(14.0, steps=True)
    assert core.decoding.due(17.0, steps=True)
    assert not core.decoding.due(17.1, steps=True)
