"""Every example runs in its short form and prints its table."""

from __future__ import annotations

import importlib

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


@pytest.mark.parametrize(
    "name,needs,wanted",
    [
        ("cnn", "sklearn", ["chosen, GPTQ", "optimal:", "read back, it computes the same"]),
        ("vision_transformer", "sklearn", ["8 bits, fixed", "dynamic", "it computes the same"]),
        ("sentence_encoder", "transformers", ["cosine to float", "chosen", "word embeddings, which stay in float"]),
        ("language_model", "torch", ["points on the frontier", "perplexity", "knee: 'def __init__(self, "]),
    ],
)
def test_quick(name: str, needs: str, wanted: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(needs)
    importlib.import_module(f"examples.{name}").main(["--quick"])
    out = capsys.readouterr().out
    assert all(text in out for text in wanted), out


@pytest.mark.parametrize("name", ["cnn", "vision_transformer", "sentence_encoder", "language_model"])
def test_help_says_how_to_call(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "sentence_encoder":
        pytest.importorskip("transformers")
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"examples.{name}").main(["--help"])
    assert stop.value.code == 0 and f"python -m examples.{name} [--quick]" in capsys.readouterr().out
