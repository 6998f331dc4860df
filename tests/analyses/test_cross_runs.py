"""Runs of an encoder-decoder: one for each of its attentions, with two token axes on the pages of cross-attention."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from lens_analyses import runner
from lens_analyses.steps import parts, sink_effects
from lens_dashboards.library import Library
from lens_dashboards.views import render
from PIL import Image
from scipy.io import wavfile
from scipy.signal import resample_poly

import lens
from lens.common.errors import LensError
from lens.runs import open_run
from lens.runs.validation import _layer, validate
from lens.traces.alignment import Alignment
from tests.lens.encoder_decoders import MAKE, SIZES, made

ASSETS = Path(lens.__file__).parent / "assets/models/stories260k"
SOURCES = "The little girl saw a big red ball.\nOnce upon a time there was a cat.\n"
TARGETS = "She played all day.\nThe cat was very happy and it slept.\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random T5 of three encoder and two decoder layers, and files of sources and targets."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 3, "num_heads": 4}
    sizes |= {"num_decoder_layers": 2, "decoder_start_token_id": 0, "eos_token_id": 2}
    config = transformers.T5Config(vocab_size=512, pad_token_id=0, **sizes)
    model = transformers.T5ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape) * 1.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder / "t5")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, folder / "t5")
    (folder / "sources.txt").write_text(SOURCES)
    (folder / "targets.txt").write_text(TARGETS)
    return folder


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory, lens_command):
    """Part -> its run."""
    answer = lens_command(
        "run", "--model", folder / "t5", "--prompts", folder / "sources.txt", "--target",
        folder / "targets.txt", "--set", "capture.block_size=4",
        "--out", tmp_path_factory.mktemp("runs"), "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert answer.err.count("loading ") == 1, "all parts are of one model"
    found = [open_run(path) for path in (*answer.json["beside"], answer.json["path"])]
    return {run.meta["model"]["part"]: run for run in found}


def test_a_dry_run_counts_every_part(folder, lens_command):
    words = (
        "run",
        "--model",
        folder / "t5",
        "--prompts",
        folder / "sources.txt",
        "--dry-run",
        "--json",
    )
    words = (*words, "--target", folder / "targets.txt")
    parts = [lens_command(*words, "--part", part).json for part in ("encoder", "decoder", "cross")]
    whole = lens_command(*words).json
    for name in ("prompts", "tokens", "disk"):
        assert whole[name] == sum(part[name] for part in parts), name
    assert whole["longest"] == max(part["longest"] for part in parts)
    assert whole["seconds"] == pytest.approx(sum(whole["steps"].values()))


@pytest.mark.parametrize("end", ["stopped", "failed"])
def test_a_part_that_is_not_whole_makes_the_whole_partial(
    folder, tmp_path, lens_command, monkeypatch, end
):
    def analyse(subject, writer, pace):
        if subject.model.chosen != "encoder":
            return None
        if end == "stopped":
            raise KeyboardInterrupt
        return LensError("no section")

    monkeypatch.setattr(runner, "analyse", analyse)
    answer = lens_command(
        "run", "--model", folder / "t5", "--prompts", folder / "sources.txt", "--target",
        folder / "targets.txt", "--out", tmp_path, "--json",
    )  # fmt: skip
    assert (answer.code, answer.json["status"]) == (3, "partial"), answer.err
    made = {open_run(path.parent).meta["model"]["part"] for path in tmp_path.glob("*/run.json")}
    assert made == ({"encoder"} if end == "stopped" else {"encoder", "decoder", "cross"})
    assert (answer.json["error"] is None) == (end == "stopped")


def test_each_part_has_a_whole_run_whose_traces_are_those_of_the_library(runs, folder):
    assert list(runs) == ["encoder", "decoder", "cross"]
    model = lens.load(str(folder / "t5"))
    lines = zip(SOURCES.splitlines(), TARGETS.splitlines(), strict=True)
    traces = lens.capture(model, list(lines), block_size=4, progress=False)
    for part, run in runs.items():
        assert validate(run) == []
        assert run.meta["model"]["name"] == f"t5 ({part})"
        assert run.meta["model"]["layers"] == (3 if part == "encoder" else 2)
        for number, expected in enumerate(traces):
            mine = run.trace(f"p00{number}")
            assert (
                mine.tokens
                == expected[part].tokens
                == run.prompts["token_strings"][number].tolist()
            )
            assert mine.query_tokens == expected[part].query_tokens
            for name in ("block_mass", "received", "entropy"):
                pair = mine.dataset[name].values, expected[part].dataset[name].values
                assert np.abs(pair[0] - pair[1]).max() < 1e-4, name
        losses = [
            float(lens.tasks.language_modelling(model, [pair]).evaluate(model)[0])
            for pair in zip(SOURCES.splitlines(), TARGETS.splitlines(), strict=True)
        ]
        assert run.prompts["loss"].tolist() == pytest.approx(losses, abs=1e-5)
        assert f"t5 ({part})" in (run.path / "report.html").read_text()
    assert runs["cross"].trace("p001").queries != runs["cross"].trace("p001").length


def test_the_page_of_a_cross_head_has_both_strips(runs):
    run = runs["cross"]
    library, trace = Library(run.path.parent), run.trace("p001")
    page = str(render(library, f"/run/{run.id}/head/1/2", "?prompt=p001&query=3"))
    assert "Target: queries of the decoder" in page
    assert "as token 3 of the target sees them" in page
    row = trace.tile(1, 2, (3, 4), (0, trace.length))[0]
    best = int(row.argmax())
    assert f"{best} {trace.tokens[best]!r}: {row[best]:.4g}" in page
    assert f"3 {trace.query_tokens[3]!r} looks most at {trace.tokens[best]!r}" in page
    assert f"The darkest holds {row.max():.1%}, uniform attention {1 / trace.length:.1%}" in page
    mean = trace.select((1, 2))["received"].values / trace.queries
    whole = str(render(library, f"/run/{run.id}/head/1/2", "?prompt=p001"))
    assert f"{best} {trace.tokens[best]!r}: {mean[best]:.4g}" in whole
    wrong = str(render(library, f"/run/{run.id}/head/1/2", "?prompt=p001&query=99"))
    assert "Query 99 is no token of the target" in wrong
    overview = str(render(library, f"/run/{run.id}", ""))
    assert "not scored" not in overview, "of two sequences no head has an induction score"
    assert "value='entropy'" in overview
    assert "not scored" in str(render(library, f"/run/{run.id}", "?metric=induction"))
    atlas = str(render(library, f"/run/{run.id}/atlas", ""))
    assert "8 heads of t5 (cross)" in atlas
    assert "queries of the target go down and keys of the source across" in atlas
    picture = library.atlas(run.id, "p001", "raw")
    assert picture.shape[:2] == (2, 4)
    blocks = trace.dataset["block_mass"].values
    if min(blocks.shape[2:]) >= 4 or max(blocks.shape[2:]) >= 4:
        assert np.allclose(picture, blocks)


def test_a_wrong_map_of_a_cross_trace_is_seen(runs):
    run = runs["cross"]
    trace = run.trace("p000")
    assert trace.cross
    changed = trace.dataset.copy(deep=True).load()
    changed["block_mass"][:] = changed["block_mass"].values[..., ::-1]
    problems = [*_layer(trace, changed.sel(layer=1))]
    assert any("does not add up to received" in one for one in problems)


def test_comparing_two_parts_says_which(runs, lens_command, tmp_path):
    paths = [runs[part].path for part in ("cross", "encoder")]
    answer = lens_command("compare", *paths, "--out", tmp_path)
    assert answer.code == 0, answer.err
    assert "t5 (cross) has 2 layers of 4 heads and t5 (encoder) has 3" in answer.out


def test_a_part_alone_whose_targets_the_model_writes(folder, lens_command, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "Once upon a time", "target": "A cat"}\n')
    for prompts in (folder / "sources.txt", tmp_path / "one.jsonl"):
        answer = lens_command(
            "run", "--model", folder / "t5", "--prompts", prompts, "--part", "decoder", "--dry-run", "--json"
        )  # fmt: skip
        assert answer.code == 0, answer.err
    assert answer.json["prompts"] == 1
    model = lens.load(str(folder / "t5"))
    target = lens.capture(model, ("Once upon a time", "A cat"), progress=False).decoder
    assert answer.json["tokens"] == target.length


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "--copied", "2"), "an encoder-decoder reads sources"),
        (
            ("policies", "--text-name", "lily"),
            "`lens run`, `lens heads`, `lens sinks` and `lens generate` take",
        ),
        (("run", "--audio", "ONE"), "reads input_ids, and --audio is a sound; give --text FILE"),
        (("run", "--image", "nowhere.png"), "no picture "),
        (("run", "--audio", "ONE", "--tokens", "3"), "--tokens cuts texts"),
        (("run", "--audio", "ONE", "--text-name", "lily"), "only one source at a time"),
        (
            ("run", "--prompts", "SOURCES", "--target", "ONE"),
            "has 1 targets and there are 2 sources",
        ),
        (("run", "--text-name", "lily", "--target", "ONE"), "target goes with"),
        (
            ("run", "--text", "ONE", "--target", "ONE", "--tokens", "3"),
            "each --target is of a whole",
        ),
        (("run", "--text", "ONE", "--part", "middle"), "part"),
    ],
)
def test_what_an_encoder_decoder_cannot_have_is_refused(
    folder, words, said, lens_command, tmp_path
):
    (tmp_path / "one.txt").write_text("Once upon a time there was a cat.")
    names = {"SOURCES": folder / "sources.txt", "ONE": tmp_path / "one.txt"}
    answer = lens_command(
        *(names.get(word, word) for word in words),
        "--model",
        folder / "t5",
        "--out",
        tmp_path / "out",
    )
    assert answer.code == 2
    assert said in answer.err
    assert not (tmp_path / "out").exists()


def test_other_models_have_no_parts_and_no_targets(folder, lens_command, tmp_path):
    for words, said in [
        (("--part", "cross", "--model", "text-lm-3l"), "is no encoder-decoder"),
        (("--model", "text-lm-3l", "--target", folder / "targets.txt"), "leave --target out"),
    ]:
        answer = lens_command("run", *words, "--prompts", folder / "sources.txt", "--out", tmp_path)
        assert answer.code != 0
        assert said in answer.err
    MAKE["whisper"]().save_pretrained(tmp_path / "whisper")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, tmp_path / "whisper")
    answer = lens_command(
        "run",
        "--model",
        tmp_path / "whisper",
        "--prompts",
        folder / "sources.txt",
        "--out",
        tmp_path,
    )
    assert answer.code == 2
    assert "reads input_features, and --text is text; give --audio FILE" in answer.err
    answer = lens_command(
        "run", "--model", "text-lm-3l", "--audio", folder / "sources.txt", "--out", tmp_path
    )
    assert answer.code == 2
    assert "text-lm-3l reads text, and --audio is a sound; leave it out" in answer.err
    Image.new("RGB", (8, 8)).save(picture := tmp_path / "a.png")
    answer = lens_command(
        "vision", "--model", "induction-2l", "--image", picture, "--out", tmp_path
    )
    assert answer.code == 2
    assert "induction-2l reads text, and --image is a picture; leave it out" in answer.err
    answer = lens_command("run", "--model", folder / "t5", "--image", picture, "--out", tmp_path)
    assert "reads input_ids, and --image is a picture; give --text FILE" in answer.err


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    """A random Whisper that hears a second, with a feature extractor, and a sound of half a second at 8 kHz."""
    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": 512, "encoder_layers": 2}
    config = transformers.WhisperConfig(
        **sizes, num_mel_bins=8, max_source_positions=50, max_target_positions=30,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder / "w")
    transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(
        folder / "w"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, folder / "w")
    tone = np.sin(np.arange(4000) * 0.7) * 12000
    wavfile.write(folder / "tone.wav", 8000, np.stack([tone, 0 * tone], 1).astype(np.int16))
    (folder / "said.txt").write_text("A cat sat there.\n")
    return folder


def test_a_sound_is_heard_by_the_commands(heard, lens_command, tmp_path):
    answer = lens_command(
        "heads", "--model", heard / "w", "--audio", heard / "tone.wav", "--target", heard / "said.txt",
        "--measures", "ablation/zero,gradient,direct", "--out", tmp_path, "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    runs = [open_run(path) for path in (*answer.json["beside"], answer.json["path"])]
    assert [run.prompts["kind"][0] for run in runs] == ["sound", "text", "sound"]
    assert [set(run.heads["prompt_id"]) for run in runs] == [
        {"sound", "p000"},
        {"text", "p000"},
        {"sound", "p000"},
    ]
    for run in runs:
        assert validate(run) == []
        assert "two" in run.meta["unsupported"]["layers"]
    encoder, _, cross = runs
    trace = cross.trace("p000")
    assert (trace.tokens[:3], trace.length) == (["0.00 s", "0.02 s", "0.04 s"], 50)
    assert trace.attrs["seconds_per_position"] == pytest.approx(0.02)
    model = lens.load(str(heard / "w"))
    samples = resample_poly(
        wavfile.read(heard / "tone.wav")[1].astype(np.float32).mean(1) / 32768, 2, 1
    )
    features = model.processor(samples, sampling_rate=16000, return_tensors="pt")["input_features"]
    own = lens.capture(model, ({"input_features": features}, "A cat sat there."), progress=False)
    for part, run in (("encoder", encoder), ("cross", cross)):
        pair = own[part].block_mass.values, run.trace("p000").block_mass.values
        assert np.abs(pair[0] - pair[1]).max() < 1e-5
    table = cross.section("alignment").tables["heads"].set_index("name")
    expected = lens.traces.alignment(own, at="predicted").table().set_index("name")
    assert np.allclose(table["monotonicity"], expected["monotonicity"][table.index], equal_nan=True)
    scores = cross.section("importance").tables["scores"]
    pair = ({"input_features": features}, own.decoder.dataset["token_id"].values.tolist())
    alone = lens.heads.importance(model.part("cross"), [pair], baseline="zero", progress=False)
    assert np.allclose(
        scores[next(name for name in scores if name.startswith("ablation (zero)"))],
        alone.table().set_index("name")["value"][scores["name"]],
        atol=1e-4,
    )
    page = str(render(Library(tmp_path), f"/run/{cross.id}/head/1/2", "?prompt=p000&query=2"))
    assert "– to –" not in page, "of one sound there is no interval"
    assert "along the sound, in seconds" in page
    row = trace.tile(1, 2, (2, 3), (0, trace.length))[0]
    assert f"The highest moment holds {row.max():.1%}" in page
    figure = lens.figures.token_strip(trace, 1, 2, 2)
    assert np.allclose(figure.data[0].y, row, atol=1e-6)
    assert figure.data[0].x[-1] == pytest.approx(0.98)
    held = json.loads(re.search(r'id="held">(.*?)</script>', trace.view("L1H2").to_html())[1])
    assert held["maps"][0]["config"]["queries"] == trace.query_tokens
    assert held["maps"][0]["config"]["seconds"] == pytest.approx(0.02)
    assert held["maps"][0]["header"]["query"] == [0, trace.queries]


def test_a_picture_is_read_by_the_commands_and_sinks_are_looked_for(
    lens_command, tmp_path, monkeypatch
):
    monkeypatch.setitem(sink_effects.EDITS, "mean_value", lens.edits.Mask([10**6]))
    made("trocr").save_pretrained(tmp_path / "trocr")  # it writes a few tokens
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(
        tmp_path / "trocr"
    )
    pixels = np.random.default_rng(0).integers(0, 255, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    answer = lens_command(
        "sinks", "--model", tmp_path / "trocr", "--image", tmp_path / "a.png", "--part", "cross", "--edits",
        "mask,mean_value", "--amounts", "0,1", "--out", tmp_path / "runs", "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    run = open_run(answer.json["path"])
    assert validate(run) == []
    assert run.prompts["kind"].tolist() == ["picture"]
    assert {"alignment", "detection", "effects", "dose"} <= set(run.sections), run.meta[
        "unsupported"
    ]
    assert "spectrum" in run.meta["unsupported"]
    limits = run.section(
        "effects"
    ).limits  # an edit that cannot be made is named; the section is made
    assert any("The edit mean_value is not made: " in one for one in limits)
    trace = run.trace("p000")
    assert trace.tokens[:3] == ["[CLS]", "0,0", "0,1"]
    rate = run.section("detection").tables["heads"].set_index("name")
    alpha = trace.received.values[..., 0] / trace.queries
    assert np.allclose(rate["alpha"], alpha.ravel(), atol=1e-6)
    model = lens.load(str(tmp_path / "trocr"))
    given = (tmp_path / "a.png", trace.dataset["query_token_id"].values.tolist())
    found = lens.effect(model.part("cross"), [given], lens.edits.Mask("first"), progress=False)
    edits = run.section("effects").tables["edits"]
    mine = edits[((edits["edit"] == "mask") & (edits["condition"] == "edit")).to_numpy()]
    assert mine["delta_loss"].iloc[0] == pytest.approx(
        found.table()["delta_loss"].iloc[0], abs=1e-5
    )
    row = trace.tile(1, 2, (1, 2), (0, trace.length))[0]
    overlay = trace.overlay("L1H2", query=1)
    assert np.allclose(overlay.values[0].ravel(), row[1:], atol=1e-6)
    everyone = trace.overlay("L1H2").values[0].ravel()
    assert np.allclose(everyone, trace.received.values[1, 2, 1:] / trace.queries, atol=1e-6)
    with pytest.raises(lens.LensError, match=r"text looks and the picture is looked at"):
        trace.overlay("L1H2", key=(0, 0))
    page = str(
        render(Library(tmp_path / "runs"), f"/run/{run.id}/head/1/2", "?prompt=p000&query=1")
    )
    assert "Attention of L1H2 on the picture" in page


def test_generate_has_the_model_write_each_target(folder, tmp_path, lens_command):
    asked = ["generate", "--model", folder / "t5", "--prompts", folder / "sources.txt", "--new", 7]
    answer = lens_command(*asked, "--out", tmp_path, "--json")
    assert answer.code == 0, answer.err
    made = [open_run(path) for path in (answer.json["path"], *answer.json["beside"])]
    runs = {run.meta["model"]["part"]: run for run in made}
    assert [problem for run in made for problem in validate(run)] == []
    model = transformers.T5ForConditionalGeneration.from_pretrained(
        folder / "t5", attn_implementation="eager"
    ).eval()
    trace = runs["cross"].trace("p001")
    source = torch.tensor([trace.dataset["token_id"].values.tolist()])
    ids = model.generate(source, max_new_tokens=7, do_sample=False)
    assert trace.dataset["query_token_id"].values.tolist() == ids[0].tolist()
    with torch.no_grad():
        own = model(source, decoder_input_ids=ids, output_attentions=True)
    cross, decoder = torch.cat(own.cross_attentions), torch.cat(own.decoder_attentions)
    entropy = -torch.special.xlogy(cross, cross).sum(-1).mean((0, 1))[:-1]
    for part, column, expected in (
        ("cross", "entropy", entropy),
        ("decoder", "start", decoder[..., 0].mean((0, 1))[:-1]),
    ):
        steps = runs[part].section("generation").tables["steps"].query("prompt_id == 'p001'")
        assert steps[column].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
        assert [*steps["token"]] == lens.load(str(folder / "t5")).token_strings(ids[0, 1:].tolist())
    assert steps["start_uniform"].tolist() == pytest.approx([1 / n for n in range(1, 8)])
    assert "before anything is written" in runs["encoder"].unsupported["generation"]
    refused = lens_command(*asked, "--target", folder / "targets.txt", "--out", tmp_path)
    assert (refused.code, "leave --target out" in refused.err) == (2, True)


def test_one_token_is_told_and_an_end_at_once_is_no_target(folder, tmp_path, lens_command):
    asked = [
        "generate",
        "--prompts",
        folder / "sources.txt",
        "--new",
        1,
        "--part",
        "cross",
        "--json",
    ]
    answer = lens_command(*asked, "--model", folder / "t5", "--out", tmp_path)
    section = open_run(answer.json["path"]).section("generation")
    assert [section.tables["texts"]["tokens"].tolist(), *section.tables["steps"]["step"]] == [
        [1, 1],
        1,
        1,
    ]
    assert not any("nan" in text or "''" in text for text in section.summary)
    shutil.copytree(folder / "t5", tmp_path / "ends")
    settings = json.loads((tmp_path / "ends/generation_config.json").read_text())
    (tmp_path / "ends/generation_config.json").write_text(
        json.dumps(settings | {"eos_token_id": list(range(512))})
    )
    answer = lens_command(*asked, "--model", tmp_path / "ends", "--out", tmp_path)
    run = open_run(answer.json["path"])
    assert "before it wrote a token" in run.unsupported["generation"]


def aligned(table, *rows):
    """Alignment of targets of so many tokens; of the heads those with a monotonicity have an order."""
    values = {"monotonicity": np.tile(table["monotonicity"].to_numpy()[:, None], len(rows))}
    return Alignment(values, None, ((0, 0),) * len(table), "m", None, "read", rows)


def test_the_order_of_a_few_tokens_is_no_headline():
    row = {"name": "L1H1", "monotonicity": 1.0}
    row |= dict.fromkeys(("monotonicity_low", "monotonicity_high"), np.nan)
    table = pd.DataFrame([row, row | {"monotonicity": 0.1}])
    few, many = (parts._aligned(table, aligned(table, count)) for count in (3, 30))
    assert (few, many[0].value) == ((), 1.0)


def test_the_order_of_a_few_tokens_of_two_prompts_is_no_headline():
    """Of 24 heads that look anywhere the best has a tau of 0.8 over two targets of three tokens, by chance."""
    ends = {"monotonicity_low": 0.82, "monotonicity_high": 0.82}
    rows = [{"name": f"L0H{head}", "monotonicity": 0.82 - head / 30, **ends} for head in range(24)]
    table = pd.DataFrame(rows)
    assert parts._aligned(table, aligned(table, 3, 3)) == ()
    assert parts._aligned(table, aligned(table, 30, 30))[0].value == 0.82
    blind = [{**row, "monotonicity": np.nan} for row in rows[1:]]  # look at one key: no order
    table = pd.DataFrame([rows[0], *blind])
    assert parts._aligned(table, aligned(table, 7, 7))
