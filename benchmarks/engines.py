"""How long one step of the released diffusion networks takes: MONAI as it comes, PyTorch as `generate` runs it, OpenVINO.

    OMP_NUM_THREADS=2 python benchmarks/engines.py --latent 64x64x32 --part unet

One process, the sides in turn, the fastest of a few calls; weights are random, with the layers that begin at zero filled.
Errors are relative (root mean square) to PyTorch in float32 with torch's own norms.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch
from maisi_cli import inference, networks
from maisi_cli.catalog import model
from maisi_cli.engines import exporting, making
from maisi_cli.geometry import parse_size
from maisi_cli.kernels import LAYOUT
from maisi_cli.testing import filled
from maisi_cli.weights import save_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent", default="32x32x16")
    parser.add_argument("--part", default="unet", choices=("unet", "controlnet"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-monai", action="store_true")
    asked = parser.parse_args()
    spec, size, part = model("rflow-ct"), parse_size(asked.latent), asked.part
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MAISI_HOME"] = folder
        file = Path(folder) / f"{part}.safetensors"
        network = filled(networks.build(spec.networks[part]))
        save_state(file, network.state_dict(), metadata={}, half=False)
        del network
        order = making.Order(spec=spec, part=part, file=file, size=size, backend="openvino", precision="bf16",
                             device=torch.device("cpu"), residuals=part == "unet")  # fmt: skip
        started = time.perf_counter()
        built = making.make(order)
        first = time.perf_counter() - started
        started = time.perf_counter()
        engine = making.open_engine(built, order)
        again = time.perf_counter() - started

        inputs = exporting.examples(spec, part, size, residuals=part == "unet")
        as_it_comes, _ = exporting.plain(spec, part, file)
        raw = exporting.bare(networks.build(spec.networks[part], fast=False), part)
        raw.load_state_dict(as_it_comes.state_dict())
        reference = making.exact(as_it_comes, inputs, torch.device("cpu"))
        laid = inference.laid_out(as_it_comes, torch.bfloat16, torch.device("cpu"))
        half = exporting.examples(spec, part, size, residuals=part == "unet", dtype=torch.bfloat16)
        half = {name: each.contiguous(memory_format=LAYOUT) if each.ndim == 5 else each for name, each in half.items()}
        known = networks.embedded(laid, {word: inputs.get(word) for word in networks.EMBEDDERS})

        def ours() -> object:
            with torch.inference_mode(), networks.known_parts(laid, known):
                return laid(**exporting.nested(half))

        def monai() -> object:
            with torch.inference_mode():
                return raw(**exporting.nested(inputs))

        sides = {"openvino bf16": lambda: engine(**exporting.nested(inputs)), "torch bf16": ours}
        if not asked.skip_monai:
            sides["monai fp32"] = monai
        best, errors = dict.fromkeys(sides, float("inf")), {}
        for k in range(asked.rounds):
            for name, call in sides.items():
                if name == "monai fp32" and k > 1:
                    continue
                started = time.perf_counter()
                made = call()
                best[name] = min(best[name], time.perf_counter() - started)
                errors[name] = max(making.compare([each.float() for each in exporting.outputs(made)], reference))
        print(json.dumps({"part": part, "latent": list(size), "threads": torch.get_num_threads(), "seconds": best, "errors": errors,
                          "first_use_s": first, "loaded_again_s": again, "mib": built.bytes() / 2**20}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
