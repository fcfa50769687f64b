"""Layers of published networks, counted from their shapes at 224 x 224, as papers count their sizes and operations."""

from __future__ import annotations

from mpqkern.scheme import Layer

# OMPQ's units: parameters with batch norms. ResNet-18's downsamples go with the last convolution of their block.
R18 = [36_992] * 4 + [73_984, 156_160, 147_712, 147_712] + [295_424, 623_616, 590_336, 590_336]
R18 += [1_180_672, 2_492_416, 2_360_320, 2_360_320]
R18_STEM, R18_HEAD = 9_536, 513_000
R18_ENDS = R18_STEM + R18_HEAD


def units(sizes: list[int]) -> list[Layer]:
    return [Layer(f"unit{i}", "conv2d", (n, 1, 1, 1), n, 1000 * (i + 1)) for i, n in enumerate(sizes)]


def mobilenet_v2() -> list[int]:
    """Parameters of its 53 units: convolution with its batch norm; the classifier with its bias."""
    sizes, channels = [3 * 9 * 32 + 64], 32
    for expand, out, repeat in ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)):
        for _ in range(repeat):
            wide = channels * expand
            sizes += [channels * wide + 2 * wide] if expand > 1 else []
            sizes += [9 * wide + 2 * wide, wide * out + 2 * out]
            channels = out
    return [*sizes, 320 * 1280 + 2560, 1280 * 1000 + 1000]


def conv(name: str, cin: int, out: int, k: int, size: int) -> Layer:
    """Weights only; `size` is the width of what comes out."""
    return Layer(name, "conv2d", (out, cin, k, k), cin * out * k * k, cin * out * k * k * size * size)


def resnet18() -> list[Layer]:
    """All 21 convolutions and the classifier."""
    layers, cin = [conv("stem", 3, 64, 7, 112)], 64
    for stage, out in enumerate((64, 128, 256, 512)):
        size = 56 >> stage
        for block in range(2):
            layers += [conv(f"{stage}.{block}.1", cin, out, 3, size), conv(f"{stage}.{block}.2", out, out, 3, size)]
            layers += [conv(f"{stage}.{block}.down", cin, out, 1, size)] if cin != out else []
            cin = out
    return [*layers, Layer("head", "linear", (1000, 512), 512_000, 512_000)]


def resnet50(stride_in: int = 1) -> list[Layer]:
    """All 54: a stage's stride is in the 1 x 1 convolution of its first block, or in the 3 x 3 one (stride_in=3)."""
    layers, cin = [conv("stem", 3, 64, 7, 112)], 64
    for stage, (wide, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        size = 56 >> stage
        for block in range(blocks):
            first = 2 * size if stride_in == 3 and stage and not block else size
            at, out = f"{stage}.{block}", 4 * wide
            layers += [conv(f"{at}.1", cin, wide, 1, first), conv(f"{at}.2", wide, wide, 3, size)]
            layers += [conv(f"{at}.3", wide, out, 1, size)]
            layers += [conv(f"{at}.down", cin, out, 1, size)] if not block else []
            cin = out
    return [*layers, Layer("head", "linear", (1000, 2048), 2_048_000, 2_048_000)]
