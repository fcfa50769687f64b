"""ONNX: packed models as files that ONNX Runtime computes like mpqkern, with the codes as they are stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mpqkern as mq
from mpqkern import Scheme

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
to_onnx = pytest.importorskip("mpqkern.integrations.onnx").to_onnx

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SCHEMES = [
    Scheme(4),
    Scheme(2, group_size=32, symmetric=False),
    Scheme(8, group_size=96),  # blocks of 32
    Scheme(4, group_size=64, symmetric=False, scale_dtype="float32"),
    Scheme(4, act_bits=8),
    Scheme(2, act_bits=8, group_size=32),
]


def session(path: Path, **options: object) -> runtime.InferenceSession:
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = 1
    for name, value in options.items():
        setattr(settings, name, value)
    return runtime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def run(path: Path, x: torch.Tensor) -> torch.Tensor:
    made = session(path)
    (y,) = made.run(None, {made.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(y)


def expected(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(x)


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


class SideBySide(nn.Module):
    """Layers that all see the same input, so that one file tests them all."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def check_side_by_side(model: SideBySide, x: torch.Tensor, path: Path, **options: object) -> None:
    to_onnx(model.eval(), (x,), path, **options)
    made = session(path)
    found = made.run(None, {made.get_inputs()[0].name: x.numpy()})
    for layer, y, wanted in zip(model.layers, found, expected(model, x), strict=True):
        torch.testing.assert_close(
            torch.from_numpy(y), wanted, rtol=1e-4, atol=1e-5, msg=lambda m, at=layer: f"{at}: {m}"
        )


@pytest.mark.parametrize("standard", [False, True])
def test_linear(standard: bool, tmp_path: Path) -> None:
    model = SideBySide([nn.Linear(200, 33, bias=i % 2 == 0) for i in range(len(SCHEMES) + 1)])
    mq.swap_(model, {f"layers.{i}": scheme for i, scheme in enumerate([*SCHEMES, SCHEMES[-1]])})
    model.layers[-1].set_act_scale_(torch.full((7,), 0.01))  # much of what comes in saturates
    check_side_by_side(model, torch.randn(2, 3, 200), tmp_path / "m.onnx", standard=standard)
    assert operators(tmp_path / "m.onnx").count("MatMulNBits") == (0 if standard else len(model.layers))


def test_convolutions(tmp_path: Path) -> None:
    schemes = [SCHEMES[0], SCHEMES[1], SCHEMES[4]]
    model = SideBySide(
        [
            layer
            for _ in schemes
            for layer in (
                nn.Conv2d(6, 8, 3, stride=2, padding=1),
                nn.Conv2d(6, 12, (3, 1), padding="same", groups=6, bias=False),
                nn.Conv2d(6, 8, 3, padding=2, dilation=2, padding_mode="reflect"),
            )
        ]
    )
    mq.swap_(model, {f"layers.{i}": schemes[i // 3] for i in range(9)})
    model.layers[-1].set_act_scale_(torch.tensor([0.01]))
    check_side_by_side(model, torch.randn(2, 6, 9, 8), tmp_path / "m.onnx")


class Head(nn.Module):
    """A convolution, attention's shapes, and layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.one, self.two = nn.Conv2d(1, 64, 4, stride=4), nn.Linear(64, 64), nn.Linear(64, 64)
        self.two.weight = self.one.weight
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = (t.unsqueeze(1) for t in (self.one(x), self.two(x), x))  # one head
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v).mean((1, 2)))


def test_the_file_holds_the_packed_bytes(tmp_path: Path) -> None:
    model = Head().eval()
    mq.swap_(model, {"*": 4, "head": Scheme(8, symmetric=False)})
    path = tmp_path / "m.onnx"
    size = to_onnx(model, (torch.zeros(2, 1, 16, 16),), path)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    assert ("one.qweight" in stored) != ("two.qweight" in stored)  # they share it
    for name in ("patch", "head"):
        for key in ("qweight", "scales", "zeros"):
            assert np.array_equal(stored[f"{name}.{key}"], model.get_submodule(name).state_dict()[key].numpy())
    tensors = sum(t.nbytes for t in stored.values())
    assert size == path.stat().st_size and tensors < size < tensors + 32_000  # the graph itself, some 6 kB a layer


def test_sizes_that_stay_open(tmp_path: Path) -> None:
    model = Head().eval()
    mq.swap_(model, {"*": 4, "one": Scheme(4, act_bits=8), "two": Scheme(4, act_bits=8)})
    batch = {"x": {0: torch.export.Dim("batch", min=1, max=99)}}
    to_onnx(model, (torch.zeros(2, 1, 16, 16),), tmp_path / "m.onnx", dynamic_shapes=batch)
    for n in (1, 5):
        x = torch.randn(n, 1, 16, 16)
        torch.testing.assert_close(run(tmp_path / "m.onnx", x), expected(model, x), rtol=1e-4, atol=1e-5)


class Normed(nn.Module):
    """Reads a weight besides calling its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(40, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) / self.layer.weight.norm()


def test_weights_that_are_read(tmp_path: Path) -> None:
    model = Normed().eval()
    mq.swap_(model, {"*": 2})
    x = torch.randn(3, 40)
    to_onnx(model, (x,), tmp_path / "m.onnx")
    torch.testing.assert_close(run(tmp_path / "m.onnx", x), expected(model, x), rtol=1e-4, atol=1e-5)


def test_half_precision_goes_in_and_out(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5)).half().eval()
    mq.swap_(model, {"*": 4})
    x = torch.randn(3, 64).half()
    to_onnx(model, (x,), tmp_path / "m.onnx")
    y = run(tmp_path / "m.onnx", x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, expected(model, x), rtol=5e-3, atol=5e-3)


def test_the_runtime_unpacks_convolutions_when_it_loads(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
    mq.swap_(model, {"*": 2})
    to_onnx(model, (torch.zeros(1, 3, 8, 8),), tmp_path / "m.onnx")
    assert "Floor" in operators(tmp_path / "m.onnx")
    session(tmp_path / "m.onnx", optimized_model_filepath=str(tmp_path / "optimized.onnx"))
    left = {"Conv", "ReorderInput", "ReorderOutput"}  # batch norms are folded too
    assert set(operators(tmp_path / "optimized.onnx")) <= left


@pytest.mark.parametrize(
    "model,example,message",
    [
        (None, (torch.zeros(1, 8),), "model=NoneType; wanted an nn.Module"),
        (nn.Sequential(nn.Linear(8, 8)).eval(), (torch.zeros(1, 8),), "model has no packed layer"),
        (mq.PackedLinear(8, 8, Scheme(4)).eval(), torch.zeros(1, 8), "example=Tensor; wanted a tuple"),
        (mq.PackedLinear(8, 8, Scheme(4)).train(), (torch.zeros(1, 8),), "in training mode; wanted model.eval"),
    ],
)
def test_bad_arguments(model: nn.Module, example: object, message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        to_onnx(model, example, tmp_path / "m.onnx")
    assert not any(tmp_path.iterdir())


def test_a_place_that_is_none_is_named_before_anything_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(32, 32)).eval()
    mq.swap_(model, {"*": 4})
    monkeypatch.delattr(torch.export, "export")
    with pytest.raises(FileNotFoundError, match=r"path='.*/gone/m\.onnx'; wanted a file in a folder that exists"):
        to_onnx(model, (torch.zeros(1, 32),), tmp_path / "gone" / "m.onnx")
