# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # What a vision model looked at, and whether it mattered
#
# A small vision transformer that reads handwritten digits of 8 × 8 pixels; `MODEL` takes anything that `lens.load` does, such as
# `dinov2-small` with photographs.

# %%
import numpy as np

import lens
from lens import vision

MODEL = "vit-digits"
DRAWN = {
    0: "..####.. .##..##. .#....#. .#....#. .#....#. .#....#. .##..##. ..####..",
    7: ".######. .....##. .....#.. ....##.. ..#####. ...##... ...#.... ..##....",
}


def picture(drawn: str) -> np.ndarray:
    """Pixels of 0 and 255."""
    return np.array([[255 * (cell == "#") for cell in row] for row in drawn.split()], np.uint8)


model = lens.load(MODEL)
pictures = {label: picture(drawn) for label, drawn in DRAWN.items()}
traces = [lens.capture(model, one, keep_qk=True, progress=False) for one in pictures.values()]
zero = traces[0]

# %% [markdown]
# ## Where it looks
#
# Attention on the picture, where the patches lie; raw, and without patches that take much from everywhere.

# %%
zero.overlay(["L0", "L1", "L2"], query="[CLS]").plot(path=True)

# %%
overlay = zero.overlay("L2", query="[CLS]")
assert 0 < overlay.values.sum() <= 1
print(*overlay.findings(), sep="\n")

# %% [markdown]
# ## How far
#
# Mass by ring round a patch, beside uniform attention: over all rings and [CLS] it adds up to 1.

# %%
rings = vision.rings(zero)
assert np.allclose(rings.mass.sum(-1) + rings.elsewhere, 1, atol=1e-5)
rings.plot()

# %% [markdown]
# ## In which pattern
#
# Every head on every picture by 16 numbers of an autoencoder, and as many principal components beside it.

# %%
patterns = vision.patterns(traces, steps=100, progress=False)
patterns.plot()

# %%
lens.figures.vision.prototypes(patterns)

# %%
print(*patterns.findings(), sep="\n")
patterns.heads()[["name", "group", "share"]]

# %% [markdown]
# ## Does it matter?
#
# Each head pruned alone: what the right label loses. More pictures give intervals: a folder with a sub-folder per label is a task
# (`lens.tasks.classification(model, "FOLDER")`).

# %%
task = lens.tasks.classification(model, list(pictures.values()), list(pictures))
assert (task.with_metric("accuracy").evaluate(model) == 1).all(), "it reads both digits"
pruned = lens.heads.pruning.metrics(model, task, progress=False)
pruned.plot("probability")

# %%
pruned.classes()[["metric", "class", "name", "value"]].query("metric == 'probability'").head()

# %% [markdown]
# ## Which structure
#
# Patches whose attention is alike, and the tree of patches from attention read backwards. A segment does not say what it is: that it is a
# thing is for the eye, or for masks (`found.iou`).

# %%
vision.cluster(zero, "L2").plot()

# %%
vision.tree(zero, "L2").plot()
