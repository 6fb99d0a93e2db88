"""`mmgen chat` and what the other commands know of language models: real processes, a tiny model."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.mmgen import command, environment, mmgen
from tests.support.text_adapters import write_random
from tests.support.text_core import make_text_folder
from tests.support.text_models import open_model

pytestmark = [pytest.mark.e2e]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_folder("llama", tmp_path_factory.mktemp("chat") / "tiny", vocab_size=512)


@pytest.fixture(scope="module")
def flags(folder: Path) -> list[str]:
    small = ["--llm-dtype", "float32", "--threads", "1", "--kv-cache-memory", "8MiB", "--max-tokens", "8"]
    return ["--llm-path", str(folder), *small, "--temperature", "0"]


def test_one_question_is_answered_on_stdout_and_as_json(flags: list[str], tmp_path: Path) -> None:
    told = mmgen("chat", "hello", "--json", *flags, folder=tmp_path)
    assert told.code == 0, told.err
    answer = json.loads(told.out)
    assert answer["model"] == "tiny"
    assert answer["finish_reason"] in ("length", "stop")
    assert answer["usage"]["completion_tokens"] <= 8
    piped = mmgen("chat", "-", *flags, folder=tmp_path, stdin="hello\n")
    assert piped.out == answer["text"] + "\n"


def test_a_conversation_on_stdin_has_its_commands_and_remembers(flags: list[str], tmp_path: Path) -> None:
    lines = ["hello", "/nope", "/help", "hello", "/reset", "hello", "/system Be brief.", "hello", "/exit", "never"]
    told = mmgen("chat", *flags, folder=tmp_path, stdin="\n".join(lines))
    assert told.code == 0, told.err
    assert "There is no command /nope" in told.err
    assert "/reset" in told.err
    once = json.loads(mmgen("chat", "hello", "--json", *flags, folder=tmp_path).out)["text"]
    brief = json.loads(mmgen("chat", "hello", "--system", "Be brief.", "--json", *flags, folder=tmp_path).out)["text"]
    assert told.out.startswith(once + "\n")
    assert told.out.endswith(f"{once}\n{brief}\n"), "after /reset as at the beginning; then with the new instructions"


def test_a_conversation_uses_the_adapters_that_it_is_told_of(flags: list[str], folder: Path, tmp_path: Path) -> None:
    config = open_model(folder).config
    paths = []
    for seed, name in enumerate(("poet", "clerk")):
        write_random(tmp_path / f"{name}.safetensors", config, seed=seed)
        paths += ["--lora-paths", f"{name}={tmp_path / f'{name}.safetensors'}"]
    lines = [
        "hello",
        "/reset",
        "/adapter poet",
        "hello",
        "/adapter nobody",
        "/reset",
        "hello",
        "/adapter",
        "/reset",
        "hello",
    ]
    told = mmgen("chat", *flags, *paths, folder=tmp_path, stdin="\n".join(lines))
    assert told.code == 0, told.err
    assert "There is no adapter 'nobody'" in told.err
    poet = json.loads(mmgen("chat", "hello", "--json", *flags, *paths[:2], folder=tmp_path).out)
    base = json.loads(mmgen("chat", "hello", "--json", *flags, folder=tmp_path).out)
    assert (poet["adapter"], base["adapter"]) == ("poet", None)
    assert poet["text"] != base["text"]
    assert told.out == "".join(f"{each['text']}\n" for each in (base, poet, poet, base))
    wrong = mmgen("chat", "hello", *flags, *paths, "--adapter", "poem", folder=tmp_path)
    assert (wrong.code, "Did you mean 'poet'" in wrong.err) == (2, True)


def test_what_is_wrong_is_one_line_and_exit_code_two(flags: list[str], folder: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["x", "--llm-path", "smollm3"], "smollm2"),
        (["x", *flags, "--temperature", "-1"], "temperature"),
        (["x", *flags, "--max-tokens", "100000"], "context"),
        (["--json", *flags], "PROMPT"),
        (["-", *flags], "stdin"),
        (["x", *flags, "--lora", "a=b"], "--lora-paths"),
        (["x", "--sytem", "y"], "--system"),
    ):
        done = mmgen("chat", *arguments, folder=tmp_path)
        assert done.code == 2, done
        assert message in done.error


def test_ctrl_c_stops_an_answer_and_not_the_conversation(flags: list[str], tmp_path: Path) -> None:
    """In a terminal. Ctrl-D ends it, with exit code 0."""
    ours, theirs = pty.openpty()
    long = [flag if flag != "8" else "200" for flag in flags]
    process = subprocess.Popen(
        command("chat", *long), stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment(),
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    heard = ""

    def until(pattern: str, since: int, limit_s: float = 60.0) -> None:
        nonlocal heard
        end = time.monotonic() + limit_s
        while not re.search(pattern, heard[since:]):
            assert time.monotonic() < end, heard
            if select.select([ours], [], [], 0.2)[0]:
                heard += os.read(ours, 65536).decode(errors="replace")

    try:
        until("> ", 0)
        os.write(ours, b"hello\n")
        until("hello\r\n.", 0)
        process.send_signal(signal.SIGINT)
        said = len(heard)
        until("> $", said)
        os.write(ours, b"/help\n")
        until(r"/reset(.|\n)*> $", said)
        os.write(ours, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_models_and_doctor_know_language_models(folder: Path, tmp_path: Path) -> None:
    listed = json.loads(mmgen("models", "--json", folder=tmp_path).out)["text"]
    assert [each["name"] for each in listed["known"]] == ["smollm2"]
    assert {"llama", "qwen2", "qwen3"} <= {each["family"] for each in listed["families"]}
    assert "hermes" in listed["tool_call_parsers"]
    assert "qwen3" in listed["reasoning_parsers"]
    assert "smollm2" in mmgen("models", folder=tmp_path).out
    card = json.loads(mmgen("models", str(folder), "--json", folder=tmp_path).out)
    assert (card["name"], card["family"], card["chat"]) == ("tiny", "llama", True)
    report = json.loads(mmgen("doctor", "--llm-path", str(folder), "--json", folder=tmp_path).out)
    assert report["text_model"]["fits"] is True
    assert report["text_model"]["context"] == 256
    assert "model" not in report, "no model of pictures was asked for"
    refused = mmgen("generate", "x", "--llm-path", "smollm2", folder=tmp_path)
    assert (refused.code, "mmgen chat" in refused.error) == (2, True)
