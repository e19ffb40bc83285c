"""The 2D networks that turn slices into features, with the names of the published weights.

Each takes a batch of slices (N, 3, H, W), or (N, 1, H, W) for `SliceNet`, of any size and returns one row of features a
slice. None depends on torchvision, and none holds weights of its own until a file is loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SliceNet(nn.Module):
    """The small network of `maisi-slices`: (N, 1, H, W) in [-1, 1] to (N, 128), about 95 000 weights.

    Features are the means over the slice of an early layer (32: edges, grain) and a late one (96: anatomy), each scaled to
    mean 0 and variance 1 over the clean slices that it was trained on.
    """

    size = 128
    centre: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = _layer(1, 16)
        self.early = _layer(16, 32, stride=2)
        self.middle = _layer(32, 64, stride=2)
        self.late = nn.Sequential(_layer(64, 96, stride=2), _layer(96, 96, groups=16))
        self.register_buffer("centre", torch.zeros(self.size))
        self.register_buffer("scale", torch.ones(self.size))

    def forward(self, slices: Tensor) -> Tensor:
        early = self.early(self.stem(slices))
        late = self.late(self.middle(early))
        return (torch.cat([early.mean((2, 3)), late.mean((2, 3))], dim=1) - self.centre) / self.scale


def _layer(inputs: int, outputs: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class ResNet50(nn.Module):
    """ResNet-50 without its classifier (He et al. 2015): (N, 3, H, W) to (N, 2048), the last map averaged over the slice.

    With `keras` it is the network of the RadImageNet weights: convolutions have a bias, each stage halves the map in its
    first 1x1 convolution, and the normalisation's epsilon is 1.001e-5. Without, it is that of torchvision's weights, which
    halve in the 3x3 convolution. Files of the one fit the other's shapes but for the biases, so loading must be strict.
    """

    size = 2048

    def __init__(self, *, keras: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=keras)
        self.bn1 = nn.BatchNorm2d(64, eps=1.001e-5 if keras else 1e-5)
        inputs = 64
        for number, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
            stage = []
            for block in range(blocks):
                stage.append(_Bottleneck(inputs, width, stride=2 if number > 1 and block == 0 else 1, widen=block == 0, keras=keras))
                inputs = 4 * width
            self.add_module(f"layer{number}", nn.Sequential(*stage))

    def forward(self, slices: Tensor) -> Tensor:
        maps = F.max_pool2d(F.relu(self.bn1(self.conv1(slices))), 3, stride=2, padding=1)
        for number in range(1, 5):
            maps = self.get_submodule(f"layer{number}")(maps)
        return maps.mean((2, 3))


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, *, stride: int, widen: bool, keras: bool) -> None:
        super().__init__()
        eps = 1.001e-5 if keras else 1e-5
        first, second = (stride, 1) if keras else (1, stride)
        self.conv1 = nn.Conv2d(inputs, width, 1, stride=first, bias=keras)
        self.bn1 = nn.BatchNorm2d(width, eps=eps)
        self.conv2 = nn.Conv2d(width, width, 3, stride=second, padding=1, bias=keras)
        self.bn2 = nn.BatchNorm2d(width, eps=eps)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=keras)
        self.bn3 = nn.BatchNorm2d(4 * width, eps=eps)
        self.downsample = None
        if widen:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride=stride, bias=keras), nn.BatchNorm2d(4 * width, eps=eps))

    def forward(self, maps: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(maps)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (maps if self.downsample is None else self.downsample(maps)))


class SqueezeNet(nn.Module):
    """SqueezeNet 1.1 (Iandola et al. 2016) with torchvision's names: (N, 3, H, W) to its 1000 class scores."""

    size = 1000

    def __init__(self) -> None:
        super().__init__()
        widths = {3: (64, 16, 64), 4: (128, 16, 64), 6: (128, 32, 128), 7: (256, 32, 128),
                  9: (256, 48, 192), 10: (384, 48, 192), 11: (384, 64, 256), 12: (512, 64, 256)}  # fmt: skip
        self.features = nn.Sequential(nn.Conv2d(3, 64, 3, stride=2))
        for place in range(1, 13):
            if place in widths:
                self.features.append(_Fire(*widths[place]))
            else:
                self.features.append(nn.ReLU(inplace=True) if place == 1 else nn.MaxPool2d(3, stride=2, ceil_mode=True))
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(512, 1000, 1), nn.ReLU(inplace=True))

    def forward(self, slices: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.features(slices))
        return scores.mean((2, 3))


class _Fire(nn.Module):
    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        small = F.relu(self.squeeze(maps))
        return F.relu(torch.cat([self.expand1x1(small), self.expand3x3(small)], dim=1))
