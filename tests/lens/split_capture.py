"""What each process of test_capture_group.py does (tests.ranks): traces of a split prompt beside whole ones."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

import lens
from lens.common.errors import LensError
from tests.lens import naive
from tests.lens.architectures import build
from tests.lens.hybrids import hybrid

LENGTH = 77
CAPTURED = ("gpt2", "llama", "gemma2", "gpt_oss", "bert")
SIZES = dict.fromkeys(CAPTURED, (4,)) | {"bert": (4, 2)}
"""Numbers of processes that split the prompt."""


def ids(seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 60, (LENGTH,), generator=generator).tolist()


def _bloom():
    torch.manual_seed(0)
    config = transformers.BloomConfig(hidden_size=48, n_layer=2, n_head=6, vocab_size=97)
    return transformers.BloomModel(config).eval()


def _refusal(model, prompt, **options) -> str:
    try:
        lens.capture(model, prompt, block_size=4, **options)
    except LensError as error:
        return str(error)
    return "captured"


OPTIONS = {
    **{"block_size": 4, "keep_qk": True},
    "labels": {"thirds": ([index % 3 for index in range(LENGTH)], [1] * LENGTH)},
}


def prepare() -> tuple:
    """The models, and their traces in one process."""
    torch.set_num_threads(1)
    models = {name: lens.load(build(name)) for name in CAPTURED}
    return models, {name: lens.capture(one, ids(), **OPTIONS) for name, one in models.items()}


def main(folder: Path, models: dict, wholes: dict) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.group.WORLD
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    found: dict = {"ratios": {}, "refusals": {}}
    for name, model in models.items():
        whole = wholes[name]
        for size in SIZES[name]:
            group = world if size == 4 else pairs[rank // 2]
            trace = lens.capture(model, ids(), group=group, **OPTIONS)
            found["ratios"][f"{name} {size}"] = {
                str(variable): naive.rms_ratio(
                    trace.dataset[variable].values, whole.dataset[variable].values
                )
                for variable in whole.dataset.data_vars
            }
    assert trace.attrs["processes"] == 2
    assert [*trace.dataset.data_vars] == [*whole.dataset.data_vars]
    llama = models["llama"]
    written = lens.capture(llama, [ids(), ids(1)], block_size=4, group=world, out=folder / "traces")
    found["paths"] = [one.path is not None for one in written]
    found["refusals"] = {
        "alibi": _refusal(lens.load(_bloom()), ids(), group=world),
        "hybrid": _refusal(lens.load(hybrid("qwen3_next")), ids(), group=world),
        "mask": _refusal(lens.load(build("llama4")), ids(), group=world),
        "twice": _refusal(lens.load(hybrid("diffllama")), ids(), group=world),
        "both": _refusal(llama, ids(), group=world, chunk=8),
        "short": _refusal(llama, ids()[:20], group=world),
        "other": _refusal(llama, ids(rank), group=world),
        "not a member": _refusal(llama, ids(), group=pairs[1 - rank // 2]),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
