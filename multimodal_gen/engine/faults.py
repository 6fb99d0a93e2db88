"""Failures on demand, for tests: `--fault STAGE:ACTION:COUNT[@RANK]` makes the next COUNT calls of a stage go wrong.

On every rank, or on that one alone.

Stages: load, encode, prepare, denoise, decode, adapter (a change of adapters is worked out), merge (a merged weight has
been written), wake (the weights are back). Actions: raise, oom, kill (the process dies), hang (it never returns), slow
(each call takes half a second longer).
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

from multimodal_gen.errors import ConfigError, OutOfMemory

STAGES = ("load", "encode", "prepare", "denoise", "decode", "adapter", "merge", "wake")
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
    def parse(cls, text: str | None, rank: int = 0) -> Fault:
        """What the flag's text means for `rank`; None never trips. Raises: ConfigError."""
        if text is None:
            return cls("", "", 0)
        stage, _, rest = text.partition(":")
        action, _, rest = rest.partition(":")
        count, at, only = rest.partition("@")
        known = stage in STAGES and action in ACTIONS and count.isdecimal()
        if not known or (at and not only.isdecimal()):
            raise ConfigError(
                f"--fault {text!r} must be STAGE:ACTION:COUNT or STAGE:ACTION:COUNT@RANK with a stage of "
                f"{', '.join(STAGES)} and an action of {', '.join(ACTIONS)}.",
                param="fault",
            )
        return cls(stage, action, 0 if at and int(only) != rank else int(count))

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
