"""What others' code gives, in their environment: `PYTHON field_reference.py CASE FOLDER` (see field.py).

Imports torch, transformers, TransformerLens 2 and, for "eap-ig", EAP-IG (https://github.com/hannamw/EAP-IG),
and nothing of this project. FOLDER holds the model and the prompts, and takes the scores.
"""

import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch


def main() -> None:
    """Run one case and print its seconds of CPU and the highest memory of the process."""
    case, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(2)
    given = np.load(folder / "given.npz")
    scores, seconds = _CASES[case](folder, given)
    np.savez(folder / f"{case}-theirs.npz", **scores)
    print(f"seconds={seconds}")
    print(f"peak={_peak()}")


def _peak() -> float:
    """MiB of this process at its highest point; `ru_maxrss` would start from the parent's."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) / 2**10


def _hooked(folder: Path) -> Any:
    from transformers import GPT2LMHeadModel

    lens: Any = import_module("transformer_lens")
    weights: Any = import_module("transformer_lens.pretrained.weight_conversions")
    theirs: Any = GPT2LMHeadModel.from_pretrained(folder).eval()
    size = theirs.config
    config = lens.HookedTransformerConfig(
        n_layers=size.n_layer,
        n_heads=size.n_head,
        d_model=size.n_embd,
        d_head=size.n_embd // size.n_head,
        n_ctx=size.n_positions,
        d_vocab=size.vocab_size,
        act_fn=size.activation_function,
        eps=size.layer_norm_epsilon,
        normalization_type="LN",
        device="cpu",
    )
    model = lens.HookedTransformer(config)
    model.load_state_dict(weights.convert_gpt2_weights(theirs, config), strict=False)
    return model.eval().requires_grad_(False)


def _patterns(folder: Path, given: Any) -> tuple[dict[str, np.ndarray], float]:
    """`run_with_cache` of the patterns alone, no logits; column sums, to compare."""
    model, ids = _hooked(folder), torch.from_numpy(given["long"])
    start = time.process_time()
    with torch.no_grad():
        _, cache = model.run_with_cache(
            ids, return_type=None, names_filter=lambda name: name.endswith("hook_pattern")
        )
    seconds = time.process_time() - start
    layers = range(model.cfg.n_layers)
    received = torch.stack([cache["pattern", layer][0].sum(-2) for layer in layers])
    return {"received": received.numpy()}, seconds


def _ablation(folder: Path, given: Any) -> tuple[dict[str, np.ndarray], float]:
    """A hook and a forward pass for every head: the fall of the logit difference with its output 0."""
    model, ids = _hooked(folder), torch.from_numpy(given["clean"])
    rows = torch.arange(len(ids))
    correct, wrong = (torch.from_numpy(given[name]) for name in ("correct", "wrong"))

    def measured(logits: Any) -> Any:
        return (logits[rows, -1, correct] - logits[rows, -1, wrong]).mean()

    start, heads = time.process_time(), model.cfg.n_heads
    found = torch.zeros(model.cfg.n_layers, heads)
    with torch.no_grad():
        whole = measured(model(ids))
        for layer in range(model.cfg.n_layers):
            for head in range(heads):

                def silence(z: Any, hook: Any, head: int = head) -> Any:
                    z[:, :, head] = 0
                    return z

                hooks = [(f"blocks.{layer}.attn.hook_z", silence)]
                found[layer, head] = whole - measured(model.run_with_hooks(ids, fwd_hooks=hooks))
    return {"heads": found.numpy()}, time.process_time() - start


class _OnCpu:
    """torch for code that writes device='cuda' where no GPU is."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *shape: Any, device: Any = None, **more: Any) -> Any:
        return torch.zeros(*shape, **more)


def _eap_ig(folder: Path, given: Any) -> tuple[dict[str, np.ndarray], float]:
    """`get_scores_eap_ig` of the published code, in one batch."""
    published: Any = import_module("eap.attribute")
    graphs: Any = import_module("eap.graph")
    model = _hooked(folder)
    for name in ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"):
        getattr(model, f"set_{name}")(True)
    published.torch = _OnCpu()
    published.tokenize_plus = lambda model, ids: (
        *(ids, None, torch.full((len(ids),), ids.shape[1])),
        ids.shape[1],
    )
    clean, corrupt = (torch.from_numpy(given[name]) for name in ("clean", "corrupt"))
    rows = torch.arange(len(clean))
    correct, wrong = (torch.from_numpy(given[name]) for name in ("correct", "wrong"))

    def metric(logits: Any, *_: Any) -> Any:
        return (logits[rows, -1, correct] - logits[rows, -1, wrong]).sum()

    graph = graphs.Graph.from_model(model)
    start = time.process_time()
    scores = published.get_scores_eap_ig(
        model, graph, [(clean, corrupt, None)], metric, steps=int(given["steps"]), quiet=True
    )
    seconds = time.process_time() - start
    names = list(graph.edges)
    found = [float(scores[graph.edges[name].matrix_index]) for name in names]
    return {"names": np.array(names), "scores": np.array(found)}, seconds


_CASES = {"patterns": _patterns, "ablation": _ablation, "eap-ig": _eap_ig}

if __name__ == "__main__":
    main()
