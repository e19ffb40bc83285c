"""Decoding and encoding in slabs: the numbers of the whole volume, whatever is stored, and far less of it held at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from maisi_cli import streaming
from maisi_cli.streaming import MODES, decoded, embedded, encoded
from torch import Tensor, nn

usual = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def autoencoder(*, transposed: bool, attention: bool = False, channels: int = 1) -> Any:
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKlMaisi(
            spatial_dims=3, in_channels=1, out_channels=channels, latent_channels=4, num_channels=[8, 16, 16], num_res_blocks=[1, 2, 2],
            norm_num_groups=4, norm_eps=1e-6, attention_levels=[False] * 3, with_encoder_nonlocal_attn=attention,
            with_decoder_nonlocal_attn=attention, use_checkpointing=False, use_convtranspose=transposed, norm_float16=False, num_splits=1,
        )  # fmt: skip
        for weights in vae.parameters():
            nn.init.normal_(weights, 0.1 if weights.ndim == 1 else 0.0, 0.3)
    return vae


VAES = {(up, attention): autoencoder(transposed=up, attention=attention, channels=3 if up else 1)
        for up in (False, True) for attention in (False, True)}  # fmt: skip


def difference(made: Tensor, wanted: Tensor) -> float:
    """Return the largest difference as a share of the range."""
    assert made.shape == wanted.shape
    return float((made - wanted).abs().max() / (wanted.max() - wanted.min()))


@usual
@given(st.sampled_from(sorted(VAES)), st.tuples(*(st.integers(1, 7),) * 3), st.sampled_from(MODES), st.integers(1, 40), st.integers(0, 9))
def test_slabs_decode_to_what_the_whole_volume_does(kind, size, mode, planes, seed):
    vae, latent = VAES[kind], torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        wanted = vae.decode_stage_2_outputs(latent)
    assert difference(torch.cat(list(decoded(vae, latent, mode=mode, planes=planes)), dim=2), wanted) < 1e-5


@usual
@given(st.booleans(), st.tuples(*(st.integers(8, 29),) * 3), st.sampled_from(MODES), st.integers(1, 40), st.integers(0, 9))
def test_slabs_encode_to_the_mean_of_the_whole_volume_odd_sizes_included(attention, size, mode, planes, seed):
    vae, image = VAES[False, attention], torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        wanted, _ = vae.encode(image)
    assert difference(encoded(vae, image, mode=mode, planes=planes), wanted) < 1e-5


def test_windows_are_not_exact_where_slabs_are():
    """The control: windows have statistics of their own, so the test above could fail."""
    from maisi_cli.decoding import decode_window

    vae, latent = VAES[False, False], torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = vae.decode_stage_2_outputs(latent)
        windows = decode_window(vae.decode_stage_2_outputs, latent, (4, 8, 8), 0.5)
    assert difference(windows, wanted) > 1e-2


@given(size=st.tuples(st.integers(4, 21), st.integers(4, 9), st.integers(4, 9)), planes=st.integers(1, 24), seed=st.integers(0, 9))
@usual
def test_a_condition_is_embedded_in_slabs_as_at_once(size: tuple[int, int, int], planes: int, seed: int) -> None:
    """Any size and any thickness of slabs, with two convolutions of stride 2 within."""
    from maisi_cli.networks import binarise
    from monai.networks.nets.controlnet import ControlNetConditioningEmbedding

    drawn = torch.Generator().manual_seed(seed)
    embedding = ControlNetConditioningEmbedding(spatial_dims=3, in_channels=8, out_channels=5, channels=(8, 6, 4))
    for weights in embedding.parameters():
        nn.init.normal_(weights, std=0.3, generator=drawn)
    labels = torch.randint(0, 256, (1, 1, *size), generator=drawn, dtype=torch.uint8)
    with torch.inference_mode():
        wanted = embedding(binarise(labels))
    made = embedded(embedding, labels, binarise, dtype=torch.float32, planes=planes)
    assert made.shape == wanted.shape
    assert torch.allclose(made, wanted, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("mode", MODES)
def test_the_modes_hold_what_they_say(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored at full resolution: at most 16 (upsampled) or 8 + 8 channels, 8, or none."""
    held: list[int] = []
    cut = streaming._cut

    def counted(slab: streaming.Slab, planes: int) -> list[streaming.Slab]:
        if slab[0].shape[3] == 16:  # full resolution
            held.append(sum(part.shape[1] for part in slab))
        return cut(slab, planes)

    monkeypatch.setattr(streaming, "_cut", counted)
    list(decoded(VAES[False, False], torch.randn(1, 4, 4, 4, 4), mode=mode, planes=4))
    assert set(held) == {"store": {16, 8}, "half": {8}, "recompute": set()}[mode]


def test_each_layer_runs_once_when_everything_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    planes: dict[int, int] = {}
    conv3d = nn.functional.conv3d

    def counted(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made = conv3d(x, weight, *args, **kwargs)
        planes[id(weight)] = planes.get(id(weight), 0) + made.shape[2]
        return made

    monkeypatch.setattr(streaming.functional, "conv3d", counted)
    list(decoded(VAES[False, False], torch.randn(1, 4, 4, 4, 4), mode="store", planes=4))
    assert set(planes.values()) == {4, 8, 16}


def test_what_cannot_be_streamed_is_refused() -> None:
    with pytest.raises(ValueError, match="no mode 'fast'"):
        list(decoded(VAES[False, False], torch.zeros(1, 4, 4, 4, 4), mode="fast"))
    with pytest.raises(ValueError, match="no mode 'fast'"):
        encoded(VAES[False, False], torch.zeros(1, 1, 8, 8, 8), mode="fast")
    with pytest.raises(ValueError, match="a batch of 2"):
        list(decoded(VAES[False, False], torch.zeros(2, 4, 4, 4, 4)))
