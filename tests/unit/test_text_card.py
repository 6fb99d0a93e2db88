"""Language models from what their files say of themselves: without torch, and with an error that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import ConfigError, CorruptModel, MmgenError, ModelNotFound, RemoteCodeRefused
from multimodal_gen.llm import sources
from multimodal_gen.llm.card import describe
from multimodal_gen.text import TextCard, TextSampling
from tests.support.folders import safetensors_bytes, write_json
from tests.support.gguf_files import entry, header, pair, text

pytestmark = [pytest.mark.unit]

CONFIG: dict[str, Any] = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16"},
    **{"vocab_size": 8, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    **{"tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1},
}


def write_folder(folder: Path, **changes: Any) -> Path:
    """A sound folder: one tensor stands for all, since headers alone are read."""
    write_json(folder / "config.json", {**CONFIG, **changes})
    tensor = {"model.embed_tokens.weight": ("BF16", [8, 4], bytes(64))}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensor))
    return folder


def card_of(path: Path | str) -> TextCard:
    return describe(EngineConfig(llm_path=str(path)))


def test_a_folder_is_described(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny")
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 5, 1], "temperature": 0.6, "top_k": 20})
    write_json(folder / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    card = card_of(folder)
    assert (card.name, card.family, card.format, card.path) == ("tiny", "llama", "safetensors", str(folder))
    assert (card.context, card.vocab_size, card.layers, card.heads, card.kv_heads, card.head_dim) == (64, 8, 1, 2, 1, 2)
    assert (card.parameters, card.weight_bytes > 64, card.eos_ids, card.bos_id, card.chat) == (
        32,
        True,
        (1, 5),
        0,
        True,
    )
    assert card.defaults == TextSampling(temperature=0.6, top_k=20)


def test_smollm2_is_described_from_the_installed_package() -> None:
    card = card_of("smollm2")
    assert (card.name, card.family, card.format, card.context) == ("smollm2", "llama", "gguf", 8192)
    assert (card.parameters, card.eos_ids, card.chat) == (134_515_008, (2,), True)


def test_a_model_that_does_not_sample_sets_no_defaults(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny")
    write_json(folder / "generation_config.json", {"do_sample": False, "temperature": 0.0})
    assert card_of(folder).defaults == TextSampling()
    assert not card_of(folder).chat


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        (None, 64),
        ({"rope_type": "default"}, 64),
        ({"type": "linear", "factor": 4.0}, 256),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, 64),
        (
            {
                **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
                "original_max_position_embeddings": 8,
            },
            64,
        ),
    ],
)
def test_the_context_counts_scaled_positions(scaling: Any, context: int, tmp_path: Path) -> None:
    assert card_of(write_folder(tmp_path / "tiny", rope_scaling=scaling)).context == context


WRONG: dict[str, tuple[dict[str, Any], type[MmgenError], str]] = {
    "no architecture": ({"architectures": None}, CorruptModel, "architectures"),
    "unknown architecture": (
        {"architectures": ["MambaForCausalLM"]},
        ConfigError,
        "MambaForCausalLM.*LlamaForCausalLM",
    ),
    "remote code": ({"auto_map": {"AutoModel": "code.Model"}}, RemoteCodeRefused, "auto_map"),
    "missing size": ({"hidden_size": None}, CorruptModel, "lacks 'hidden_size'"),
    "text for a size": ({"hidden_size": "4"}, CorruptModel, "'hidden_size' must be of type int"),
    "true for a size": ({"num_hidden_layers": True}, CorruptModel, "num_hidden_layers"),
    "no layers": ({"num_hidden_layers": 0}, CorruptModel, "sizes"),
    "a million layers": ({"num_hidden_layers": 10**6}, CorruptModel, "sizes"),
    "negative width": ({"hidden_size": -4}, CorruptModel, "not positive"),
    "no heads": ({"num_attention_heads": 0}, CorruptModel, "not positive"),
    "heads that keys do not divide": ({"num_key_value_heads": 3, "head_dim": 2}, CorruptModel, "2 heads and 3"),
    "part of a head turns": ({"partial_rotary_factor": 0.5}, CorruptModel, "turn 1 of 2"),
    "infinite theta": ({"rope_theta": float("inf")}, CorruptModel, "rope_theta"),
    "activation": ({"hidden_act": "gelu"}, ConfigError, "gelu"),
    "biases of the network": ({"mlp_bias": True}, ConfigError, "mlp_bias"),
    "sliding layers": ({"layer_types": ["sliding_attention"]}, ConfigError, "sliding_attention"),
    "sliding window": (
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True},
        ConfigError,
        "use_sliding_window",
    ),
    "dynamic positions": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ConfigError, "dynamic"),
    "long rope": ({"rope_scaling": {"rope_type": "longrope"}}, ConfigError, "longrope"),
    "positions by layer": ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ConfigError, "by layer"),
    "scaling without a factor": ({"rope_scaling": {"type": "linear"}}, CorruptModel, "factor"),
    "shrinking factor": ({"rope_scaling": {"type": "linear", "factor": 0.5}}, CorruptModel, "factor"),
    "quantised otherwise": ({"quantization_config": {"quant_method": "gptq"}}, CorruptModel, "quantization_config"),
    "end outside the vocabulary": ({"eos_token_id": 8}, CorruptModel, "eos_token_id"),
    "start outside the vocabulary": ({"bos_token_id": -1}, CorruptModel, "bos_token_id"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_configuration_is_refused_by_name(what: str, tmp_path: Path) -> None:
    changes, error, message = WRONG[what]
    with pytest.raises(error, match=f"(?s){message}"):
        card_of(write_folder(tmp_path / "tiny", **changes))


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


def _bad_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _code_of_the_tokenizer(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": "code.Tokenizer"}})


def _bad_sampling(folder: Path) -> None:
    write_json(folder / "generation_config.json", {"top_p": 7})


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_truncate, CorruptModel, r"tiny/model\.safetensors is truncated"),
        (_only_pickles, CorruptModel, r"pytorch_model\.bin"),
        (_bad_json, CorruptModel, r"tiny/config\.json is not valid JSON"),
        (_code_of_the_tokenizer, RemoteCodeRefused, r"tiny/tokenizer_config\.json"),
        (_bad_sampling, CorruptModel, r"tiny/generation_config\.json"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(
    damage: Callable[[Path], None], error: type[MmgenError], message: str, tmp_path: Path
) -> None:
    damage(write_folder(tmp_path / "tiny"))
    with pytest.raises(error, match=message):
        card_of(tmp_path / "tiny")


def numbers(values: dict[str, int]) -> bytes:
    return b"".join(pair(key, 4, value.to_bytes(4, "little")) for key, value in values.items())


SIZES = {
    **{"llama.block_count": 1, "llama.context_length": 64, "llama.embedding_length": 4},
    **{"llama.feed_forward_length": 6, "llama.attention.head_count": 2, "tokenizer.ggml.eos_token_id": 1},
}
EPS = pair("llama.attention.layer_norm_rms_epsilon", 6, b"\xac\xc5'7")


def gguf(path: Path, name: str = "llama", tensors: bytes = entry("token_embd.weight", (8, 4)), **changes: int) -> Path:
    values = {**SIZES, **changes}
    raw = header(1, len(values) + 2) + pair("general.architecture", 8, text(name)) + EPS + numbers(values) + tensors
    path.write_bytes(raw + bytes(-len(raw) % 32 + 128))
    return path


def test_a_gguf_file_is_described(tmp_path: Path) -> None:
    card = card_of(gguf(tmp_path / "small.gguf"))
    assert (card.name, card.vocab_size, card.kv_heads, card.head_dim, card.eos_ids) == ("small", 8, 2, 2, (1,))
    assert card_of(tmp_path).path == str(tmp_path / "small.gguf")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"name": "mamba"}, ConfigError, r"small\.gguf: the architecture 'mamba'"),
        ({"tensors": entry("blk.0.ssm_a", (8, 4))}, CorruptModel, r"small\.gguf: the tensor 'blk\.0\.ssm_a'"),
        ({"tensors": entry("output.weight", (8, 4))}, CorruptModel, r"small\.gguf holds no embedding"),
        ({"split.count": 2}, CorruptModel, r"one of 2 parts"),
        ({"llama.block_count": 0}, CorruptModel, "sizes"),
        ({"llama.attention.sliding_window": 16}, ConfigError, "sliding_window"),
        ({"llama.expert_count": 4}, ConfigError, "expert_count"),
        ({"tokenizer.ggml.eos_token_id": 9}, CorruptModel, r"small\.gguf: tokenizer\.ggml\.eos_token_id"),
    ],
)
def test_a_wrong_gguf_file_is_refused_by_name(
    changes: dict[str, Any], error: type[MmgenError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        card_of(gguf(tmp_path / "small.gguf", **changes))


def test_a_name_that_means_nothing_says_what_was_tried(tmp_path: Path) -> None:
    for wanted, message in (
        ("smolm2", r"known name \(smollm2\).*Did you mean 'smollm2'"),
        (str(tmp_path / "nothing"), "no folder or GGUF file"),
        ("../x", "No language model"),
    ):
        with pytest.raises(ModelNotFound, match=message) as raised:
            card_of(wanted)
        assert raised.value.param == "llm_path"
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelNotFound, match=r"no \.gguf file"):
        card_of(tmp_path / "model.bin")
    with pytest.raises(CorruptModel, match=r"config\.json is missing"):
        card_of(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        gguf(tmp_path / name)
    with pytest.raises(ModelNotFound, match=r"several GGUF files \(a\.gguf, b\.gguf\)"):
        card_of(tmp_path)
    with pytest.raises(ConfigError, match="--llm-path"):
        describe(EngineConfig())


def test_a_package_that_is_absent_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = sources.Package("no_such_package", "model.gguf", "pip install no-such-package")
    monkeypatch.setitem(sources.NAMES, "absent", absent)
    with pytest.raises(
        ModelNotFound, match="no-such-package, which is not installed here: pip install no-such-package"
    ):
        card_of("absent")


def test_an_unknown_repository_is_not_downloaded_without_leave() -> None:
    with pytest.raises(ModelNotFound, match="downloads are off") as raised:
        describe(EngineConfig(llm_path="nobody/nothing", local_files_only=True))
    assert raised.value.param == "llm_path"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the hub library keeps `owner/name` once it has downloaded it; empty."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    root, commit = tmp_path / "hub" / "models--owner--name", "0123456789abcdef0123456789abcdef01234567"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "snapshots" / commit).mkdir(parents=True)
    return root / "snapshots" / commit


def test_a_downloaded_repository_is_found_and_called_by_its_name(hub: Path) -> None:
    write_folder(hub)
    card = describe(EngineConfig(llm_path="owner/name", local_files_only=True))
    assert (card.name, card.path) == ("name", str(hub))
    assert describe(EngineConfig(llm_path="owner/name", local_files_only=True, revision="v2")).name == "name"
    with pytest.raises(ModelNotFound, match="revision 'v2'"):  # without pictures it is the language model's
        describe(EngineConfig(llm_path="owner/name", local_files_only=True, revision="v2", model_path="none"))


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"auto_map": {"AutoModel": "code.Model"}}, RemoteCodeRefused), ({"architectures": ["Other"]}, ConfigError)],
)
def test_a_repository_is_refused_by_its_configuration_before_weights(
    changes: dict[str, Any], error: type[MmgenError], hub: Path
) -> None:
    write_json(hub / "config.json", {**CONFIG, **changes})
    with pytest.raises(error):
        describe(EngineConfig(llm_path="owner/name", local_files_only=True))


def test_only_safetensors_and_text_of_the_root_are_downloaded() -> None:
    from huggingface_hub.utils import filter_repo_objects

    taken = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    taken += ["tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
    left = ["README.md", "modeling.py", "pytorch_model.bin", "original/consolidated.00.pth", "onnx/model.onnx"]
    left += ["original/params.json", "consolidated.safetensors", "model.fp16.safetensors", "model-Q4_K_M.gguf"]
    found = filter_repo_objects(
        taken + left, allow_patterns=list(sources.WANTED), ignore_patterns=list(sources.UNWANTED)
    )
    assert list(found) == taken


def test_json_numbers_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "rms_norm_eps": float("nan")}))
    with pytest.raises(CorruptModel, match="rms_norm_eps"):
        card_of(folder)
