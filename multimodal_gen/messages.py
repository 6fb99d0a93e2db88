"""Everything that crosses a process border, as typed msgspec structs. Nothing here is ever unpickled.

front → worker: `Load`, `Generate`, `GenerateText`, `Cancel`, `ChangeLoras`, `Sleep`, `Wake`, `Shutdown`.
rank 0 → all ranks of its replica: `Turn`; each rank → all: `Outcome`, `Staging`.
worker → front: `Ready`, `LoadFailed`, `Started`, `Progress`, `Checkpoint`, `Preview`, `Frames`, `Finished`, `Failed`,
`TextStep`, `TextFinished`, `LorasChanged`, `LorasRefused`, `MemoryChanged`, `Gauges`, `TextGauges`.

The in-process engine yields the same events (`Event`), so both faces of the engine speak one language.
"""

from __future__ import annotations

from typing import Any

import msgspec

from multimodal_gen.adapters import Change, LoraState, LoraStates, Side
from multimodal_gen.config import EngineConfig
from multimodal_gen.offload import WeightsPlan, WeightsUse
from multimodal_gen.request import AnyRequest, ModelCard, Timings
from multimodal_gen.text import FinishReason, TextCard, TextInfo, TextRequest, TextTimings, TextUsage, TokenLogprob

MAX_FRAME_BYTES = 1 << 30


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages; the class name is the tag on the wire."""


class Array(msgspec.Struct, frozen=True):
    """A dense C-contiguous array. Images are uint8 [height, width, 3], videos [frames, height, width, 3]; latents are
    float32 [C, h, w] or [C, frames, h, w]."""

    shape: tuple[int, ...]
    dtype: str
    data: memoryview


class ErrorInfo(msgspec.Struct, frozen=True):
    """An `MmgenError` on the wire; `errors.from_code` rebuilds it."""

    code: str
    message: str
    param: str | None = None


# --- front → worker ---------------------------------------------------------------------------------------------


class Seat(msgspec.Struct, frozen=True):
    """One rank's place in its replica."""

    rank: int = 0
    ranks: int = 1
    store: str = ""
    """where the ranks meet: file:///path on one machine, tcp://host:port across machines; nothing for one rank"""
    address: str = "127.0.0.1"
    """where this rank listens for the others"""
    device: int = 0
    """CUDA index, where the settings name none"""


class Load(Message, frozen=True):
    """The first message of a worker's life."""

    card: ModelCard | None
    """None: no pictures and videos are made"""
    config: EngineConfig
    text: TextCard | None = None
    """None: no text is written"""
    loras: LoraStates | None = None
    """of the worker before this one; None: the first worker loads those of the configuration"""
    seat: Seat = Seat()
    replica: int = 0
    """which of the server's; for its log"""
    loading: int = 1
    """replicas that load now and share out what is free, this one included"""


class RowState(msgspec.Struct, frozen=True):
    """All that a row has gathered at a step: with the request, enough to go on in another process, bit for bit."""

    index: int
    step: int
    """steps done"""
    tensors: dict[str, Array]
    """the latents and what the solver keeps"""


class Generate(Message, frozen=True):
    request: AnyRequest
    resume: list[RowState] = []
    """rows that go on where another process left them; the others start"""


class GenerateText(Message, frozen=True):
    request: TextRequest


class Cancel(Message, frozen=True):
    """Stop a request before its next step; unknown ids are ignored, because the request may just have finished."""

    request_id: str


class ChangeLoras(Message, frozen=True):
    """A transaction on the adapters; answered by `LorasChanged` or `LorasRefused` with the same id."""

    id: str
    change: Change
    side: Side = "pictures"


class Sleep(Message, frozen=True):
    """Give the memory of weights and caches back; nothing waits or runs by then. Answered by `MemoryChanged`."""

    id: str


class Wake(Message, frozen=True):
    """Bring the weights back, adapters included. Answered by `MemoryChanged`."""

    id: str


class Shutdown(Message, frozen=True):
    """Exit once nothing runs any more."""


class Turn(Message, frozen=True):
    """From rank 0 to all ranks before every step: what has arrived, and what time it is. All else follows from it."""

    clock: float
    messages: list[Generate | GenerateText | Cancel | ChangeLoras | Sleep | Wake | Shutdown]


class Staging(Message, frozen=True):
    """From every rank to all ranks while a change of adapters is being worked out."""

    done: bool
    error: ErrorInfo | None = None
    found: tuple[str, ...] = ()
    """what it comes to: digests of the files, in order, and which trees are merged"""


class Outcome(Message, frozen=True):
    """From every rank to all ranks after every piece of work that may fail."""

    work: str
    """which piece; ranks that name different ones have come apart"""
    error: ErrorInfo | None = None


# --- worker → front ---------------------------------------------------------------------------------------------


class Ready(Message, frozen=True):
    """Where no pictures are made, device and dtype are those of the text."""

    device: str
    dtype: str
    attention_backend: str
    parameters: int
    load_seconds: float
    threads: int = 1
    """CPU threads in use"""
    max_batch_tokens: int = 0
    """of a step of several rows"""
    targets: tuple[str, ...] = ()
    """module trees that adapters can change"""
    loras: LoraStates = LoraStates()
    lora_error: ErrorInfo | None = None
    """why the adapters of the worker before this one could not be brought back"""
    plan: WeightsPlan | None = None
    """None: weights of the fallback family are not planned"""
    weights: WeightsUse = WeightsUse()
    rests: bool = False
    """whether it can give its memory back and live on"""
    text: TextInfo | None = None


class LoadFailed(Message, frozen=True):
    error: ErrorInfo


class Started(Message, frozen=True):
    """The first row of the request has been taken from the queue."""

    request_id: str


class Progress(Message, frozen=True):
    """Output `index` has finished `step` of `steps`."""

    request_id: str
    index: int
    step: int
    steps: int
    more: bool = False  # whether that of another output of the same step follows at once


class Checkpoint(Message, frozen=True):
    """Where row `state.index` is; sent every `checkpoint_every` steps of the request, but not after the last."""

    request_id: str
    state: RowState


class Preview(Message, frozen=True):
    """The clean-image estimate of image `index`; `number` counts from 0."""

    request_id: str
    index: int
    number: int
    image: Array


class Frames(Message, frozen=True):
    """The next frames of video `index`, where they leave as they are made; `begin` is the first one's number."""

    request_id: str
    index: int
    begin: int
    pixels: Array
    merged: tuple[str, ...] = ()
    """as in `Finished`: the recipe is at the beginning of a file"""


class Finished(Message, frozen=True):
    """All outputs of a request, in seed order, or its latents; none where they have left as `Frames`."""

    request_id: str
    outputs: list[Array]
    timings: Timings
    prompt_tokens: int
    warnings: list[str] = []
    merged: tuple[str, ...] = ()
    """module trees whose adapters were merged into the weights; the others ran beside them"""


class Failed(Message, frozen=True):
    request_id: str
    error: ErrorInfo


class TextDelta(msgspec.Struct, frozen=True, array_like=True):
    """What one step has added to one answer."""

    request_id: str
    index: int
    """of the choice"""
    text: str
    """whole characters; may be empty while a character, or a stop text, may still be under way"""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    """of token_ids, where they were asked for"""
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    """with finish: the stop text or stop token that ended it; None: the model's end, or the limit"""


class TextStep(Message, frozen=True):
    """The deltas of one step, of all requests."""

    deltas: list[TextDelta]


class TextFinished(Message, frozen=True):
    """All choices of a request are finished; comes after the last delta."""

    request_id: str
    usage: TextUsage
    timings: TextTimings
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


class LorasChanged(Message, frozen=True):
    """The change is done: requests sent from now on may use it. `changed` is False where nothing had to be done."""

    id: str
    state: LoraState
    changed: bool
    seconds: float
    side: Side = "pictures"


class LorasRefused(Message, frozen=True):
    """The change failed; everything is as it was before."""

    id: str
    error: ErrorInfo


class MemoryChanged(Message, frozen=True):
    """What came of `Sleep` or `Wake`. After an error the worker sleeps."""

    id: str
    seconds: float
    freed_bytes: int = 0
    """weights and caches, of all ranks"""
    weights: WeightsUse = WeightsUse()
    error: ErrorInfo | None = None


class Gauges(Message, frozen=True):
    """The worker's state, sent when it changes by a step or a piece of decoding; feeds /metrics and the watchdog."""

    running_rows: int
    waiting_rows: int
    step_seconds: float
    step_rows: int
    """0 after a piece of decoding, which has no figures of a step"""
    step_tokens: int
    cache_bytes: int
    cache_hits: int
    cache_misses: int
    step_stall_seconds: float = 0.0
    """of the step, waiting for weights"""
    step_cache_bytes: int = 0
    """that rows remember of the steps that they have computed"""
    cached_steps: int = 0
    """of finished requests, extrapolated instead of computed, since the process started"""
    weights: WeightsUse = WeightsUse()


class TextGauges(Message, frozen=True, kw_only=True):
    """The state of the text side, sent by its steps; counters count from the start of the process."""

    running: int = 0
    """answers that are being written, or whose prompt is being read"""
    waiting: int = 0
    """answers that have no pages yet, or lost them"""
    kv_pages: int = 0
    kv_pages_used: int = 0
    """that answers hold"""
    kv_pages_cached: int = 0
    """that only the prefix cache holds"""
    step_seconds: float = 0.0
    step_rows: int = 0
    """answers in the latest step"""
    step_tokens: int = 0
    prompt_tokens: int = 0
    """read, those found in the prefix cache included"""
    cached_tokens: int = 0
    """of them, found there"""
    generated_tokens: int = 0
    preemptions: int = 0
    """answers that lost their pages and were computed anew"""


ToWorker = Load | Generate | GenerateText | Cancel | ChangeLoras | Sleep | Wake | Shutdown
OfARequest = Started | Progress | Checkpoint | Preview | Frames | Finished | Failed
Event = OfARequest | TextStep | TextFinished | LorasChanged | LorasRefused | MemoryChanged | Gauges | TextGauges
FromWorker = Ready | LoadFailed | Event

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_turn: msgspec.msgpack.Decoder[Turn] = msgspec.msgpack.Decoder(Turn)
_staging: msgspec.msgpack.Decoder[Staging] = msgspec.msgpack.Decoder(Staging)
_outcome: msgspec.msgpack.Decoder[Outcome] = msgspec.msgpack.Decoder(Outcome)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def encode(message: Any) -> bytes:
    """One message as msgpack."""
    return _encoder.encode(message)


def decode_to_worker(frame: bytes) -> ToWorker:
    """Raises msgspec.DecodeError for anything that is not a known message."""
    return _to_worker.decode(frame)


def decode_from_worker(frame: bytes) -> FromWorker:
    """Raises msgspec.DecodeError for anything that is not a known message."""
    return _from_worker.decode(frame)


def decode_turn(frame: bytes) -> Turn:
    """Raises msgspec.DecodeError for anything else."""
    return _turn.decode(frame)


def decode_staging(frame: bytes) -> Staging:
    """Raises msgspec.DecodeError for anything else."""
    return _staging.decode(frame)


def decode_outcome(frame: bytes) -> Outcome:
    """Raises msgspec.DecodeError for anything else."""
    return _outcome.decode(frame)
