# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Long context: 16 thousand tokens of Moby-Dick on a laptop
#
# At 16 thousand tokens one layer's attention matrices are gigabytes. `capture` never builds them: what
# it keeps grows with the number of tokens and of blocks. This notebook measures that, here and now.
#
# The model is a small Llama with random weights, because no model that comes with the package reads
# that far. So nothing below is a finding about language: it is about memory, time and exactness. With
# `MODEL = "smollm2-135m"` (`make models`) it is a real one, whose context ends at 8,192 tokens; set
# `LENGTHS` to what your patience takes.

# %%
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pandas as pd
import psutil
import torch
import transformers

import lens

MODEL = ""  # a name, a folder or a hub id; empty: the random model
LENGTHS = (2048, 4096, 8192, 16384)

if MODEL:
    model = lens.load(MODEL)
else:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=max(LENGTHS),
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
    )
    tokenizer = lens.load("text-lm-3l").tokenizer
    model = lens.load(transformers.LlamaForCausalLM(config).eval(), tokenizer=tokenizer)
model

# %% [markdown]
# ## Memory and time, measured
#
# A thread looks at the memory of this process every few milliseconds while the model reads. Beside it
# stands what the attention probabilities of one single layer would take in float32.


# %%
def resident() -> float:
    """Memory of this process in MiB."""
    return psutil.Process().memory_info().rss / 2**20


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Seconds, and the MiB that the block needed at most beyond what was there before."""
    seen = {"seconds": time.perf_counter(), "extra_MiB": 0.0}
    before, done = resident(), threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            seen["extra_MiB"] = max(seen["extra_MiB"], resident() - before)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()
        seen["seconds"] = time.perf_counter() - seen["seconds"]


text = lens.tasks.text("moby-dick")
rows = []
for tokens in LENGTHS:
    ids = lens.tasks.take(model, text, tokens)
    with watched() as seen:
        trace = lens.capture(model, ids, progress=False)
    rows.append(
        {
            "tokens": tokens,
            **seen,
            "trace_MiB": trace.dataset.nbytes / 2**20,
            "one_layer_N×N_MiB": trace.heads * tokens**2 * 4 / 2**20,
        }
    )
measured = pd.DataFrame(rows).set_index("tokens")
measured.round(1)

# %%
longest = measured.iloc[-1]
print(
    f"Reading {measured.index[-1]:,} tokens took {longest['extra_MiB']:.0f} MiB more, where the "
    f"matrices of one layer alone would take {longest['one_layer_N×N_MiB']:.0f} MiB; the trace that "
    f"stays is {longest['trace_MiB']:.0f} MiB."
)
assert longest["extra_MiB"] < longest["one_layer_N×N_MiB"] / 4
assert longest["trace_MiB"] < longest["one_layer_N×N_MiB"] / 20

# %% [markdown]
# Time grows with the square of the length, as attention does; memory does not.

# %%
growth = measured["trace_MiB"].iloc[-1] / measured["trace_MiB"].iloc[0]
longer = measured.index[-1] / measured.index[0]
print(
    f"{longer:.0f} times the tokens make a trace {growth:.1f} times as large, not {longer**2:.0f}."
)
assert growth < longer**2 / 2

# %% [markdown]
# ## The whole text at a glance
#
# The block map pools the tokens into cells that fit a screen. Every cell is the exact mass of its
# block.

# %%
lens.figures.block_map(trace, layer=1, head=0)

# %%
lens.figures.distance_profile(trace, layer=1, head=0)

# %% [markdown]
# ## Exact where you zoom in
#
# With queries and keys kept, the probabilities of any rectangle are recomputed. The rows below are the
# last ones of the text, over all keys that they see. They must sum to one, and they must give the
# received mass and entropy that the pass itself wrote down.

# %%
ids = lens.tasks.take(model, text, LENGTHS[0])
kept = lens.capture(model, ids, keep_qk=True, progress=False)
last = (LENGTHS[0] - 8, LENGTHS[0])
tile = kept.tile(1, 0, last, (0, LENGTHS[0])).astype(np.float64)
entropy = -(tile * np.log(np.maximum(tile, 1e-30))).sum(axis=1)
written = kept.entropy.sel(layer=1, head=0).values[-8:]
print(
    f"Rows sum to one within {abs(tile.sum(axis=1) - 1).max():.1e}; their entropy is the recorded one "
    f"within {abs(entropy - written).max():.1e} nats."
)
assert abs(tile.sum(axis=1) - 1).max() < 1e-4
assert abs(entropy - written).max() < 1e-3

# %% [markdown]
# ## One row per head, at full length

# %%
table = lens.profile(trace, all=True)
table.set_index(["layer", "head"])[
    ["first_token", "entropy", "effective_keys", "distance", "locality"]
].round(3)

# %%
lens.figures.metric_by_layer(lens.traces.profiles.prompt_table(trace, "moby-dick"), "entropy")

# %% [markdown]
# ## What this does not say
#
# Times are of this machine while it did whatever else it did. The watching thread can miss a peak that
# lasts less than a few milliseconds. And scores of random weights are the baseline that a trained
# model's are to be held against.
