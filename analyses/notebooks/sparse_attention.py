# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Which heads may be sparse
#
# What a serving engine wants to know of a model before it drops keys: which heads, by which policy, how many
# blocks are left, and what the loss does. Everything is measured on one small model and one book; `MODEL` takes
# anything that `lens.load` does, and longer windows.

# %%
import numpy as np

import lens
from lens import edits, policies

MODEL, LENGTH, BLOCK = "text-lm-3l", 96, 8

model = lens.load(MODEL)
ids = model.encode(lens.tasks.text("moby-dick"))
windows = [ids[start : start + LENGTH] for start in range(0, 9 * LENGTH, LENGTH)]
model

# %% [markdown]
# ## What policies keep, head by head
#
# Recall is the attention on the kept blocks; beside it stand the best choice of as many blocks, and a random one.

# %%
offered = [
    policies.AShape(BLOCK, 2 * BLOCK),
    policies.VerticalSlash(8, 8, first=4, last=8),
    policies.BlockSparse(share=0.25),
    policies.XAttention(),
]
found = policies.evaluate(model, windows[:4], offered, block_size=BLOCK, loss=True, progress=False)
found.summary()[
    ["policy", "density", "recall", "oracle_recall", "random_recall", "loss_change"]
].round(3)

# %%
found.plot()

# %%
found.plot(str(offered[0]))

# %%
rows = found.table()
assert (rows["oracle_recall"] >= rows["recall"] - 1e-6).all(), "nothing beats the best blocks"
print(*found.findings(), sep="\n")

# %% [markdown]
# ## Where a head looks, and what a policy drops
#
# The head that loses most under A-shape, with what is dropped veiled.

# %%
near = rows[rows["policy"] == str(offered[0])]
poorest = str(near.loc[near["recall"].idxmin(), "name"])
shown = policies.maps(model, windows[0], offered, block_size=BLOCK)
shown.plot(poorest, str(offered[0]))

# %% [markdown]
# ## A policy for each head
#
# The cheapest that the allowed loss leaves, chosen on some windows and promised on others.

# %%
searched = policies.search(
    model, windows[:6], loss=0.05, block_size=BLOCK, draws=1, levels=3, progress=False
)
searched.plot()

# %%
low, high = searched.promise()
with lens.edit(model, edits.Sparse(searched.policy, searched.block_size)) as (done,):
    after = [lens.tasks.loss(model, window) for window in windows[6:]]
with lens.edit(model):
    before = [lens.tasks.loss(model, window) for window in windows[6:]]
change = float(np.mean(after) - np.mean(before))
assert low <= change <= high, "windows that nobody chose on lie where they should"
print(*searched.findings(), sep="\n")
print(
    f"{done.density:.0%} of the blocks: {change:+.4f} nats on new windows, promised [{low:+.4f}, {high:+.4f}]"
)

# %% [markdown]
# ## Text alone does not tell: needles
#
# How much of a needle of random tokens comes back, dense and sparse; and with a dense context and a sparse question.

# %%
trials = lens.tasks.needles.copied(model, n=3, length=60, needle=6)
whole = policies.run(model, trials, offered, block_size=BLOCK, progress=False)
late = policies.run(model, trials, offered, block_size=BLOCK, question=1, progress=False)
needles = whole.table()[["policy", "density", "dense", "sparse", "change"]]
needles["question"] = late.table()["sparse"]
needles.round(3)

# %%
assert needles["sparse"][0] <= needles["dense"][0], "A-shape does not see the needle"
print(*whole.findings(), sep="\n")

# %% [markdown]
# ## A gate that learns the map
#
# SeerAttention's, trained on the exact largest entries of other windows; as many blocks as A-shape.

# %%
learn = [ids[start : start + LENGTH] for start in range(9 * LENGTH, 21 * LENGTH, LENGTH)]
gate = policies.train("seer", model, learn, block_size=BLOCK, steps=60, progress=False)
both = policies.evaluate(
    model,
    windows[:4],
    [offered[0], gate.keeping(like=offered[0])],
    block_size=BLOCK,
    loss=True,
    progress=False,
)
table = both.summary()[["policy", "density", "recall", "loss_change"]]
assert table["recall"][1] > table["recall"][0]
table.round(3)

# %% [markdown]
# ## Does it carry over
#
# The pattern of one window, layer or step in another: what reuse costs.

# %%
stable = policies.stability(model, windows[:3], block_size=BLOCK, steps=(1, 4, 16), progress=False)
assert stable.summary().set_index("condition").loc["repeat", "overlap"] == 1
stable.plot()

# %%
stable.claims()
