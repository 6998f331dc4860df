# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Which heads matter, by whose measure
#
# "Important head" means different things to different measures. This notebook asks several of them
# about two small models whose answers are known, shows where they disagree and why, and ends with a
# model of your own: set `MODEL` to anything that `lens.load` takes.

# %%
import tempfile
from pathlib import Path

import lens

MODEL = "text-lm-3l"  # of the last section; the sections before it are about two known models
heads = lens.heads

known = lens.load("induction-2l")
copied = [lens.tasks.copied(known, 25, seed=seed) for seed in range(8)]
known

# %% [markdown]
# ## Roles: what the heads look at
#
# On random symbols that come twice, with a baseline of uniform attention beside each score.

# %%
roles = heads.roles(known, copied, progress=False)
roles.top("induction")

# %%
roles.plot()

# %%
looks_back = roles.top("previous_token", 1)["name"].item()
inducing = set(roles.top("induction", 3)["name"])
print(f"{looks_back} looks at the token before; {', '.join(sorted(inducing))} copy.")
assert looks_back == "L0H1"
assert inducing == {"L1H0", "L1H2", "L1H3"}

# %% [markdown]
# ## Importance: what the heads cause
#
# The task is to predict the second copy. `importance` puts something else in place of a head's output
# and sees how much worse the loss gets, or estimates that from one backward pass. Positive = the head
# helps.

# %%
task = lens.tasks.induction(known, n=32)
zero = heads.importance(known, task, method="ablation", baseline="zero", progress=False)
mean = heads.importance(known, task, method="ablation", baseline="mean", progress=False)
gradient = heads.importance(known, task, method="gradient", progress=False)
patching = heads.importance(known, task, method="attribution", progress=False)
mean.table().round(3)

# %%
mean.plot()

# %% [markdown]
# L1H1 is the head to be careful with: taken out by zero it seems to matter, replaced by its own mean it
# does not. What later layers need of it is a constant, and a zero takes the constant away too.

# %%
l1h1 = (1, 1)
print(
    f"L1H1 is worth {zero.values[l1h1]:.3f} ± {zero.stderr[l1h1]:.3f} nats by zero ablation and "
    f"{mean.values[l1h1]:.3f} ± {mean.stderr[l1h1]:.3f} by mean ablation."
)
assert zero.values[l1h1] > 10 * abs(mean.values[l1h1])
assert str(mean.top(1)[0]) == "L0H1"  # the previous-token head, necessary alone

# %% [markdown]
# ## Agreement
#
# The measures rank the heads differently, and the report says where. Gradients are slopes at the model
# as it is. Where a softmax is saturated, or a head acts all or nothing, as the previous-token head does
# here, the slope says little of what happens when the head is gone.

# %%
agreement = heads.agreement(zero, mean, gradient, patching)
for sentence in agreement.findings():
    print("-", sentence)
agreement.table().round(2)

# %%
from lens.figures.agreement import agreement_map, measure_scatter

agreement_map(agreement)

# %%
joined = heads.join(zero, mean, gradient, patching)
measure_scatter(joined, zero.label, mean.label)

# %%
rank = {str(head): place for place, head in enumerate(gradient.top(8))}
print(f"The gradient puts L0H1, without which nothing works, in place {rank['L0H1'] + 1} of 8.")
assert rank["L0H1"] > 0

# %% [markdown]
# ## Redundant heads hide each other
#
# The three induction heads do the same work. Without one of them the others go on, so each alone looks
# dispensable.

# %%
group = heads.pruning.ablate(known, task, heads=sorted(inducing), progress=False)
said = group.findings(mean)
print(*said)
group

# %%
alone = sum(mean.values[head.layer, head.head] for head in group.heads)
print(f"Alone they are worth {alone:.2f} nats in sum, together {group.value:.2f}.")
assert group.value > 5 * alone
assert {one.kind for one in said} == {"understated"}

# %% [markdown]
# Similarity finds such groups before anything is ablated: by what the heads look at (Jensen–Shannon
# divergence between their rows of attention), with clusters that come back on resampled prompts.

# %%
similarity = heads.similarity(known, copied, progress=False)
clusters = similarity.clusters()
print(clusters)
similarity.redundancy().round(3)

# %%
similarity.plot()

# %%
assert sorted(inducing) in clusters.members

# %% [markdown]
# ## What could be pruned
#
# Heads are taken out one after the other, least important first, and the loss is measured each time,
# beside random orders.

# %%
curve = heads.pruning.curve(known, task, order=mean, draws=2, progress=False)
curve.table()[["removed", "name", "value", "cost", "low", "high", "random_cost"]].round(3)

# %%
curve.plot()

# %%
row = curve.table().set_index("removed").loc[3]
print(f"Three of eight heads cost {row['cost']:.3f} nats [{row['low']:.3f}, {row['high']:.3f}].")
assert row["cost"] < 0.05 < row["random_cost"]

# %% [markdown]
# ## Far or near: retrieval and streaming
#
# A retrieval head is one that looks at the needle while the model copies it. A streaming head loses
# nothing when all it may see are the first keys and the last ones, here too few to reach back to the
# first copy. They are two sides of one thing, and retrieval heads should be the ones that keep least.
# L1H1, which looks at an earlier copy of the same symbol, is a far head too without copying anything:
# far is not the same as retrieving.

# %%
retrieval = heads.retrieval(known, lens.tasks.needles.copied(known, n=16), progress=False)
print(retrieval)
streaming = heads.streaming(known, copied, first=4, last=16, progress=False)
streaming.table().round(2)

# %%
least_kept = set(streaming.table().nsmallest(3, "kept")["name"])
print(f"Least of their attention keep {', '.join(sorted(least_kept))}.")
assert {str(head) for head in retrieval.heads()} == inducing == least_kept

# %%
streaming.plot()

# %% [markdown]
# ## It depends on the task
#
# `text-lm-3l` learned to copy too. Its head L1H3 matters for copying random tokens and not for the
# text it was trained on; both are in one table.

# %%
reader = lens.load("text-lm-3l")
copying = lens.tasks.induction(reader, n=5, length=50)
reading = lens.tasks.language_modelling(reader, lens.tasks.text("moby-dick"), length=128, n=6)
for_copying = heads.importance(reader, copying, progress=False)
for_reading = heads.importance(reader, reading, progress=False)
both = for_copying.table().merge(for_reading.table(), on="name", suffixes=("_copying", "_reading"))
both[["name", "value_copying", "stderr_copying", "value_reading", "stderr_reading"]].round(3)

# %%
l1h3 = (1, 3)
print(
    f"L1H3 is worth {for_copying.values[l1h3]:.2f} ± {for_copying.stderr[l1h3]:.2f} nats for copying "
    f"and {for_reading.values[l1h3]:.3f} ± {for_reading.stderr[l1h3]:.3f} for reading."
)
assert for_copying.values[l1h3] > 1
assert abs(for_reading.values[l1h3]) < 0.02

# %% [markdown]
# ## Your model
#
# The classes of attention patterns say which sparse shape would keep most of each head's mass at a
# given budget; they describe, they do not prove that the rest can go.

# %%
mine = reader if MODEL == "text-lm-3l" else lens.load(MODEL)
window = min(mine.info.context or 128, 128)
mine_task = lens.tasks.language_modelling(
    mine, lens.tasks.text("pride-and-prejudice"), length=window, n=4
)
mine_importance = heads.importance(mine, mine_task, method="gradient", progress=False)
mine_importance.plot()

# %%
traces = lens.capture(
    mine,
    [lens.tasks.take(mine, lens.tasks.text(name), window) for name in ("moby-dick", "lily")],
    keep_qk=True,
    progress=False,
)
patterns = heads.patterns(traces)
patterns.table().head(8)

# %% [markdown]
# ## Take it with you
#
# Every result has `table()`; `to_csv` and `to_parquet` write it beside a file that says how it was
# made, and `to_headvis` writes the JSON tree that HeadVis reads.

# %%
with tempfile.TemporaryDirectory() as folder:
    csv = lens.runs.to_csv(mine_importance, Path(folder) / "importance.csv")
    lens.runs.to_headvis(traces, Path(folder) / "headvis")
    written = sorted(
        str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()
    )
    rows = len(csv.read_text(encoding="utf-8").splitlines())
print(f"{len(written)} files, among them {', '.join(written[:3])}; the table has {rows - 1} heads.")
assert rows - 1 == mine_importance.values.size

# %% [markdown]
# ## What this does not say
#
# A number here belongs to a task, a set of prompts, a metric and a way of taking a head out. Heads that
# none of these prompts needs score nothing and may matter elsewhere. Single-head scores say nothing of
# groups until the group is taken out together.
