"""What an exception means to those who asked for the work."""

from __future__ import annotations

from multimodal_gen.errors import GenerationFailed, MmgenError, OutOfMemory
from multimodal_gen.memory.failures import is_out_of_memory
from multimodal_gen.messages import ErrorInfo


def as_ours(error: Exception) -> MmgenError:
    """The error that a request ends with when its work raised `error`."""
    if isinstance(error, MmgenError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory("The device ran out of memory. Ask for a smaller size or fewer images.")
    return GenerationFailed(f"The model failed on this request ({type(error).__name__}); the server's log has more.")


def info_of(error: MmgenError) -> ErrorInfo:
    """The same on the wire."""
    return ErrorInfo(error.code, error.message, error.param)
