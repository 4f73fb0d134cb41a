"""Builds the image and runs containers, by buildah and podman, with a store of their own that is gone afterwards.

Containers have no network: what is asked of a service is asked from inside, so that the machine's network stays as it
is, and the service is shown to need none.
"""

import json
import resource
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.image import stand_in

ROOT = Path(__file__).parent.parent.parent
BASE, IMAGE = "localhost/winnow-stand-in:bookworm", "localhost/winnow:tested"
PATIENCE_S = 120.0  # a test that waits longer has failed
STOP_S = 20  # what compose and Kubernetes grant at least; then comes SIGKILL, and exit code 137
HARDENED = (
    *("--network", "none", "--read-only", "--read-only-tmpfs=false", "--cap-drop", "all"),
    *("--security-opt", "no-new-privileges", "--tmpfs", "/tmp:size=16m,mode=1777,noexec,nosuid,nodev"),  # noqa: S108
    *("--pids-limit", "128", "--memory", "1g", "--cpus", "2"),
    *("--health-interval", "disable"),  # podman has systemd ask; here the tests do
)
KEYS_AT = "/run/secrets/winnow_api_keys"

# Asks one request inside a container: port, method, path, headers, body → a line of status, then the answer.
ASK = """
import http.client, json, sys
port, method, path, headers, body = sys.argv[1:]
connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
connection.request(method, path, body.encode(), json.loads(headers))
answer = connection.getresponse()
print(answer.status)
print(answer.read().decode())
"""


@dataclass(frozen=True, slots=True)
class Store:
    """Images and containers under one folder, apart from those that the machine has."""

    folder: Path

    def command(self, tool: str, *arguments: str) -> list[str]:
        placed = ["--root", f"{self.folder}/store", "--runroot", f"{self.folder}/run"]
        if tool == "podman":  # it complains of systemd where there is none, and goes on
            placed += ["--tmpdir", f"{self.folder}/state", "--runtime", "runc", "--cgroup-manager", "cgroupfs"]
            placed += ["--log-level", "fatal"]
        return [tool, *placed, *arguments]

    def run(self, tool: str, *arguments: str) -> str:
        """What it says on standard output. Raises AssertionError with what it complained of."""
        done = subprocess.run(self.command(tool, *arguments), capture_output=True, text=True)
        assert done.returncode == 0, f"{tool} {arguments[0]}: {done.stderr[-4_000:]}"
        return done.stdout

    def build(self) -> None:
        """The stand-in, then the Dockerfile on it."""
        self.run("podman", "import", str(stand_in.base()), BASE)
        configured = self.folder / "pip.conf"
        seen = [f"--volume={path}:{path}:ro" for path in stand_in.pip_configuration(configured)]
        how = ["--isolation", "chroot", "--format", "docker", "--secret", f"id=pip_conf,src={configured}"]
        self.run("buildah", "bud", *how, *seen, "--build-arg", f"BASE={BASE}", "--tag", IMAGE, str(ROOT))

    def inspect(self, kind: str, name: str) -> Any:
        return json.loads(self.run("podman", kind, "inspect", name))[0]

    def clear(self) -> None:
        """Remove every container and image, and let go of the folder."""
        self.run("podman", "rm", "--all", "--force", "--time", "0")
        self.run("podman", "rmi", "--all", "--force")
        subprocess.run(["umount", f"{self.folder}/store/overlay"], capture_output=True)  # mounted on itself, or not


@dataclass(frozen=True, slots=True)
class Container:
    """A container of the image, running or ended."""

    store: Store
    name: str

    def command(self, *command: str) -> list[str]:
        """How to run something beside the service, as confined as it is."""
        return self.store.command("podman", "exec", self.name, *command)

    def python(self, script: str, *arguments: str, **environ: str) -> str:
        """What the script says, run in the container."""
        given = [f"--env={name}={value}" for name, value in environ.items()]
        return self.store.run("podman", "exec", *given, self.name, "python", "-c", script, *arguments)

    def ask(
        self, method: str, path: str, body: Any = None, key: str | None = None, *, port: int = 8000
    ) -> tuple[int, str]:
        """Status and body of one request."""
        return read_answer(self.python(ASK, *asked(method, path, body, key, port)))

    def is_healthy(self) -> bool:
        """The verdict of the image's own HEALTHCHECK."""
        done = subprocess.run(self.store.command("podman", "healthcheck", "run", self.name), capture_output=True)
        return done.returncode == 0

    def log(self) -> str:
        done = subprocess.run(self.store.command("podman", "logs", self.name), capture_output=True, text=True)
        return done.stdout + done.stderr

    def wait_for_line(self, text: str) -> None:
        """Until it has logged that."""
        following = self.store.command("podman", "logs", "--follow", self.name)
        with subprocess.Popen(following, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            watchdog = threading.Timer(PATIENCE_S, process.kill)
            watchdog.start()
            has_come = any(text in line for line in process.stdout or ())
            watchdog.cancel()
            process.kill()
        assert has_come, f"no line {text!r} in:\n{self.log()}"

    def wait(self) -> int:
        """Until it ends by itself; its exit code."""
        waiting = self.store.command("podman", "wait", self.name)
        return int(subprocess.run(waiting, check=True, capture_output=True, text=True, timeout=PATIENCE_S).stdout)

    def stop(self) -> int:
        """As an orchestrator would; the exit code of process 1."""
        self.store.run("podman", "stop", "--time", str(STOP_S), self.name)
        return int(self.store.inspect("container", self.name)["State"]["ExitCode"])


def asked(method: str, path: str, body: Any, key: str | None, port: int) -> list[str]:
    """The arguments of ASK."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    return [str(port), method, path, json.dumps(headers), "" if body is None else json.dumps(body)]


def read_answer(said: str) -> tuple[int, str]:
    """What ASK printed as status and body."""
    status, _, body = said.partition("\n")
    return int(status), body


@contextmanager
def running(
    store: Store, bundles: Path, *command: str, keys: Path | None = None, **settings: str
) -> Iterator[Container]:
    """A hardened container on these bundles, started; removed at the end. keys: the file of API keys."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # podman's own limit may be more than we may give
    options = [f"--ulimit=nofile={most}:{most}", "--ulimit=nproc=512:512", f"--volume={bundles}:/bundles:ro"]
    if keys:
        options.append(f"--volume={keys}:{KEYS_AT}:ro")
        settings = {"WINNOW_API_KEYS_FILE": KEYS_AT} | settings
    options += [f"--env={name}={value}" for name, value in ({"WINNOW_WORKERS": "2"} | settings).items()]
    name = store.run("podman", "run", "--detach", *HARDENED, *options, IMAGE, *command).strip()
    try:
        yield Container(store, name)
    finally:
        store.run("podman", "rm", "--force", "--time", "0", name)
