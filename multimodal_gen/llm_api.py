"""`LLM`: text from Python, a synchronous face of the same engine that the server runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from multimodal_gen import settings
from multimodal_gen.adapters import AdapterInfo, check_alpha, check_nickname
from multimodal_gen.config import NO_MODEL, EngineConfig
from multimodal_gen.environment import calm_openmp
from multimodal_gen.errors import ConfigError, InvalidValue, UnknownParameter, did_you_mean
from multimodal_gen.llm.answers import Answers
from multimodal_gen.llm.asking import TextParams, settle
from multimodal_gen.llm.front import TextFront
from multimodal_gen.lora.sources import make_source
from multimodal_gen.messages import TextDelta, TextFinished
from multimodal_gen.text import Grammar, GrammarKind, TextCard, TextInfo, TextOutput, TextRequest

if TYPE_CHECKING:
    from multimodal_gen.engine.local_text import TextEngine

Message = Mapping[str, Any]
OnDelta = Callable[[TextDelta], None]
# Settings whose names say that they are of the language model, where a server may have two models.
_SHORT = {"dtype": "llm_dtype", "quantization": "llm_quantize"}
_ONLY_PICTURES = ("model_path", "llm_path", "lora")


class LLM:
    """One loaded language model: in this process, or in workers of its own where several ranks were asked for.

        with LLM("smollm2") as llm:
            print(llm.generate("The capital of France is", max_tokens=8, temperature=0)[0].text)

    Not thread-safe: call it from one thread at a time.
    """

    def __init__(self, model_path: str | Path | EngineConfig, **options: Any) -> None:
        """Load a folder, a GGUF file, a hub repository, or `smollm2`.

        Every engine flag has the keyword of the same name: `--max-running-requests` is `max_running_requests=`. `dtype`
        and `quantization` are short for `llm_dtype` and `llm_quantize`. Settings that are settled already take the
        place of all of it.
        Raises: ModelNotFound, CorruptModel, RemoteCodeRefused, ConfigError.
        """
        calm_openmp()
        from multimodal_gen.engine.cards import refuse_settings_of_pictures
        from multimodal_gen.engine.local_text import LocalTextEngine, RemoteTextEngine
        from multimodal_gen.llm.card import describe
        from multimodal_gen.parallel.plan import plan

        if isinstance(model_path, EngineConfig):
            assert not options, "settled settings are whole"
            self.config = msgspec.structs.replace(model_path, model_path=NO_MODEL)
        else:
            self.config = settings.load(EngineConfig, _named(str(model_path), options))
        refuse_settings_of_pictures(self.config)
        self.card: TextCard = describe(self.config)
        apart = plan(self.config, None, text=self.card).workers > 1 or self.config.executor == "ray"
        self.front = TextFront.open(self.card, self.config)
        self._closed = False
        self._ids = itertools.count()
        try:
            self._live: TextEngine = RemoteTextEngine(self.config) if apart else LocalTextEngine(self.card, self.config)
        except BaseException:
            self.front.close()
            raise

    @property
    def info(self) -> TextInfo:
        """Device, dtype, context and memory in use."""
        return self._engine.info

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        *,
        params: TextParams | None = None,
        json_schema: Mapping[str, Any] | None = None,
        regex: str | None = None,
        ebnf: str | None = None,
        lora: str | None = None,
        on_delta: OnDelta | None = None,
        **overrides: Any,
    ) -> list[TextOutput]:
        """Go on with prompts, which share their steps.

        Args:
            prompts: texts or lists of token ids; one of them or several.
            params: for all prompts; keywords in `overrides` (its field names) take precedence.
            json_schema, regex, ebnf: what every answer must match; at most one of them.
            lora: name of a loaded adapter; None: the base model.
            on_delta: called with what a step has added to an answer.

        Returns: the answers in the order of the prompts, `n` for each.
        Raises: the errors of `multimodal_gen.errors`, before anything runs where the arguments are wrong.
        """
        tokens = [
            self.front.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            for prompt in _several(prompts)
        ]
        return self._run(tokens, params, overrides, self._grammar(json_schema, regex, ebnf), lora, on_delta)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        params: TextParams | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        json_schema: Mapping[str, Any] | None = None,
        regex: str | None = None,
        ebnf: str | None = None,
        lora: str | None = None,
        on_delta: OnDelta | None = None,
        **overrides: Any,
    ) -> list[TextOutput]:
        """Answer conversations, written down as the checkpoint's own template says.

        Args:
            messages: {"role", "content"} each; one conversation or several.
            tools: functions that the model may call, as OpenAI's; calls come as the model writes them.
            template_variables: what the template reads beside the messages, such as `enable_thinking`.

        The rest is as for `generate`. Raises: InvalidValue where the model has no template, or it refuses the messages.
        """
        if self.front.template is None:
            raise InvalidValue(f"{self.card.name} comes without a chat template; use generate().", param="messages")
        several = _conversations(messages)
        tokens = [
            self.front.template.encode(self.front.tokenizer, each, tools=tools, variables=template_variables)
            for each in several
        ]
        return self._run(tokens, params, overrides, self._grammar(json_schema, regex, ebnf), lora, on_delta)

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        params: TextParams | None,
        overrides: Mapping[str, Any],
        grammar: Grammar | None,
        lora: str | None,
        on_delta: OnDelta | None,
    ) -> list[TextOutput]:
        engine, settled = self._engine, _merge(params or TextParams(), overrides)
        context = engine.info.context
        adapter = None if lora is None else engine.adapters.find(lora, "lora")
        given: dict[str, Any] = {"card": self.card, "context": context, "grammar": grammar, "adapter": adapter}
        requests = [settle(f"local-{next(self._ids)}", tokens, settled, **given) for tokens in prompts]
        written = _Written(requests, on_delta)
        engine.run(requests, written.hear)
        return [output for request in requests for output in written.outputs[request.id]]

    def _grammar(self, json_schema: Mapping[str, Any] | None, regex: str | None, ebnf: str | None) -> Grammar | None:
        sources: dict[GrammarKind, Any] = {"json_schema": json_schema, "regex": regex, "ebnf": ebnf}
        given = {kind: source for kind, source in sources.items() if source is not None}
        if len(given) > 1:
            raise InvalidValue(f"An answer can match one of {', '.join(given)}, not all.", param=next(iter(given)))
        for kind, source in given.items():
            text = source if isinstance(source, str) else msgspec.json.encode(source).decode()
            return self.front.grammars.compile_now(kind, text, kind)
        return None

    def load_lora_adapter(
        self,
        name: str,
        path: str,
        *,
        pinned: bool = False,
        lora_alpha: float | None = None,
        allow_partial: bool = False,
    ) -> AdapterInfo:
        """Load an adapter of the language model under a name, for `lora` of `generate` and `chat`.

        Beyond `max_loaded_loras` the least recently used one that is not pinned leaves.

        Args:
            path: a safetensors file, or peft's folder.
            pinned: never make it leave for another.
            lora_alpha: instead of the file's.
            allow_partial: load a file of which some modules have no place in the model.

        Raises: the AdapterError family; all is as before then.
        """
        check_nickname(name, "name")
        source = make_source(name, str(path), None, check_alpha(lora_alpha), allow_partial)
        return self._engine.load_adapter(source, pinned=pinned).info

    def unload_lora_adapter(self, name: str) -> None:
        """Forget an adapter, pinned or not. Raises: AdapterNotFound."""
        self._engine.unload_adapter(name)

    @property
    def lora_adapters(self) -> dict[str, AdapterInfo]:
        """Those that are loaded, the least recently used first."""
        return {name: entry.info for name, entry in self._engine.adapters.entries.items()}

    def sleep(self) -> int:
        """Give the memory of weights and keys and values back, on all ranks; returns the bytes that it was."""
        return self._engine.sleep().freed_bytes

    def wake(self) -> None:
        """Bring the weights back. Raises: WeightsUnavailable, OutOfMemory; it can be tried again."""
        self._engine.wake()

    def close(self) -> None:
        """Free the model and end its workers; the object cannot be used any more."""
        if not self._closed:
            self._closed = True
            self.front.close()
            self._live.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def _engine(self) -> TextEngine:
        if self._closed:
            raise InvalidValue("This LLM is closed; make a new one.")
        return self._live


class _Written:
    """What has been heard of the requests of one call."""

    def __init__(self, requests: Sequence[TextRequest], on_delta: OnDelta | None) -> None:
        self._answers = {request.id: Answers(request) for request in requests}
        self._on_delta = on_delta
        self.outputs: dict[str, list[TextOutput]] = {}

    def hear(self, event: TextDelta | TextFinished) -> None:
        """Called by the engine."""
        answers = self._answers[event.request_id]
        if isinstance(event, TextFinished):
            self.outputs[event.request_id] = answers.outputs(event)
            return
        answers.note(event)
        if self._on_delta is not None:
            self._on_delta(event)


def _named(model_path: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords as settings. Raises: ConfigError."""
    for name in _ONLY_PICTURES:
        if name in options:
            raise ConfigError(f"LLM() has no setting {name!r}.", param=name)
    given = {"llm_path": model_path, "model_path": NO_MODEL}
    for name, value in options.items():
        setting = _SHORT.get(name, name)
        if setting in given:
            raise ConfigError(f"LLM() was given {setting!r} twice.", param=setting)
        given[setting] = value
    return given


def _several(prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]) -> list[str | Sequence[int]]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise InvalidValue("'prompts' must be texts or lists of token ids.", param="prompts")
    if prompts and all(isinstance(each, int) for each in prompts):
        return [[each for each in prompts if isinstance(each, int)]]
    found = list[str | Sequence[int]]()
    for each in prompts:
        if isinstance(each, int):
            raise InvalidValue("'prompts' must be texts or lists of token ids, each of one kind.", param="prompts")
        if not isinstance(each, Sequence):
            raise InvalidValue("Each of 'prompts' must be a text or a list of token ids.", param="prompts")
        found.append(each)
    return found


def _conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[list[Message]]:
    """Raises: InvalidValue for anything else, and for a conversation without messages."""
    wrong = InvalidValue(
        "'messages' must be {'role', 'content'} each: one conversation, or a list of conversations.", param="messages"
    )
    if not messages or isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise wrong
    one = all(isinstance(each, Mapping) for each in messages)
    several: list[Any] = [messages] if one else [*messages]
    for each in several:
        listed = isinstance(each, Sequence) and not isinstance(each, str) and len(each) > 0
        if not listed or not all(isinstance(message, Mapping) for message in each):
            raise wrong
    return [list(each) for each in several]


def _merge(params: TextParams, overrides: Mapping[str, Any]) -> TextParams:
    for name in overrides:
        if name not in params.__struct_fields__:
            raise UnknownParameter(
                f"An answer has no setting {name!r}." + did_you_mean(name, params.__struct_fields__), param=name
            )
    return msgspec.structs.replace(params, **overrides)
