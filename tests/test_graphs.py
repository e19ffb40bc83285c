"""Steps as CUDA graphs: run, captured, replayed; and refused where they cannot be captured. With CUDA the real thing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from maisi_cli.errors import CannotRun
from maisi_cli.graphs import Captured
from torch import Tensor


class Recording:
    """Stands for torch's CUDA graphs on a machine without them: a replay runs what was captured again."""

    now: Recording | None = None

    def __init__(self) -> None:
        self.replays = 0
        self.run: Any = None

    def replay(self) -> None:
        self.replays += 1
        if self.run:
            self.run()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    made: list[Recording] = []

    @contextlib.contextmanager
    def graph(recording: Recording, pool: Any) -> Iterator[None]:
        assert pool == "pool"
        made.append(recording)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return made


def test_a_step_runs_once_is_captured_once_and_is_replayed_with_new_inputs(stand_in: list[Recording]) -> None:
    calls = 0

    def step(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x * t

    captured = Captured(step, "pool")
    x, t = torch.tensor([1.0, 2.0]), torch.tensor(3.0)
    assert captured(x, t).tolist() == [3, 6]
    assert not stand_in
    first = captured(x, t)  # captures; the stand-in's replay has to compute
    (recording,) = stand_in
    recording.run = lambda: captured.made.copy_(captured.x * captured.t)
    second, third = captured(x + 1, t), captured(x, t * 2)
    assert (second.tolist(), third.tolist()) == ([6, 9], [6, 12])
    assert first.tolist() == [3, 6]  # memory of its own: the graph's was written to since
    assert calls == 2
    assert recording.replays == 3


def test_a_step_that_cannot_be_captured_is_said_with_the_way_out(stand_in: list[Recording]) -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        if stand_in:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return x

    captured = Captured(step, "pool")
    captured(torch.ones(1), torch.ones(()))
    with pytest.raises(
        CannotRun, match=r"cannot be captured as a CUDA graph: operation not permitted when stream is capturing \(add"
    ) as error:
        captured(torch.ones(1), torch.ones(()))
    assert error.value.hint == "add --set cuda_graphs=false"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_graph_gives_what_the_step_gives() -> None:
    weight = torch.randn(64, 64, device="cuda")

    def step(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x @ weight) * t

    captured = Captured(step, torch.cuda.graph_pool_handle())
    for number in range(4):
        x, t = torch.randn(8, 64, device="cuda"), torch.tensor(float(number))
        with torch.inference_mode():
            assert torch.allclose(captured(x, t), step(x, t.cuda()), atol=1e-6)
