"""The set-up: its lock files, its idempotence, and its message when no Python fits."""

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

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ("k2", "modern")


def locked(environment: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{environment}.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def hashed(environment: str) -> dict[str, str]:
    """The versions in the lock file with hashes, each of which must have one."""
    text = (ROOT / "requirements" / f"{environment}.hashes.txt").read_text().replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", value) for _, *values in lines for value in values)
    assert all(values for _, *values in lines)
    return {canonicalize_name(name): version for name, version in (line[0].split("==") for line in lines)}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `make setup` reads, alone in a directory."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def run(*command: str, where: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    # MAKEFLAGS and friends belong to the make that may be running these tests.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS")) and k != "ENV"}
    return subprocess.run(
        command, cwd=where, env={**environment, **variables}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_lock_holds_everything_the_project_asks_for(environment: str) -> None:
    pins = locked(environment)
    extras = [line for lines in project()["optional-dependencies"].values() for line in lines]
    for line in [*project()["dependencies"], *extras]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), f"{line} in {environment}.txt"


def test_the_locks_are_the_two_environments() -> None:
    k2, modern = locked("k2"), locked("modern")
    assert (k2["torch"], modern["torch"]) == ("1.13.1", "2.13.0")
    assert k2["numpy"].startswith("1.")
    assert "k2" not in {**k2, **modern}
    shared = {name: version for name, version in k2.items() if name in modern and name not in ("torch", "numpy")}
    assert all(modern[name] == version for name, version in shared.items())


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_every_file_is_locked_by_its_hash(environment: str) -> None:
    """`make lock` was run after the last change. torch's file in `modern` is not the same on every machine."""
    pins = locked(environment)
    if environment == "modern":
        del pins["torch"]
    assert hashed(environment) == pins


def test_k2_is_locked_by_hash_and_no_dependency() -> None:
    wheel = (ROOT / "requirements" / "k2-wheel.txt").read_text()
    assert re.search(r"^k2==1\.23\.4 --hash=sha256:[0-9a-f]{64}$", wheel, re.M)
    from asrkit.reporting.packages import K2_WHEEL

    assert K2_WHEEL in wheel
    names = {canonicalize_name(Requirement(line).name) for line in project()["dependencies"]}
    assert not names & {"k2", "torchaudio"}


def test_make_runs_the_set_up_once(checkout: Path) -> None:
    first = run("make", "-n", "setup", "ENV=modern", where=checkout)
    assert "scripts/setup.sh modern" in first.stdout
    stamp = checkout / ".venv-modern" / ".stamp"
    stamp.parent.mkdir()
    stamp.touch()
    assert run("make", "-q", "setup", "ENV=modern", where=checkout).returncode == 0
    assert run("make", "-q", "setup", "ENV=k2", where=checkout).returncode == 1


@pytest.mark.parametrize("changed", ["requirements/modern.hashes.txt", "pyproject.toml", "scripts/setup.sh"])
def test_a_change_of_what_is_installed_outdates_the_stamp(checkout: Path, changed: str) -> None:
    stamp = checkout / ".venv-modern" / ".stamp"
    stamp.parent.mkdir()
    stamp.touch()
    later = stamp.stat().st_mtime + 10
    os.utime(checkout / changed, (later, later))
    assert run("make", "-q", "setup", "ENV=modern", where=checkout).returncode == 1


def fake_python(folder: Path, name: str, version: str) -> Path:
    """A program that claims to be Python ``version`` and can do nothing else."""
    path = folder / name
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return path


def test_a_python_that_does_not_fit_is_named(checkout: Path, tmp_path: Path) -> None:
    python = fake_python(tmp_path, "python3.12", "3.12")
    outcome = run("make", "setup", "ENV=k2", f"PYTHON={python}", where=checkout)
    error = [line for line in outcome.stderr.splitlines() if line.startswith("error:")]
    assert outcome.returncode != 0
    assert len(error) == 1
    assert "needs Python 3.11" in error[0]
    assert f"{python} is 3.12" in error[0]
    assert "ENV=modern" in error[0]
    assert not (checkout / ".venv-k2").exists()


def test_no_python_at_all_says_so(checkout: Path) -> None:
    outcome = run("make", "setup", "ENV=modern", "PYTHON=/nonexistent/python", where=checkout)
    assert outcome.returncode != 0
    assert "3.11 or newer" in outcome.stderr
    assert "/nonexistent/python is absent" in outcome.stderr


def test_an_unknown_environment_lists_the_known_ones(checkout: Path) -> None:
    outcome = run("bash", "scripts/setup.sh", "k3", where=checkout)
    assert outcome.returncode == 1
    assert outcome.stderr.strip() == "error: ENV=k3 is no environment; use ENV=k2 or ENV=modern"
    assert "use ENV=k2 or ENV=modern" in run("make", "test", "ENV=k3", where=checkout).stderr


def test_every_target_is_in_the_help(checkout: Path) -> None:
    shown = run("make", where=checkout).stdout
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
    assert {"setup", "test", "test-fast", "lint", "demo", "smoke", "ci", "clean"} <= set(targets)
    assert all(f"make {target}" in shown for target in targets)


@pytest.mark.parametrize("makefile", ["Makefile", "recipes/fsdd/Makefile"])
def test_a_path_with_a_space_is_refused(makefile: str, tmp_path: Path) -> None:
    """Make splits names at spaces, so a recipe would run other programs."""
    for name in {"Makefile", "recipes/common.mk", makefile}:
        (path := tmp_path / "a clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, path)
    folder = (tmp_path / "a clone" / makefile).parent
    done = subprocess.run(["make", "-n", "-C", str(folder)], capture_output=True, text=True)
    assert done.returncode == 2 and "make cannot work in a path with a space; move the repository" in done.stderr
