"""When induction emerges: two layers of four heads learn to repeat, and their checkpoints are compared.

    python tests/benchmarks/induction_checkpoints.py [--steps 0 200 400 450 500 700] [--seed 0] [--out runs/induction-checkpoints]

The text is random symbols, of which a stretch comes a second time, anywhere: only induction predicts it (Olsson et al. 2022, arXiv
2209.11895). Writes a folder for each checkpoint, a run of each, and `series.html`, in a folder for the
seed, and prints the loss on the second time and the sentences of the comparison. A minute or two on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from sink_checkpoints import compared, tokenizer
from transformers.models.llama.modeling_llama import LlamaForCausalLM

SYMBOLS, LENGTH, STRETCH = 32, 40, 12
"""Symbols there are, symbols of a text, and how many of them come again."""
START, FIRST = 0, 1
"""Token ids: the first token of every text, and the first symbol."""


def main() -> None:
    """Train, run, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    steps = [0, 200, 400, 450, 500, 700]
    parser.add_argument("--steps", nargs="+", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0, help="Of the weights and batches.")
    parser.add_argument("--out", type=Path, default=Path("runs/induction-checkpoints"))
    given = parser.parse_args()
    words = ["run", "--copied", "4", "--copied-length", "12"]
    folders = checkpoints(given.steps, given.out / f"seed-{given.seed}", given.seed)
    texts = [" ".join(f"s{one}" for one in row[1:].tolist()) for row in drawn(8, seed=1)[0]]
    compared(folders, given.out / f"seed-{given.seed}", texts, words)


def checkpoints(steps: Sequence[int], out: Path, seed: int = 0) -> Iterator[tuple[int, Path]]:
    """Train up to the last of these steps; (step, folder of the model then) at each."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=SYMBOLS + 1, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, bos_token_id=START, eos_token_id=None, pad_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    for step in range(max(steps) + 1):
        ids, known = drawn(32, seed=1000 * (seed + 1) + step)
        logits = model(ids).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
        if step in steps:
            print(
                f"step {step}: {losses[known[:, 1:]].mean():.2f} nats a symbol the second time",
                flush=True,
            )
            folder = out / f"step-{step}"
            model.save_pretrained(folder)
            tokenizer(SYMBOLS).save_pretrained(folder)
            yield step, folder
        optimiser.zero_grad()
        losses.mean().backward()
        optimiser.step()


def drawn(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[count, 1 + LENGTH] token ids, and which symbols can be known: those of the second stretch, but its first."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST, FIRST + SYMBOLS, (count, 1 + LENGTH), generator=draw)
    ids[:, 0] = START
    ends = torch.rand(count, 2, generator=draw).sort(1).values * (LENGTH - 2 * STRETCH + 1)
    first, gap = 1 + ends[:, :1].long(), (ends[:, 1:].long() - ends[:, :1].long()) + STRETCH
    places = first + torch.arange(STRETCH)
    ids.scatter_(1, places + gap, ids.gather(1, places))
    known = torch.zeros_like(ids, dtype=torch.bool).scatter_(1, (places + gap)[:, 1:], True)
    return ids, known


if __name__ == "__main__":
    main()
