"""torch.export and AOTInductor: a packed model as one graph, as a file, and compiled ahead of time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import mpqkern as mq
from mpqkern import Scheme


class Net(nn.Module):
    """Images through convolutions of each kind and layers with rounded activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = (
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.Conv2d(8, 8, 3, padding="same", groups=8),
        )
        self.up, self.head = nn.Linear(8, 40), nn.Linear(40, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.stem(x).relu()).relu().mean((2, 3))
        return self.head(nn.functional.gelu(self.up(x)))


PLAN = {"stem": 4, "depthwise": 8, "up": Scheme(2, group_size=32, symmetric=False), "head": Scheme(4, act_bits=8)}
BATCH = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}


@pytest.fixture
def net() -> nn.Module:
    model = Net().eval()
    mq.swap_(model, PLAN)
    return model


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))


def ops_of(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if str(node.target).startswith("mpqkern")]


def test_a_graph_holds_the_ops_whole_and_runs_as_eager(net: nn.Module) -> None:
    program = torch.export.export(net, (images(2),), dynamic_shapes=BATCH)
    assert ops_of(program) == ["mpqkern.conv2d.default"] * 2 + ["mpqkern.linear.default"] * 2
    for batch in (2, 5):
        assert torch.equal(program.module()(images(batch)), net(images(batch)))
    state = program.state_dict
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    assert state["stem.qweight"].dtype == torch.uint8


def test_a_graph_survives_its_file(net: nn.Module, tmp_path: Path) -> None:
    program = torch.export.export(net, (images(2),), dynamic_shapes=BATCH)
    path = tmp_path / "net.pt2"
    torch.export.save(program, path)
    loaded = torch.export.load(path)
    assert ops_of(loaded) == ops_of(program)
    assert torch.equal(loaded.module()(images(3)), net(images(3)))
    floats = sum(4 * m.weight.numel() for m in Net().modules() if hasattr(m, "weight"))
    stored = sum(t.nbytes for t in loaded.state_dict.values())
    assert stored < floats


def test_a_graph_refuses_what_the_op_refuses(net: nn.Module) -> None:
    with pytest.raises(Exception, match=r"input is \[2, 4, 8, 8\]; wanted \[batch, in_channels=3"):
        torch.export.export(net, (torch.zeros(2, 4, 8, 8),))


RUN = """
import sys, torch
{imports}
net = torch._inductor.aoti_load_package(sys.argv[1])
x, y = torch.load(sys.argv[2])
print(float((net(x) - y).abs().max()))
"""


def in_a_new_process(imports: str, package: str, data: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN.format(imports=imports), package, str(data)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_compiled_ahead_of_time_and_loaded_in_a_new_process(net: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        program = torch.export.export(net, (images(2),), dynamic_shapes=BATCH)
        package = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "net.pt2"),
            inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},  # most of the time goes into the wrapper
        )
    data = tmp_path / "data.pt"
    torch.save((images(7), net(images(7)).detach()), data)
    done = in_a_new_process("import mpqkern", package, data)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5
    without = in_a_new_process("", package, data)
    assert without.returncode != 0 and "mpqkern" in without.stderr
