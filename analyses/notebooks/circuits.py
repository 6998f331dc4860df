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
recovered = circuits.recovery(scored, active)
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
evaluation = circuits.evaluate(model, task, edges, random=3, progress=False)
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
# ## What this does not say
#
# A circuit belongs to a task, a metric and a way of cutting: other twins give other circuits. The
# estimate ranks edges, and only the evaluation, which really cuts them, says what they are worth. A
# faithful circuit is not the only one, and need not be the smallest.
