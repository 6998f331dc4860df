"""The names that the examples of the reference use. A test runs every example with them.

Small models and short prompts: numbers that an example prints are those of these, not of a study.
"""

import tempfile
from pathlib import Path

import pandas as pd
import torch
import transformers

import lens
from lens.runs.writer import RunWriter
from lens.traces.profiles import pooled_table, prompt_table

# A small trained language model, what it reads, and what its attention did.
model = lens.load("text-lm-3l")
texts = [
    lens.tasks.take(model, lens.tasks.text("moby-dick"), 24),
    lens.tasks.take(model, lens.tasks.text("lily"), 24),
]
ids = torch.tensor([texts[0]])
traces = [lens.capture(model, prompt, keep_qk=True, progress=False) for prompt in texts]
trace = traces[0]

# A still smaller one, attention only, which knows how to copy.
small = lens.load("induction-2l")

# What it does, in few prompts: circuits of it take a moment.
copying = lens.tasks.induction(small, n=4)

# Two tasks: prompts with a metric, and other prompts of the same kind to check a choice on.
task = lens.tasks.induction(model, n=8)
held_out = lens.tasks.induction(model, n=8, seed=1)

# A vision-language model with random weights, with the inputs of one prompt: 5 tokens, 16 of the image, 11 tokens.
torch.manual_seed(0)
vlm = lens.load(
    transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=40,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=16,
                patch_size=4,
            ),
            text_config=transformers.LlamaConfig(
                vocab_size=97,
                hidden_size=48,
                intermediate_size=56,
                num_hidden_layers=3,
                num_attention_heads=6,
                num_key_value_heads=2,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            ),
            image_token_index=90,
            vision_feature_layer=-1,
        )
    ).eval()
)
images = torch.randn(1, 3, 16, 16)
inputs = {
    "input_ids": torch.tensor([[*range(3, 8), *[90] * 16, *range(20, 31)]]),
    "pixel_values": images,
    "attention_mask": torch.ones(1, 32, dtype=torch.long),
}

# A vision tower with random weights.
vit = lens.load(
    transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
        ),
        add_pooling_layer=False,
    ).eval()
)

# An encoder-decoder with random weights.
translator = lens.load(
    transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=97,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=40,
            decoder_ffn_dim=40,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
    ).eval()
)

# A model of Mamba-2 mixers alone, with random weights.
mamba = transformers.Mamba2ForCausalLM(
    transformers.Mamba2Config(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=16,
        state_size=8,
        n_groups=2,
        chunk_size=8,
    )
).eval()

# Two run folders of the profile of the language model, as `lens run` makes them: before and after training.
_folder = Path(tempfile.mkdtemp(prefix="given-"))


def _run(prompts: list[lens.traces.AttentionTrace], seed: int) -> lens.runs.Run:
    facts = {"layers": model.info.layers, "heads": model.info.heads, "name": model.name}
    meta = {
        "what": "profile", "title": "given", "model": facts, "versions": {"attention-lens": lens.__version__},
        "prompts": {"total": len(prompts), "done": len(prompts)},
    }  # fmt: skip
    writer = RunWriter.start(_folder, {"seed": seed}, meta)
    tables = [prompt_table(one, f"p{number:03d}") for number, one in enumerate(prompts)]
    rows = [
        {
            "prompt_id": f"p{number:03d}", "kind": "text", "tokens": one.length, "loss": 1.0,
            "token_ids": one.dataset["token_id"].values.tolist(), "title": "", "text": "",
            "token_strings": list(one.tokens), "status": "done", "seconds": 0.1, "loss_repeat": None,
        }
        for number, one in enumerate(prompts)
    ]  # fmt: skip
    writer.table("prompts", pd.DataFrame(rows))
    writer.table("heads", pd.concat([*tables, pooled_table(tables, "text")], ignore_index=True))
    return writer.finish()


run = _run(traces, 0)
untrained = lens.models.random_weights(model, 0)
other = _run([lens.capture(untrained, prompt, progress=False) for prompt in texts], 1)
