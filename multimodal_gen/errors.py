"""The one tree of errors: every class knows its HTTP status, OpenAI type and OpenAI code.

    MmgenError
    ├── UserError (ValueError)              the caller can mend it
    │   ├── InvalidValue                    400 invalid_value
    │   │   ├── InvalidN                    400 invalid_n
    │   │   ├── InvalidSize                 400 invalid_size
    │   │   ├── PromptTooLong               400 prompt_too_long
    │   │   │   └── ContextExceeded         400 context_length_exceeded: prompt and answer beyond the context
    │   │   ├── RequestTooLarge             400 request_too_large
    │   │   └── InvalidImage                400 invalid_image: damaged, or no picture at all
    │   │       ├── ImageTooLarge           400 image_too_large
    │   │       ├── UnsupportedImage        400 unsupported_image: of a kind that no decoder of ours is asked to read
    │   │       └── TooManyImages           400 too_many_images
    │   ├── InvalidJson                     400 invalid_json
    │   ├── InvalidMultipart                400 invalid_multipart
    │   ├── UrlNotAllowed                   400 url_not_allowed: this server fetches nothing from elsewhere
    │   ├── UnknownParameter                400 unknown_parameter
    │   ├── UnsupportedParameter            400 unsupported_parameter
    │   ├── UnsupportedEndpoint             400 unsupported_endpoint: the model makes something else
    │   ├── RemoteCodeRefused               400 remote_code_refused
    │   ├── AuthenticationFailed            401 invalid_api_key
    │   ├── HostNotAllowed                  403 host_not_allowed
    │   ├── OriginNotAllowed                403 origin_not_allowed
    │   ├── NotFound                        404 not_found
    │   │   └── ModelNotFound               404 model_not_found
    │   ├── MethodNotAllowed                405 method_not_allowed
    │   ├── BodyTooLarge                    413 body_too_large
    │   ├── RequestTimeout                  408 request_timeout
    │   ├── VideoNotReady                   409 video_not_ready
    │   ├── IdempotencyMismatch             409 idempotency_mismatch: the same key with another request
    │   ├── InvalidRange                    416 invalid_range
    │   ├── UnsupportedMediaType            415 unsupported_media_type
    │   ├── ConfigError                     400 invalid_config
    │   ├── CorruptModel                    400 corrupt_model
    │   ├── AdminRequired                   403 admin_key_required
    │   └── AdapterError                    400 invalid_adapter
    │       ├── AdapterNotFound             404 adapter_not_found
    │       ├── AdapterMismatch             400 adapter_mismatch
    │       ├── AdapterMergeOnly            400 adapter_merge_only
    │       ├── AdapterInUse                409 adapter_in_use
    │       ├── AdapterLimit                429 adapter_limit
    │       ├── CorruptAdapter              400 corrupt_adapter
    │       ├── PathNotAllowed              403 path_not_allowed
    │       └── UnsafeFormat                400 unsafe_format
    ├── CapacityError                       try again later
    │   ├── QueueFull                       429 queue_full
    │   ├── ModelLoading                    503 model_loading
    │   ├── Asleep                          503 asleep
    │   └── ShuttingDown                    503 shutting_down
    └── EngineError                         ours to mend
        ├── GenerationFailed                500 generation_failed
        │   └── Overflowed                  500 overflow
        ├── WorkerCrashed                   500 worker_crashed
        │   └── PeerLost                    500 peer_lost
        ├── OutOfMemory                     503 out_of_memory
        ├── StorageFull                     503 storage_full
        ├── AdapterUnavailable              503 adapter_unavailable
        ├── WeightsUnavailable              503 weights_unavailable
        ├── DeadlineExceeded                504 deadline_exceeded
        └── Cancelled                       499 cancelled

A message says what happened, why, and what to do about it. It never holds a traceback, an address or a server path
that the caller did not name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class MmgenError(Exception):
    """Base of all errors that this package raises on purpose."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    # False: work may have run already, a client must not resend the request by itself.
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param  # the request field at fault
        self.retry_after = retry_after  # seconds; only for retryable errors


class UserError(MmgenError, ValueError):
    """The caller can mend it."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class InvalidValue(UserError):
    code = "invalid_value"


class InvalidN(InvalidValue):
    code = "invalid_n"


class InvalidSize(InvalidValue):
    code = "invalid_size"


class PromptTooLong(InvalidValue):
    code = "prompt_too_long"


class ContextExceeded(PromptTooLong):
    code = "context_length_exceeded"


class RequestTooLarge(InvalidValue):
    code = "request_too_large"


class InvalidImage(InvalidValue):
    code = "invalid_image"


class ImageTooLarge(InvalidImage):
    code = "image_too_large"


class UnsupportedImage(InvalidImage):
    code = "unsupported_image"


class TooManyImages(InvalidImage):
    code = "too_many_images"


class InvalidJson(UserError):
    code = "invalid_json"


class InvalidMultipart(UserError):
    code = "invalid_multipart"


class UrlNotAllowed(UserError):
    code = "url_not_allowed"


class UnknownParameter(UserError):
    code = "unknown_parameter"


class UnsupportedParameter(UserError):
    code = "unsupported_parameter"


class UnsupportedEndpoint(UserError):
    code = "unsupported_endpoint"


class RemoteCodeRefused(UserError):
    code = "remote_code_refused"


class AuthenticationFailed(UserError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class HostNotAllowed(UserError):
    status = 403
    type = "permission_error"
    code = "host_not_allowed"


class OriginNotAllowed(UserError):
    status = 403
    type = "permission_error"
    code = "origin_not_allowed"


class NotFound(UserError):
    status = 404
    type = "not_found_error"
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(UserError):
    status = 405
    code = "method_not_allowed"


class RequestTimeout(UserError):
    status = 408
    code = "request_timeout"


class VideoNotReady(UserError):
    status = 409
    code = "video_not_ready"


class IdempotencyMismatch(UserError):
    status = 409
    code = "idempotency_mismatch"


class InvalidRange(UserError):
    status = 416
    code = "invalid_range"
    size: int | None = None  # bytes of the file, where one was found


class BodyTooLarge(UserError):
    status = 413
    code = "body_too_large"


class UnsupportedMediaType(UserError):
    status = 415
    code = "unsupported_media_type"


class ConfigError(UserError):
    """A flag, environment variable or configuration file is wrong: the program cannot start."""

    code = "invalid_config"


class CorruptModel(UserError):
    """A model file is missing, truncated or not what its index says; the message names the file."""

    code = "corrupt_model"


class AdminRequired(UserError):
    status = 403
    type = "permission_error"
    code = "admin_key_required"


class AdapterError(UserError):
    code = "invalid_adapter"


class AdapterNotFound(AdapterError):
    status = 404
    type = "not_found_error"
    code = "adapter_not_found"


class AdapterMismatch(AdapterError):
    """The adapter was made for another model: names or shapes have no place in this one."""

    code = "adapter_mismatch"


class AdapterMergeOnly(AdapterError):
    """The update is no low-rank product, so it exists only merged into the weights."""

    code = "adapter_merge_only"


class AdapterInUse(AdapterError):
    status = 409
    code = "adapter_in_use"


class AdapterLimit(AdapterError):
    status = 429
    type = "rate_limit_error"
    code = "adapter_limit"


class CorruptAdapter(AdapterError):
    code = "corrupt_adapter"


class PathNotAllowed(AdapterError):
    status = 403
    type = "permission_error"
    code = "path_not_allowed"


class UnsafeFormat(AdapterError):
    """A pickle, or a pickle that calls itself safetensors: loading it could run code."""

    code = "unsafe_format"


class CapacityError(MmgenError):
    """Nothing ran; the same request can succeed later."""

    status = 503
    code = "unavailable"
    retryable = True


class QueueFull(CapacityError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class ModelLoading(CapacityError):
    code = "model_loading"


class Asleep(CapacityError):
    code = "asleep"
    retryable = False  # it does not wake by itself


class ShuttingDown(CapacityError):
    code = "shutting_down"


class EngineError(MmgenError):
    """The request was good and its execution failed."""


class GenerationFailed(EngineError):
    code = "generation_failed"


class Overflowed(GenerationFailed):
    """The numbers grew beyond what their dtype can hold."""

    code = "overflow"


class WorkerCrashed(EngineError):
    code = "worker_crashed"


class PeerLost(WorkerCrashed):
    """Another rank of this worker's group ended or stopped answering in a collective operation."""

    code = "peer_lost"


class OutOfMemory(EngineError):
    status = 503
    code = "out_of_memory"


class AdapterUnavailable(EngineError):
    """An active adapter could not be loaded again after a restart."""

    status = 503
    code = "adapter_unavailable"


class WeightsUnavailable(EngineError):
    """The checkpoint's files are not what they were when the model was loaded, or cannot be read."""

    status = 503
    code = "weights_unavailable"


class StorageFull(EngineError):
    status = 503
    code = "storage_full"


class DeadlineExceeded(EngineError):
    status = 504
    code = "deadline_exceeded"


class Cancelled(EngineError):
    status = 499
    code = "cancelled"


def _classes(root: type[MmgenError]) -> dict[str, type[MmgenError]]:
    table = {root.code: root}
    for child in root.__subclasses__():
        table.update(_classes(child))
    return table


BY_CODE: dict[str, type[MmgenError]] = _classes(MmgenError)


def from_code(code: str, message: str, param: str | None = None, retry_after: float | None = None) -> MmgenError:
    """Rebuild an error that travelled between processes; an unknown code becomes a `GenerationFailed`."""
    return BY_CODE.get(code, GenerationFailed)(message, param=param, retry_after=retry_after)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
