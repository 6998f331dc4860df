"""The commands on models of many shapes, random and small: they end with a report, and say what cannot be.

Each command on the kinds of model that take another way through it, and each way once; `make exhaustive`
tries every command on every shape. `lens sinks` on the same models is in test_unsupported.
"""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from lens.runs import open_run
from lens.runs.validation import validate

from .test_unsupported import ENCODERS, SHAPES, saved

COPIED = ["--copied", "2", "--set", "prompts.copied_length=8"]
ON_TEXT = [
    *("--text-name", "moby-dick", "--tokens", "18", "--windows", "4", "--length", "18"),
    *COPIED,
]
COMMANDS = {
    "heads": [*ON_TEXT, "--measures", "ablation/mean,gradient"],
    "circuit": [*COPIED, "--edges", "20"],
    "redistribute": [*ON_TEXT, "--amounts", "1"],
    "policies": ON_TEXT,
}
SECTIONS = {
    "heads": (
        *("roles", "importance", "patterns", "retrieval", "similarity"),
        *("stability", "pruning", "layers", "heads"),
    ),
    "circuit": ("edges", "circuit", "joined", "reading"),
    "redistribute": ("dose", "search"),
    "policies": ("policies", "running", "stability", "search"),
}
NO_NEXT_TOKEN = "predicts masked tokens and no next token"
OF_ENCODERS = {
    "heads": {"patterns": "looks ahead; the patterns are defined for causal models"},
    "policies": dict.fromkeys(SECTIONS["policies"], NO_NEXT_TOKEN),
}
"""What a masked language model cannot have, and why."""
ALWAYS = {
    (
        "bert",
        "heads",
    ),  # no patterns; every section of gpt_oss is in test_unsupported.py
    ("gemma2", "circuit"),  # norms after parts
    ("bert", "redistribute"),  # answers at masks; windows are in test_unsupported.py
    ("bert", "policies"),  # refused
}


def with_mask(folder):
    """The tokenizer has a mask token, as that of a masked language model has."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_token": "<unk>"}))
    return folder


def cases():
    for kind in (*SHAPES, *ENCODERS):
        for command in COMMANDS:
            marks = () if (kind, command) in ALWAYS else pytest.mark.exhaustive
            yield pytest.param(kind, command, marks=marks, id=f"{command}-{kind}")


@pytest.mark.parametrize(("kind", "command"), [*cases()])
def test_a_command_ends_with_a_report(kind, command, lens_command, tmp_path):
    encoder = kind in ENCODERS
    head = transformers.AutoModelForMaskedLM if encoder else transformers.AutoModelForCausalLM
    folder = with_mask(saved(kind, (SHAPES | ENCODERS)[kind], head, tmp_path / kind))
    answer = lens_command(
        command, "--model", folder, *COMMANDS[command], "--n", "4", "--out", tmp_path, "--json"
    )
    assert answer.code == 0, answer.err
    run = open_run(answer.json["path"])
    assert run.status == "success"
    assert validate(run) == []
    assert (run.path / "report.html").is_file()
    cannot = OF_ENCODERS.get(command, {}) if encoder else {}
    assert run.unsupported.keys() == cannot.keys()
    assert all(reason in run.unsupported[name] for name, reason in cannot.items())
    assert run.sections == [name for name in SECTIONS[command] if name not in cannot]
    if encoder and command == "redistribute":
        assert "response" in run.section("dose").tables
        assert "side_effects" not in run.section("dose").tables
        assert "fills in masked tokens" in "".join(run.section("dose").limits)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=32, patch_size=8,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessorPil(size=size).save_pretrained(folder)
    return folder


@pytest.mark.exhaustive
@pytest.mark.parametrize("command", ["heads", "sinks", "redistribute", "circuit"])
def test_a_classifier_of_pictures_ends_with_a_report(vit, command, lens_command, tmp_path):
    random = np.random.default_rng(0)
    for label in (0, 1):
        (tmp_path / "pictures" / str(label)).mkdir(parents=True)
        for number in range(3):
            picture = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / f"pictures/{label}/{number}.png")
    flags = ["--model", vit, "--images", tmp_path / "pictures", "--out", tmp_path / "runs"]
    answer = lens_command(command, *flags, "--n", "6", "--json")
    assert answer.code == 0, answer.err
    run = open_run(answer.json["path"])
    assert run.status == "success"
    assert validate(run) == []
    assert (run.path / "report.html").is_file()
    assert run.sections


@pytest.mark.parametrize(
    "command", ["run", "heads", "sinks", "circuit", "redistribute", "policies"]
)
def test_a_model_of_pictures_is_refused_with_what_to_use(vit, command, lens_command, tmp_path):
    text = [] if command == "circuit" else ["--text-name", "moby-dick", "--tokens", "18"]
    answer = lens_command(command, "--model", vit, *text, "--out", tmp_path)
    assert answer.code == 2
    *_, last = answer.err.splitlines()
    assert last.startswith("error: vit0 (ViTForImageClassification) has no vocabulary")
    assert "`lens vision --image FILE` is for models of pictures" in last
    assert [*tmp_path.iterdir()] == []
