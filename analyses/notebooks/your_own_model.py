# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Your own model
#
# Anything that transformers can build, that attends by a softmax over keys, can be looked at: a model
# object that you have in your hands, or a folder that `save_pretrained` wrote. Here both are made from a
# configuration, with random weights, so that the notebook needs no download. Random weights know
# nothing: what their heads score is what a score is worth without training, a baseline and no finding.
#
# Put your own folder or hub id into `MODEL` and start from the second section.

# %%
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

import lens

MODEL = ""  # a folder or a hub id; empty: the random model below

# %% [markdown]
# ## A model object
#
# `lens.load` takes the object as it is. Before it returns it runs the model and compares the captured
# output with the model's own; the repr says how close they are.

# %%
torch.manual_seed(0)
config = transformers.GPT2Config(
    vocab_size=199,
    n_positions=96,
    n_embd=60,
    n_layer=3,
    n_head=5,
    bos_token_id=0,
    eos_token_id=1,
    initializer_range=0.2,
)
gpt2 = transformers.GPT2LMHeadModel(config).eval()
by_object = lens.load(gpt2)
by_object

# %% [markdown]
# Without a tokenizer, prompts are token ids.

# %%
ids = [0, *torch.randint(2, 199, (70,), generator=torch.Generator().manual_seed(1)).tolist()]
trace = lens.capture(by_object, ids, block_size=16, keep_qk=True, progress=False)
trace

# %% [markdown]
# That the numbers are the model's own can be seen: the probabilities that the trace gives are those of
# transformers' own eager attention.

# %%
eager = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
eager.load_state_dict(gpt2.state_dict())
with torch.no_grad():
    theirs = eager(torch.tensor([ids]), output_attentions=True).attentions[1][0, 3].numpy()
ours = trace.tile(1, 3, (0, len(ids)), (0, len(ids)))
print(f"Largest difference from transformers' eager attention: {np.abs(ours - theirs).max():.1e}.")
assert np.abs(ours - theirs).max() < 1e-5

# %% [markdown]
# ## A folder
#
# `save_pretrained` writes it, `lens.load` reads it, and the numbers are the same.

# %%
with tempfile.TemporaryDirectory() as folder:
    gpt2.save_pretrained(folder)
    loaded = lens.load(folder)
again = lens.capture(loaded, ids, block_size=16, progress=False)
assert np.array_equal(again.dataset["received"].values, trace.dataset["received"].values)
print(f"Read from a folder, {loaded.info.class_name} gives the same attention, bit by bit.")

# %%
model = lens.load(MODEL) if MODEL else loaded
copied = [lens.tasks.copied(model, 40, seed=seed) for seed in range(4)]
table = lens.profile(lens.capture(model, copied, progress=False), all=True)
table.set_index(["layer", "head"])[["previous_token", "induction", "first_token", "entropy"]].head(
    15
).round(3)

# %%
best = table.loc[table["induction"].idxmax()]
print(
    f"The most inductive head is L{best['layer']}H{best['head']} with {best['induction']:.1%} "
    f"[{best['induction_low']:.1%}, {best['induction_high']:.1%}]."
)
if not MODEL:
    assert best["induction"] < 0.1
    print("Weights are random, so nothing is found, as it should be.")

# %%
lens.figures.block_map(trace, 1, 3)

# %% [markdown]
# ## What a head causes, on your own prompts
#
# Any list of token ids, or texts if there is a tokenizer, makes a language-modelling task. Taking a
# head out of a random model moves its loss a little in some direction, which an interval over a few
# prompts may well set apart from zero: an effect is to be held against the loss itself, and against what
# random weights give.

# %%
task = lens.tasks.language_modelling(model, copied)
importance = lens.heads.importance(model, task, method="ablation", baseline="mean", progress=False)
importance.table().head(5).round(4)

# %%
importance.plot()

# %%
print(
    f"The largest effect of a head is {abs(importance.values).max():.3f} nats of a loss of "
    f"{importance.clean.mean():.2f}."
)
if not MODEL:
    assert abs(importance.values).max() < 0.05 * importance.clean.mean()

# %% [markdown]
# ## What is refused, and why
#
# What cannot be measured is refused with the reason, never answered with zeros.


# %%
def refusal(action) -> str:
    """What `action` is refused with."""
    try:
        action()
    except lens.LensError as error:
        return str(error)
    raise AssertionError("this was not refused")


mamba = transformers.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, state_size=4)
recurrent = lens.load(transformers.MambaForCausalLM(mamba).eval())
refused = {
    "attention of a state-space model": refusal(lambda: lens.capture(recurrent, [5, 6, 7])),
    "a folder that is not there": refusal(lambda: lens.load(str(Path("no") / "such" / "folder"))),
    "a text without a tokenizer": refusal(lambda: lens.capture(by_object, "Call me Ishmael.")),
    "more tokens than the model takes": refusal(lambda: lens.capture(by_object, [5] * 97)),
    "a token that is not in the vocabulary": refusal(lambda: lens.capture(by_object, [5, 199])),
    "probabilities without queries and keys": refusal(lambda: again.tile(0, 0, (0, 4), (0, 4))),
}
for what, reason in refused.items():
    print(f"- {what}: {reason}")
assert all(len(reason) > 20 for reason in refused.values())

# %% [markdown]
# ## What this does not say
#
# That a model loads says that its attention is captured exactly, and not that every analysis suits it:
# direct logit attribution needs a language-model head, circuits need an architecture whose residual
# stream is understood, and each says so when asked.
