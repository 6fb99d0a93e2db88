"""What must happen on all ranks or on none."""

from __future__ import annotations

import msgspec

from multimodal_gen.errors import GenerationFailed, MmgenError, from_code
from multimodal_gen.parallel.group import Group


class _Told(msgspec.Struct, frozen=True):
    """How it went on one rank; an empty code means well."""

    code: str = ""
    message: str = ""


def agree(group: Group, error: Exception | None) -> None:
    """Tell every rank how it went here, and learn how it went elsewhere. All ranks call it at the same point.

    Raises: `error` where there is one, else the first error of another rank; PeerLost.
    """
    if group.size > 1:
        reports = group.all_gather_bytes(msgspec.msgpack.encode(_report(error)))
        told = [msgspec.msgpack.decode(report, type=_Told) for report in reports]
        if error is None:
            error = next((from_code(report.code, report.message) for report in told if report.code), None)
    if error is not None:
        raise error


def _report(error: Exception | None) -> _Told:
    if error is None:
        return _Told()
    if isinstance(error, MmgenError):
        return _Told(error.code, error.message)
    return _Told(GenerationFailed.code, f"Another rank failed ({type(error).__name__}); the server's log has more.")
