"""Failures on demand, for tests: `--fault STAGE:ACTION:COUNT` makes the next COUNT calls of a stage go wrong.

Stages: load, encode, prepare, denoise, decode, adapter (a change of adapters is worked out), merge (a merged weight has
been written). Actions: raise, oom, kill (the process dies), hang (it never returns),
slow (each call takes half a second longer).
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

from multimodal_gen.errors import ConfigError, OutOfMemory

STAGES = ("load", "encode", "prepare", "denoise", "decode", "adapter", "merge")
ACTIONS = ("raise", "oom", "kill", "hang", "slow")
SLOW_SECONDS = 0.5


class InjectedFault(RuntimeError):
    """The failure that a test asked for."""


@dataclass
class Fault:
    """One planned failure; `trip` counts it down."""

    stage: str
    action: str
    count: int

    @classmethod
    def parse(cls, text: str | None) -> Fault:
        """From the flag's text; None never trips. Raises: ConfigError."""
        if text is None:
            return cls("", "", 0)
        stage, _, rest = text.partition(":")
        action, _, count = rest.partition(":")
        if stage not in STAGES or action not in ACTIONS or not count.isdecimal():
            raise ConfigError(
                f"--fault {text!r} must be STAGE:ACTION:COUNT with a stage of {', '.join(STAGES)} and an action of "
                f"{', '.join(ACTIONS)}.",
                param="fault",
            )
        return cls(stage, action, int(count))

    def trip(self, stage: str) -> None:
        """Fail here if this is the planned stage and failures are left."""
        if stage != self.stage or self.count == 0:
            return
        self.count -= 1
        if self.action == "raise":
            raise InjectedFault(f"injected at {stage}")
        if self.action == "oom":
            raise OutOfMemory(f"The device ran out of memory (injected at {stage}).")
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while self.action == "hang":
            time.sleep(60)
        time.sleep(SLOW_SECONDS)
