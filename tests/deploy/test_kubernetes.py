"""The manifests against Kubernetes' own schemas, against each other, and against the service."""

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from app.metrics import Metrics
from tests.deploy.manifests import ROOT, SETTINGS, VERSION, stop_s, unknown

FOLDER = ROOT / "deploy/kubernetes"
OLDEST = "1.30"  # that knows `preStop: sleep` without being asked to
NEWEST = kubernetes_validate.latest_version()
MANIFESTS = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(FOLDER.glob("*.yml"))}
ADAPTER = yaml.safe_load((ROOT / "deploy/prometheus-adapter.yml").read_text())["rules"]["custom"]

DEPLOYMENT = MANIFESTS["deployment"]
POD: dict[str, Any] = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
LABELS = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("name", MANIFESTS)
def test_the_schema_finds_nothing(name, version):
    kubernetes_validate.validate(MANIFESTS[name], version, strict=True)


def test_a_field_that_is_misspelt_is_found():
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(MANIFESTS["service"] | {"sepc": {}}, NEWEST, strict=True)


def test_all_stand_in_one_namespace():
    assert MANIFESTS["namespace"]["metadata"]["name"] == "winnow"
    assert {m["metadata"]["namespace"] for name, m in MANIFESTS.items() if name != "namespace"} == {"winnow"}


def test_all_that_select_pods_select_these():
    selectors = [
        DEPLOYMENT["spec"]["selector"]["matchLabels"],
        MANIFESTS["service"]["spec"]["selector"],
        MANIFESTS["disruption-budget"]["spec"]["selector"]["matchLabels"],
        MANIFESTS["network-policy"]["spec"]["podSelector"]["matchLabels"],
        *(spread["labelSelector"]["matchLabels"] for spread in POD["topologySpreadConstraints"]),
    ]
    assert [selector for selector in selectors if not selector.items() <= LABELS.items()] == []
    target = MANIFESTS["autoscaler"]["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": "apps/v1", "kind": "Deployment", "name": DEPLOYMENT["metadata"]["name"]}
    assert "replicas" not in DEPLOYMENT["spec"]  # or each `apply` would undo the autoscaler's work


def test_the_pod_meets_the_restricted_standard():
    pod, container = POD["securityContext"], CONTAINER["securityContext"]
    assert pod["runAsNonRoot"] is True
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["allowPrivilegeEscalation"] is False
    assert container["capabilities"] == {"drop": ["ALL"]}
    assert container["readOnlyRootFilesystem"] is True
    assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & set(POD)
    assert {kind for volume in POD["volumes"] for kind in volume} == {
        "name",
        "persistentVolumeClaim",
        "secret",
        "emptyDir",
    }


def test_it_runs_the_image_of_this_version_as_the_images_user():
    assert CONTAINER["image"] == f"winnow:{VERSION}"
    user = f"{POD['securityContext']['runAsUser']}:{POD['securityContext']['runAsGroup']}"
    assert re.findall(r"^USER (.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE) == [user]


def test_the_service_takes_every_setting_it_is_given():
    given = {variable["name"]: variable for variable in CONTAINER["env"]}
    assert unknown(given) == []
    assert given["WINNOW_WORKERS"]["valueFrom"]["resourceFieldRef"]["resource"] == "limits.cpu"
    assert POD["enableServiceLinks"] is False
    assert f"{MANIFESTS['service']['metadata']['name']}_port".upper() in SETTINGS  # which is why


def test_bundles_and_keys_are_mounted_where_they_are_looked_for():
    given = {variable["name"]: Path(variable.get("value", "")) for variable in CONTAINER["env"]}
    mounted = {mount["name"]: Path(mount["mountPath"]) for mount in CONTAINER["volumeMounts"]}
    assert given["WINNOW_BUNDLE"].parent == mounted["bundles"]
    assert given["WINNOW_API_KEYS_FILE"].parent == mounted["keys"]
    assert {mount["name"] for mount in CONTAINER["volumeMounts"] if not mount.get("readOnly")} == {"tmp"}
    (claim,) = [v["persistentVolumeClaim"]["claimName"] for v in POD["volumes"] if "persistentVolumeClaim" in v]
    assert claim == MANIFESTS["bundles"]["metadata"]["name"]


def test_it_has_the_cores_and_the_memory_that_it_asks_for():
    assert CONTAINER["resources"]["requests"] == CONTAINER["resources"]["limits"]
    assert CONTAINER["resources"]["limits"]["cpu"].isdigit()


def test_a_stop_has_the_time_it_needs():
    waits_s = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert POD["terminationGracePeriodSeconds"] > waits_s + stop_s()


def test_probes_ask_what_they_are_for():
    paths = {name: CONTAINER[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/livez"}
    startup = CONTAINER["startupProbe"]
    assert DEPLOYMENT["spec"]["progressDeadlineSeconds"] > startup["periodSeconds"] * startup["failureThreshold"]


def test_only_prometheus_reaches_the_admin_port_and_nothing_goes_out():
    assert [port["name"] for port in MANIFESTS["service"]["spec"]["ports"]] == ["ranking"]
    policy = MANIFESTS["network-policy"]["spec"]
    for_all, for_prometheus = policy["ingress"]
    assert [port["port"] for port in for_all["ports"]] == ["ranking"]
    assert [port["port"] for port in for_prometheus["ports"]] == ["admin"]
    assert for_prometheus["from"]
    assert policy["egress"] == []


def test_the_autoscaler_reads_what_the_adapter_makes_of_what_the_service_exposes():
    read = {m["pods"]["metric"]["name"] for m in MANIFESTS["autoscaler"]["spec"]["metrics"] if m["type"] == "Pods"}
    assert read == {rule["name"]["as"] for rule in ADAPTER}
    exposed = set(re.findall(r"^(winnow_\w+)", Metrics(0.1, {}).render()[0].decode(), re.MULTILINE))
    queried = {
        name for rule in ADAPTER for name in re.findall(r"winnow_\w+", rule["seriesQuery"] + rule["metricsQuery"])
    }
    assert queried
    assert queried <= exposed
