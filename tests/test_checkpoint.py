"""save and load: exact bytes, no float weights on the way, and one clear error for every bad file."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import mpqkern as mq
from mpqkern import PackedModule, Scheme
from mpqkern.checkpoint import FORMAT_VERSION, FileError

PLAN = {
    "conv": Scheme(2, group_size=32, symmetric=False),
    "head": Scheme(4, act_bits=8),
    "wide": Scheme(8, scale_dtype="float32"),
}


class Net(nn.Module):
    """A convolution, a norm with buffers, tied layers, a float layer and a buffer outside the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.wide, self.head, self.free = nn.Linear(8 * 16, 33), nn.Linear(33, 5), nn.Linear(5, 5)
        self.again = self.free
        self.register_buffer("table", torch.arange(5.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.head(self.wide(self.norm(self.conv(x)).relu().flatten(1)))) + self.table


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    model = Net().eval()
    model.norm.running_mean.uniform_()
    mq.swap_(model, PLAN)
    path = tmp_path / "net.safetensors"
    mq.save(model, path)
    return model, path


def header_of(path: Path) -> dict:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size])


def rewrite(path: Path, edit: Callable[[dict], None], tail: bytes = b"") -> None:
    """The same data under an edited header."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :] + tail)


def rewrite_note(path: Path, edit: Callable[[dict], None]) -> None:
    def change(header: dict) -> None:
        note = json.loads(header["__metadata__"]["mpqkern"])
        edit(note)
        header["__metadata__"]["mpqkern"] = json.dumps(note)

    rewrite(path, change)


def test_round_trip(saved: tuple[nn.Module, Path]) -> None:
    model, path = saved
    loaded = mq.load(Net, path).eval()
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(loaded(x), model(x))
    assert repr(loaded) == repr(model)
    assert loaded.again is loaded.free and loaded.free.weight.requires_grad
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}
    assert mq.verify(loaded, x).ok


def test_file_bytes_are_the_schemes_bytes_and_the_floats(saved: tuple[nn.Module, Path]) -> None:
    model, path = saved
    packed = sum(m.scheme.bytes(m.weight_shape) for m in model.modules() if isinstance(m, PackedModule))
    floats = sum(
        4 * t.numel()
        for t in (
            model.conv.bias,
            model.wide.bias,
            model.head.bias,
            *model.free.parameters(),
            *model.norm.parameters(),
            model.norm.running_mean,
            model.norm.running_var,
            model.table,
        )
    )
    counters = 8  # the norm's int64
    entries = {k: v for k, v in header_of(path).items() if k != "__metadata__"}
    on_disk = sum(v["data_offsets"][1] - v["data_offsets"][0] for v in entries.values())
    assert on_disk == packed + floats + counters == mq.save(model, path)
    head = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert path.stat().st_size == head + on_disk


def test_other_safetensors_readers_read_it(saved: tuple[nn.Module, Path]) -> None:
    model, path = saved
    tensors = safetensors.torch.load_file(path)
    assert all(torch.equal(tensors[k], v) for k, v in model.state_dict().items() if k in tensors)
    assert "again.weight" not in tensors and "table" in tensors


def test_loading_never_makes_float_weights(tmp_path: Path) -> None:
    def big() -> nn.Module:
        return nn.Sequential(nn.Linear(2048, 2048, bias=False), nn.Linear(2048, 2048, bias=False))

    model = big()
    mq.swap_(model, {"*": Scheme(2)})
    path = tmp_path / "big.safetensors"
    mq.save(model, path)
    largest = 0
    real = torch.Tensor.__torch_function__

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out.is_meta:
                largest = max(largest, out.numel() * out.element_size())
            return out

    assert real is not None
    tracemalloc.start()
    with Watch():
        loaded = mq.load(big, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest <= 2048 * 2048 // 4 and peak < 2 * 2048 * 2048 // 4 + 2**20  # floats would be 16 MiB each
    assert torch.equal(loaded[1].qweight, model[1].qweight)


def test_tied_packed_weights_are_stored_once(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        model[1].weight = model[0].weight
        return model

    model = make()
    mq.swap_(model, {"*": 4})
    path = tmp_path / "tied"
    assert mq.save(model, path) == Scheme(4).bytes((64, 64)) + 2 * 64 * 4
    loaded = mq.load(make, path)
    assert loaded[0].qweight is loaded[1].qweight and torch.equal(loaded(torch.ones(1, 64)), model(torch.ones(1, 64)))


def test_half_models_keep_their_type(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(40, 8), nn.Linear(8, 3)).bfloat16()
    mq.swap_(model, {"0": 4})
    mq.save(model, tmp_path / "m")
    loaded = mq.load(lambda: nn.Sequential(nn.Linear(40, 8), nn.Linear(8, 3)), tmp_path / "m")
    assert loaded[0].weight.dtype == loaded[1].weight.dtype == torch.bfloat16
    x = torch.randn(2, 40).bfloat16()
    assert torch.equal(loaded(x), model(x))


def test_saving_is_whole_or_nothing(saved: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = saved
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        mq.save(model, path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict:
            return {}

    with pytest.raises(ValueError, match="module '0' keeps extra state"):
        mq.save(nn.Sequential(Extra(2, 2)), tmp_path / "m")
    with pytest.raises(ValueError, match="tensor 'weight' is on the meta device"):
        mq.save(nn.Linear(2, 2, device="meta"), tmp_path / "m")
    with pytest.raises(ValueError, match="complex64"):
        mq.save(nn.Linear(2, 2).to(torch.complex64), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_make_model_must_be_a_function_that_makes_a_model(saved: tuple[nn.Module, Path]) -> None:
    with pytest.raises(TypeError, match="make_model is a Net; wanted a function or class"):
        mq.load(Net(), saved[1])
    with pytest.raises(TypeError, match=r"make_model\(\) returned a int; wanted an nn.Module"):
        mq.load(lambda: 3, saved[1])


NOTE_ERRORS = [
    (
        lambda n: n.update(format_version=FORMAT_VERSION + 1),
        f"its format_version is {FORMAT_VERSION + 1}; wanted {FORMAT_VERSION}",
    ),
    (lambda n: n.pop("format_version"), "its mpqkern entry cannot be read"),
    (lambda n: n.update(layers=[1]), "are no objects"),
    (lambda n: n["layers"].update(conv=3), "layer 'conv': its entry is no object"),
    (lambda n: n["layers"]["conv"].update(bits=3), "layer 'conv': bits=3; wanted 2, 4 or 8"),
    (lambda n: n["layers"]["conv"].update(bits="__import__('os')"), "layer 'conv': bits=.*wanted an integer"),
    (lambda n: n["layers"]["conv"].update(colour=1), "layer 'conv': scheme=.*; wanted only the keys bits"),
    (lambda n: n["layers"]["conv"].update(kind="linear"), "layer 'conv' is a linear .* but a Conv2d"),
    (lambda n: n["layers"]["conv"].update(kind="posix"), "layer 'conv' of kind 'posix'"),
    (lambda n: n["layers"]["conv"].update(weight_shape=[8, 3, 3, 2**40]), "layer 'conv' is a conv2d"),
    (
        lambda n: n["layers"]["conv"].update(bits=8),
        r"tensor 'conv.qweight' is torch.uint8 \[8, 8\]; wanted torch.uint8 \[8, 32\]",
    ),
    (lambda n: n["layers"]["head"].update(scale_dtype="float32"), "tensor 'head.scales' is torch.float16"),
    (lambda n: n["layers"].update(nose=n["layers"]["conv"]), "layer 'nose' of kind 'conv2d' is not in the model"),
    (lambda n: n["layers"].pop("conv"), "it lacks 'conv.weight'; the model has no 'conv.qweight'"),
    (
        lambda n: n["aliases"].update({"again.weight": "nowhere"}),
        "'again.weight' shares 'nowhere', which it does not hold",
    ),
    (lambda n: n["aliases"].update({"again.weight": "norm.running_mean"}), "wanted|shares"),
    (lambda n: n["aliases"].pop("again.weight"), "it lacks 'again.weight'"),
]


@pytest.mark.parametrize("edit,message", NOTE_ERRORS)
def test_edited_notes(saved: tuple[nn.Module, Path], edit: Callable[[dict], None], message: str) -> None:
    _, path = saved
    rewrite_note(path, edit)
    with pytest.raises(FileError, match=message) as caught:
        mq.load(Net, path)
    assert str(path) in str(caught.value)


def entry(**change: object) -> Callable[[dict], None]:
    return lambda header: header["free.weight"].update(change)


HEADER_ERRORS = [
    (lambda h: h.pop("__metadata__"), "it has no mpqkern entry"),
    (lambda h: h.update(__metadata__={"mpqkern": 3}), "no object of strings"),
    (lambda h: h.update(__metadata__={"mpqkern": "{"}), "its mpqkern entry cannot be read"),
    (lambda h: h.update(__metadata__={"mpqkern": "[" * 100000}), "its mpqkern entry cannot be read"),
    (entry(dtype="F128"), "tensor 'free.weight' has a bad entry"),
    (
        entry(shape=[2**31, 2**31]),
        r"tensor 'free.weight' is torch.float32 \[2147483648, 2147483648\] but takes 100 bytes",
    ),
    (entry(shape=[-5, -5]), "tensor 'free.weight' has a bad entry"),
    (entry(shape=[True, 25]), "tensor 'free.weight' has a bad entry"),
    (entry(shape=[25]), r"tensor 'free.weight' is torch.float32 \[25\]; wanted torch.float32 \[5, 5\]"),
    (entry(data_offsets=[0, 100]), "begins at|takes"),
    (entry(data_offsets=[10**17, 10**17 + 100]), "begins at"),
    (entry(data_offsets=[1e3, 1e4]), "tensor 'free.weight' has a bad entry"),
    (lambda h: h.update(surplus=3), "tensor 'surplus' has a bad entry"),
    (lambda h: h.pop("free.weight"), "begins at|wanted"),
]


@pytest.mark.parametrize("edit,message", HEADER_ERRORS)
def test_edited_headers(saved: tuple[nn.Module, Path], edit: Callable[[dict], None], message: str) -> None:
    rewrite(saved[1], edit)
    with pytest.raises(FileError, match=message):
        mq.load(Net, saved[1])


def test_damaged_files(saved: tuple[nn.Module, Path]) -> None:
    _, path = saved
    whole = path.read_bytes()
    huge = struct.pack("<Q", 2**62)
    for data in (
        b"",
        whole[:7],
        whole[:100],
        whole[:-1],
        whole + b"x",
        huge + whole[8:],
        b"PK\x03\x04" + whole,
        whole[8:],
        struct.pack("<Q", 10) + b"\xff" * 10,
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 200000) + b"[" * 200000,
    ):
        path.write_bytes(data)
        with pytest.raises(FileError):
            mq.load(Net, path)
    twice = b'{"a":{},"a":{}}'
    path.write_bytes(struct.pack("<Q", len(twice)) + twice)
    with pytest.raises(FileError, match="names one key twice"):
        mq.load(Net, path)
    with pytest.raises(FileNotFoundError):
        mq.load(Net, path.with_name("missing"))


@given(where=st.integers(0, 4000), value=st.integers(0, 255), cut=st.integers(0, 3000))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_damage_gives_an_error_or_a_model(
    saved: tuple[nn.Module, Path], where: int, value: int, cut: int
) -> None:
    """One changed byte of the header, or a cut: never a crash, never another kind of error."""
    mq.save(*saved)
    data = bytearray(saved[1].read_bytes())
    data[where % len(data)] = value
    saved[1].write_bytes(data[: len(data) - cut] if cut % 2 else data)
    with contextlib.suppress(FileError):
        assert isinstance(mq.load(Net, saved[1]), Net)


def test_folded_batch_norms(tmp_path: Path) -> None:
    """By the function that made the model, with the norms, and by one that has none."""

    def make() -> nn.Module:
        layers = (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False))
        return nn.Sequential(*layers, nn.BatchNorm2d(4), nn.Identity()).eval()

    def without() -> nn.Module:
        model = make()
        model[1] = model[4] = nn.Identity()
        return model

    model, x = make(), torch.randn(4, 3, 8, 8)
    model[1].running_mean.fill_(1)
    assert len(mq.fold_batchnorm_(model, x).done) == 2
    mq.swap_(model, {"0": 8})  # the other one stays in float, with a bias as well
    mq.save(model, tmp_path / "m")
    found = mq.load(make, tmp_path / "m")
    assert isinstance(found[1], nn.Identity) and not found[1].training and found[3].bias is not None
    assert torch.equal(found(x), model(x))
    rewrite_note(tmp_path / "m", lambda note: note.update(identities=["1", "4", "5", "gone", "2", ""]))
    assert torch.equal(mq.load(make, tmp_path / "m")(x), model(x))
    rewrite_note(tmp_path / "m", lambda note: note.update(identities=[1]))
    with pytest.raises(FileError, match="no list of names"):
        mq.load(make, tmp_path / "m")
    with pytest.raises(FileError, match=r"the model has no '3\.bias'"):
        rewrite_note(tmp_path / "m", lambda note: note.pop("identities"))  # as files were before
        mq.load(without, tmp_path / "m")


def test_a_model_that_does_not_fit(saved: tuple[nn.Module, Path]) -> None:
    with pytest.raises(FileError, match="is not in the model"):
        mq.load(lambda: nn.Linear(3, 3), saved[1])
