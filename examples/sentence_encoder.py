"""A sentence encoder of Hugging Face transformers, packed while it is loaded and found again by AutoModel.

    python -m examples.sentence_encoder [--quick] [--average 3]        # needs transformers >= 5

A small BERT learns within a minute, by contrast (the loss of SimCSE, arXiv 2104.08821), which continuation belongs to
the beginning of a docstring of the standard library. Widths are chosen by how far rounding a layer moves sentences.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertModel

import mpqkern as mq
import mpqkern.integrations.transformers as hf
from mpqkern.ledger import table

WORDS, LENGTH = 2048, 12  # entries of the hashed vocabulary, words of a half


def halves() -> Tensor:
    """Beginning and continuation of every docstring that is long enough, as hashed words [docstrings, 2, LENGTH]."""
    texts = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                words = (ast.get_docstring(node) or "").lower().split()
                if len(words) >= 2 * LENGTH:
                    texts.append([zlib.crc32(word.encode()) % WORDS for word in words[: 2 * LENGTH]])
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    return torch.tensor(texts).view(-1, 2, LENGTH)[order]


def embed(model: nn.Module, ids: Tensor) -> Tensor:
    return F.normalize(model(ids).last_hidden_state.mean(1), dim=-1)


def moved(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """For each sentence the cosine that is lost to the float model's vector."""
    return 1 - (F.normalize(output.last_hidden_state.mean(1), dim=-1) * batch["labels"]).sum(1)


def losses(vectors: Tensor) -> Tensor:
    """For each beginning the cross-entropy of its own continuation among all; halves follow each other."""
    first, second = vectors[0::2], vectors[1::2]
    return F.cross_entropy(first @ second.T / 0.1, torch.arange(len(first)), reduction="none")


def trained(pairs: Tensor, steps: int) -> BertModel:
    config = BertConfig(
        vocab_size=WORDS, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=LENGTH, hidden_dropout_prob=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertModel(config, add_pooling_layer=False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        losses(embed(model, pairs[torch.randint(len(pairs), (64,))].flatten(0, 1))).mean().backward()
        optimizer.step()
    return model.eval()


def judged(model: nn.Module, pairs: Tensor, wanted: Tensor) -> tuple[str, str]:
    """How often the right continuation comes first, and how far sentences lie from where the float model puts them."""
    with torch.inference_mode():
        vectors = embed(model, pairs.flatten(0, 1))
    first = (vectors[0::2] @ vectors[1::2].T).argmax(1) == torch.arange(len(pairs))
    return f"{float(first.float().mean()):.1%}", f"{float((vectors * wanted).sum(1).mean()):.5f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="trained for a few steps")
    parser.add_argument("--average", type=float, default=3, help="bits per weight")
    args = parser.parse_args(arguments)
    pairs = halves()
    held_out, learned = pairs[:200], pairs[200:]
    model = trained(learned, 5 if args.quick else 120)
    ids = learned[:64].flatten(0, 1)
    with torch.inference_mode():
        batch = {"input_ids": ids, "labels": embed(model, ids)}
        wanted = embed(model, held_out.flatten(0, 1))
    best = mq.assign(model, [batch], mq.Budget(avg_bits=args.average), method="single", loss=moved)
    print(best)

    floats = sum(p.nbytes for p in model.parameters())
    lines = [("model", "found", "cosine to float", "all tensors")]
    lines.append(("float", *judged(model, held_out, wanted), f"{floats:,} B"))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/float")
        for name, plan in (("8 bits", {"*": 8}), ("4 bits", {"*": 4}), ("chosen", best), ("2 bits", {"*": 2})):
            packed = AutoModel.from_pretrained(
                f"{folder}/float", quantization_config=hf.MpqConfig(plan, rounding="mse"), add_pooling_layer=False
            )
            packed.save_pretrained(f"{folder}/packed")
            again = AutoModel.from_pretrained(f"{folder}/packed", add_pooling_layer=False)
            size = sum(t.nbytes for t in again.state_dict().values())
            lines.append((name, *judged(again, held_out, wanted), f"{size:,} B"))
    print(table(lines))
    print(f"({model.embeddings.word_embeddings.weight.nbytes:,} B of each are word embeddings, which stay in float)")


if __name__ == "__main__":
    main()
