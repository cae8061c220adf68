"""The variable for an old MKL: only where it helps, and never over the user's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from asrkit import mkl

AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 7763\nflags\t\t: fpu sse2 avx avx2 bmi2\n"


@pytest.fixture
def cpuinfo(tmp_path: Path) -> Path:
    (tmp_path / "cpuinfo").write_text(AMD)
    return tmp_path / "cpuinfo"


@pytest.mark.parametrize(
    "torch, text, given, expected",
    [
        ("1.13.1+cu117", AMD, {}, "5"),
        ("1.13.1", AMD + "\n" + AMD, {}, "5"),
        ("2.13.0+cpu", AMD, {}, None),  # its MKL needs no help
        ("", AMD, {}, None),
        ("1.13.1", AMD.replace("AuthenticAMD", "GenuineIntel"), {}, None),
        ("1.13.1", AMD.replace("avx2", "avx2_of_another_name"), {}, None),
        ("1.13.1", "", {}, None),
        ("1.13.1", AMD, {"MKL_DEBUG_CPU_TYPE": "4"}, "4"),
        ("1.13.1", AMD, {"MKL_DEBUG_CPU_TYPE": ""}, ""),
    ],
)
def test_it_is_set_where_it_helps(
    cpuinfo: Path, monkeypatch: pytest.MonkeyPatch, torch: str, text: str, given: dict[str, str], expected: str | None
) -> None:
    cpuinfo.write_text(text)
    monkeypatch.setattr(mkl, "torch_version", lambda: torch)
    mkl.use_avx2_path(given, cpuinfo)
    assert given.get("MKL_DEBUG_CPU_TYPE") == expected


def test_no_cpuinfo_is_no_amd(tmp_path: Path) -> None:
    assert not mkl.is_amd_with_avx2(tmp_path / "none")


def test_what_is_said_of_it(cpuinfo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mkl, "torch_version", lambda: "1.13.1")
    assert mkl.described({}, cpuinfo).startswith("slow: set MKL_DEBUG_CPU_TYPE=5")
    assert mkl.described({"MKL_DEBUG_CPU_TYPE": "5"}, cpuinfo).startswith("MKL_DEBUG_CPU_TYPE=5: the MKL of torch 1")
    monkeypatch.setattr(mkl, "torch_version", lambda: "2.13.0")
    assert mkl.described({}, cpuinfo) == "MKL chooses its own path"
    assert mkl.described({"MKL_DEBUG_CPU_TYPE": "5"}, cpuinfo) == "MKL_DEBUG_CPU_TYPE=5: not needed here"


def test_it_comes_before_torch() -> None:
    code = "import asrkit, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
