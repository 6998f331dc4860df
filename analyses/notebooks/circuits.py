# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Circuits: which heads feed which, for one task
#
# A head matters through what it writes into others. A circuit is a set of such edges that does the task
# with all the others cut. This notebook first recovers a circuit that is known because the weights were
# written by hand, then finds one in a trained model and says how faithful it is, beside random ones.
#
# For a model of your own set `MODEL`, and make a task with `lens.tasks` whose prompts have corrupt
# twins (`induction` works for any language model).

# %%
import lens

MODEL = "induction-2l"
PROMPTS = 16

circuits = lens.circuits

# %% [markdown]
# ## A circuit with a known answer
#
# Two layers, weights by hand: one head looks at the token before, one head of the next layer uses that
# to copy. Every other component does nothing. The task is a single prompt, so its scores are exact and
# have no interval.

# %%
known = circuits.known.induction_transformer(beta=30)
scored = circuits.score_edges(known.model, known.task, method="exact", progress=False)
active = known.visible[next(iter(known.tasks))]
recovered = circuits.checks.recovery(scored, active)
scored.table().head(8).round(3)

# %%
print(
    f"Of {scored.graph.n} edges {recovered.positives} can be seen by this task; cutting each alone ranks "
    f"them with an area of {recovered.auroc:.2f} under the curve (1 is perfect, one half is chance)."
)
assert recovered.auroc > 0.99

# %% [markdown]
# ## A trained model
#
# The task: random symbols that come twice, and a twin in which the symbol to copy from was changed.
# `eap-ig` estimates what cutting each edge would do from a few backward passes.

# %%
model = lens.load(MODEL)
task = lens.tasks.induction(model, n=PROMPTS)
edges = circuits.score_edges(model, task, progress=False)
print(edges)
edges.table().head(8).round(3)

# %%
edges.plot()

# %% [markdown]
# ## How faithful
#
# Edges are kept, best first, everything else is replaced by what it is on the twin prompts, and the
# task is measured again. 1 = as good as the whole model, 0 = as bad as without any edge. Random
# circuits of the same size stand beside it, because a circuit of many edges works anyhow.

# %%
evaluation = circuits.evaluate(model, task, edges, draws=3, progress=False)
evaluation.plot()

# %%
print(
    f"Area under the curve: {evaluation.cpr:.2f}; of random circuits of the same sizes "
    f"{evaluation.random_cpr.mean():.2f}."
)
assert evaluation.cpr > evaluation.random_cpr.max()

# %%
by_size = evaluation.table().query("ranking == 'signed'")
enough = by_size[by_size["faithfulness"] > 0.9].iloc[0]
print(
    f"{enough['edges']:.0f} of {edges.graph.n} edges give {enough['faithfulness']:.0%} "
    f"[{enough['low']:.0%}, {enough['high']:.0%}] of what the whole model does; as many at random "
    f"{enough['random']:.0%}."
)
assert enough["faithfulness"] > 0.9 > 0.5 > enough["random"]

# %% [markdown]
# ## The circuit itself

# %%
from lens.figures.circuits import layered_graph

circuit = edges.top(int(enough["edges"]))
print(circuit)
layered_graph(circuit, edges)

# %%
heads = [node for node in circuit.nodes if ".h" in node]
print(f"Heads in it: {', '.join(heads)}.")
if MODEL == "induction-2l":
    assert {"a0.h1", "a1.h0", "a1.h2", "a1.h3"} <= set(heads)  # the model's known circuit

# %% [markdown]
# ## Is it the same circuit elsewhere?
#
# Other prompts, one answer each, and another kind of twin: only the earlier copy of the last symbol is
# replaced, so that nothing finds what followed it. Heads are compared by what ablating each one costs. A
# model of few heads leaves chance a lot: here heads are renamed over all layers; in a deep model
# leave `null` as it is, which renames them within their layers, since like work sits in like layers.

# %%
from dataclasses import replace

import torch

other = lens.tasks.induction(model, n=PROMPTS, seed=1)
last = other.positions.max(1).values
asked = other.clean[torch.arange(other.n), last]
same = other.clean == asked[:, None]
earlier = same.int().argmax(1)
broken = other.clean.clone()
for row, place in zip(broken, earlier.tolist(), strict=True):
    row[place] = min(set(range(model.info.vocab)) - set(row.tolist()))
other = replace(
    other,
    name="earlier copy replaced",
    corrupt=broken,
    positions=last[:, None],
    correct=other.correct[:, -1:],
    marks={"answer": earlier + 1},
).take((same.sum(1) == 2).nonzero()[:, 0])

# %%
heads_by_task = [
    lens.heads.importance(model, one, baseline="counterfactual", progress=False)
    for one in (task, other)
]
shared = circuits.reuse.overlap(*heads_by_task, count=3, null="all")
print(*shared.findings(), sep="\n")
shared.table().round(2)

# %%
shared.plot()

# %%
if MODEL == "induction-2l":
    assert shared.values["rank correlation"] > 0.5
    assert shared.p_value("rank correlation") < 0.05

# %% [markdown]
# ## Heads made to look
#
# If the heads that look for what followed only fail to find the place, then forcing them to look
# there, and nothing else, must repair the broken prompts, and as many other heads must not.

# %%
joined = circuits.head_parts(model, task, circuit).table()
finders = joined.nlargest(3, "induction")["name"].tolist()
asked_in_vain = replace(other, clean=other.corrupt_or_refuse(), corrupt=None)
repaired = circuits.reuse.redirect(
    model, asked_in_vain, finders, ["answer"], match="all", progress=False
)
print(*repaired.findings(), sep="\n")
repaired.table().round(2)

# %%
repaired.plot()

# %%
if MODEL == "induction-2l":
    before, after, others = repaired.table()["accuracy"][:3]
    assert after > 0.9 > 0.2 > before
    assert others < 0.2

# %% [markdown]
# ## What this does not say
#
# A circuit belongs to a task, a metric and a way of cutting: other twins give other circuits. The
# estimate ranks edges, and only the evaluation, which really cuts them, says what they are worth. A
# faithful circuit is not the only one, and need not be the smallest.
