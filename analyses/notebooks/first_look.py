# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # First look
#
# Load a model, let it read a text, and see where every attention head looks. Nothing here needs a GPU
# or the network, and no N×N attention matrix is ever built: the numbers come out of the attention pass
# itself.
#
# `MODEL` can be any name that `lens.load` knows (`smollm2-135m` is a real language model), a hub id or
# a folder of your own. The sentences below are made from the results, so they change with it; the
# checks on named heads hold for the default model alone.

# %%
import lens

MODEL = "text-lm-3l"
TOKENS = 128

model = lens.load(MODEL)
model

# %% [markdown]
# The repr tells what was loaded, and that the captured output equals the model's own: `load` checks
# that before anything else. Now the model reads, and `capture` writes down what each head did.

# %%
tokens = lens.tasks.take(model, lens.tasks.text("moby-dick"), TOKENS)
trace = lens.capture(model, tokens, block_size=16, keep_qk=True, progress=False)
trace

# %%
loss = lens.tasks.loss(model, tokens)
print(f"{model.name} pays {loss:.2f} nats for the average token of this text.")
print("It reads: " + "".join(trace.tokens[1:20]))
assert 0 < loss < 10

# %% [markdown]
# ## One row per head
#
# `profile` makes a table: each score with the ends of its 95 % interval, taken over the queries of this
# prompt. A score that a sink could dominate comes a second time without the first token
# (`..._sink_excluded`).

# %%
table = lens.profile(trace, all=True)
table.set_index(["layer", "head"])[
    ["previous_token", "first_token", "entropy", "distance", "locality", "sink_rate"]
].round(2)

# %%
by_token = table.loc[table["previous_token"].idxmax()]
previous = f"L{by_token['layer']}H{by_token['head']}"
print(
    f"{previous} looks at the token just before: {by_token['previous_token']:.0%} of its attention "
    f"[{by_token['previous_token_low']:.0%}, {by_token['previous_token_high']:.0%}]."
)
parked = table.loc[table["first_token"].idxmax()]
sink = f"L{parked['layer']}H{parked['head']}"
print(
    f"{sink} parks {parked['first_token']:.0%} of its attention on the first token, "
    f"{trace.tokens[0]!r} (BOS {trace.attrs['bos']}): an attention sink."
)
if MODEL == "text-lm-3l":
    assert (previous, sink) == ("L0H0", "L1H0")

# %% [markdown]
# Figures of all heads read the same scores in long form, one row per head and metric.

# %%
from lens.traces.profiles import prompt_table

long = prompt_table(trace, "moby-dick")
lens.figures.head_grid(long, "first_token")

# %%
lens.figures.head_scatter(long, "entropy", "distance")

# %% [markdown]
# ## One head
#
# The block map pools the attention of one head into blocks of tokens, which is what stays readable at
# 16 thousand tokens. Every cell is exact.

# %%
lens.figures.block_map(trace, int(by_token["layer"]), int(by_token["head"]))

# %% [markdown]
# Because `keep_qk=True` kept queries and keys, the exact probabilities of any rectangle can be had
# later, without running the model again.

# %%
tile = trace.tile(int(by_token["layer"]), int(by_token["head"]), (0, 8), (0, 8))
print(tile.round(2))
assert abs(tile.sum(axis=-1) - 1).max() < 1e-5  # the first 8 queries see these 8 keys only

# %% [markdown]
# The map of the dashboard, here: wheel or `+` and `-` zoom, hover shows the probability, a click on a row
# draws where it looks. `.to_html("head.html")` writes it as a file of its own, `.widget()` asks this
# process for every rectangle, exact at any length.

# %%
from lens_dashboards.notebook import attention_map

shown = attention_map(trace, int(by_token["layer"]), int(by_token["head"]), query=20)
assert len(shown._repr_html_()) < 200_000
shown

# %%
lens.figures.token_strip(trace, int(by_token["layer"]), int(by_token["head"]), query=20)

# %%
lens.figures.distance_profile(trace, int(by_token["layer"]), int(by_token["head"]))

# %% [markdown]
# ## A probe with a known answer
#
# Heads that copy do not show on every text. Random tokens that come twice bring them out: in the second
# copy an induction head looks at the token that followed last time.

# %%
copied = lens.capture(
    model, [lens.tasks.copied(model, 50, seed=seed) for seed in range(4)], progress=False
)
probed = lens.profile(copied, all=True)
copying = probed.nlargest(3, "induction")
copying[["layer", "head", "induction", "induction_low", "induction_high"]].round(2)

# %%
on_text = table.merge(copying[["layer", "head"]])["induction"].mean()
names = [f"L{layer}H{head}" for layer, head in zip(copying["layer"], copying["head"], strict=True)]
print(
    f"{', '.join(names)} give the induction token {copying['induction'].mean():.0%} of their attention "
    f"on copied random tokens, and {on_text:.0%} on the text, where less is there to copy."
)
if MODEL == "text-lm-3l":
    assert set(names) == {"L1H2", "L1H3", "L1H5"}
    assert copying["induction"].min() > 0.8 > on_text

# %% [markdown]
# ## What this does not say
#
# All of it describes where attention goes. It does not say what a head causes: a head that looks
# somewhere may write nothing that matters there. `heads.py` ablates them, `sinks_and_redistribution.py`
# moves the attention of sinks. And one prompt is one prompt: the intervals above are over its queries,
# not over all the texts that could have been read.
