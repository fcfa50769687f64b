"""What the command line says to mistakes: one line that names what was wanted, and the exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentTypeError
from importlib import import_module
from pathlib import Path

import pytest
import safetensors.torch
import torch

import mpqkern as mq
from mpqkern.cli import loading, values

from .test_cli import float_model

SCORE = "score --method size --model net.py:make --data net.py:batches"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: VERB; see mpqkern --help"),
        ("sovle", "argument VERB: invalid choice: 'sovle'"),
        ("solve --avg-bits four", "argument --avg-bits: invalid float value: 'four'; see mpqkern solve --help"),
        ("solve", "--run mpqkern-run has no scores; wanted `mpqkern score --run mpqkern-run ...` first"),
        ("frontier --run there", "--run there has no scores; wanted `mpqkern score --run there ...` first"),
        ("apply", "has no assignment.json; wanted `mpqkern solve --avg-bits 4 --run mpqkern-run` first"),
        ("verify", "has no ledger.json; wanted `mpqkern apply --run mpqkern-run` first"),
        ("report", "--run mpqkern-run has nothing to show; wanted `mpqkern score --run mpqkern-run ...` first"),
        ("report --run net.py", "--run net.py is a file; wanted a folder"),
        ("scan", "there is no model; wanted --model module:callable or path/file.py:callable"),
        ("bench --model net.py:make", "there is no data; wanted --data module:callable"),
        ("scan --model net.py", "--model net.py: wanted module:callable or path/file.py:callable"),
        ("scan --model nett.py:make", "there is no file 'nett.py'; did you mean 'net.py'?"),
        ("scan --model net.py:mak", "net.py has no 'mak'; did you mean 'make'?"),
        ("scan --model nett:make", "--model: there is no module 'nett'; did you mean 'net.py'?"),
        ("scan --model net:torch.nn.Linear", "missing a required argument: 'in_features'; wanted a callable without"),
        ("scan --model net.py:batches", "--model net.py:batches returned a generator; wanted a torch.nn.Module"),
        ("scan --model net.py:__name__", "__name__ is a str; wanted a callable with 0 arguments"),
        ("score --model net.py:make --data net:make", "returned a Sequential; wanted batches, or a data loader"),
        (f"{SCORE} --method what", "argument --method: invalid choice: 'what'"),
        (f"{SCORE} --bits 4 w9", "bits=9; wanted an integer from 1 to 8"),
        (f"{SCORE} --bits four", "'four' is no scheme; wanted a width, w4, w4g32"),
        (f"{SCORE} --layers 7", "pattern='7' matches no layer"),
        (f"{SCORE} --option depth", "'depth'; wanted NAME=VALUE"),
        (f"{SCORE} --option depth=3", "depth=3 is no option"),
        (f"{SCORE} --rounding nearest", "rounding='nearest'; wanted"),
        (f"{SCORE} --memory much", "'much'; wanted bytes, as 512MiB"),
        (f"{SCORE} --checkpoint gone.pt", "gone.pt: No such file or directory"),
        (f"{SCORE} --checkpoint net.py", "holds no plain weights ("),
        ("bench --linear 4096", "'4096'; wanted NxK, as 4096x11008"),
        ("bench --linear 4x4 --rounds 0", "--rounds=0; wanted a whole number above 0"),
        ("bench --linear 4x4 --bits 3", "bits=3; wanted 2, 4 or 8: only these pack"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(cli, line, message) -> None:
    code, out, err = cli(line)
    assert code == 2 and not out
    err = err.replace("a model's own words\n", "")
    assert message in err and err.startswith("mpqkern: ") and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("solve --avg-bits 1", "no assignment fits avg_bits=1 (alone it needs at least 2 bits); these clash"),
        ("solve --avg-bits 4 --pin 0=8 --pin 2=8", "these clash: Budget(avg_bits=4.0), pins['0']=8"),
        ("frontier --kind avg_bits --at 1", "no assignment fits avg_bits=1"),
    ],
)
def test_what_cannot_be_is_exit_code_1(cli, scored, line, message) -> None:
    code, out, err = cli(line)
    assert code == 1 and message in err and err.count("\n") == 1 and not out
    assert not Path("mpqkern-run/assignment.json").exists()


def test_names_of_the_run_are_checked(cli, scored) -> None:
    for line, message in (
        ("solve --method clado", "--run mpqkern-run has scores by kl, none by clado; wanted one of these"),
        ("solve --pin 00=4", "pattern='00' matches no layer; did you mean '0'?"),
        ("solve --explain 1", "layer='1' is not in the assignment"),
        (
            "score --model net:make --data net.py:batches",
            "--model net:make, but --run mpqkern-run is about net.py:make",
        ),
        ("solve --seed 3", "--seed 3, but --run mpqkern-run is about 0; wanted that"),
    ):
        code, _, err = cli(line)
        assert code == 2 and message in err, err
    Path("mpqkern-run/run.json").write_text("{}")
    assert "is no run of this version; wanted another --run" in cli("solve --avg-bits 4")[2]
    Path("mpqkern-run/run.json").write_text("[")
    assert "run.json: Expecting value" in cli("solve --avg-bits 4")[2]


def test_a_script_that_exits_is_an_error_that_says_so(cli, tmp_path) -> None:
    (tmp_path / "train.py").write_text("import sys\nsys.exit(0)\n")
    code, out, err = cli("scan --model train.py:make --json")
    assert code == 2 and "mpqkern: the code of --model or --data ended the program (exit 0)" in err
    assert "ended the program" in json.loads(out)["error"]


def test_debug_shows_where(cli, tmp_path) -> None:
    (tmp_path / "bad.py").write_text("def make():\n    raise KeyError('deep inside')\n\nimport gone_module\n")
    code, _, err = cli("scan --model bad.py:make")
    assert code == 2 and "bad.py fails (ModuleNotFoundError: No module named 'gone_module')" in err
    (tmp_path / "bad.py").write_text("def make():\n    raise KeyError('deep inside')\n")
    code, _, err = cli("scan --model bad.py:make")
    assert code == 2 and err == "mpqkern: KeyError: 'deep inside'; --debug shows where\n"
    code, _, err = cli("scan --model bad.py:make --debug")
    assert code == 2 and "Traceback" in err and "line 2, in make" in err


@pytest.mark.parametrize("line", ["solve --avg-bits four", "sovle", "solve --avg-bits 4", "scan --model nett:make"])
def test_an_error_is_json_where_that_is_asked_for(cli, line) -> None:
    code, out, err = cli(f"{line} --json")
    assert code == 2 and f"mpqkern: {json.loads(out)['error']}\n" == err


def test_a_reader_that_leaves_is_no_error() -> None:
    for line in ("env", "env --json", "solve --run gone --json"):
        reads, writes = os.pipe()
        os.close(reads)
        done = subprocess.run([sys.executable, "-m", "mpqkern", *line.split()], stdout=writes, stderr=subprocess.PIPE)
        os.close(writes)
        assert b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr, done.stderr.decode()
        assert done.returncode == (2 if "gone" in line else 0)


@pytest.mark.parametrize(("verb", "wanted"), [("score", "the same command goes on from there"), ("apply", "nothing")])
def test_ctrl_c_is_one_line_that_says_how_to_go_on(cli, scored, monkeypatch, verb, wanted) -> None:
    cli("solve --avg-bits 4")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module(f"mpqkern.cli.{verb}"), {"score": "score", "apply": "swap_"}[verb], stop)
    code, out, err = cli(verb)
    assert code == 130 and not out and err.startswith("mpqkern: stopped; ") and wanted in err and err.count("\n") == 1


def test_a_search_that_was_interrupted_does_not_let_a_chain_go_on(cli, scored, monkeypatch) -> None:
    module = import_module("mpqkern.cli.solve")
    found = mq.Assignment(dict.fromkeys("024", mq.Scheme(4)), 1.0, 0.5, "interrupted")
    monkeypatch.setattr(module, "solve", lambda *_, **__: found)
    code, out, _ = cli("solve --avg-bits 4")
    assert code == 130 and "interrupted: objective 1, bound 0.5" in out


def test_weights_of_a_checkpoint(cli, tmp_path) -> None:
    torch.manual_seed(7)
    state = {name: torch.randn_like(t) for name, t in float_model().state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": t for name, t in state.items()}}, tmp_path / "c.pt")
    for file in ("a.safetensors", "b.pt", "c.pt"):
        model = float_model()
        loading.load_weights(model, tmp_path / file)
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    cli(f"{SCORE} --checkpoint a.safetensors"), cli("solve --avg-bits 8"), cli("apply")
    packed = mq.load(float_model, tmp_path / "mpqkern-run/model.safetensors")
    torch.testing.assert_close(packed[0].dequantize(), state["0.weight"], atol=0.03, rtol=0)
    for change, message in (
        (lambda s: s.pop("0.weight"), "lacks '0.weight'; did you mean"),
        (lambda s: s.update({"5.weight": s["0.weight"]}), "the model has no '5.weight'; did you mean"),
        (lambda s: s.update({"0.weight": torch.zeros(2)}), "'0.weight' is [2]; the model's is [8, 12]"),
    ):
        other = dict(state)
        change(other)
        torch.save(other, tmp_path / "d.pt")
        with pytest.raises(ValueError) as caught:
            loading.load_weights(float_model(), tmp_path / "d.pt")
        assert message in str(caught.value)
    torch.save(tmp_path, tmp_path / "e.pt")  # an object that would have to be unpickled
    with pytest.raises(ValueError, match=r"holds no plain weights .*wanted a state_dict"):
        loading.load_weights(float_model(), tmp_path / "e.pt")


def test_values() -> None:
    assert values.pin("a=b=w4g32") == ("a=b", mq.Scheme(4, group_size=32)) and values.pin("a=4") == ("a", 4)
    assert values.ban("*=2,float") == ("*", [2, None]) and values.most("w2=3") == (mq.Scheme(2), 3)
    assert values.option("x=[1, 2]") == ("x", [1, 2]) and values.option("x=abc") == ("x", "abc")
    assert values.size("1.5KiB") == 1536 and values.shape("3x4") == (3, 4)
    assert str(values.scheme("w8a8g64")) == "w8a8g64"
    for parse, text in ((values.pin, "=4"), (values.most, "2=x"), (values.size, "4XB"), (values.shape, "0x4")):
        with pytest.raises(ArgumentTypeError, match="wanted"):
            parse(text)
