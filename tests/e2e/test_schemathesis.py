"""Schemathesis over the published document, all checks; what is expected is in schemathesis.toml."""

import os
import subprocess
from pathlib import Path
from sysconfig import get_path

from tests.running import RANK_KEY

ROOT = Path(__file__).parent.parent.parent


def test_schemathesis_finds_nothing(service):
    tool = Path(get_path("scripts")) / "schemathesis"
    document = f"http://127.0.0.1:{service.port}/openapi.json"
    before = service.counted("ok"), service.counted("client_error")
    done = subprocess.run(
        [tool, "--config-file", "schemathesis.toml", "run", "--checks", "all", document],
        cwd=ROOT,
        env=os.environ | {"WINNOW_KEY": RANK_KEY},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # It reached the models, not only the door.
    assert service.counted("ok") - before[0] >= 20
    assert service.counted("client_error") - before[1] >= 20
    assert service.counted("error") == 0
    reply = service.rank({"user": {"id": "cho"}, "timeout_ms": 10_000})
    assert reply.status == 200
    assert reply.json()["degraded"] == []
