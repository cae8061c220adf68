"""`asrkit doctor` explains a broken environment instead of failing in it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from asrkit.reporting.machine import has_kernels, threads
from asrkit.reporting.packages import requirements, version_tuple


def doctor(stubs: Path, arguments: tuple[str, ...] = ("--json",)) -> subprocess.CompletedProcess[str]:
    """Run the command with the modules in ``stubs`` shadowing the installed ones."""
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{stubs}{os.pathsep}{root}",
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "",
    }
    command = [sys.executable, "-m", "asrkit", "doctor", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def checks_of(outcome: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert "Traceback" not in outcome.stderr
    return {check["name"]: check for check in json.loads(outcome.stdout)["checks"]}


def hide(stubs: Path, module: str) -> None:
    """Make ``import module`` fail as if it were not installed."""
    missing = f"raise ModuleNotFoundError(\"No module named '{module}'\", name='{module}')\n"
    (stubs / f"{module}.py").write_text(missing)


@pytest.mark.slow
def test_a_sound_environment_can_train(tmp_path: Path) -> None:
    outcome = doctor(tmp_path)
    checks = checks_of(outcome)
    assert outcome.returncode == 0, outcome.stdout
    assert json.loads(outcome.stdout)["can_train"]
    assert checks["torch"]["status"] == "ok"
    assert "cores" in checks["processor"]["detail"]
    assert checks["threads"]["detail"] == "1 a process (OMP_NUM_THREADS)"
    assert "MKL" in checks["matrix products"]["detail"]


def test_threads_that_nobody_chose() -> None:
    assert threads("3", 8) == "3 a process (OMP_NUM_THREADS)"
    assert "8 for one process" in threads(None, 8) and "OMP_NUM_THREADS=4 for two" in threads(None, 8)


@pytest.mark.slow
def test_the_text_ends_with_a_verdict_and_commands(tmp_path: Path) -> None:
    hide(tmp_path, "kaldialign")
    outcome = doctor(tmp_path, ())
    lines = outcome.stdout.splitlines()
    assert outcome.returncode == 1
    assert lines[-1].startswith("asrkit cannot train here")
    assert any(line.split()[:2] == ["NO", "kaldialign"] for line in lines)
    assert any("pip install 'kaldialign>=" in line for line in lines)


@pytest.mark.slow
def test_nothing_but_the_command_line_is_there(tmp_path: Path) -> None:
    for module in ("torch", "numpy", "lhotse", "yaml", "soundfile", "sentencepiece", "k2"):
        hide(tmp_path, module)
    outcome = doctor(tmp_path)
    checks = checks_of(outcome)
    assert outcome.returncode == 1
    assert checks["torch"]["status"] == "absent"
    assert "pip install 'torch>=1.13.1'" in checks["torch"]["fix"]
    assert checks["train-backbone"]["status"] == "broken"


@pytest.mark.slow
def test_lhotse_without_the_package_it_does_not_declare(tmp_path: Path) -> None:
    hide(tmp_path, "urllib3")
    outcome = doctor(tmp_path)
    checks = checks_of(outcome)
    assert outcome.returncode == 1
    assert "pip install 'urllib3>=" in checks["urllib3"]["fix"]
    assert "urllib3" in checks["lhotse"]["detail"]
    assert checks["lhotse"]["fix"].endswith("pip install urllib3")


@pytest.mark.slow
def test_numpy_2_beside_an_old_torch(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "__version__ = '1.13.1'\n"
        "class version: cuda = None\n"
        "class cuda:\n    is_available = staticmethod(lambda: False)\n"
        "def from_numpy(array): raise RuntimeError('Numpy is not available')\n"
    )
    (tmp_path / "numpy.py").write_text("__version__ = '2.4.6'\ndef zeros(n): return [0.0] * n\n")
    outcome = doctor(tmp_path)
    bridge = checks_of(outcome)["torch with numpy"]
    assert outcome.returncode == 1
    assert "Numpy is not available" in bridge["detail"]
    assert bridge["fix"].endswith("pip install 'numpy<2'")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise ImportError('_k2.so: undefined symbol: _ZN3c104impl')\n", "undefined symbol"),
        ("import os; os.abort()\n", "ended with"),
    ],
)
def test_k2_that_does_not_load(tmp_path: Path, body: str, says: str) -> None:
    (tmp_path / "k2").mkdir()
    (tmp_path / "k2" / "__init__.py").write_text(body)
    outcome = doctor(tmp_path)
    check = checks_of(outcome)["k2"]
    assert outcome.returncode == 1
    assert check["status"] == "broken"
    assert says in check["detail"]
    assert "pip uninstall -y k2" in check["fix"]


@pytest.mark.slow
def test_k2_for_another_torch_names_both_versions(tmp_path: Path) -> None:
    (tmp_path / "k2").mkdir()
    (tmp_path / "k2" / "torch_version.py").write_text('k2_torch_version = "1.9.0+cu102"\n')
    (tmp_path / "k2" / "__init__.py").write_text("raise ImportError('k2 was built using PyTorch 1.9.0')\n")
    check = checks_of(doctor(tmp_path))["k2"]
    assert "built for torch 1.9.0" in check["detail"]
    assert "but torch is" in check["detail"]


@pytest.mark.slow
def test_an_extra_that_is_not_installed_is_optional(tmp_path: Path) -> None:
    hide(tmp_path, "espeakng_loader")
    hide(tmp_path, "jinja2")
    hide(tmp_path, "onnxruntime")
    outcome = doctor(tmp_path)
    checks = checks_of(outcome)
    assert outcome.returncode == 0
    assert checks["data synthesize"]["status"] == "absent"
    assert "pip install 'espeakng-loader>=" in checks["data synthesize"]["fix"]
    assert re.search(r"pip install 'jinja2>=[\d.]+' 'matplotlib>=", checks["report"]["fix"])
    assert checks["exported models"]["status"] == "absent"
    assert re.search(r"pip install 'onnx>=[\d.]+' 'onnxruntime>=", checks["exported models"]["fix"])


def test_requirements_come_from_the_project_itself() -> None:
    by_name = {requirement.name: requirement for requirement in requirements()}
    assert by_name["torch"].minimum == "1.13.1"
    assert by_name["PyYAML"].module == "yaml"
    assert by_name["matplotlib"].extra == "report"
    assert "k2" not in by_name


def test_versions_compare_by_their_leading_numbers() -> None:
    assert version_tuple("2.13.0+cpu") == (2, 13, 0)
    assert version_tuple("1.24.4.dev20250715+cpu.torch2.7.1") == (1, 24, 4)
    assert version_tuple("unknown") == ()


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((8, 6), ["sm_70", "sm_80"], True),  # the same major version
        ((9, 0), ["sm_80", "sm_86"], False),  # torch 1.13.1 on a newer GPU
        ((9, 0), ["sm_80", "compute_80"], True),  # compiled when loaded
        ((7, 0), ["sm_75", "compute_75"], False),
        ((12, 0), ["sm_90", "sm_120"], True),
    ],
)
def test_which_gpus_a_torch_build_runs_on(capability: tuple[int, int], built_for: list[str], runs: bool) -> None:
    assert has_kernels(capability, built_for) is runs
