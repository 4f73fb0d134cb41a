"""The image, built and run as hardened as docker-compose.yml and deploy/kubernetes have it: `make image-test`.

Not among the tests that `make test` collects: it needs root and Debian's packages, and takes minutes.
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import world
from tests.image import stand_in
from tests.image.containers import BASE, IMAGE, Container, Store, asked, read_answer, running
from tests.running import KEYS_FILE, RANK_KEY
from tests.seal import reseal

NEXT_TO_20 = [world.item_id(row) for row in (21, 22, 23, 24, 25)]
PATIENT = {"timeout_ms": 10_000}
REQUEST = {"user": {"id": "cho"}} | PATIENT
ADDED_MB = 300  # to the base; 255 when it was set: onnxruntime 78, numpy and its BLAS 73, faiss and its own 66
WRITABLE = {"/tmp", "/dev/mqueue", "/dev/shm"}  # noqa: S108  in memory, and gone with the container
UNWANTED = {"torch", "onnx", "scipy", "pandas", "models", "loadtest", "tests", "pip", "setuptools", "wheel"}
TOOLS = ("pip", "pip3", "uv", "gcc", "g++", "cc", "c++", "clang", "cpp", "as", "ld", "make", "cmake", "curl", "wget")

# In the container: what can be imported besides the standard library, from the venv and from the base.
LIST_MODULES = """
import glob, os, site
for folder in {*site.getsitepackages(), *glob.glob("/usr/local/lib/python3*/*-packages")}:
    if os.path.isdir(folder):
        print(*os.listdir(folder))
"""

# In the container: every folder that its user may write to.
FIND_WRITABLE = """
import os
for folder, inner, _ in os.walk("/"):
    inner[:] = [name for name in inner if os.path.join(folder, name) not in ("/proc", "/sys")]
    if os.access(folder, os.W_OK):
        print(folder)
        inner[:] = []
"""


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    """The image, built on the stand-in."""
    stand_in.install_tools()
    with tempfile.TemporaryDirectory(prefix="winnow-image-") as folder:
        made = Store(Path(folder))
        try:
            made.build()
            yield made
        finally:
            made.clear()


@pytest.fixture(scope="module")
def folder(bundle, tmp_path_factory) -> Path:
    """What is mounted: two bundles, and a file of keys that anybody may read, since it holds digests only."""
    folder = tmp_path_factory.mktemp("mounted")
    folder.chmod(0o755)
    shutil.copytree(bundle, folder / "bundles/current")
    shutil.copytree(bundle, folder / "bundles/next")
    reseal(folder / "bundles/next", lambda manifest: manifest.update(version="2"))
    (folder / "keys").write_text(KEYS_FILE)
    (folder / "keys").chmod(0o644)
    return folder


def start(store: Store, folder: Path, *command: str, **settings: str):
    return running(store, folder / "bundles", *command, keys=folder / "keys", **settings)


@pytest.fixture(scope="module")
def service(store, folder) -> Iterator[Container]:
    with start(store, folder) as container:
        container.wait_for_line("ready after")
        yield container


def ranks_well(container: Container) -> bool:
    status, body = container.ask("POST", "/v1/rank", REQUEST, RANK_KEY)
    return status == 200 and [item["id"] for item in json.loads(body)["items"]] == NEXT_TO_20


# ------------------------------------------------------------------------------------------- the image


def test_it_is_run_by_a_number_that_is_not_root(store):
    user, group = store.inspect("image", IMAGE)["Config"]["User"].split(":")
    assert int(user) > 0
    assert int(group) > 0


def test_the_admin_port_is_not_among_those_that_it_exposes(store):
    assert list(store.inspect("image", IMAGE)["Config"]["ExposedPorts"]) == ["8000/tcp"]


def test_it_says_what_it_is(store):
    labels = store.inspect("image", IMAGE)["Config"]["Labels"]
    wanted = {
        f"org.opencontainers.image.{name}" for name in ("title", "description", "version", "licenses", "revision")
    }
    assert wanted <= set(labels)


def test_it_adds_little_to_its_base(store):
    whole, base = (store.inspect("image", name)["Size"] for name in (IMAGE, BASE))
    print(f"{(whole - base) / 1e6:.0f} MB on a base of {base / 1e6:.0f} MB")
    assert whole - base < ADDED_MB * 1e6


def test_nothing_in_it_trains_builds_or_installs(service):
    modules = {name.partition(".")[0].partition("-")[0] for name in service.python(LIST_MODULES).split()}
    assert {"app", "onnxruntime"} <= modules
    assert not UNWANTED & modules
    tools = service.python("import shutil, sys; print(*filter(shutil.which, sys.argv[1:]))", *TOOLS)
    assert tools.split() == []
    for python in ("python", "/usr/local/bin/python3"):
        for module in ("pip", "ensurepip"):
            done = subprocess.run(service.command(python, "-m", module, "--version"), capture_output=True, text=True)
            assert done.returncode == 1, f"{python} -m {module}: {done.stdout}"


# ------------------------------------------------------------------------------------- a running container


def test_it_ranks_from_a_mounted_bundle(service):
    assert ranks_well(service)


def test_it_asks_for_keys(service):
    assert service.ask("POST", "/v1/rank", REQUEST)[0] == 401


def test_the_admin_port_answers_beside_the_ranking_port(service):
    status, metrics = service.ask("GET", "/metrics", port=8001)
    assert status == 200
    assert "winnow_quality 1.0" in metrics
    assert service.ask("GET", "/metrics")[0] == 404


# In the container: what the kernel says of a process.
READ_STATUS = "import sys; print(open(f'/proc/{sys.argv[1]}/status').read())"


def test_its_processes_have_no_capability_and_can_gain_none(service):
    for process in ("1", "self"):
        status = dict(
            line.split(":\t", 1) for line in service.python(READ_STATUS, process).splitlines() if ":\t" in line
        )
        assert {int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
        assert status["NoNewPrivs"] == "1"
        assert "0" not in status["Uid"].split() + status["Gid"].split()


def test_it_can_write_nowhere_but_to_memory(service):
    assert set(service.python(FIND_WRITABLE).split()) <= WRITABLE


@pytest.mark.parametrize("path", ["/x", "/opt/winnow/x", "/run/x", "/bundles/x"])
def test_a_write_is_refused_by_the_file_system(service, path):
    script = "import errno, sys\ntry: open(sys.argv[1], 'a')\nexcept OSError as e: print(errno.errorcode[e.errno])"
    assert service.python(script, path) == "EROFS\n"


def test_the_health_check_follows_readiness(service):
    assert service.is_healthy()
    (_, *check) = service.store.inspect("image", IMAGE)["Healthcheck"]["Test"]
    for port, code in (("8000", 0), ("1", 1)):  # nobody listens on 1
        elsewhere = service.store.command("podman", "exec", f"--env=WINNOW_PORT={port}", service.name, *check)
        assert subprocess.run(elsewhere, capture_output=True).returncode == code


def test_it_logs_json_and_nothing_else(service):
    assert ranks_well(service)
    for line in service.log().splitlines():
        assert json.loads(line)["message"], line


def test_a_bundle_beside_the_first_serves_after_a_swap(store, folder):
    with start(store, folder) as container:
        container.wait_for_line("ready after")
        asked = {"path": "/bundles/next", "activate": True}
        assert container.ask("POST", "/admin/generations", asked, port=8001)[0] == 202
        container.wait_for_line("serving tiny@2")
        assert ranks_well(container)


def test_workers_that_die_are_replaced_and_leave_no_zombies(store, folder):
    """Process 1 is the service and no init; it is the server of forks that has the workers as children."""
    with start(store, folder) as container:
        container.wait_for_line("ready after")
        assert container.python(KILL_WORKERS) == "replaced, 0 zombies\n"
        assert ranks_well(container)


# Kills all workers, waits until others are there, then counts the dead that nobody has waited for.
KILL_WORKERS = """
import glob, json, os, signal, time, urllib.request

def workers():
    held = json.load(urllib.request.urlopen("http://127.0.0.1:8001/admin/generations"))["generations"]
    return {pid for one in held for pid in one["workers"].values() if pid}

def zombies():
    states = []
    for file in glob.glob("/proc/[0-9]*/stat"):
        try:
            states.append(open(file).read().rpartition(")")[2].split()[0])
        except FileNotFoundError:
            pass
    return states.count("Z")

before, until = workers(), time.monotonic() + 60
for pid in before:
    os.kill(pid, signal.SIGKILL)
while (len(now := workers()) < len(before) or now & before or zombies()) and time.monotonic() < until:
    time.sleep(0.05)
print("replaced," if len(now) == len(before) and not now & before else now, zombies(), "zombies")
"""


# ------------------------------------------------------------------------------------------- its end


def test_a_stop_lets_what_is_in_flight_end_and_exits_with_0(store, folder):
    """A row takes 0.1 s here, so that the request outlives the signal."""
    with start(store, folder, WINNOW_PACED_ROW_MS="100", WINNOW_SLA_MS="10000") as container:
        container.wait_for_line("ready after")
        command = container.command(
            "python", "-c", ASK_WHEN_IN_FLIGHT, *asked("POST", "/v1/rank", REQUEST, RANK_KEY, 8000)
        )
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asking:
            assert asking.stdout
            assert asking.stdout.readline() == "in flight\n"
            assert container.stop() == 0
            status, body = read_answer(asking.stdout.read())
        assert status == 200
        assert json.loads(body)["coverage"]["reranked"] == world.RERANK
        assert "stopping; 1 requests in flight" in container.log()


ASK_WHEN_IN_FLIGHT = """
import http.client, json, sys, threading, time, urllib.request
port, method, path, headers, body = sys.argv[1:]
connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
connection.request(method, path, body.encode(), json.loads(headers))
while b"winnow_inflight 1.0" not in urllib.request.urlopen("http://127.0.0.1:8001/metrics").read():
    time.sleep(0.01)
print("in flight", flush=True)
answer = connection.getresponse()
print(answer.status)
print(answer.read().decode(), flush=True)
"""


def test_a_stop_while_a_bundle_loads_exits_with_0(store, folder):
    with start(store, folder) as container:
        container.wait_for_line("answer 503")
        assert container.stop() == 0


def test_without_keys_it_refuses_to_start_and_says_why(store, folder):
    with running(store, folder / "bundles") as container:
        assert container.wait() == 2
        assert container.log().startswith("refused: WINNOW_HOST=0.0.0.0: without WINNOW_API_KEYS_FILE")


def test_without_its_bundle_it_refuses_to_start_and_says_why(store, folder):
    with start(store, folder, WINNOW_BUNDLE="/bundles/none") as container:
        assert container.wait() == 2
        said = [json.loads(line) for line in container.log().splitlines()]
        assert [line for line in said if line["level"] == "error" and "/bundles/none" in line["message"]]


def test_it_checks_a_bundle(store, folder):
    with start(store, folder, "check", "/bundles/current") as container:
        assert container.wait() == 0
        assert container.log().startswith("tiny@1#")
        assert ": sound\n" in container.log()
