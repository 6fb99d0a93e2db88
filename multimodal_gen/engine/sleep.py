"""The sleep of an engine: weights and caches leave the memory, and come back bit for bit.

Every rank does it at the same point between two turns, with nothing waiting or running. Waking brings the weights as
they were, with the adapters that were merged into them; caches fill again by themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from multimodal_gen.engine.attempt import Attempts
from multimodal_gen.engine.failures import info_of
from multimodal_gen.engine.ranks import Ranks
from multimodal_gen.errors import Asleep, CorruptModel, GenerationFailed, MmgenError, OutOfMemory, WeightsUnavailable
from multimodal_gen.lora.manager import LoraManager
from multimodal_gen.memory.device import release_device_memory
from multimodal_gen.memory.failures import is_out_of_memory
from multimodal_gen.memory.host import release_freed_memory
from multimodal_gen.memory.shares import MemoryPlan
from multimodal_gen.memory.use import MemoryUse
from multimodal_gen.messages import MemoryChanged, Sleep, Wake
from multimodal_gen.offload import WeightsPlan, WeightsUse
from multimodal_gen.pipelines.contract import Pipeline


class Sleeper:
    """Puts one engine to sleep and wakes it."""

    def __init__(
        self,
        pipeline: Pipeline,
        loras: LoraManager,
        ranks: Ranks,
        attempt: Attempts,
        load_timeout_s: float,
        on_wake: Callable[[], None],
    ) -> None:
        """
        Args:
            load_timeout_s: how long one rank waits for the others to be awake.
            on_wake: called once the weights are back; tests fail there.
        """
        self._pipeline = pipeline
        self._loras = loras
        self._ranks = ranks
        self._attempt = attempt
        self._load_timeout_s = load_timeout_s
        self._on_wake = on_wake

    @property
    def asleep(self) -> bool:
        """Whether the weights are away, on all ranks."""
        return self._pipeline.memory.asleep

    @property
    def weights(self) -> WeightsUse:
        """Where this rank's weights are."""
        return use_of(self._pipeline.memory.use)

    @property
    def plan(self) -> WeightsPlan | None:
        """How they share the memory."""
        plan = self._pipeline.memory.plan
        return None if plan is None else plan_of(plan)

    def check_awake(self) -> None:
        """Raises: Asleep."""
        if self.asleep:
            raise Asleep("The model is asleep and its memory is given back; wake it first.")

    def obey(self, order: Sleep | Wake) -> MemoryChanged:
        """Sleep or wake; nothing happens where that is so already. Raises: PeerLost."""
        if isinstance(order, Wake) and not self.asleep:
            return MemoryChanged(order.id, 0.0, weights=self.weights)
        began, before = time.monotonic(), self._held()
        if isinstance(order, Sleep):
            error = self._attempt("going to sleep", self._sleep)
        else:
            error = self._attempt("waking", self._wake, patience_s=self._load_timeout_s)
            if error is not None:  # some ranks may be awake, and an engine is on all ranks or on none
                self._attempt("going back to sleep", self._sleep)
        freed = self._of_all_ranks(before - self._held()) if isinstance(order, Sleep) else 0
        told = None if error is None else info_of(error)
        return MemoryChanged(order.id, time.monotonic() - began, freed, self.weights, told)

    def _sleep(self) -> None:
        try:
            self._pipeline.reset()
            self._loras.forget_overlays()
            self._pipeline.memory.sleep()
            release_freed_memory()
            release_device_memory()
        except MmgenError:
            raise
        except Exception as error:
            raise _as_ours(error, "put to sleep") from error

    def _wake(self) -> None:
        try:
            self._pipeline.memory.wake()
            self._on_wake()
        except CorruptModel as error:  # it was whole when the model was loaded
            message = error.message.replace(f"{self._pipeline.card.path}/", "")
            raise WeightsUnavailable(f"The model cannot be woken: {message}") from error
        except MmgenError:
            raise
        except Exception as error:
            raise _as_ours(error, "woken") from error

    def _held(self) -> int:
        """Bytes of this process that sleep gives back."""
        use = self.weights
        return use.device_bytes + use.pinned_bytes + use.pageable_bytes + self._pipeline.info.cache.bytes

    def _of_all_ranks(self, own: int) -> int:
        return sum(int(part) for part in self._ranks.gather(str(own).encode())) if not self._ranks.alone else own


def _as_ours(error: Exception, what: str) -> MmgenError:
    if is_out_of_memory(error):
        return OutOfMemory(f"The model cannot be {what}: there is not enough memory. Free some, then try again.")
    return GenerationFailed(f"The model cannot be {what} ({type(error).__name__}); the server's log has more.")


def use_of(use: MemoryUse) -> WeightsUse:
    """The counters of a pipeline's memory on the wire."""
    return WeightsUse(
        device_bytes=use.device_bytes,
        pinned_bytes=use.tiers.get("pinned", 0),
        pageable_bytes=use.tiers.get("pageable", 0),
        file_bytes=use.tiers.get("file", 0),
        moved_bytes=use.moved_bytes,
        loads=use.loads,
        stall_seconds=use.stall_seconds,
    )


def plan_of(plan: MemoryPlan) -> WeightsPlan:
    """A plan on the wire."""
    streamed = {name: share for name, share in plan.shares.items() if share.residency == "streamed"}
    return WeightsPlan(
        residency={name: share.residency for name, share in plan.shares.items()},
        resident_layers={name: len(share.resident_layers) for name, share in streamed.items()},
        slots=plan.slots,
        slot_bytes=plan.slot_bytes,
        peak_bytes=plan.peak_bytes,
        limit_bytes=plan.limit_bytes,
        host_bytes=plan.host_bytes,
        pinned_bytes=plan.pinned_bytes,
    )
