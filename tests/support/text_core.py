"""A TextCore in this process, what it says to requests, and what transformers says to the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from multimodal_gen.config import EngineConfig
from multimodal_gen.llm.answers import Answers
from multimodal_gen.llm.card import describe
from multimodal_gen.llm.core import TextCore
from multimodal_gen.llm.grammar.library import compile_grammar, tokenizer_info
from multimodal_gen.llm.loading import TextModel
from multimodal_gen.llm.tokenizer import Tokenizer
from multimodal_gen.messages import ErrorInfo, Event, Failed, TextFinished, TextStep
from multimodal_gen.text import Grammar, GrammarKind, TextOutput, TextRequest, TextSampling
from tests.support.checkpoints import qwen_tokenizer
from tests.support.device import DEVICE
from tests.support.text_models import make_model

GREEDY = TextSampling(temperature=0.0)


def make_text_folder(family: str, folder: Path, **changes: Any) -> Path:
    """A tiny model with a tokenizer."""
    qwen_tokenizer().save_pretrained(folder)
    return make_model(family, folder, **changes)


def open_core(
    path: Path | str,
    dtype: str = "float32",
    *,
    model: TextModel | None = None,
    clock: Callable[[], float] | None = None,
    **settings: Any,
) -> TextCore:
    """Our core, on the CPU, with little memory where nothing else is said."""
    settings = {"kv_cache_memory": 64 << 20, **settings}
    config = EngineConfig(llm_path=str(path), llm_dtype=dtype, device=DEVICE, **settings)  # type: ignore[arg-type]
    more = {} if clock is None else {"clock": clock}
    return TextCore(describe(config), config, model=model, **more)


def ask(name: str, prompt: Sequence[int], max_tokens: int = 12, **more: Any) -> TextRequest:
    """A greedy request whose end tokens do not count."""
    settings = {"sampling": GREEDY, "ignore_eos": True, **more}
    return TextRequest(id=name, prompt=tuple(prompt), max_tokens=max_tokens, **settings)


@dataclass
class Heard:
    """All that a core has said."""

    events: list[Event] = field(default_factory=list)
    outputs: dict[str, list[TextOutput]] = field(default_factory=dict)
    finished: dict[str, TextFinished] = field(default_factory=dict)
    failed: dict[str, ErrorInfo] = field(default_factory=dict)

    def ids(self, name: str, index: int = 0) -> list[int]:
        """Tokens of one answer."""
        return list(self.outputs[name][index].token_ids)


class Driver:
    """Asks a core and listens."""

    def __init__(self, core: TextCore) -> None:
        self.core = core
        self.heard = Heard()
        self._answers: dict[str, Answers] = {}

    def add(self, *requests: TextRequest) -> None:
        """Ask."""
        for request in requests:
            self._answers[request.id] = Answers(request)
            self.note(self.core.add(request))

    def step(self) -> list[Event]:
        """One step; what was said in it."""
        events = list(self.core.step())
        self.note(events)
        return events

    def run(self) -> Heard:
        """Until everything is answered."""
        while not self.core.idle:
            self.step()
        return self.heard

    def note(self, events: Sequence[Event]) -> None:
        """Take in what was said."""
        self.heard.events += events
        for event in events:
            if isinstance(event, TextStep):
                for delta in event.deltas:
                    self._answers[delta.request_id].note(delta)
            elif isinstance(event, TextFinished):
                self.heard.finished[event.request_id] = event
                self.heard.outputs[event.request_id] = self._answers[event.request_id].outputs(event)
            elif isinstance(event, Failed):
                self.heard.failed[event.request_id] = event.error


def answer(core: TextCore, *requests: TextRequest) -> Heard:
    """What the core says to requests that come together."""
    driver = Driver(core)
    driver.add(*requests)
    return driver.run()


def greedy(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """What transformers goes on with."""
    return greedy_together(model, [prompt], tokens)[0]


@torch.no_grad()
def greedy_together(model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """The same of several prompts in one batch, padded at their start."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return out[:, width:].tolist()


def grammar(core: TextCore, kind: GrammarKind, source: str) -> Grammar:
    """Compiled here and now; the front's helper does the same."""
    import xgrammar as xg

    vocabulary = Tokenizer.load(core.card).vocabulary
    compiled = compile_grammar(xg.GrammarCompiler(tokenizer_info(vocabulary)), kind, source)
    return Grammar(kind=kind, digest=f"{kind} {source}", compiled=compiled.serialize_json().encode())
