"""The command line from score to report: what each verb leaves, says, and answers to programs."""

from __future__ import annotations

import json
import re
import subprocess
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import mpqkern as mq
from mpqkern.cli import main
from mpqkern.cli.main import CHAIN, VERBS
from mpqkern.solve import Frontier


def float_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)
    )  # fmt: skip


def test_every_page_of_help_ends_with_examples_that_run(cli) -> None:
    pages = {verb.name: cli(f"{verb.name} --help")[1] for verb in VERBS} | {"": cli("--help")[1]}
    lines = {}
    for name, page in pages.items():
        _, _, tail = page.partition("\nexample")
        lines[name] = [line.strip() for line in tail.splitlines()[1:]]
        assert lines[name] and all("mpqkern" in line for line in lines[name]), page
    order = ["env", "scan", "score", "bench", "solve", "frontier", "apply", "verify", "report"]
    assert sorted(order) == sorted(pages.keys() - {""}) and lines[""] == list(CHAIN)
    for line in [line for name in [*order, ""] for line in lines[name]]:
        command = re.sub(r"^([A-Z_]+=\S+ )*mpqkern ", "", line)
        code, out, err = cli(command)
        assert code == 0 and out.strip(), (line, err)
    assert "<svg" in Path("mpqkern-run/report.html").read_text()


def test_each_verb_reads_what_the_one_before_has_left(cli, tmp_path, monkeypatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    score = "score --run r --model net.py:make --data net.py:batches --method clado --batches 2"
    lines = [score, "solve --run r --avg-bits 4", "frontier --run r", "apply --run r"]
    lines += ["verify --run r --rounds 2", "report --run r"]
    for line in lines[:4]:
        assert cli(line)[0] == 0
    monkeypatch.chdir(tmp_path / "elsewhere")  # a run knows where its model is
    for line in lines[4:]:
        assert cli(line.replace("--run r", "--run ../r"))[0] == 0
    model = float_model()
    scores = mq.Scores.load(tmp_path / "r/scores-clado.npz")
    assert scores.provenance["samples"] == 32 and scores.pairwise is not None
    best = mq.Assignment.load(tmp_path / "r/assignment.json")
    assert best.schemes == mq.solve(scores, mq.Budget(avg_bits=4)).schemes and best.status == "optimal"
    mq.swap_(model, best)
    x = torch.randn(5, 12)
    torch.testing.assert_close(mq.load(float_model, tmp_path / "r/model.safetensors")(x), model(x))
    ledger = mq.Ledger.from_json((tmp_path / "r/ledger.json").read_text())
    assert ledger.sized_as_predicted and ledger.whole.file_bytes == (tmp_path / "r/model.safetensors").stat().st_size
    assert ledger.whole.loss == "ce" and ledger.whole.method == "clado" and ledger["0"].ms > 0
    assert ledger.whole.score == pytest.approx(best.objective)
    front = Frontier.from_json((tmp_path / "r/frontier.json").read_text())
    assert front.kind == "bytes" and len(front) > 3 and front.states == ["optimal"] * len(front)
    page = (tmp_path / "r/report.html").read_text()
    assert "<svg" in page and all(f'id="{part}"' in page for part in ("frontier", "pairs", "sensitivity", "packed"))
    assert "chosen: " in page  # among the points of the frontier


def test_stdout_has_json_and_nothing_else(cli) -> None:
    for line in (
        "env",
        "scan --model net.py:make",
        "score --model net.py:make --data net.py:batches --method size --dry-run",
        "score --model net.py:make --data net.py:batches --method size",
        "bench --rounds 1",
        "solve --fraction 0.4",
        "frontier",
        "apply --dry-run",
        "apply",
        "verify --rounds 1",
        "report",
    ):
        code, out, err = cli(f"{line} --json")
        assert code == 0 and isinstance(json.loads(out), dict), (line, err)
    code, out, err = cli("solve --bytes 1 --json")
    assert code == 1 and json.loads(out)["error"].startswith("no assignment fits") and err.startswith("mpqkern: no ass")


def test_a_score_that_was_stopped_goes_on(cli) -> None:
    line = "score --model net.py:make --data net.py:batches --method single --json"
    code, _, err = cli(f"{line} --max-evals 5")
    assert code == 1 and not Path("mpqkern-run/scores-single.npz").exists()
    assert "max_evals=5 was reached after 5 of" in err and "the same command goes on from there" in err
    rest = json.loads(cli(line)[1])["provenance"]["evaluations"]
    whole = json.loads(cli(f"{line} --run other")[1])["provenance"]["evaluations"]
    assert 0 < rest == whole - 5
    code, _, err = cli(f"{line} --bits 2 4")
    assert code == 2 and err.count("\n") == 1 and "under other conditions" in err and "wanted another --run" in err


def test_a_dry_run_says_what_it_takes_and_leaves_nothing(cli, tmp_path) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = json.loads(cli("score --model net.py:make --data net.py:batches --method clado --dry-run --json")[1])
    work = mq.plan(float_model(), list(torch.randn(3, 16, 12)), method="clado")
    assert (found["evaluations"], found["forwards"]) == (work.evaluations, work.forwards) and found["seconds"] > 0
    layers = mq.catalog(float_model())
    assert found["sizes"] == {f"w{b}": sum(mq.Scheme(b).bytes(la.weight_shape) for la in layers) for b in (2, 4, 8)}
    assert [p for p in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(p)] == before
    cli("score --model net.py:make --data net.py:batches --method size"), cli("solve --avg-bits 4")
    files = sorted(Path("mpqkern-run").rglob("*"))
    planned = json.loads(cli("apply --dry-run --rounding gptq --json")[1])
    assert planned["batches"] == 3 and sorted(Path("mpqkern-run").rglob("*")) == files
    done = json.loads(cli("apply --rounding gptq --json")[1])
    assert done["bytes"] == planned["bytes"] and {r["name"]: str(mq.Scheme.from_dict(r["scheme"])) for r in
        done["layers"]} == {r["name"]: r["scheme"] for r in planned["layers"]}  # fmt: skip


def test_scan_lists_bytes_and_reasons(cli, tmp_path) -> None:
    (tmp_path / "odd.py").write_text(
        "import torch\nfrom torch import nn\ndef make():\n"
        "    odd = nn.utils.parametrizations.weight_norm(nn.Linear(64, 5))\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), odd)\n"
        "def one():\n    return torch.zeros(2, 3, 6, 6)\n"
    )
    conv, linear = json.loads(cli("scan --model odd.py:make --data odd.py:one --bits 2 w4g32 --json")[1])["layers"]
    assert conv["bytes"] == {"w2": mq.Scheme(2).bytes((4, 27)), "w4g32": mq.Scheme(4, group_size=32).bytes((4, 27))}
    assert (conv["macs"], conv["params"], conv["weight_shape"]) == (4 * 27 * 16, 108, [4, 3, 3, 3])
    assert "parametrized" in linear["reason"] and linear["bytes"] == {} and linear["macs"] is None
    text = cli("scan --model odd.py:make")[1]
    assert "stays in float: its weight is parametrized" in text and not Path("mpqkern-run").exists()


@pytest.mark.parametrize(
    ("line", "budgets", "constraints"),
    [
        ("--avg-bits 3", [mq.Budget(avg_bits=3)], {}),
        ("--bytes 280", [mq.Budget(bytes=280)], {}),
        ("--mbytes 0.0001 --count nominal", [mq.Budget(mbytes=0.0001, count="nominal")], {}),
        ("--fraction 0.1 --count nominal", [mq.Budget(fraction=0.1, count="nominal")], {}),
        ("--gbops 0.00002 --avg-bits 7", [mq.Budget(gbops=0.00002)], {}),
        ("--avg-bits 6.5 --pin 0=8", [mq.Budget(avg_bits=6.5)], {"pins": {"0": 8}}),
        ("--avg-bits 5 --forbid 'Linear=4'", [mq.Budget(avg_bits=5)], {"forbid": {"*": 4}}),
        ("--avg-bits 5 --tie 2 4 --tie 0", [mq.Budget(avg_bits=5)], {"ties": [["2", "4"]]}),
        ("--at-most 8=1", [], {"at_most": {8: 1}}),
        ("--first-last w4", [], {"first_last": mq.Scheme(4)}),
        ("--objective minimax --avg-bits 4", [mq.Budget(avg_bits=4)], {"objective": "minimax"}),
    ],
)
def test_budgets_and_constraints_are_those_of_solve(cli, scored, line, budgets, constraints) -> None:
    layers = mq.Scores.load("mpqkern-run/scores-kl.npz").layers
    scores = mq.Scores(layers, [2, 4, 8], [[16.0, 4.0, 0.0], [16.0, 5.0, 0.0], [17.0, 12.0, 0.0]])
    scores.save("mpqkern-run/scores-kl.npz")
    found = json.loads(cli(f"solve {line} --json")[1])["bits"]
    assert found == mq.solve(scores, *budgets, **constraints).bits
    assert found not in [
        mq.solve(scores).bits,
        *([mq.solve(scores, *budgets).bits] if constraints else []),
    ]  # they bind


def test_milliseconds_are_of_the_whole_model(cli, scored, tmp_path) -> None:
    latency = mq.Latency({n: {"float": 4.0, "w2": 1.0, "w4": 2.0, "w8": 3.0} for n in ("0", "2", "4")}, 20.0)
    Path("mpqkern-run/latency.json").write_text(latency.to_json())
    found = json.loads(cli("solve --ms 13 --json")[1])  # 8 of them are outside of the layers
    assert found["costs"] == {"ms": 5.0} and found["explained"] == []
    points = json.loads(cli("frontier --kind ms --json")[1])["points"]
    assert points[0]["use"] == 3.0 and points[-1]["use"] <= 9.0
    code, _, err = cli("solve --ms 7")
    assert code == 2 and "wanted at least 8, which is spent outside" in err
    Path("mpqkern-run/latency.json").unlink()
    assert cli("solve --ms 1000")[0] == 0 and set(mq.Latency.from_json(
        Path("mpqkern-run/latency.json").read_text())["0"]) == {"float", "w2", "w4", "w8"}  # fmt: skip


def test_an_assignment_edited_by_hand_is_applied(cli, scored) -> None:
    cli("solve --avg-bits 4")
    file = Path("mpqkern-run/assignment.json")
    file.write_text(re.sub(r'"2": .*', '"2": null,', file.read_text()))
    found = json.loads(cli("apply --out elsewhere.safetensors --json")[1])
    assert [row["name"] for row in found["layers"] if row["scheme"] is None] == ["2"]
    assert Path("elsewhere.safetensors").is_file() and cli("verify --rounds 1")[0] == 0


def test_verify_fails_where_a_check_does(cli, scored, monkeypatch) -> None:
    cli("solve --avg-bits 3"), cli("apply")
    code, out, _ = cli("verify --rounds 1 --max-rise -1")
    assert code == 1 and "FAIL  ce rises by at most -1" in out and "ok    kernels compute" in out
    from mpqkern.verify import Check, Verification

    module = import_module("mpqkern.cli.verify")
    with monkeypatch.context() as patch:
        wrong = Check("0", 1.0, 0.5, 2.0)
        patch.setattr(module, "verify", lambda *_, **__: Verification((wrong,), wrong))
        code, out, _ = cli("verify --rounds 1 --json")
        assert code == 1 and json.loads(out)["checks"]["kernels compute what the codes say"] is False
    cli("solve --avg-bits 8"), cli("apply --out other"), cli("solve --avg-bits 3"), cli("apply")
    code, _, err = cli("verify --file other")
    assert code == 2 and "wanted the model of this ledger" in err


def test_bench_of_kernels(cli) -> None:
    found = json.loads(cli("bench --linear 32x64 8x96 --m 1 3 --bits 4 w8g32 --rounds 1 --threads 1 --json")[1])
    cells = found["cells"]
    assert [(c["n"], c["k"], c["m"], c["scheme"]) for c in cells] == [
        (n, k, m, s) for n, k in ((32, 64), (8, 96)) for m in (1, 3) for s in ("float", "w4", "w8g32")
    ]
    for c in cells:
        assert c["bytes"] == (4 * c["n"] * c["k"] if c["scheme"] == "float" else SIZES[c["scheme"]](c["n"], c["k"]))
        assert c["gigabytes"] == pytest.approx(c["bytes"] / c["us"] / 1e3)
        assert c["of_memory"] == pytest.approx(1e9 * c["gigabytes"] / found["bandwidth"])
    assert cells[0]["of_float"] == 1 and found["threads"] == 1 and not Path("mpqkern-run").exists()


SIZES = {"w4": lambda n, k: mq.Scheme(4).bytes((n, k)), "w8g32": lambda n, k: mq.Scheme(8, group_size=32).bytes((n, k))}


def test_losses_and_ways_to_call_of_ones_own(cli, tmp_path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\nfrom net import make\n"
        "def data():\n    return [{'x': torch.randn(8, 12), 'y': torch.randn(8, 4)}]\n"
        "def forward(model, batch):\n    return model(batch['x'])\n"
        "def loss(output, batch):\n    return (output - batch['y']).square().mean(1)\n"
    )
    line = "score --model own.py:make --data own.py:data --forward own.py:forward --loss own.py:loss --method single"
    code, out, err = cli(f"{line} --bits 2 float --option 'x=1' --json")
    assert code == 2 and "x=1 is no option" in err
    code, out, err = cli(f"{line} --bits 2 float --json")
    assert code == 0 and json.loads(out)["provenance"]["loss"] == "loss", err
    scores = mq.Scores.load("mpqkern-run/scores-single.npz")
    assert scores.schemes == [mq.Scheme(2), None] and not np.any(scores.unary[:, 1])
    for verb in ("solve --avg-bits 12 --pin 4=float", "apply", "verify --rounds 1"):
        assert cli(verb)[0] == 0
    assert mq.Ledger.from_json(Path("mpqkern-run/ledger.json").read_text()).whole.loss == "loss"


def test_the_packages_and_the_script_are_declared() -> None:
    root = Path(mq.__file__).parent
    declared = pytest.importorskip("tomllib").loads((root.parent / "pyproject.toml").read_text())
    module, _, name = declared["project"]["scripts"]["mpqkern"].partition(":")
    assert getattr(import_module(module), name) is main
    there = {".".join(p.parent.relative_to(root.parent).parts) for p in root.rglob("__init__.py")}
    assert there == set(declared["tool"]["setuptools"]["packages"])


def test_shells_can_complete_verbs_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", "bash"])
    script = capsys.readouterr().out
    assert end.value.code == 0
    assert f"({' '.join(verb.name for verb in VERBS)})" in script and "--avg-bits" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
