"""A language model in a few numbers, from its files' headers: no torch here."""

from __future__ import annotations

from typing import Any

from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import CorruptModel
from multimodal_gen.llm import checkpoint, sources
from multimodal_gen.llm.checkpoint import GENERATION, TextCheckpoint
from multimodal_gen.llm.models.config import Keys
from multimodal_gen.text import TextCard, TextSampling

TEMPLATES = ("chat_template.jinja", "chat_template.json")
ENDS = ("eos", "eot", "eom")  # of a text, of a turn, of a message
MAX_ENDS = 64


def describe(config: EngineConfig) -> TextCard:
    """Find the language model, check its files and describe it.

    Raises: ModelNotFound, CorruptModel, RemoteCodeRefused, ConfigError.
    """
    source = sources.resolve(config)
    found = checkpoint.read(source.path, source.format)
    model = found.config
    return TextCard(
        name=source.name,
        family=found.family.name,
        path=str(source.path),
        format=source.format,
        context=model.context,
        vocab_size=model.vocab_size,
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        parameters=found.parameters,
        weight_bytes=found.bytes,
        eos_ids=_ends(found),
        bos_id=_start(found),
        chat=_chats(found),
        defaults=_defaults(found),
    )


def _ends(found: TextCheckpoint) -> tuple[int, ...]:
    if found.format == "gguf":
        wanted = [found.metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ENDS]
        return _ids(found, [value for value in wanted if value is not None], "tokenizer.ggml.eos_token_id")
    value = found.generation.get("eos_token_id", found.metadata.get("eos_token_id"))
    return _ids(found, value if isinstance(value, list) else [] if value is None else [value], "eos_token_id")


def _start(found: TextCheckpoint) -> int | None:
    key = "tokenizer.ggml.bos_token_id" if found.format == "gguf" else "bos_token_id"
    value = found.generation.get(key, found.metadata.get(key))
    return None if value is None else _ids(found, [value], key)[0]


def _ids(found: TextCheckpoint, values: list[Any], key: str) -> tuple[int, ...]:
    size = found.config.vocab_size
    wrong = next((value for value in values if type(value) is not int or not 0 <= value < size), None)
    if wrong is not None or len(values) > MAX_ENDS:
        raise CorruptModel(
            f"{found.path.name}: {key} must name tokens below {size:,}, at most {MAX_ENDS}, not {str(wrong)[:40]}."
        )
    return tuple(dict.fromkeys(values))


def _chats(found: TextCheckpoint) -> bool:
    if found.format == "gguf":
        return bool(found.metadata.get("tokenizer.chat_template"))
    return bool(found.tokenizer.get("chat_template")) or any((found.path / name).exists() for name in TEMPLATES)


def _defaults(found: TextCheckpoint) -> TextSampling:
    """What the checkpoint's makers sample with; a folder that says not to sample says nothing of it."""
    plain = TextSampling()
    keys = Keys(found.generation, f"{found.path.name}/{GENERATION}")
    if not keys.get("do_sample", True):
        return plain
    made = TextSampling(
        temperature=keys.get("temperature", plain.temperature),
        top_k=keys.get("top_k", plain.top_k),
        top_p=keys.get("top_p", plain.top_p),
        min_p=keys.get("min_p", plain.min_p),
        repetition_penalty=keys.get("repetition_penalty", plain.repetition_penalty),
    )
    sound = made.temperature >= 0 and made.top_k >= 0 and 0 < made.top_p <= 1 and 0 <= made.min_p <= 1
    if not sound or made.repetition_penalty <= 0:
        raise CorruptModel(f"{found.path.name}/{GENERATION} has values that nothing can be sampled with: {made}.")
    return made
