"""What operators see: health, metrics, the documentation page, the schema, and the headers of every answer."""

from __future__ import annotations

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.server import QUICK, Server

pytestmark = [pytest.mark.api]

NAMES = {
    "mmgen_requests", "mmgen_queue_depth", "mmgen_running", "mmgen_queue_seconds", "mmgen_request_seconds",
    "mmgen_stage_seconds", "mmgen_step_seconds", "mmgen_worker_restarts", "mmgen_rejected", "mmgen_cancelled",
    "mmgen_condition_cache_bytes", "mmgen_condition_cache_hits", "mmgen_condition_cache_misses",
    "mmgen_step_cache_bytes", "mmgen_cached_steps",
}  # fmt: skip


def test_health(server: Server) -> None:
    assert server.get("/health/live").json() == {"status": "live"}
    for path in ("/health", "/health/ready"):
        assert server.get(path).json() == {"status": "ready"}


def test_metrics_parse_and_count(server: Server) -> None:
    def families() -> dict[str, float]:
        text = server.get("/metrics").text
        return {
            sample.name + str(sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    before = families()
    server.post({**QUICK, "prompt": "counted once", "n": 2})
    server.post({**QUICK, "prompt": "counted once", "n": 0})
    server.post({**QUICK, "prompt": "counted once", "n": 2})
    after = families()

    def grew(start: str) -> float:
        return sum(v - before.get(k, 0) for k, v in after.items() if k.startswith(start))

    route = "mmgen_requests_total[('endpoint', '/v1/images/generations'), ('model', 'emoji-image'), "
    assert grew(route + "('outcome', 'ok')]") == 2
    assert grew(route + "('outcome', 'client_error')]") == 1
    assert grew("mmgen_images_total") == 4
    assert grew("mmgen_step_seconds_count") == 2
    assert grew("mmgen_stage_seconds_count[('stage', 'denoise')]") == 2
    assert grew("mmgen_condition_cache_hits_total") >= 1
    assert after["mmgen_condition_cache_bytes[]"] > 0
    text = server.get("/metrics").text
    assert {name for name in NAMES if f"# TYPE {name}" in text} == NAMES
    assert "counted once" not in text


def test_labels_are_bounded(server: Server) -> None:
    for i in range(20):
        server.get(f"/made-up/{i}")
        server.delete(f"made-up-{i}")
    text = server.get("/metrics").text
    assert "made-up" not in text


def test_openapi_documents_every_field(server: Server) -> None:
    schema = server.get("/openapi.json").json()
    operation = schema["paths"]["/v1/images/generations"]["post"]
    fields = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"prompt", "n", "size", "seed", "negative_prompt", "cfg_truncation", "stream"} <= set(fields)
    assert all(field["description"] for field in fields.values())
    assert set(schema["paths"]) >= {"/v1/models", "/v1/models/{model_id}", "/health/ready", "/metrics"}
    assert "422" not in str(schema["paths"])


def test_docs_page_needs_nothing_from_elsewhere(server: Server) -> None:
    response = server.get("/docs")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "num_inference_steps" in response.text
    assert "<script" not in response.text
    assert not re.search(r'(src|href)="?(https?:)?//', response.text)


def test_headers_of_every_answer(server: Server) -> None:
    for response in (server.get("/health"), server.get("/nothing"), server.post(QUICK), server.post(b"{")):
        assert re.fullmatch(r"req_[0-9a-f]{32}", response.headers["x-request-id"])
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "server" not in response.headers
    assert server.get("/health", **{"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    assert server.logged(f"{server.get('/health').headers['x-request-id']} GET '/health' 200"), server.log
