"""The workflows say what they must: pinned, least rights, real targets."""

import re
import shlex

import pytest
import yaml

#: Actions, and the versions of them that are known to exist.
KNOWN = {
    "actions/checkout": "v4",
    "actions/setup-python": "v5",
    "actions/upload-artifact": "v4",
    "actions/download-artifact": "v4",
    "actions/upload-pages-artifact": "v3",
    "actions/deploy-pages": "v4",
    "pypa/gh-action-pypi-publish": "release/v1",
}
NAMES = ("ci", "publish", "release")


@pytest.fixture(scope="module")
def workflows(root):
    folder = root / ".github" / "workflows"
    found = {p.stem: yaml.load(p.read_text(), yaml.BaseLoader)
             for p in folder.glob("*.yml")}
    assert sorted(found) == sorted(NAMES)
    return found


def steps(workflow):
    return [s for job in workflow["jobs"].values() for s in job["steps"]]


@pytest.mark.parametrize("name", NAMES)
def test_workflow_is_well_formed_and_pinned(workflows, name):
    workflow = workflows[name]
    assert workflow["name"] == name and workflow["on"]
    assert workflow["permissions"] == {"contents": "read"}
    jobs = workflow["jobs"]
    for job in jobs.values():
        assert job["runs-on"] == "ubuntu-latest"
        assert job.get("needs", next(iter(jobs))) in jobs
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
    for step in steps(workflow):
        if "uses" in step:
            action, _, version = step["uses"].partition("@")
            assert KNOWN[action] == version
    # no untrusted text is pasted into a shell
    for step in steps(workflow):
        assert "${{" not in step.get("run", "")


@pytest.mark.parametrize("name", NAMES)
def test_commands_exist(workflows, name, root):
    targets = re.findall(r"^([a-z]+):", (root / "Makefile").read_text(), re.M)
    for step in steps(workflows[name]):
        for line in step.get("run", "").splitlines():
            words = shlex.split(line)
            if words[0] == "make":
                assert words[1] in targets


def test_publish_uploads_what_make_book_builds(workflows):
    jobs = workflows["publish"]["jobs"]
    upload = next(s for s in jobs["build"]["steps"]
                  if "upload-pages" in s.get("uses", ""))
    assert upload["with"]["path"] == "_build/html"
    assert jobs["deploy"]["needs"] == "build"
    assert jobs["deploy"]["permissions"] == {"pages": "write",
                                             "id-token": "write"}
    assert "pull_request" not in workflows["publish"]["on"]


def test_release_is_trusted_and_checks_its_version(workflows, root):
    release = workflows["release"]
    assert release["on"] == {"release": {"types": ["published"]}}
    publish = release["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"] == "pypi"
    text = (root / ".github/workflows/release.yml").read_text()
    assert "password" not in text and "secrets." not in text
    assert re.search(r"^version = \d", (root / "settings.ini").read_text(), re.M)
    check = next(s["run"] for s in steps(release) if "TAG" in s.get("env", {}))
    assert "version = ${TAG#v}" in check


def test_python_is_the_one_the_lock_is_for(workflows):
    versions = {s["with"]["python-version"] for w in workflows.values()
                for s in steps(w) if "setup-python" in s.get("uses", "")}
    assert versions == {"3.11"}
