"""Settings: one schema for flags, variables, files and keywords; precedence, origins and messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from multimodal_gen.config import EngineConfig, ServerConfig, check_bind, data_folder, is_loopback
from multimodal_gen.errors import ConfigError
from multimodal_gen.settings import load, options, settle

pytestmark = [pytest.mark.unit]


def server(*, environ: dict[str, str] | None = None, file: Path | None = None, **given: Any) -> ServerConfig:
    return load(ServerConfig, given, file=file, environ=environ or {})


def refused(*, environ: dict[str, str] | None = None, file: Path | None = None, **given: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        server(environ=environ, file=file, **given)
    assert "\n" not in caught.value.message
    return caught.value


def written(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_need_nothing_and_are_valid_themselves():
    assert server() == ServerConfig()
    assert load(EngineConfig, {}, environ={}) == EngineConfig()
    for option in options(ServerConfig):
        settle(ServerConfig, {option.name: option.default}, environ={})


def test_every_option_has_help_and_one_of_the_known_shapes():
    names = [option.name for option in options(ServerConfig)]
    assert [option.name for option in options(EngineConfig)] == names[: len(options(EngineConfig))]
    for option in options(ServerConfig):
        assert len(option.help) > 10
        assert option.flag == "--" + option.name.replace("_", "-")
    switches = {option.name for option in options(ServerConfig) if option.is_switch}
    assert {"deterministic", "local_files_only"} <= switches
    assert {option.name for option in options(ServerConfig) if option.is_list} == {
        "allowed_hosts",
        "allowed_origins",
        "lora",
        "lora_paths",
        "lora_root",
        "offload_components",
    }
    assert {option.name: option.choices for option in options(ServerConfig) if option.choices} == {
        "dtype": ("auto", "float32", "bfloat16", "float16"),
        "executor": ("process", "ray"),
        "kernels": ("auto", "torch"),
        "quantize": ("none", "int8", "fp8", "int8-weights", "int4-weights"),
        "llm_dtype": ("auto", "float32", "bfloat16", "float16"),
        "llm_quantize": ("none", "int8", "int8-weights", "int4-weights"),
        "offload": ("auto", "none", "layerwise", "component"),
        "schedule_policy": ("fcfs", "lpm", "routing-key", "priority"),
        "lora_merge_mode": ("auto", "merge", "dynamic"),
        "unknown_fields": ("error", "warn"),
        "log_level": ("debug", "info", "warning", "error"),
    }


def test_flag_beats_variable_beats_file_beats_default(tmp_path):
    file = written(tmp_path, "port: 1\nmax-body-mb: 2\nthreads: 3\n")
    environ = {"MMGEN_PORT": "10", "MMGEN_THREADS": "30"}
    settings = {s.option.name: s for s in settle(ServerConfig, {"port": "100"}, file=file, environ=environ)}
    assert (settings["port"].value, settings["port"].origin) == (100, "arguments")
    assert (settings["threads"].value, settings["threads"].origin) == (30, "MMGEN_THREADS")
    assert (settings["max_body_mb"].value, settings["max_body_mb"].origin) == (2.0, str(file))
    assert (settings["host"].value, settings["host"].origin) == ("127.0.0.1", "default")
    assert list(settings) == [option.name for option in options(ServerConfig)]
    config = server(file=file, environ=environ, port="100")
    assert (config.port, config.threads, config.max_body_mb) == (100, 30, 2.0)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("port", "8080", 8080),
        ("threads", "2", 2),
        ("max_body_mb", "1.5", 1.5),
        ("deterministic", "true", True),
        ("deterministic", "0", False),
        ("dtype", "bfloat16", "bfloat16"),
        ("allowed_hosts", "a.example, b.example,", ["a.example", "b.example"]),
        ("revision", "null", "null"),
        ("device_memory_limit", "12GB", 12 * 10**9),
        ("host_memory_limit", "1.5GiB", 3 << 29),
        ("pin_memory", "500 MB", 500 * 10**6),
        ("pin_memory", "auto", None),
        ("prefetch_layers", "3", "3"),
        ("prefetch_layers", "1.5 GB", "1.5GB"),
        ("offload_components", "vae, text_encoder = parked", ["vae", "text_encoder=parked"]),
    ],
)
def test_variables_are_text(name, text, value):
    assert msgspec.structs.asdict(server(environ={"MMGEN_" + name.upper(): text}))[name] == value


def test_empty_variables_and_none_count_as_not_given(tmp_path):
    file = written(tmp_path, "port:\nhost: 127.0.0.2\n")
    config = server(environ={"MMGEN_API_KEY": "", "MMGEN_HOST": ""}, file=file, threads=None)
    assert config.api_key is None
    assert config.host == "127.0.0.2"
    assert config.port == ServerConfig().port


def test_keywords_may_be_paths_and_tuples():
    config = server(model_path=Path("/models/x"), allowed_hosts=("a", "b"))
    assert config.model_path == "/models/x"
    assert config.allowed_hosts == ["a", "b"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"port": "99999"}, "--port cannot be '99999': expected int <= 65535"),
        ({"port": "http"}, "--port cannot be 'http': expected int"),
        ({"threads": 0}, "--threads cannot be 0: expected int >= 1"),
        ({"num_gpus": True}, "--num-gpus cannot be True: expected int | null"),
        ({"body_timeout_s": "inf"}, "--body-timeout-s cannot be 'inf': expected a finite number"),
        ({"body_timeout_s": float("nan")}, "--body-timeout-s cannot be nan"),
        ({"drain_timeout_s": float("inf")}, "expected a finite number"),
        ({"max_body_mb": 0}, "--max-body-mb cannot be 0: expected float > 0.0"),
        ({"deterministic": "maybe"}, "--deterministic cannot be 'maybe': it is true or false."),
        (
            {"dtype": "flaot32"},
            "--dtype cannot be 'flaot32': choose one of auto, float32, bfloat16, float16. Did you mean 'float32'?",
        ),
        ({"allowed_hosts": [1]}, "--allowed-hosts cannot be [1]"),
        (
            {"device_memory_limit": "12"},
            "--device-memory-limit cannot be '12': say which unit: 12GB or 12MB.",
        ),
        (
            {"device_memory_limit": "12 GP"},
            "there is no unit GP; use one of B, kB, MB, GB, TB, KiB, MiB, GiB, TiB. It is:",
        ),
        ({"host_memory_limit": "-1GB"}, "cannot be '-1GB': a size is a number and a unit, as in 12GB, 500 MB or 1.5"),
        ({"pin_memory": "yes"}, "--pin-memory cannot be 'yes': a size is a number and a unit"),
        ({"prefetch_layers": "-1"}, "--prefetch-layers cannot be '-1': a size is a number and a unit"),
        ({"prefetch_layers": 5000}, "--prefetch-layers cannot be 5000: it is 0 to 1024 layers, or a size with its"),
        ({"resident_layers": -1}, "--resident-layers cannot be -1: expected int >= 0"),
        ({"offload": "layers"}, "none, layerwise, component. Did you mean 'layerwise'?"),
        (
            {"offload_components": "vae=praked"},
            "resident, streamed, parked. Did you mean 'parked'?",
        ),
        ({"offload_components": ["vae", "vae=parked"]}, "vae is named twice"),
        ({"offload_components": ["text encoder"]}, "is no NAME or NAME=RESIDENCY, as in text_encoder=parked"),
        ({"prot": 5}, "Unknown setting 'prot'. Did you mean 'port'?"),
    ],
)
def test_wrong_values_say_what_is_allowed(given, expected):
    error = refused(**given)
    assert expected in error.message
    assert error.param == next(iter(given))


def test_messages_name_the_source(tmp_path):
    assert "(from MMGEN_PORT)" in refused(environ={"MMGEN_PORT": "x"}).message
    file = written(tmp_path, "port: x")
    assert f"(from {file})" in refused(file=file).message


def test_a_wrong_value_is_an_error_even_where_a_better_source_overrides_it():
    assert "MMGEN_PORT" in refused(environ={"MMGEN_PORT": "x"}, port=1).message


def test_unknown_variables_are_errors_with_a_suggestion_and_foreign_ones_are_not_read():
    error = refused(environ={"MMGEN_PRT": "1"})
    assert error.message == "Unknown environment variable MMGEN_PRT. Did you mean 'MMGEN_PORT'?"
    assert server(environ={"PORT": "1", "XMMGEN_PORT": "2"}).port == ServerConfig().port


def test_engine_settings_ignore_the_servers_variables_and_keys(tmp_path):
    file = written(tmp_path, "port: 8000\nthreads: 2\n")
    config = load(EngineConfig, {}, file=file, environ={"MMGEN_HOST": "0.0.0.0"})
    assert config.threads == 2
    with pytest.raises(ConfigError, match="Unknown setting 'port'"):
        load(EngineConfig, {"port": 8000}, environ={})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", "must hold a mapping"),
        ("port: [1\n", "Cannot read the configuration file"),
        ("!!python/object/apply:os.system ['true']", "Cannot read the configuration file"),
        ("prot: 1", "Unknown setting 'prot' in"),
        ("port: 1\n\x00", "Cannot read the configuration file"),
        ("[" * 5000, "Cannot read the configuration file"),
    ],
)
def test_broken_files_are_errors(tmp_path, text, expected):
    assert expected in refused(file=written(tmp_path, text)).message


def test_missing_and_binary_files_are_errors(tmp_path):
    assert "No such file" in refused(file=tmp_path / "absent.yaml").message
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x80")
    assert "binary.yaml" in refused(file=tmp_path / "binary.yaml").message


def test_an_empty_file_is_fine(tmp_path):
    assert server(file=written(tmp_path, "# nothing\n")) == ServerConfig()


def test_the_api_key_is_never_shown():
    secret = "sk-very-secret"
    settings = settle(ServerConfig, {"api_key": secret}, environ={})
    (key,) = (s for s in settings if s.option.name == "api_key")
    assert key.value == secret
    assert key.shown == "(hidden)"
    assert secret not in refused(api_key=[secret]).message
    (unset,) = (s for s in settle(ServerConfig, {}, environ={}) if s.option.name == "api_key")
    assert unset.shown is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "::1", "[::1]", "::ffff:127.0.0.1"])
def test_loopback_needs_no_key(host):
    assert is_loopback(host)
    check_bind(server(host=host))


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "192.168.1.5", "::ffff:10.0.0.1", "example.org", "localhost.evil.example"]
)
def test_other_addresses_need_a_key(host):
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match="MMGEN_API_KEY") as caught:
        check_bind(ServerConfig(host=host))
    assert caught.value.param == "host"
    check_bind(ServerConfig(host=host, api_key="k"))


@pytest.mark.parametrize("key", ["", " ", " a", "a\n", "schlüssel", "a\0b"])
def test_keys_that_cannot_travel_in_a_header_are_refused(key):
    with pytest.raises(ConfigError, match="--api-key") as caught:
        check_bind(ServerConfig(api_key=key))
    assert caught.value.param == "api_key"


def test_the_data_folder_is_where_the_user_says_or_where_the_desktop_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert data_folder(ServerConfig()) == Path("/home/x/.local/share/mmgen")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert data_folder(ServerConfig()) == Path("/data/mmgen")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert data_folder(ServerConfig()) == Path("/home/x/.local/share/mmgen")
    assert data_folder(ServerConfig(data_dir="~/jobs")) == Path("/home/x/jobs")


@pytest.mark.parametrize(
    ("given", "model"),
    [
        ({}, "emoji-image"),
        ({"llm_path": "smollm2"}, "none"),
        ({"llm_path": "smollm2", "model_path": "emoji-image"}, "emoji-image"),
        ({"model_path": "none"}, "none"),
    ],
)
def test_a_language_model_alone_is_what_was_asked_for(given: dict[str, str], model: str) -> None:
    assert load(ServerConfig, given, environ={}).model_path == model


def test_the_language_model_may_stand_in_the_environment_and_the_other_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("model_path: emoji-image\n")
    environ = {"MMGEN_LLM_PATH": "smollm2"}
    assert load(EngineConfig, {}, environ=environ).model_path == "none"
    assert load(EngineConfig, {}, environ=environ, file=file).model_path == "emoji-image"
