"""A model hub on 127.0.0.1: it speaks the endpoints that files are resolved and fetched by, and misbehaves on request.

It serves a model of five very small networks in the layouts of the released checkpoints.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from maisi_cli.testing import TINY

COMMIT = "c0ffee00" * 5


@dataclass
class Asked:
    """One request: where it went (`hub` or `cdn`), what it asked for, and its headers in small letters."""

    where: str
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class FakeHub:
    """Files by repository and path; large ones are redirected to a second server, as the hub does to its CDN.

    `refuse` answers with a status and error code; `cut` sends only so many bytes of a file, once, and then is down for
    `down` requests; `swap` sends other content than it promises; `ranges` says whether ranges are honoured; `says` is an etag
    for every file.
    """

    address: str = ""
    cdn: str = ""
    files: dict[tuple[str, str], bytes | Path] = field(default_factory=dict)
    small: set[str] = field(default_factory=set)
    asked: list[Asked] = field(default_factory=list)
    refuse: tuple[int, str] | None = None
    cut: int | None = None
    down: int = 0
    swap: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    says: str = ""
    bare: bool = False

    def put(self, repo: str, path: str, content: bytes | Path, *, small: bool = False) -> str:
        """Add a file; return its sha256."""
        self.files[repo, path] = content
        if small:
            self.small.add(path)
        return digest(content)

    @staticmethod
    def read(content: bytes | Path) -> bytes:
        return content if isinstance(content, bytes) else content.read_bytes()

    def etag(self, path: str, content: bytes | Path) -> str:
        if self.says:
            return self.says
        if path in self.small:
            return git_sha1(self.read(content))
        return digest(content)

    def gets(self, where: str = "cdn") -> list[Asked]:
        return [each for each in self.asked if each.method == "GET" and each.where == where]


@cache
def digest(content: bytes | Path) -> str:
    """Return the sha256 of a file's content."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def running() -> Iterator[FakeHub]:
    """Run a hub and its CDN on two free ports."""
    hub = FakeHub()

    class OfHub(_Handler):
        state, where = hub, "hub"

    class OfCdn(_Handler):
        state, where = hub, "cdn"

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in (OfHub, OfCdn)]
    hub.address, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FakeHub
    where: str

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.state
        headers = {key.casefold(): value for key, value in self.headers.items()}
        hub.asked.append(Asked(self.where, self.command, self.path, headers))
        if self.where == "cdn":
            self._send(self.path.removeprefix("/"))
            return
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if hub.refuse is not None:
            self._status(hub.refuse[0], hub.refuse[1])
        elif found is None or (found[1], found[3]) not in hub.files:
            self._status(404, "EntryNotFound" if found else "")
        elif hub.bare:
            self._headers(200, {"Content-Length": "0"})
        else:
            self._resolve(found[1], found[3])

    def _resolve(self, repo: str, path: str) -> None:
        hub = self.state
        content = hub.files[repo, path]
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        about = {"X-Repo-Commit": COMMIT, "ETag": f'"{hub.etag(path, content)}"'}
        if path in hub.small:
            self._send(f"{repo}/{path}", about)
        else:
            about = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{hub.etag(path, content)}"', "X-Linked-Size": str(size),
                     "Location": f"{hub.cdn}/{repo}/{path}"}  # fmt: skip
            self._headers(302, {**about, "Content-Length": "0"})

    def _send(self, name: str, about: dict[str, str] | None = None) -> None:
        hub = self.state
        owner, repo, path = name.split("/", 2)
        content = hub.swap.get(path) or hub.files[f"{owner}/{repo}", path]
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if self.command == "GET" and hub.cut is None and hub.down:
            hub.down -= 1
            self._status(503, "")
            return
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(asked[1]) if asked and hub.ranges else 0
        extra = {"Content-Range": f"bytes {first}-{size - 1}/{size}"} if asked and hub.ranges else {}
        self._headers(206 if extra else 200, {**(about or {}), **extra, "Content-Length": str(size - first)})
        if self.command == "GET":
            with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
                file.seek(first)
                if hub.cut is None:
                    shutil.copyfileobj(file, self.wfile, 2**20)
                else:
                    self.wfile.write(file.read(hub.cut))
                    hub.cut, self.close_connection = None, True

    def _status(self, status: int, code: str) -> None:
        self._headers(status, {"Content-Length": "0", **({"X-Error-Code": code} if code else {})})

    def _headers(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


# --- a model in the released layouts ----------------------------------------------------------------

REPO = "maisi-test/tiny"
SCALE = 1.0311251878738403
LICENCE = '[licence]\nname = "Test Licence"\nurl = "https://example.org/licence"\ncommercial = true\n'

_MASK_NETWORKS = """
[networks.mask_vae]
kind = "autoencoder_kl_maisi"
spatial_dims = 3
in_channels = 8
out_channels = 5
latent_channels = 4
num_channels = [8, 8, 8]
num_res_blocks = [1, 1, 1]
norm_num_groups = 4
norm_eps = 1e-6
attention_levels = [false, false, false]
with_encoder_nonlocal_attn = false
with_decoder_nonlocal_attn = false
use_flash_attention = false
use_checkpointing = false
use_convtranspose = true

[networks.mask_unet]
kind = "unet"
spatial_dims = 3
in_channels = 4
out_channels = 4
num_channels = [8, 8]
attention_levels = [false, true]
num_head_channels = [0, 8]
num_res_blocks = 1
norm_num_groups = 4
with_conditioning = true
cross_attention_dim = 10
"""

FILES = {
    "vae": ("models/autoencoder_v1.pt", "state_dict"),
    "unet": ("models/diff_unet_3d_tiny-ct.pt", "unet"),
    "controlnet": ("models/controlnet_3d_tiny-ct.pt", "controlnet"),
    "mask_vae": ("models/mask_generation_autoencoder.pt", "state_dict"),
    "mask_unet": ("models/mask_generation_diffusion_unet.pt", "mask_unet"),
}
SIZES = "datasets/all_anatomy_size_conditions.json"
MASKS = "datasets/all_masks.zip"


def model_text(*, licence: str = LICENCE, pins: Mapping[str, str] | None = None, name: str = "tiny-hub") -> str:
    """Return a model file whose weights are on the hub; `pins` are sha256 by path, git's SHA-1 when they have 40 digits.

    The attention of its UNet and ControlNet has no projection, as that of ddpm-ct, and the scale factor is in the weights.
    """
    head = TINY[: TINY.index("[[weights]]")].replace("include_fc = true", "include_fc = false").replace("scale_factor = 1.0\n", "")
    head = head.replace('name = "tiny"', f'name = "{name}"')
    rows = [(part, path, layout) for part, (path, layout) in FILES.items()]
    rows += [("data", SIZES, "data"), ("data", MASKS, "data")]
    text = f"{head}{_MASK_NETWORKS}\n{licence}"
    for part, path, layout in rows:
        text += f'\n[[weights]]\npart = "{part}"\npath = "{path}"\nlayout = "{layout}"\nrepo = "{REPO}"\nrevision = "{COMMIT}"\n'
        if pins and path in pins:
            text += f'{"git_sha1" if len(pins[path]) == 40 else "sha256"} = "{pins[path]}"\n'
    return text


@cache
def states() -> dict[str, dict[str, Any]]:
    """Return the random weights of each network of the model, with the excess keys that the ddpm-ct files hold."""
    import tempfile

    import torch
    from maisi_cli.catalog import read_model
    from maisi_cli.networks import build

    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(model_text())
        file.flush()
        spec = read_model.__wrapped__(Path(file.name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        found: dict[str, dict[str, Any]] = {part: dict(build(network).state_dict()) for part, network in spec.networks.items()}
    for part in ("unet", "controlnet"):
        for key in [key for key in found[part] if key.endswith(".attn.to_q.weight")]:
            stem, width = key.removesuffix("to_q.weight"), len(found[part][key])
            found[part] |= {f"{stem}out_proj.weight": torch.ones(width, width), f"{stem}out_proj.bias": torch.ones(width)}
    return found


def saved(content: Any) -> bytes:
    """Return what `torch.save` writes."""
    import torch

    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def released(layout: str, tensors: Mapping[str, Any]) -> Any:
    """Return a checkpoint in one of the released layouts, with what training left in it."""
    import torch
    from monai.data import MetaTensor

    scale = MetaTensor(torch.tensor(SCALE))
    moments = {
        "state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.ones(1000)}},
        "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}],
    }
    return {
        "state_dict": dict(tensors),
        "v2": {"epoch": 3, "unet_state_dict": dict(tensors), "epoch_finished": True},
        "unet": {"epoch": 3, "loss": 0.1, "num_train_timesteps": 1000, "scale_factor": scale, "unet_state_dict": dict(tensors),
                 "epoch_finished": True, "optimizer_state_dict": moments, "scheduler_state_dict": {"last_epoch": 3}},
        "controlnet": {"epoch": 3, "loss": 0.1, "controlnet_state_dict": dict(tensors)},
        "mask_unet": {"unet_state_dict": dict(tensors), "scale_factor": torch.tensor(1.0055984258651733)},
    }[layout]  # fmt: skip


@cache
def checkpoints() -> dict[str, bytes]:
    """Return the released files of the model by their paths."""
    return {path: saved(released(layout, states()[part])) for part, (path, layout) in FILES.items()}


def zipped(*names: str) -> bytes:
    """Return a zip with members of these names."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, b"mask")
    return out.getvalue()


def publish(hub: FakeHub) -> dict[str, str]:
    """Put the model on the hub; return the hash that pins each file."""
    pins = {path: hub.put(REPO, path, content) for path, content in checkpoints().items()}
    hub.put(REPO, SIZES, b'[{"organ_size": [0.5]}]', small=True)
    pins[SIZES] = hub.etag(SIZES, hub.files[REPO, SIZES])
    pins[MASKS] = hub.put(REPO, MASKS, zipped("all_masks/a.nii.gz"))
    return pins


@contextmanager
def isolated(monkeypatch: Any, home: Path) -> Iterator[FakeHub]:
    """Run a hub that everything in the block is sent to, with an empty folder of weights and without a token."""
    from huggingface_hub import constants

    with running() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("MAISI_HOME", str(home))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.setenv(name, "")  # and not what a command sets while it runs
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "no-token"))
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
        yield server
