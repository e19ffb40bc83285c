"""Runs of training that are killed before each operation on their files, and go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

KILLER = """
import json, os, signal, sys
from pathlib import Path
from maisi_cli.train import train
arguments = json.loads(sys.argv[1])
out = Path(sys.argv[2])

def killed(at):
    seen = 0
    def hook(event, values):
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod") and str(out / str(at)) in str(values[0]):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    train(**arguments, out=out / str(at), resume="auto")

train(**arguments, out=out / "whole")
at, status = 0, 1
while status:
    at += 1
    number = os.fork()
    if number == 0:
        killed(at)
        os._exit(0)
    status = os.waitpid(number, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status), status
    train(**arguments, out=out / str(at), resume="auto")
print(at)
"""


def killed_anywhere(arguments: Mapping[str, Any], folder: Path) -> None:
    """Kill `train(**arguments)` before each of its operations on files in turn, let it go on, and compare state and weights bit by bit."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps(arguments), str(folder)], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 60
    whole = _tensors(folder / "whole")
    assert {"model", "average", "optimiser", "rng"} <= {Path(name).stem for name in whole}
    for at in range(1, int(done.stdout) + 1):
        found = _tensors(folder / str(at))
        assert found.keys() == whole.keys(), at
        for name, tensors in whole.items():
            assert all(torch.equal(value, found[name][key]) for key, value in tensors.items()), (at, name)


def _tensors(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of a run's last checkpoint and of what it exported, by file."""
    last = max((run / "checkpoints").glob("step_*"))
    return {path.name: load_file(path) for path in (*last.glob("*.safetensors"), *run.glob("*.safetensors"))}
