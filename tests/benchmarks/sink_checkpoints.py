"""When a sink emerges: a layer of two heads is trained for seconds, and its checkpoints are compared.

    python tests/benchmarks/sink_checkpoints.py [--steps 0 10 25 50 100 200] [--seed 2] [--out runs/sink-checkpoints]

The text is bigrams after a first token; behind five of sixteen symbols comes the symbol before them once more, so that a head has
work at these and none elsewhere (bigram-backcopy, Guo et al. 2024, arXiv 2410.13835). Writes a folder for each checkpoint,
a run of each, and `series.html`, in a folder for the seed, and prints its sentences. How strong the sink gets differs from seed to seed (of 0, 1 and 2 most with 2).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import transformers
from lens_analyses.cli import main as lens_command
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers.models.llama.modeling_llama import LlamaForCausalLM

SYMBOLS, TRIGGERS, LENGTH = 16, 5, 32
START, FIRST = 0, 1
"""Token ids: the first token of every text, and the first symbol."""


def main() -> None:
    """Train, run, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 10, 25, 50, 100, 200])
    parser.add_argument("--seed", type=int, default=2, help="Of the weights and batches.")
    parser.add_argument("--out", type=Path, default=Path("runs/sink-checkpoints"))
    given = parser.parse_args()
    words = ["run", "--copied", "0"]
    folders = checkpoints(given.steps, given.out / f"seed-{given.seed}", given.seed)
    compared(folders, given.out / f"seed-{given.seed}", texts(16, seed=1), words)


def compared(
    folders: Iterable[tuple[int, Path]], out: Path, prompts: Sequence[str], words: Sequence[str]
) -> None:
    """A run of each checkpoint on these prompts with this command, and the series of them."""
    out.mkdir(parents=True, exist_ok=True)
    given = out / "prompts.txt"
    given.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    runs: list[str] = []
    for step, folder in folders:
        before = set((out / "runs").glob("*"))
        print(f"step {step}: {folder}", flush=True)
        asked = [words[0], "--model", str(folder), "--prompts", str(given), *words[1:]]
        lens([*asked, "--out", str(out / "runs"), "--quiet"])
        runs += sorted(map(str, set((out / "runs").glob("*")) - before))
    lens(["compare", *runs, "--out", str(out)])


def lens(words: list[str]) -> None:
    """Run a command; it ends the script if it fails."""
    try:
        lens_command(words)
    except SystemExit as end:
        if end.code:
            raise


def checkpoints(steps: Sequence[int], out: Path, seed: int = 2) -> Iterator[tuple[int, Path]]:
    """Train up to the last of these steps; (step, folder of the model then) at each."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=SYMBOLS + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=START, eos_token_id=None, pad_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
    pool, draw = drawn(2048, seed=0), torch.Generator().manual_seed(seed)
    for step in range(max(steps) + 1):
        if step in steps:
            folder = out / f"step-{step}"
            model.save_pretrained(folder)
            tokenizer().save_pretrained(folder)
            yield step, folder
        ids = pool[torch.randint(len(pool), (64,), generator=draw)]
        logits = model(ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def drawn(count: int, seed: int) -> torch.Tensor:
    """[count, LENGTH] token ids; the bigrams are the same for every seed."""
    logits = 2 * torch.randn(SYMBOLS, SYMBOLS, generator=torch.Generator().manual_seed(0))
    bigrams, generator = logits.softmax(-1), torch.Generator().manual_seed(seed)
    ids = torch.full((count, LENGTH), START)
    ids[:, 1] = torch.randint(FIRST, FIRST + SYMBOLS, (count,), generator=generator)
    for at in range(2, LENGTH):
        before = ids[:, at - 1]
        drawn_next = torch.multinomial(bigrams[before - FIRST], 1, generator=generator)[:, 0]
        again = (before < FIRST + TRIGGERS) & (at > 2)
        ids[:, at] = torch.where(again, ids[:, at - 2], drawn_next + FIRST)
    return ids


def texts(count: int, seed: int) -> list[str]:
    """The same as words, without the first token, which the tokenizer puts there."""
    return [" ".join(f"s{one}" for one in row[1:].tolist()) for row in drawn(count, seed)]


def tokenizer(symbols: int = SYMBOLS) -> transformers.PreTrainedTokenizerFast:
    """Words s1, s2 and so on, behind the first token."""
    words = {"<s>": START} | {f"s{FIRST + number}": FIRST + number for number in range(symbols)}
    made = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", START)])  # pyright: ignore[reportAttributeAccessIssue]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


if __name__ == "__main__":
    main()
