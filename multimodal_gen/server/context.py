"""What the routes of one server share, and the requests it is working on."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from multimodal_gen.adapters import LoraState
from multimodal_gen.config import ServerConfig
from multimodal_gen.errors import AdapterUnavailable
from multimodal_gen.request import ModelCard
from multimodal_gen.server.metrics import Metrics
from multimodal_gen.text import TextCard

if TYPE_CHECKING:
    from multimodal_gen.engine.cards import Cards
    from multimodal_gen.engine.client import EngineClient
    from multimodal_gen.engine.job_runner import JobRunner
    from multimodal_gen.engine.ticket import AnyTicket
    from multimodal_gen.llm.front import TextFront


class Running:
    """The tickets of unanswered requests by (owner, request id), so that `DELETE` finds them.

    Clients choose request ids, so one id may name several requests; another owner's are out of reach.
    """

    def __init__(self) -> None:
        self._tickets: dict[tuple[str, str], list[AnyTicket]] = {}

    @contextmanager
    def hold(self, owner: str, request_id: str, *tickets: AnyTicket) -> Iterator[None]:
        """Keep tickets findable; those that are left unfinished are cancelled."""
        held = self._tickets.setdefault((owner, request_id), [])
        held += tickets
        try:
            yield
        except BaseException:
            # Whatever ends the answer early (an error, a disconnect, a shutdown), nobody waits for it.
            for ticket in tickets:
                ticket.cancel()
            raise
        finally:
            for ticket in tickets:
                held.remove(ticket)
            if not held:
                self._tickets.pop((owner, request_id), None)

    def cancel(self, owner: str, request_id: str) -> int:
        """Cancel the owner's requests of that id; returns how many there were."""
        tickets = self._tickets.get((owner, request_id), [])
        for ticket in list(tickets):
            ticket.cancel()
        return len(tickets)


@dataclass
class Context:
    """One server: its settings, its engine and its bookkeeping."""

    config: ServerConfig
    engine: EngineClient
    metrics: Metrics
    jobs: JobRunner | None = None  # of models that make videos
    text: TextFront | None = None  # of language models
    running: Running = field(default_factory=Running)
    started_at: int = field(default_factory=lambda: int(time.time()))  # seconds since the epoch
    encoders: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="encode")
    )

    @property
    def card(self) -> ModelCard:
        """The model of pictures or videos. Raises: UnsupportedEndpoint where there is none."""
        return self.engine.card

    @property
    def text_card(self) -> TextCard:
        """The language model. Raises: UnsupportedEndpoint where there is none."""
        return self.engine.text_card

    @property
    def model_name(self) -> str:
        """The id under which the model of pictures is listed, or the language model where it is alone."""
        return main_name(self.engine.cards, self.config)

    @property
    def text_name(self) -> str:
        """The id under which the language model is listed. Raises: UnsupportedEndpoint where there is none."""
        return self.model_name if self.engine.cards.pictures is None else self.text_card.name


def main_name(cards: Cards, config: ServerConfig) -> str:
    """What `--served-model-name` names: the model of pictures, or the language model where it is alone."""
    main = cards.pictures or cards.text
    assert main is not None, "a server serves something"
    return config.served_model_name or main.name


def lost_adapters(state: LoraState) -> AdapterUnavailable:
    """Why requests that rely on the active adapters cannot be served."""
    why = next(iter(state.missing.values()))
    return AdapterUnavailable(
        f"An active adapter could not be loaded again after the worker restarted. {why} Use set_lora again."
    )


def fingerprint(*parts: str) -> str:
    """A short key that reveals none of its parts: owners of requests, fair-share keys."""
    joined = b"\0".join(part.encode("utf-8", "surrogatepass") for part in parts)
    return hashlib.sha256(joined).hexdigest()[:16]
