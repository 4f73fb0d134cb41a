"""What the libraries below us would do unasked."""

import os
import subprocess
import sys


def test_onnxruntime_neither_keeps_a_device_id_nor_uploads(bundle, tmp_path):
    """Its telemetry leaves an id and a queue of events under the home directory; these switch it off by themselves."""
    silencing = ("ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "CI", "GITHUB_ACTIONS")
    environ = {k: v for k, v in os.environ.items() if k not in silencing and not k.startswith("XDG_")}
    command = [sys.executable, "-m", "app", "check", str(bundle)]
    subprocess.run(command, env=environ | {"HOME": str(tmp_path)}, check=True, capture_output=True)
    assert list(tmp_path.iterdir()) == []
