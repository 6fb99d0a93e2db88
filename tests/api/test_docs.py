"""docs/openai_api.md: every example runs, every field and metric is described."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from multimodal_gen.errors import BY_CODE
from multimodal_gen.server.schemas import FIELDS
from multimodal_gen.server.text_schemas import TEXT_FIELDS
from multimodal_gen.server.video_schemas import VIDEO_FIELDS
from tests.support.server import ROOT, Server, environment
from tests.support.text_adapters import write_poet

pytestmark = [pytest.mark.api]

PAGE = (ROOT / "docs" / "openai_api.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:30000"
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("language", "code"), BLOCKS, ids=lambda text: text.strip().splitlines()[0][:40])
def test_example(request: pytest.FixtureRequest, tmp_path: Path, language: str, code: str) -> None:
    server: Server = request.getfixturevalue(_server_for(code))
    # Examples stay plain: an HTTP error fails them all the same.
    Path(tmp_path, ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
    for adapter in (ROOT / "examples" / "loras").glob("*.safetensors"):
        shutil.copy(adapter, tmp_path)
    write_poet(tmp_path)
    Image.new("RGB", (320, 180), "teal").save(tmp_path / "first.png")
    code = code.replace(ADDRESS, server.base_url)
    command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(MMGEN_API_KEY="none", CURL_HOME=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if server.get("/v1/models").json()["data"][0]["task"] == "text-to-image":
        _without_adapters(server)
    assert done.returncode == 0, done.stdout[:2000] + done.stderr
    assert done.stdout or len(list(tmp_path.glob("*.png"))) > 1, "the example shows nothing"


def _server_for(code: str) -> str:
    """The fixture whose model the example is about."""
    if "input_reference" in code:
        return "image_video_server"
    if any(word in code for word in ("client.chat", "client.completions", "/completions", "tokenize", "lora_adapter")):
        return "text_server"
    if "enhance_prompt" in code:
        return "both_server"
    return "video_server" if "/v1/videos" in code or "client.videos" in code else "server"


def _without_adapters(server: Server) -> None:
    headers = {"content-type": "application/json"}
    server.client.post(server.base_url + "/v1/unmerge_lora_weights", content=b"{}", headers=headers)
    for info in server.get("/v1/list_loras").json()["loaded_adapters"]:
        assert server.client.delete(f"{server.base_url}/v1/loras/{info['nickname']}").status_code == 200


def test_every_endpoint_has_examples_in_both_languages(server: Server) -> None:
    for path in server.get("/openapi.json").json()["paths"]:
        literal = path.partition("{")[0].rstrip("/")
        assert literal in PAGE
    sections = PAGE.split("\n## ")[1:-1]
    for section in sections:
        assert "```bash" in section, section[:60]
        assert "```python" in section, section[:60]


def test_every_field_is_described() -> None:
    assert not [name for name in FIELDS | VIDEO_FIELDS | TEXT_FIELDS if f"`{name}`" not in PAGE]


def test_every_error_of_a_server_is_described() -> None:
    startup = {"invalid_config", "corrupt_model", "remote_code_refused"}
    assert not [code for code in set(BY_CODE) - startup if f"`{code}`" not in PAGE]


def test_every_metric_is_described(server: Server, shared_video_server: Server, shared_text_server: Server) -> None:
    text = "".join(each.get("/metrics").text for each in (server, shared_video_server, shared_text_server))
    names = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    shown = PAGE.replace("…", "mmgen_condition_cache")
    missing = [name for name in names if not name.endswith("_created") and f"`{name}" not in shown]
    assert not missing
