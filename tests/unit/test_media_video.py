"""Videos as files: they play, keep their length and colours, hold their recipe and the mark; stills beside them."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import time
from pathlib import Path

import av
import msgspec
import numpy as np
import psutil
import pytest
from PIL import Image

from multimodal_gen.errors import GenerationFailed, InvalidValue, StorageFull
from multimodal_gen.media.encode import SOURCE_TYPE
from multimodal_gen.media.orders import WriteVideo
from multimodal_gen.media.process import write_video
from multimodal_gen.media.recipe import Recipe, VideoFormat, read_recipe
from multimodal_gen.media.video import encode_video, sheet_indices, spritesheet, thumbnail
from multimodal_gen.request import VideoRequest

pytestmark = [pytest.mark.unit]

FORMATS: tuple[VideoFormat, ...] = ("mp4", "webm", "gif")
REQUEST = VideoRequest(
    id="x", model="m", prompt="ein Käse; x=1 #\n\\ \ud800", negative_prompt=None, width=72, height=40,
    num_inference_steps=3, guidance_scale=1.0, seeds=(5,), max_sequence_length=9, num_frames=17, fps=16,
)  # fmt: skip


def recipe(request: VideoRequest = REQUEST) -> Recipe:
    return Recipe.of(request, 0, dtype="float32", device="cpu", attention_backend="naive", deterministic=True)


def frames(count: int = 17) -> np.ndarray:
    """Smooth colours that change over time: lossy encoders keep those."""
    t, y, x = np.meshgrid(np.arange(count), np.arange(40), np.arange(72), indexing="ij")
    return np.stack([x * 3, y * 6, t * 14 % 256], axis=-1).astype(np.uint8)


def decoded(data: bytes) -> tuple[av.VideoStream, np.ndarray]:
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        return stream, np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "h264"), ("webm", "vp9")])
def test_videos_play_as_they_were(kind: VideoFormat, codec: str) -> None:
    data = encode_video(frames(), 16, kind, recipe())
    stream, shown = decoded(data)
    assert (stream.codec_context.name, stream.codec_context.pix_fmt) == (codec, "yuv420p")
    assert stream.average_rate == 16
    assert shown.shape == frames().shape
    assert np.abs(shown.astype(int) - frames()).mean() < 6


def test_a_gif_is_as_long_as_it_should_be() -> None:
    with Image.open(io.BytesIO(encode_video(frames(), 16, "gif"))) as image:
        lengths = []
        for i in range(image.n_frames):
            image.seek(i)
            image.load()
            lengths.append(image.info["duration"])
    assert len(lengths) == 17
    assert sum(lengths) == 1060  # 17/16 s in hundredths
    assert decoded(encode_video(frames(), 16, "gif"))[1].shape == frames().shape


def test_an_mp4_can_be_played_while_it_arrives() -> None:
    data = encode_video(frames(), 16, "mp4", recipe())
    assert 0 < data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_single_frame_is_a_video_too(kind: VideoFormat) -> None:
    assert decoded(encode_video(frames(1), 24, kind))[1].shape == (1, 40, 72, 3)


@pytest.mark.parametrize("kind", FORMATS)
def test_equal_videos_are_equal_files(kind: VideoFormat) -> None:
    assert encode_video(frames(), 16, kind, recipe()) == encode_video(frames(), 16, kind, recipe())


def test_equal_videos_are_equal_files_whatever_was_encoded_between() -> None:
    """x264 with its defaults fails this one time in four at this size."""
    square = np.tile(frames(), (1, 2, 1, 1))[:, :64, :64]
    files = set()
    for _ in range(16):
        files.add(encode_video(square, 16, "mp4"))
        encode_video(frames(), 16, "webm")
        encode_video(frames(), 16, "gif")
    assert len(files) == 1


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("prompt", [REQUEST.prompt, "水" * 32_000], ids=["odd", "long"])
def test_the_recipe_comes_back(tmp_path: Path, kind: VideoFormat, prompt: str) -> None:
    wanted = recipe(msgspec.structs.replace(REQUEST, prompt=prompt))
    path = tmp_path / "no-suffix"
    path.write_bytes(encode_video(frames(3), 16, kind, wanted))
    assert read_recipe(path) == msgspec.structs.replace(wanted, output_format=kind)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_video_carries_the_mark_even_without_a_recipe(tmp_path: Path, kind: VideoFormat) -> None:
    data = encode_video(frames(3), 16, kind)
    assert SOURCE_TYPE.encode() in data
    path = tmp_path / "a"
    path.write_bytes(data)
    with pytest.raises(InvalidValue, match="holds no recipe"):
        read_recipe(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_video_is_told_so(tmp_path: Path, kind: VideoFormat) -> None:
    path = tmp_path / "a"
    path.write_bytes(encode_video(frames(3), 16, kind, recipe())[:30])
    with pytest.raises(InvalidValue):
        read_recipe(path)


def test_odd_sizes_are_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match="even"):
        encode_video(np.zeros((2, 33, 64, 3), np.uint8), 16, "mp4")


def test_stills_show_the_frames() -> None:
    with Image.open(io.BytesIO(thumbnail(frames()[8]))) as image:
        assert (image.format, image.size) == ("WEBP", (72, 40))
    shown = [frames()[i] for i in sheet_indices(17)]
    with Image.open(io.BytesIO(spritesheet(shown))) as image:
        assert (image.format, image.size) == ("JPEG", (5 * 72, 4 * 40))
        last = np.asarray(image)[3 * 40 + 20, 72 + 36].astype(int)  # frame 16: fourth row, second column
    assert np.abs(last - frames()[16][20, 36]).max() < 25


@pytest.mark.parametrize(("count", "shown"), [(1, [0]), (2, [0, 1]), (5, [0, 1, 2, 3, 4])])
def test_few_frames_are_all_on_the_sheet(count: int, shown: list[int]) -> None:
    assert sheet_indices(count) == shown


def test_many_frames_are_sampled_from_first_to_last() -> None:
    indices = sheet_indices(81)
    assert (len(indices), indices[0], indices[-1]) == (25, 0, 80)
    assert len(set(indices)) == 25


# --- in a process of its own ----------------------------------------------------------------------------------------


def order(folder: Path, count: int = 17) -> WriteVideo:
    return WriteVideo(
        video=str(folder / "0.mp4"), thumbnail=str(folder / "0.webp"), spritesheet=str(folder / "0.jpg"),
        shape=(count, 40, 72, 3), fps=16, output_format="mp4", recipe=recipe().to_json(),
    )  # fmt: skip


def test_a_helper_process_writes_the_same_files(tmp_path: Path) -> None:
    asyncio.run(write_video(order(tmp_path), frames().data.cast("B")))
    assert sorted(os.listdir(tmp_path)) == ["0.jpg", "0.mp4", "0.webp"]
    assert (tmp_path / "0.mp4").read_bytes() == encode_video(frames(), 16, "mp4", recipe())
    assert (tmp_path / "0.webp").read_bytes() == thumbnail(frames()[8])


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageFull) as caught:
        asyncio.run(write_video(order(tmp_path / "gone"), frames().data.cast("B")))
    assert str(tmp_path) not in caught.value.message


def helpers() -> list[psutil.Process]:
    """Of this process, which may have other children."""
    children = psutil.Process().children()
    return [child for child in children if any("media.helper" in part for part in child.cmdline())]


def test_a_helper_that_is_killed_leaves_no_half_file(tmp_path: Path) -> None:
    many = 2000

    async def scenario() -> None:
        writing = asyncio.create_task(write_video(order(tmp_path, many), frames(many).data.cast("B")))
        end = time.monotonic() + 30
        while not list(tmp_path.glob("*.part")):
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
        (helper,) = helpers()
        helper.send_signal(signal.SIGKILL)
        await writing

    with pytest.raises(GenerationFailed, match="encoder died"):
        asyncio.run(scenario())
    assert not [name for name in os.listdir(tmp_path) if not name.endswith(".part")]


def test_nobody_waits_means_nobody_works(tmp_path: Path) -> None:
    many = 2000

    async def scenario() -> None:
        writing = asyncio.create_task(write_video(order(tmp_path, many), frames(many).data.cast("B")))
        while not helpers():
            await asyncio.sleep(0.01)
        (helper,) = helpers()
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        assert not helper.is_running()

    asyncio.run(scenario())
