"""What workers tell of themselves, and what all of them come to together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from multimodal_gen.messages import Gauges, MemoryChanged, Ready, TextGauges
from multimodal_gen.offload import WeightsUse

COUNTED = ("moved_bytes", "loads", "stall_seconds")  # of a process since its start: they outlive it here
COUNTED_TEXT = ("prompt_tokens", "cached_tokens", "generated_tokens", "preemptions")  # as well
STEP = ("step_seconds", "step_rows", "step_tokens", "step_stall_seconds")  # of the latest step


@dataclass
class Readings:
    """The latest of one replica. Of a group that is dead nothing is shown but what has been counted."""

    gauges: Gauges | None = None  # filled by the first step of a group
    tokens_per_second: float = 0.0  # of recent steps
    _text: TextGauges = field(default_factory=TextGauges)  # of the group that lives
    _past_text: TextGauges = field(default_factory=TextGauges)  # of those before it, as far as it is counted
    _weights: WeightsUse = field(default_factory=WeightsUse)  # of the group that lives
    _past: WeightsUse = field(default_factory=WeightsUse)  # of those before it, as far as it is counted

    @property
    def weights(self) -> WeightsUse:
        """Where the weights are, and what all groups so far have moved and waited."""
        return total_use([self._weights, self._past])

    @property
    def text(self) -> TextGauges:
        """The text side, what all groups so far have counted included."""
        return total_text([self._text, self._past_text])

    def note(self, message: Ready | Gauges | TextGauges | MemoryChanged) -> None:
        """Take in what a message says."""
        if isinstance(message, TextGauges):
            self._text = message
            return
        self._weights = message.weights
        if isinstance(message, Ready) and message.text is not None:
            self._text = TextGauges(kv_pages=message.text.kv_pages)
        if isinstance(message, Gauges):
            self.gauges = message if message.step_rows else _after_piece(message, self.gauges)
            if not message.step_rows:
                return
            rate, before = message.step_tokens / max(message.step_seconds, 1e-6), self.tokens_per_second
            self.tokens_per_second = rate if not before else 0.9 * before + 0.1 * rate
        elif isinstance(message, MemoryChanged):  # caches are empty after a sleep
            if self.gauges is not None:
                self.gauges = msgspec.structs.replace(self.gauges, cache_bytes=0)
            self._text = _counted(self._text)

    def forget(self) -> None:
        """The group has died."""
        seen = msgspec.structs.asdict(self.weights)
        self._past = WeightsUse(**{name: seen[name] for name in COUNTED})
        self.gauges, self._weights = None, WeightsUse()
        self._past_text, self._text = _counted(self.text), TextGauges()


def _after_piece(message: Gauges, before: Gauges | None) -> Gauges:
    """The state after a piece of decoding; the latest step is still the one before."""
    if before is None:
        return message
    told = msgspec.structs.asdict(before)
    return msgspec.structs.replace(message, **{name: told[name] for name in STEP})


def _counted(gauges: TextGauges) -> TextGauges:
    told = msgspec.structs.asdict(gauges)
    return TextGauges(**{name: told[name] for name in COUNTED_TEXT})


def total_use(parts: Sequence[WeightsUse]) -> WeightsUse:
    """Sums, field by field."""
    values = [msgspec.structs.asdict(part) for part in parts]
    return WeightsUse(**{name: sum(each[name] for each in values) for name in WeightsUse.__struct_fields__})


def total(parts: Sequence[Gauges]) -> Gauges | None:
    """Gauges of several replicas as one: the longest of the latest steps, sums of the rest."""
    if not parts:
        return None
    values = [msgspec.structs.asdict(part) for part in parts]
    sums = {name: sum(each[name] for each in values) for name in Gauges.__struct_fields__ if name != "weights"}
    longest = {name: max(each[name] for each in values) for name in ("step_seconds", "step_stall_seconds")}
    return Gauges(**{**sums, **longest, "weights": total_use([part.weights for part in parts])})


def total_text(parts: Sequence[TextGauges]) -> TextGauges:
    """Gauges of several replicas as one: the longest of the latest steps, sums of the rest."""
    values = [msgspec.structs.asdict(part) for part in parts]
    sums = {name: sum(each[name] for each in values) for name in TextGauges.__struct_fields__}
    return TextGauges(**{**sums, "step_seconds": max(each["step_seconds"] for each in values)})
