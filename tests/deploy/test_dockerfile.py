"""The Dockerfile by its linter, and against the files it takes. Built and run it is by `make image-test`."""

import re
import subprocess

from tests.deploy.manifests import BIN, ROOT, SETTINGS, VERSION, unknown

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_the_linter_finds_nothing():
    subprocess.run([BIN / "hadolint", "--failure-threshold", "style", ROOT / "Dockerfile"], check=True)


def test_it_is_built_from_what_it_names_and_nothing_else():
    """.dockerignore lets in what COPY takes: everything else on the machine stays out of the build."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    assert rules[0] == "*"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == set(" ".join(copied).split())


def test_its_version_is_the_projects():
    assert re.findall(r"^ARG VERSION=(.*)$", DOCKERFILE, re.MULTILINE) == [VERSION]


def test_the_service_takes_every_setting_it_is_given():
    given = dict(re.findall(r"(WINNOW_\w+)=(\S+)", DOCKERFILE))
    assert unknown(given) == []
    for name in ("WINNOW_PORT", "WINNOW_ADMIN_PORT"):
        assert given[name] == str(SETTINGS[name].default)


def test_every_download_is_checked_by_its_hash():
    installs = re.findall(r"pip (?:--python \S+ )?install (.*)", DOCKERFILE)
    assert len(installs) == 3
    assert [line for line in installs if "--require-hashes" not in line and "--no-index" not in line] == []
