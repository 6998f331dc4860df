"""Predictors of the map that are trained here, beside A-shape with as many blocks, on held-out text.

    python tests/benchmarks/gates.py [--model text-lm-3l] [--layers 10] [--length 128] [--block 8]
        [--windows 48] [--threads 2]

Prints a Markdown table: recall and change of loss on windows of moby-dick that come after those of the training,
with 95 % intervals over windows, and the seconds that training took. With `--layers` those layers alone
are trained, the others stay dense under the predictor and under A-shape alike.
"""

import argparse
import sys
import time

import torch

import lens
from lens import policies
from lens.policies import AShape, Oracle, PerHead, RandomBlocks, train
from lens.policies.base import Policy


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="text-lm-3l")
    parser.add_argument("--layers", default="")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--held-out", type=int, default=12)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model = lens.load(asked.model)
    ids = model.encode(lens.tasks.text("moby-dick"))
    windows = [
        ids[at : at + asked.length] for at in range(0, len(ids) - asked.length + 1, asked.length)
    ][: asked.windows + asked.held_out]
    learn, other = windows[: -asked.held_out], windows[-asked.held_out :]
    layers = [int(one) for one in asked.layers.split(",") if one] or None
    near = AShape(asked.block, asked.length // 8)

    def alone(policy: Policy) -> Policy:
        if layers is None:
            return policy
        return PerHead(
            {(layer, head): policy for layer in layers for head in range(model.info.heads)}
        )

    offered = {
        "A-shape": near,
        "random": RandomBlocks(like=near, ends=True),
        "exact map": Oracle(like=near),
    }
    seconds = dict.fromkeys(offered, 0.0)
    for kind in ("seer", "sparsifiner", "indexer"):
        start = time.perf_counter()
        found = train(
            kind,
            model,
            learn,
            layers=layers,
            block_size=asked.block,
            steps=asked.steps,
            progress=False,
        )
        offered[kind], seconds[kind] = found.keeping(like=near), time.perf_counter() - start
    found = policies.evaluate(
        model, other, [alone(one) for one in offered.values()], block_size=asked.block, loss=True,
        progress=False,
    )  # fmt: skip
    at = [found.layers.index(layer) for layer in layers or found.layers]
    recall = found.of("recall")[:, at].mean((1, 2, 3))
    density = found.of("density")[:, at].mean((1, 2, 3))
    said = [
        f"{model.name}, {'all layers' if layers is None else f'layers {asked.layers}'}: {len(learn)} windows of "
        f"{asked.length} tokens to train on, {len(other)} later ones to measure, blocks of {asked.block}, "
        f"{asked.steps} steps, {asked.threads} threads.\n",
        "| blocks by | density | recall | change of loss, nats per token | training, s |",
        "|---|---|---|---|---|",
    ]
    for place, (name, row) in enumerate(
        zip(offered, found.summary().to_dict("records"), strict=True)
    ):
        took = f"{seconds[name]:.1f}" if seconds[name] else ""
        said.append(
            f"| {name} | {density[place]:.3f} | {recall[place]:.3f} | {row['loss_change']:+.4f} "
            f"[{row['loss_change_low']:.4f}, {row['loss_change_high']:.4f}] | {took} |"
        )
    sys.stdout.write("\n".join(said) + "\n")


if __name__ == "__main__":
    main()
