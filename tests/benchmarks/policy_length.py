"""Policies evaluated on a long prompt: time and peak memory of a process with layers shaped as those of `smollm2-135m`.

    python tests/benchmarks/policy_length.py [--tokens 16384] [--layers 2] [--block 64] [--threads 2]

9 heads of 64 and 3 key-value heads, random weights. Dense attention alone would take 9.7 GB a layer at 16,384 tokens.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lens
from lens import policies

sys.path[:0] = [str(Path(__file__).parents[2])]

from tests.benchmarks.long_prompt import peak_mb  # noqa: E402


def main() -> None:
    """Evaluate four policies, and print what each keeps, seconds and memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=asked.layers, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=1000, max_position_embeddings=asked.tokens,
    )  # fmt: skip
    model = lens.load(LlamaForCausalLM(config).eval())
    ids = torch.randint(0, 1000, (asked.tokens,)).tolist()
    chosen = [
        policies.AShape(64, 1024), policies.VerticalSlash(), policies.FlexPrefill(), policies.XAttention()
    ]  # fmt: skip
    before, start, busy = peak_mb(), time.perf_counter(), time.process_time()
    found = policies.evaluate(model, [ids], chosen, block_size=asked.block, progress=False)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    mean = (
        found.table().groupby("policy", sort=False)[["density", "recall", "oracle_recall"]].mean()
    )
    sys.stdout.write(
        f"{asked.tokens:,} tokens, {asked.layers} layers, blocks of {asked.block}, {asked.threads} threads: "
        f"{seconds:.0f} s, {busy:.0f} s of CPU; peak {peak_mb():,.0f} MB ({before:,.0f} before)\n"
        f"{mean.round(3).to_string()}\n"
    )


if __name__ == "__main__":
    main()
