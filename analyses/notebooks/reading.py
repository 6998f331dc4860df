# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Reading: why a head looks there, and whether attention explains the answer
#
# A map says where a head looks. This notebook asks why: who wrote the query and the key, and what happens
# without it. Every claim stands beside a control, because a drop alone proves nothing. `MODEL` may be your own; the checks
# on named heads hold for the default alone.

# %%
import lens

MODEL = "induction-2l"
HEAD = "L1H3"  # a head that looks at what followed an earlier copy of the token at hand

reading = lens.reading
model = lens.load(MODEL)
is_default = MODEL == "induction-2l"
prompts = [lens.tasks.copied(model, 20, seed) for seed in range(8)]  # 20 random symbols, twice
model

# %% [markdown]
# ## One pair
#
# The logit of a query and a key is a sum over pairs of writers: what the embedding, each earlier head and each
# MLP wrote at the query, times what each wrote at the key. The parts sum to the logit, to rounding.

# %%
query = 30  # in the second copy; 30 - 20 + 1 is what followed its first copy
why = reading.explain(model, prompts[0], HEAD, query, query - 19, progress=False)
for sentence in why.findings():
    print("-", sentence)
assert abs(why.values.sum() - why.logit) < 1e-4 * max(1, abs(why.logit))
why.plot(top=6)

# %% [markdown]
# ## All pairs of a kind, over prompts
#
# One pair may be chance. Here are all queries of the second copy, with intervals over prompts.

# %%
many = reading.explain_pairs(model, prompts, HEAD, "induction", progress=False)
keys = many.side("key")
best = keys.iloc[0]
print(
    f"On the key side {best['part']} carries {best['share']:.0%} of the logit above the row's mean."
)
if is_default:
    assert best["part"] == "L0H1"
    assert best["share"] > 0.5
keys.head(5).round(3)

# %% [markdown]
# What does that writer look at? If the story is "the key knows which token stood before it", it is the
# token before.

# %%
profile = lens.profile(lens.capture(model, prompts[0], progress=False), all=True).set_index("name")
if is_default:
    looks = profile.loc["L0H1", ["previous_token", "previous_token_uniform"]]
    print(
        f"L0H1 gives the token before it {looks.iloc[0]:.0%} of its attention, even attention {looks.iloc[1]:.0%}."
    )
    assert looks.iloc[0] > 0.5 > looks.iloc[1]

# %% [markdown]
# ## Is it so? Predicted and measured
#
# The explanation predicts what the head looks at without each writer's part. Then the model is run without it, and every
# other writer is the control.

# %%
without = reading.removal(model, prompts, HEAD, progress=False)
for sentence in without.findings():
    print("-", sentence)
table = without.table().set_index("part")
if is_default:
    assert table.loc["L0H1", "measured_high"] < table.drop(index="L0H1")["measured_low"].min()
    assert table["error"].mean() < 0.05
without.plot()

# %% [markdown]
# ## A subspace, and why a drop is not enough
#
# Directions in which the queries meet the keys of the pairs and no others are taken out. Beside them: as many principal
# components of the queries and of the keys, another head's directions, and random ones.

# %%
subspace = reading.subspace(model, prompts, "L1H0", "induction", rank=6, draws=4, progress=False)
left = subspace.table().set_index("basis")
assert {"contrast", "queries", "keys", "other head", "random"} == set(left.index)
own, chance = left.loc["contrast"], left.loc["random"]
print(
    f"Without the contrast's {subspace.rank} of {subspace.width} directions {own['mass']:.0%} is left of {own['clean']:.0%}, "
    f"without random ones {chance['mass']:.0%}, without principal components of the queries {left.loc['queries', 'mass']:.0%}."
)
if own["mass_high"] < left.drop(index="contrast")["mass_low"].min():
    print("So these directions carry it, more than any control.")
else:
    print("So the drop says little about these directions: a control loses as much.")
subspace.plot()

# %% [markdown]
# ## A circuit, read aloud
#
# An edge's sentence holds where cutting it costs the task, by an interval over prompts that leaves out 0.

# %%
task = lens.tasks.induction(model, n=6)
circuit = lens.circuits.score_edges(model, task, progress=False).top(12)
held_out = lens.tasks.induction(model, n=6, seed=1)
told = reading.circuit(model, held_out, circuit, progress=False)
for sentence in told.findings():
    print("-", sentence)
told.table().sort_values("drop", ascending=False).head(6).round(3)

# %% [markdown]
# ## Where in the prompt
#
# The same circuit with places: which edges work in which half, and what heads carry from one to the other.

# %%
halves = {"first copy": (1, 26), "second copy": (26, 51)}
places = lens.circuits.scores.positions(model, task, halves, method="eap", progress=False)
print(places)
across = places.table()
across = across[across["key_span"] != ""].head(5)
if is_default:
    first = across.iloc[0]
    assert (first["span"], first["key_span"]) == ("second copy", "first copy")
across.round(3)

# %% [markdown]
# ## Does attention explain the answer?
#
# Each method orders the tokens. The answer is then asked for without the first of them, and with them alone, at equal retention,
# beside random orders and leave-one-out.

# %%
methods = ["raw", "rollout", "gradient_attention", "attnlrp", "leave_one_out"]
judged = reading.faithfulness(
    model, prompts[:2], methods, draws=4, shares=(0.1, 0.3, 0.6), progress=False
)
for sentence in judged.findings():
    print("-", sentence)
scores = judged.table().set_index("method")
assert scores.loc["leave_one_out", "comprehensiveness"] > scores.loc["random", "comprehensiveness"]
judged.plot()

# %% [markdown]
# Another row of attention may write the same: then what a head looks at is not even determined by what it does.

# %%
other = reading.adversary(model, prompts, draws=2, progress=False)
for sentence in other.findings():
    print("-", sentence)
assert other.error.max() < 1e-5
assert abs(other.change).max() < 1e-4
other.plot()

# %% [markdown]
# And how much hangs on where each head looks: the loss of the answer when its attention logits change, along the
# gradient (dearest) and at random, by the size of the change.

# %%
changed = reading.perturb(model, prompts, ["L0H1", "L1H0", HEAD], draws=2, progress=False)
for sentence in changed.findings():
    print("-", sentence)
changed.plot()

# %% [markdown]
# ## Long prompts
#
# Past 512 tokens blocks are scored. Sums over tokens stay exact; products of maps are approximate, and say so.

# %%
for method in ("attnlrp", "rollout"):
    blocks = reading.attribute_blocks(model, prompts[0], method, block=8, progress=False)
    print("-", *blocks.findings(), sep="\n  ")
exact = reading.attribute_blocks(model, prompts[0], "attnlrp", block=8, progress=False)
tokens = reading.attribute(model, prompts[0], "attnlrp", progress=False)
assert not exact.approximate
assert abs(exact.values[0] - float(tokens[:8].sum())) < 1e-3
blocks.plot()

# %% [markdown]
# ## What this does not say
#
# Parts are what heads and MLPs write, not features. Norms are held at their sizes, so what the model does without a
# part is the judge, not the share. And a deleted token is a mean embedding, which the model was not trained on.
