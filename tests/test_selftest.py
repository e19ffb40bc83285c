"""The self-test of a device: quiet where sums are right, loud where a kernel is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from maisi_cli import cli, selftest
from torch.nn import functional

CPU = torch.device("cpu")


def test_a_device_that_computes_rightly_is_passed() -> None:
    found = selftest.check(CPU)
    assert {each.name.split(",")[0] for each in found} == {"convolutions", "attention"}
    assert [each.name for each in found if not each.ok] == []
    assert all(each.error > 0 for each in found)  # rounding is there: the operations were really run


@pytest.mark.parametrize("wrong", [torch.bfloat16, torch.float32])
def test_a_kernel_that_is_wrong_in_one_precision_and_place_is_named(wrong: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.conv3d

    def conv3d(x: Any, weight: Any, **how: Any) -> Any:
        made = right(x, weight, **how)
        if x.dtype == wrong:
            made[..., -1] = 0  # the last plane is left out
        return made

    monkeypatch.setattr(functional, "conv3d", conv3d)
    named = [each.name for each in selftest.check(CPU) if not each.ok]
    assert named
    assert all(str(wrong).removeprefix("torch.") in name and "convolutions" in name for name in named)


def test_attention_that_forgets_its_scale_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "scaled_dot_product_attention", lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2), -1) @ v)
    assert all("attention" in each.name for each in selftest.check(CPU) if not each.ok)
    assert any(not each.ok for each in selftest.check(CPU))


def test_doctor_runs_it_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["doctor", "--compute", "--device", "cpu", "--json"])
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert sum("convolutions" in check["name"] for check in checks) == 4
    assert all(check["ok"] for check in checks if check["name"].startswith("cpu:"))
