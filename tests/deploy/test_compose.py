"""docker-compose.yml against its schema, and against what it promises at its top."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import BIN, ROOT, VERSION, stop_s, unknown

FILE = ROOT / "docker-compose.yml"
COMPOSE: dict[str, Any] = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


def filled(text: str) -> str:
    """With the default of each variable, as without a .env."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@pytest.fixture(params=SERVICES)
def service(request) -> dict[str, Any]:
    return SERVICES[request.param]


def test_the_schema_finds_nothing():
    subprocess.run([BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", FILE], check=True)


def test_every_service_is_confined(service):
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "devices", "network_mode", "pid", "ipc", "userns_mode"} & set(service)


def test_every_service_has_limits(service):
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}


def test_every_log_has_a_bound(service):
    assert {"max-size", "max-file"} <= set(service["logging"]["options"])


def test_every_image_is_pinned_to_a_version(service):
    assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", filled(service["image"]))


def test_the_image_is_this_version():
    given = SERVICES["winnow"]
    assert filled(given["image"]) == f"winnow:{VERSION}"
    assert filled(given["build"]["args"]["VERSION"]) == VERSION


def test_what_is_mounted_from_the_machine_is_read_only(service):
    bound = [volume for volume in service.get("volumes", ()) if not isinstance(volume, str)]
    assert [volume["source"] for volume in bound if not volume["read_only"]] == []


def test_ports_are_published_on_loopback_and_the_admin_port_is_not():
    published = [filled(port) for service in SERVICES.values() for port in service.get("ports", ())]
    assert published == ["127.0.0.1:8000:8000", "127.0.0.1:3000:3000"]


def test_the_admin_port_is_reached_over_a_network_without_a_way_out():
    assert SERVICES["prometheus"]["networks"] == ["monitoring"]
    assert "monitoring" in SERVICES["winnow"]["networks"]
    assert COMPOSE["networks"]["monitoring"]["internal"] is True


def test_secrets_are_files_that_git_ignores():
    files = [secret["file"] for secret in COMPOSE["secrets"].values()]
    assert set(files) == {f"./secrets/{name}" for name in COMPOSE["secrets"]}
    assert "secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if "PASSWORD" in name or "KEY" in name:
                assert Path(value).parent == Path("/run/secrets"), name
                assert Path(value).name in service["secrets"], name


def test_the_service_takes_every_setting_it_is_given():
    assert unknown(SERVICES["winnow"]["environment"]) == []


def test_workers_are_as_many_as_the_cores_it_may_use():
    given, limits = SERVICES["winnow"]["environment"], SERVICES["winnow"]["deploy"]["resources"]["limits"]
    assert given["WINNOW_WORKERS"] == limits["cpus"]


def test_a_stop_has_the_time_it_needs():
    assert float(SERVICES["winnow"]["stop_grace_period"].removesuffix("s")) > stop_s()
