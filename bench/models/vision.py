"""Three well-known networks for images of 224 x 224, whole, batch norms folded; `bench/layers.py` lists layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from layers import EFFICIENTNET_LITE0, MOBILENET_V2
from torch import Tensor, nn

CLASSES = 1000


def conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups)


class Basic(nn.Module):
    """He et al. 2015 (arXiv 1512.03385)."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(cin, cout, 3, stride), conv(cout, cout, 3)
        self.down = conv(cin, cout, 1, stride) if stride > 1 else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.relu(self.conv1(x)))
        y += self.down(x)
        return self.relu(y)


class Inverted(nn.Module):
    """Sandler et al. 2018 (arXiv 1801.04381)."""

    def __init__(self, cin: int, cout: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = cin * expansion
        widened = [conv(cin, wide, 1), nn.ReLU6(inplace=True)] if expansion > 1 else []
        filtered = [conv(wide, wide, kernel, stride, wide), nn.ReLU6(inplace=True)]
        self.body = nn.Sequential(*widened, *filtered, conv(wide, cout, 1))
        self.adds = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def resnet18() -> nn.Module:
    blocks: list[nn.Module] = [conv(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    cin = 64
    for cout in (64, 128, 256, 512):
        blocks += [Basic(cin, cout, cout // cin), Basic(cout, cout, 1)]
        cin = cout
    return nn.Sequential(*blocks, *head(cin))


def inverted_residuals(stages: Iterable[tuple[int, int, int, int, int]]) -> nn.Module:
    blocks: list[nn.Module] = [conv(3, 32, 3, 2), nn.ReLU6(inplace=True)]
    cin = 32
    for expansion, kernel, stride, cout, count in stages:
        for i in range(count):
            blocks.append(Inverted(cin, cout, expansion, kernel, 1 if i else stride))
            cin = cout
    return nn.Sequential(*blocks, conv(cin, 1280, 1), nn.ReLU6(inplace=True), *head(1280))


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]


MAKE: dict[str, Callable[[], nn.Module]] = {
    "resnet18": resnet18,
    "mobilenet_v2": lambda: inverted_residuals(MOBILENET_V2),
    "efficientnet_lite0": lambda: inverted_residuals(EFFICIENTNET_LITE0),
}
