"""The hub: what is asked and sent, fetching that goes on where it stopped, and refusals that say what to do."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from maisi_cli import __version__, hub
from maisi_cli.catalog import WeightFile
from maisi_cli.errors import CannotRun
from maisi_cli.events import Event, Note, Step

from .fakehub import COMMIT, FakeHub, git_sha1, isolated

REPO, PATH = "owner/net", "models/unet.pt"
DATA = bytes(range(256)) * 200
WEIGHT = WeightFile(part="unet", path=PATH, layout="unet", repo=REPO, revision=COMMIT)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """Run a hub with one file, and send what is asked of the hub to it, without a token."""
    with isolated(monkeypatch, tmp_path / "home") as server:
        server.put(REPO, PATH, DATA)
        yield server


def fetched(target: Path, events: list[Event] | None = None) -> bytes:
    return hub.fetch(hub.probe(WEIGHT), target, (events if events is not None else []).append).read_bytes()


def test_a_large_file_is_known_by_its_sha256_and_a_small_one_by_its_git_hash(fake: FakeHub) -> None:
    found = hub.probe(WEIGHT)
    assert (found.bytes, found.commit) == (len(DATA), COMMIT)
    assert found.etag == fake.etag(PATH, DATA)
    fake.put(REPO, "data.json", b"[]", small=True)
    small = hub.probe(WeightFile(part="data", path="data.json", layout="data", repo=REPO))
    assert (small.bytes, small.etag) == (2, git_sha1(b"[]"))
    assert git_sha1(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # git's own
    assert [each.path for each in fake.asked] == [f"/{REPO}/resolve/{COMMIT}/{PATH}", f"/{REPO}/resolve/main/data.json"]


def test_a_fetch_asks_for_the_file_and_nothing_else(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No counter, no telemetry; the token goes to the hub, not to the host that the hub names."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AI_AGENT", "something")  # the library would look up what that is
    assert fetched(tmp_path / "a.pt") == DATA
    address = f"/{REPO}/resolve/{COMMIT}/{PATH}"
    assert [(each.where, each.method, each.path) for each in fake.asked] == [
        ("hub", "HEAD", address), ("hub", "GET", address), ("cdn", "GET", f"/{REPO}/{PATH}"),
    ]  # fmt: skip
    assert {each.headers["user-agent"] for each in fake.asked} == {f"maisi/{__version__}"}
    assert [each.headers.get("authorization") for each in fake.asked] == ["Bearer hf_secret", "Bearer hf_secret", None]


def test_a_fetch_that_was_cut_goes_on_by_itself(fake: FakeHub, tmp_path: Path) -> None:
    fake.cut = 10_500
    events: list[Event] = []
    assert fetched(tmp_path / "a.pt", events) == DATA
    assert [each.headers.get("range") for each in fake.gets()] == [None, "bytes=10000-"]
    steps = [event for event in events if isinstance(event, Step)]
    assert (steps[-1].done, steps[-1].total) == (1, 1)


def test_a_fetch_that_failed_goes_on_at_the_next_try(fake: FakeHub, tmp_path: Path) -> None:
    fake.cut, fake.down = 10_500, 1
    with pytest.raises(CannotRun, match="answers 503") as caught:
        fetched(tmp_path / "a.pt")
    assert "goes on after the 0.00954 MiB" in str(caught.value.hint)
    (part,) = hub.parts(tmp_path / "a.pt")
    assert part.read_bytes() == DATA[:10_000]
    fake.asked.clear()
    assert fetched(tmp_path / "a.pt") == DATA
    assert [each.headers.get("range") for each in fake.gets()] == ["bytes=10000-"]


def test_a_fetch_that_was_stopped_goes_on_at_the_next_try(fake: FakeHub, tmp_path: Path) -> None:
    said: list[Event] = []

    def stop(event: Event) -> None:
        said.append(event)
        if sum(isinstance(each, Step) for each in said) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.fetch(hub.probe(WEIGHT), tmp_path / "a.pt", stop)
    assert isinstance(said[-1], Note)
    assert "the next try goes on from there" in said[-1].text
    (part,) = hub.parts(tmp_path / "a.pt")
    assert part.read_bytes() == DATA[:3000]
    fake.asked.clear()
    assert fetched(tmp_path / "a.pt") == DATA
    assert [each.headers.get("range") for each in fake.gets()] == ["bytes=3000-"]


def test_a_server_without_ranges_begins_anew(fake: FakeHub, tmp_path: Path) -> None:
    fake.cut, fake.down = 10_500, 1
    with pytest.raises(CannotRun):
        fetched(tmp_path / "a.pt")
    fake.ranges = False
    fake.asked.clear()
    assert fetched(tmp_path / "a.pt") == DATA
    assert [each.headers.get("range") for each in fake.gets()] == ["bytes=10000-"]


def test_what_has_arrived_of_another_version_is_dropped(fake: FakeHub, tmp_path: Path) -> None:
    fake.cut, fake.down = 10_500, 1
    with pytest.raises(CannotRun):
        fetched(tmp_path / "a.pt")
    assert len(hub.parts(tmp_path / "a.pt")) == 1
    fake.put(REPO, PATH, DATA[::-1])
    fake.asked.clear()
    assert fetched(tmp_path / "a.pt") == DATA[::-1]
    assert len(hub.parts(tmp_path / "a.pt")) == 1
    assert [each.headers.get("range") for each in fake.gets()] == [None]


@pytest.mark.parametrize("etag", ["../../../outside", "a/b", "..", "é" * 40])
def test_an_etag_is_no_path(fake: FakeHub, tmp_path: Path, etag: str) -> None:
    fake.says = etag.encode("utf-8").decode("latin-1")
    (tmp_path / "deep").mkdir()
    assert fetched(tmp_path / "deep" / "a.pt") == DATA
    (part,) = tmp_path.rglob("*.part")
    assert hub.parts(tmp_path / "deep" / "a.pt") == [part]


def test_more_than_the_file_is_no_beginning_of_it(fake: FakeHub, tmp_path: Path) -> None:
    part = hub.fetch(hub.probe(WEIGHT), tmp_path / "a.pt")
    part.write_bytes(DATA + b"more")
    assert fetched(tmp_path / "a.pt") == DATA


@pytest.mark.parametrize(("status", "code"), [(401, "GatedRepo"), (401, "RepoNotFound"), (403, "GatedRepo"), (403, "")])
def test_a_refusal_names_where_to_accept_the_terms(fake: FakeHub, status: int, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.refuse = (status, code)
    with pytest.raises(CannotRun, match=rf"refuses {PATH} of {REPO} \({status}\): no token is set") as caught:
        hub.probe(WEIGHT)
    assert caught.value.hint == f"accept the terms at {fake.address}/{REPO}, then set HF_TOKEN to a token of that account"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(CannotRun, match="the token of HF_TOKEN is not enough"):
        hub.probe(WEIGHT)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("code", ["EntryNotFound", "RevisionNotFound", "RepoNotFound", ""])
def test_a_missing_file_is_said_to_be_missing(fake: FakeHub, code: str) -> None:
    fake.refuse = (404, code)
    with pytest.raises(CannotRun, match=r"has no models/unet.pt of owner/net at that revision") as caught:
        hub.probe(WEIGHT)
    assert fake.address in str(caught.value.hint)


def test_a_server_that_is_no_hub_is_named(fake: FakeHub) -> None:
    fake.bare = True
    with pytest.raises(CannotRun, match="does not answer as a model hub does") as caught:
        hub.probe(WEIGHT)
    assert "HF_ENDPOINT" in str(caught.value.hint)


def test_an_unreachable_hub_is_named_with_the_ways_out(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = hub.probe(WEIGHT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", nowhere)
    with pytest.raises(CannotRun, match=f"cannot reach {nowhere}") as caught:
        hub.probe(WEIGHT)
    assert "maisi models import" in str(caught.value.hint)
    fake.down = 1
    with pytest.raises(CannotRun, match="answers 503"):
        hub.fetch(remote, tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []  # nothing arrived, nothing is kept


def test_a_full_disk_is_said_to_be_full(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, chunk: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    remote = hub.probe(WEIGHT)
    monkeypatch.setattr(hub._Counted, "write", full)
    with pytest.raises(CannotRun, match="No space left on device") as caught:
        hub.fetch(remote, tmp_path / "a.pt")
    assert "MAISI_HOME" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_the_library_stays_out_until_it_is_needed_and_sends_nothing_of_its_own() -> None:
    script = """
import os, sys
from maisi_cli import hub, store
assert "huggingface_hub" not in sys.modules
hub._library()
from huggingface_hub import constants
assert constants.HF_HUB_DISABLE_TELEMETRY and constants.HF_HUB_OFFLINE
assert not {"torch", "monai", "numpy"} & set(sys.modules)
try:
    hub.probe(hub.WeightFile(part="unet", path="a", repo="b/c"))
except Exception as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "HF_HUB_OFFLINE forbids" in done.stdout
