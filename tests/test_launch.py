"""The set-up scripts, run with a stand-in for Python that only writes down how it was called; and the locks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
SCRIPTS = ["launch/setup.sh", "launch/quickstart.sh", "launch/test.sh", ".ci/run"]
FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
  *realpath*) echo "$0" ;;
  "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
esac
[[ -z ${FAIL_ON:-} || "$*" != *"$FAIL_ON" ]]
"""


def lock_pins(device: str) -> dict[str, str]:
    lines = (ROOT / f"launch/requirements-{device}.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


class Checkout:
    """A copy of what set-up reads, and the calls it made to its Python."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        shutil.copytree(ROOT / "launch", folder / "launch")
        shutil.copy(ROOT / "pyproject.toml", folder)
        self.python = folder / "fake_python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)

    def set_up(self, device: str = "cpu", fail_on: str = "") -> tuple[int, str, list[str]]:
        """Exit status, what was printed, and the calls made to Python."""
        self.calls.write_text("")
        own = {"CALLS": str(self.calls), "FAIL_ON": fail_on, "RLPOST_DEVICE": device, "RLPOST_PYTHON": str(self.python)}
        command = ["bash", str(self.folder / "launch/setup.sh")]
        done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr, self.calls.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_parses_and_is_executable(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    done = subprocess.run(["bash", "-n", str(ROOT / script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_lock_pins_every_package_once(device: str) -> None:
    lines = (ROOT / f"launch/requirements-{device}.txt").read_text().splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    assert [line for line in packages if not re.fullmatch(r"[a-z0-9-]+==[A-Za-z0-9.+]+", line)] == []
    assert len(lock_pins(device)) == len(packages)


def test_cpu_lock_keeps_cuda_packages_out() -> None:
    pins = lock_pins("cpu")
    assert pins["torch"] == "2.13.0+cpu"
    unwanted = ("torchvision", "torchaudio", "torchcodec", "nvidia-", "cuda-")
    assert [name for name in pins if name.startswith(unwanted)] == []


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_lock_satisfies_pyproject(device: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(line) for line in project["dependencies"] + extras["train"] + extras["dev"] + extras[device]]
    pins = lock_pins(device)
    unmet = [
        str(requirement)
        for requirement in wanted
        if requirement.name != "rlpost"
        and pins.get(canonicalize_name(requirement.name), "0") not in requirement.specifier
    ]
    assert unmet == []


def test_setup_installs_the_lock_without_its_dependencies(checkout: Checkout) -> None:
    status, _, calls = checkout.set_up()
    installs = [call for call in calls if " install " in call]
    assert status == 0
    assert len(installs) == 3
    assert all("--no-deps" in call for call in installs)
    assert "-m venv --clear .venv" in calls


def test_setup_second_run_does_nothing(checkout: Checkout) -> None:
    checkout.set_up()
    assert checkout.set_up() == (0, "", [])


def test_setup_goes_on_after_a_failed_install(checkout: Checkout) -> None:
    status, printed, _ = checkout.set_up(fail_on="-r launch/requirements-cpu.txt")
    assert status != 0
    assert "did not finish" in printed
    status, _, calls = checkout.set_up()
    assert status == 0
    assert any(call.endswith("-r launch/requirements-cpu.txt") for call in calls)
    assert "-m venv --clear .venv" not in calls


def test_setup_brings_an_old_environment_up_to_date(checkout: Checkout) -> None:
    checkout.set_up()
    with open(checkout.folder / "launch/requirements-cpu.txt", "a") as lock:
        lock.write("new-package==1.0\n")
    _, printed, calls = checkout.set_up()
    assert "bringing .venv up to date" in printed
    assert any(call.endswith("-r launch/requirements-cpu.txt") for call in calls)


def test_setup_starts_afresh_for_another_device(checkout: Checkout) -> None:
    checkout.set_up()
    _, _, calls = checkout.set_up(device="gpu")
    assert "-m venv --clear .venv" in calls
    assert any(call.endswith("-r launch/requirements-gpu.txt") for call in calls)


def test_setup_says_where_it_falls_back_for_torch(checkout: Checkout) -> None:
    plain = "--no-input --no-deps torch==2.13.0+cpu"
    status, printed, calls = checkout.set_up(fail_on=plain)
    assert status == 0
    assert "not found where pip is configured to look" in printed
    assert any("--extra-index-url" in call and call.endswith("torch==2.13.0+cpu") for call in calls)


def test_setup_refuses_an_unknown_device(checkout: Checkout) -> None:
    status, printed, calls = checkout.set_up(device="tpu")
    assert status != 0
    assert "RLPOST_DEVICE must be cpu or gpu (got tpu)" in printed
    assert calls == []


def test_quickstart_takes_the_first_free_name_and_passes_arguments_on(checkout: Checkout) -> None:
    checkout.set_up()
    rlpost = checkout.folder / ".venv/bin/rlpost"
    rlpost.write_text('#!/usr/bin/env bash\necho "rlpost $*"\n')
    rlpost.chmod(0o755)
    for taken in ["quickstart", "quickstart-2"]:
        (checkout.folder / "runs" / taken).mkdir(parents=True)
    own = {"RLPOST_DEVICE": "cpu", "CALLS": str(checkout.calls)}
    command = ["bash", str(checkout.folder / "launch/quickstart.sh"), "steps=3"]
    printed = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, check=True).stdout
    assert printed == "rlpost train recipes/quickstart.yaml name=quickstart-3 steps=3\n"


def test_setup_does_not_trust_an_environment_whose_update_failed(checkout: Checkout) -> None:
    checkout.set_up()
    lock = checkout.folder / "launch/requirements-cpu.txt"
    before = lock.read_text()
    lock.write_text(before + "new-package==1.0\n")
    checkout.set_up(fail_on="-r launch/requirements-cpu.txt")
    lock.write_text(before)
    status, _, calls = checkout.set_up()
    assert status == 0
    assert any(call.endswith("-r launch/requirements-cpu.txt") for call in calls)
