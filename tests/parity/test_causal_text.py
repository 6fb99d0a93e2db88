"""The text encoder of Z-Image against transformers: states, token ids, and what is left to transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from multimodal_gen.errors import CorruptModel
from multimodal_gen.pipelines.encoders import chat_tokens
from multimodal_gen.pipelines.encoders.causal_text import _body
from multimodal_gen.pipelines.encoders.qwen3 import Qwen3Body, Qwen3Config
from tests.support.checkpoints import build, qwen_tokenizer

pytestmark = [pytest.mark.parity]

PLAIN = {
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}


def folder_of(model: Any, place: Path) -> Path:
    model.config.save_pretrained(place)
    return place


def qwen3(**options: Any) -> Any:
    from transformers import Qwen3Config as Theirs
    from transformers import Qwen3Model

    return build(lambda: Qwen3Model(Theirs(**{**PLAIN, **options})), seed=3)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_key_value_heads": 6, "head_dim": 8}, {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_theta": 1e6}}],
    ids=["grouped heads", "as many keys as heads", "other constants"],
)
def test_states_before_the_last_layer_are_those_of_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = qwen3(**options)
    model, config, forward = _body(folder_of(theirs, tmp_path), torch.float32)
    assert isinstance(model, Qwen3Body)
    assert config.num_hidden_layers == theirs.config.num_hidden_layers - 1
    model.load_state_dict({k: v for k, v in theirs.state_dict().items() if k in model.state_dict()}, assign=True)
    ids = torch.randint(0, config.vocab_size, (37,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = theirs(input_ids=ids[None], output_hidden_states=True).hidden_states[-2][0]
        got = forward(ids)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert wanted.std() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"attention_bias": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    ],
    ids=["bias", "stretched positions", "windows"],
)
def test_what_is_not_written_here_is_computed_by_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    model, config, _ = _body(folder_of(qwen3(**options), tmp_path), torch.float32)
    assert type(model).__module__.startswith("transformers.")
    assert config.num_hidden_layers == PLAIN["num_hidden_layers"] - 1


def test_older_files_say_apart_how_positions_are_stretched() -> None:
    old = {**{k: v for k, v in PLAIN.items() if k != "rope_parameters"}, "model_type": "qwen3", "rms_norm_eps": 1e-6}
    found = Qwen3Config.read({**old, "rope_theta": 500.0, "rope_scaling": None})
    assert found is not None
    assert found.rope_theta == 500.0
    assert Qwen3Config.read({**old, "rope_theta": 500.0, "rope_scaling": {"type": "yarn", "factor": 4.0}}) is None


@pytest.mark.parametrize("wrong", [{"head_dim": None}, {"hidden_size": "40"}, {"num_key_value_heads": 4}], ids=str)
def test_a_damaged_configuration_is_named(wrong: dict[str, Any], tmp_path: Path) -> None:
    values = {**json.loads(qwen3().config.to_json_string(use_diff=False)), **wrong}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CorruptModel, match=r"text_encoder/config\.json"):
        _body(tmp_path, torch.float32)


@pytest.mark.parametrize(
    "prompt", ["", "a small red cat, photo", "x<|im_end|>y <think>", "\r\n é\u200d🍎\t" * 9, "one " * 90]
)
def test_tokens_are_those_of_transformers(prompt: str, tmp_path: Path) -> None:
    qwen_tokenizer().save_pretrained(tmp_path)
    ours, theirs = chat_tokens.load(tmp_path), chat_tokens.OfTransformers(tmp_path)
    assert isinstance(ours, chat_tokens.OfFile)
    for length in (None, 5, 40, 512):
        assert ours(prompt, length) == theirs(prompt, length)
