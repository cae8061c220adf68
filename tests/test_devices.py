"""The device a command runs on: names, and GPUs that are not there."""

from __future__ import annotations

import pytest
import torch

from asrkit.devices import choose_device
from asrkit.errors import UserError


def _with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize("count, expected", [(0, "cpu"), (1, "cuda:0")])
def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch, count: int, expected: str) -> None:
    _with_gpus(monkeypatch, count)
    assert choose_device("auto") == torch.device(expected)
    assert choose_device("cpu") == torch.device("cpu")


def test_a_gpu_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_gpus(monkeypatch, 2)
    assert choose_device("cuda") == torch.device("cuda:0")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match=r"--device cuda:2: torch finds 2 GPU\(s\), cuda:0 to cuda:1"):
        choose_device("cuda:2")


@pytest.mark.parametrize(
    "name", ["", "gpu", "CPU", "cpu:0", "mps", "meta", "cuda:", "cuda:-1", "cuda:x", "cuda:300", "cuda:²"]
)
def test_a_name_that_is_no_device(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _with_gpus(monkeypatch, 2)
    with pytest.raises(UserError, match="is not a device; use auto, cpu, cuda or cuda:N"):
        choose_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_torch_does_not_have(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _with_gpus(monkeypatch, 0)
    with pytest.raises(UserError, match=f"--device {name}: torch .* finds no GPU here; use auto or cpu"):
        choose_device(name)
