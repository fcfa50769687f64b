"""Importing, describing and forcing: what works with and without the compiled part."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import mpqkern as mq
from mpqkern import ops
from mpqkern.cli import main

MISSING = {"MPQKERN_LIBRARY": "/nonexistent/_C.so"}
# Nothing imports what stands further down.
STAGES = (
    "version scheme numbers select trees held files tensorfile checks packed plain stacked ops gradients",
    "ledger catalog planned capabilities",
    "measuring transform rounding scores solve",
    "nn notes checkpoint activations verify latency audit",
    "assign compare repeated reporting integrations cli __main__",
)
USE = """
import torch, mpqkern as mq
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 5))
mq.swap_(model, {"*": mq.Scheme(4, group_size=32)})
x = torch.randn(2, 3, 6, 6)
assert mq.verify(model, x).ok
assert torch.compile(model, fullgraph=True, backend="aot_eager")(x).shape == (2, 5)
model(x.requires_grad_()).sum().backward()
print(mq.ops.isa())
"""


def run(code: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"MPQKERN_ISA": ""} | env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_source_package_builds_and_a_wheel_has_all_but_tests(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    commands = f"egg_info --egg-base {tmp_path} build_py --build-lib {tmp_path}/lib sdist -d {tmp_path}"
    command = [sys.executable, "setup.py", "-q", *commands.split()]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    def files(*folders: str) -> set[str]:
        found = {p for folder in folders for p in (root / folder).rglob("*") if p.is_file()}
        return {str(p.relative_to(root)) for p in found if p.parent.name != "__pycache__" and p.suffix != ".so"}

    lib = tmp_path / "lib"
    assert {str(p.relative_to(lib)) for p in lib.rglob("*") if p.is_file()} == files("mpqkern")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        packed = {m.name.partition("/")[2] for m in source if m.isfile()}
    assert files("csrc", "mpqkern") | {"CMakeLists.txt", "pyproject.toml", "setup.py", "LICENSE"} <= packed
    assert not [name for name in packed if name.startswith("tests/") or name.endswith(".so")]


def test_without_the_compiled_part_everything_works_after_one_warning() -> None:
    done = run(USE, MISSING)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "plain"
    assert done.stderr.count("mpqkern runs without its compiled kernels") == 1
    assert "/nonexistent/_C.so does not exist" in done.stderr and "pip install --no-build-isolation ." in done.stderr


def test_a_library_that_does_not_load_is_only_a_warning(tmp_path: Path) -> None:
    bad = tmp_path / "_C.so"
    bad.write_bytes(b"no library")
    done = run(USE, {"MPQKERN_LIBRARY": str(bad)})
    assert done.returncode == 0, done.stderr
    assert f"does not load with torch {torch.__version__}" in done.stderr


def test_plain_on_request_is_silent() -> None:
    done = run(USE, {"MPQKERN_ISA": "plain"})
    assert done.returncode == 0 and done.stdout.strip() == "plain" and "mpqkern" not in done.stderr


@pytest.mark.skipif(ops.why_plain is not None, reason="no compiled kernels")
def test_a_lower_isa_on_request() -> None:
    assert run("import mpqkern; print(mpqkern.ops.isa())", {"MPQKERN_ISA": "scalar"}).stdout.strip() == "scalar"
    unknown = run("import mpqkern; print(mpqkern.ops.isa())", {"MPQKERN_ISA": "sse"})
    assert unknown.stdout.strip() == ops.isa() and "MPQKERN_ISA='sse'; wanted one of plain, scalar" in unknown.stderr


def test_importing_types_needs_no_torch() -> None:
    package = Path(mq.__file__).parent
    code = f"""
import sys, importlib.util as u
for name in ("scheme", "select"):
    spec = u.spec_from_file_location("m_" + name, "{package}/" + name + ".py")
    module = u.module_from_spec(spec); sys.modules[spec.name] = module; spec.loader.exec_module(module)
assert "torch" not in sys.modules
"""
    assert run(code, {}).returncode == 0


def test_highspy_is_imported_only_when_it_is_needed() -> None:
    code = """
import sys, numpy as np, mpqkern as mq
assert "highspy" not in sys.modules
sys.modules["highspy"] = None  # from here on it cannot be imported
layers = [mq.Layer(f"l{i}", "linear", (8, 8), 64) for i in range(4)]
scores = mq.Scores(layers, [2, 4, 8], np.arange(4)[:, None] * [3.0, 1.0, 0.0])
print(mq.solve(scores, mq.Budget(avg_bits=4)).status)
mq.solve(scores, mq.Budget(avg_bits=4), mq.Budget(limit=10, rows=[[5, 0, 3]] * 4))
"""
    done = run(code, {})
    assert done.stdout.strip() == "optimal" and "this problem needs HiGHS" in done.stderr
    assert done.stderr.strip().endswith("wanted: pip install highspy")


def test_the_solver_imports_no_torch() -> None:
    sources = sorted((Path(mq.__file__).parent / "solve").glob("*.py"))
    assert len(sources) > 10
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "torch" for name in names), source


def test_no_stage_imports_a_later_one() -> None:
    package, order = Path(mq.__file__).parent, " ".join(STAGES).split()
    sources = [path for path in package.rglob("*.py") if path != package / "__init__.py"]
    seen = set()
    for path in sources:
        parts = path.relative_to(package).with_suffix("").parts
        seen.add(parts[0])
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                above = list(parts[: len(parts) - node.level])
                whole = above + (node.module.split(".") if node.module else [])
                found = whole[:1] or [alias.name for alias in node.names if alias.name != "_host"]
                assert all(order.index(name) <= order.index(parts[0]) for name in found), (path, found)
    assert sorted(seen) == sorted(order)


def test_capabilities_name_a_kernel_for_each_op_bits_and_device() -> None:
    found = mq.capabilities()
    rows = {(k["op"], k["bits"], k["device"]): k for k in found["kernels"]}
    for op in ops.SCHEMAS:
        packs = "int bits" in ops.SCHEMAS[op]
        kernel = ops.isa()
        served = {bits: row["kernel"] for (name, bits, device), row in rows.items() if (name, device) == (op, "cpu")}
        assert served == dict.fromkeys((2, 4, 8) if packs else (None,), kernel)
    assert len(rows) == len(found["kernels"])
    assert found["torch"] == torch.__version__ and found["mpqkern"] == mq.__version__
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    "why_plain,built,want",
    [
        (None, True, ("cuda", None)),
        (None, False, ("plain", "the build had no nvcc")),
        ("_C.so is not there", False, ("plain", "_C.so is not there")),
    ],
)
def test_what_serves_a_gpu_and_why(
    monkeypatch: pytest.MonkeyPatch, why_plain: str | None, built: bool, want: tuple[str, str | None]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(ops, "why_plain", why_plain)
    monkeypatch.setattr(ops, "has_kernel", lambda op, device: built)
    found = [k for k in mq.capabilities()["kernels"] if k["device"] == "cuda"]
    assert {(k["kernel"], k["why"]) for k in found if k["op"] not in ops.STACKED} == {want}
    assert {k["kernel"] for k in found if k["op"] in ops.STACKED} == {"torch"}


def test_cli(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    assert torch.__version__ in (text := capsys.readouterr().out) and "conv2d" in text
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["isa"] == ops.isa()
    assert main([]) == 2
    done = subprocess.run(
        [sys.executable, "-m", "mpqkern", "env", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["mpqkern"] == mq.__version__
