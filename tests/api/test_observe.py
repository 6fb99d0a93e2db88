"""What operators see of a running server beside /metrics and /health: status lines, CPU time, stacks of a start that
hangs; and the header that names what goes well together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import QUICK, ROOT, Server, assert_error, environment, http, start_server, wait_for
from tests.support.text_server import QUICK_CHAT, post

pytestmark = [pytest.mark.api]

CPU = 'process_cpu_seconds_total{component="%s"}'


def test_a_bad_routing_key_is_refused_by_every_route(server: Server) -> None:
    for path in ("/v1/models", "/health/live", "/metrics"):
        assert_error(server.get(path, **{"x-routing-key": "two words"}), 400, "invalid_value", "x-routing-key")
        assert server.get(path, **{"x-routing-key": "tenant-7/user_3"}).status_code == 200
    twice = http("GET", "/v1/models").replace(b"\r\n\r\n", b"\r\nx-routing-key: a\r\nx-routing-key: b\r\n\r\n", 1)
    assert_error(server.exchange(twice), 400, "invalid_value", "x-routing-key")


def test_cpu_time_grows_where_the_work_is(server: Server) -> None:
    before = {name: server.metric(CPU % name) for name in ("front", "worker", "helper")}
    assert before["front"] > 0
    assert before["worker"] > 0
    server.post({**QUICK, "num_inference_steps": 20})
    after = {name: server.metric(CPU % name) for name in before}
    assert all(after[name] >= before[name] for name in before)
    assert after["worker"] > before["worker"]


def test_texts_are_counted_and_their_routing_keys_are_seen_while_they_run(text_server: Server) -> None:
    tokens, key = "mmgen_text_generated_tokens_total", "mmgen_num_unique_running_routing_keys"
    before = text_server.metric(tokens)
    body = {**QUICK_CHAT, "max_tokens": 64, "ignore_eos": True}
    with ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(post, text_server, "/v1/chat/completions", body, **{"x-routing-key": name})
            for name in ("alice", "bob")
        ]
        wait_for(lambda: text_server.metric(key) == 2, 20, "both keys")
        answers = [each.result(60) for each in asked]
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [64, 64]
    assert text_server.metric(key) == 0
    wait_for(lambda: text_server.metric(tokens) == before + 128, 5, "the worker's last word")
    assert text_server.metric('mmgen_text_kv_pages{state="used"}') == 0
    assert text_server.metric("mmgen_text_tpot_seconds_count") >= 2
    refused = post(text_server, "/v1/chat/completions", body, **{"x-routing-key": "a b"})
    assert_error(refused, 400, "invalid_value", "x-routing-key")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def test_the_scheduler_tells_what_runs_and_waits_once_it_can(tmp_path: Path) -> None:
    folder = tmp_path / "status"
    folder.touch()  # a file: nothing can be written below it
    flags = ("--scheduler-status-target", str(folder), "--scheduler-status-interval-s", "0.02")
    with start_server(*flags, "--max-batch-tokens", "1") as server, ThreadPoolExecutor(2) as pool:
        pid = server.worker_pid()
        for seed in range(3):
            assert server.post({**QUICK, "num_inference_steps": 10, "seed": seed}).status_code == 200
        assert server.logged("status cannot be written")
        assert server.log.count("status cannot be written") == 1
        folder.unlink()

        long = {**QUICK, "num_inference_steps": 300}
        answers = [pool.submit(server.post, long, {"x-request-id": name}) for name in ("one", "two")]

        def told() -> bool:
            found = [(line["running"], line["queued"]) for line in lines(folder)]
            return any(
                sorted(work.partition("/")[0] for work in running + queued) == ["one", "two"]
                for running, queued in found
                if running and queued
            )

        wait_for(told, 30, "a line of both")
        assert all(server.delete(name).status_code == 200 for name in ("one", "two"))
        assert [answer.result(30).status_code for answer in answers] == [499, 499]
        wait_for(lambda: not lines(folder)[-1]["running"], 10, "the end of the work")
        last = lines(folder)[-1]
        assert (last["side"], last["replica"], last["rank"], last["queued"]) == ("pictures", 0, 0, [])
        assert server.worker_pid() == pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_front_that_hangs_before_it_listens_says_where_and_can_be_ended(
    tmp_path: Path, number: signal.Signals
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    os.mkfifo(model / "model_index.json")  # as on a disk that does not answer: whoever opens it waits for ever
    command = [sys.executable, "-m", "multimodal_gen.cli.main", "serve", "--port", "0", "--model-path", str(model)]
    said = tmp_path / "said"
    with said.open("wb") as stderr:
        process = subprocess.Popen(
            [*command, "--load-timeout-s", "0.5"], cwd=ROOT, env=environment(), stderr=stderr, stdout=stderr
        )
        try:
            wait_for(lambda: b"Timeout" in said.read_bytes() and b"checkpoint.py" in said.read_bytes(), 30, "stacks")
            process.send_signal(number)
            assert process.wait(5) == -number
        finally:
            process.kill()
            process.wait()
