"""The configuration of a run: checked, written, read back, and said as a command line."""

import shlex
import tomllib

import pytest
import tomli_w
from lens_analyses.config import (
    CaptureConfig,
    ModelConfig,
    PromptConfig,
    RunConfig,
    parse_assignments,
)

from lens.common.errors import LensError


def test_defaults_are_a_copied_run_of_the_embedded_model():
    config = RunConfig()
    assert config.model.name == "text-lm-3l"
    assert config.prompts.copied == 4
    assert config.capture.keep_qk is True


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "unknown setting modle; did you mean model"),
        ({"prompts": {"token": 3}}, "unknown setting prompts.token; did you mean prompts.tokens"),
        ({"prompts": {"zzz": 3}}, "unknown setting prompts.zzz; known: text, text_name"),
        ({"prompts": 3}, "prompts is a section, got the value 3"),
        ({"prompts": {"tokens": "many"}}, "prompts.tokens must be an integer, got 'many'"),
        ({"prompts": {"tokens": True}}, "prompts.tokens must be an integer, got True"),
        ({"capture": {"keep_qk": 1}}, "capture.keep_qk must be true or false, got 1"),
        ({"seed": "x"}, "seed must be an integer, got 'x'"),
        ({"prompts": {"tokens": 0}}, "prompts.tokens must be at least 1, got 0"),
        ({"prompts": {"copied": -1}}, "prompts.copied must be 0 or more, got -1"),
        ({"prompts": {"copied": 0}}, "no prompt: give a text"),
        ({"capture": {"block_size": 0}}, "capture.block_size must be at least 1, got 0; e.g. 64"),
        ({"prompts": {"text": "a", "text_name": "b"}}, "only one source of text at a time"),
        ({"prompts": {"text": "a", "windows": 2}}, "it needs prompts.tokens"),
        (
            {"prompts": {"batch": "a", "windows": 2, "tokens": 5}},
            "does not go with prompts.batch",
        ),
        (
            {"what": "magic"},
            "what must be one of profile, heads, sinks, redistribute, circuit, got 'magic'",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(values, message):
    with pytest.raises(LensError, match=message.replace("(", r"\(")):
        RunConfig.from_mapping(values)


def test_a_configuration_survives_toml():
    config = RunConfig(
        seed=7,
        model=ModelConfig("stories260k", dtype="float64"),
        prompts=PromptConfig(text_name="lily", tokens=31, windows=3, copied=2, copied_length=13),
        capture=CaptureConfig(block_size=17, keep_qk=False),
    )
    mapping = tomllib.loads(tomli_w.dumps(config.as_mapping()))
    assert RunConfig.from_mapping(mapping) == config


def test_assignments_are_toml_or_plain_words():
    found = parse_assignments(["a.b=3", "c=true", "d=word", "e='3'", "f=x=y"])
    assert found == {"a.b": 3, "c": True, "d": "word", "e": "3", "f": "x=y"}


@pytest.mark.parametrize("assignment", ["a.b", "=3"])
def test_an_assignment_needs_a_name_and_a_value(assignment):
    with pytest.raises(LensError, match="--set takes name=value, got"):
        parse_assignments([assignment])


def test_overrides_go_on_top_of_the_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('seed = 3\n[prompts]\ntext = "a.txt"\nsha256 = "00"\ntokens = 5\n')
    config = RunConfig.load(file, {"prompts.tokens": 9, "capture.block_size": 8})
    assert (config.seed, config.prompts.tokens, config.capture.block_size) == (3, 9, 8)
    assert config.prompts.text == "a.txt"


def test_another_text_replaces_the_file_and_its_hash(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[prompts]\ntext = "a.txt"\nsha256 = "00"\n')
    prompts = RunConfig.load(file, {"prompts.text_name": "lily"}).prompts
    assert (prompts.text, prompts.text_name, prompts.sha256) == (None, "lily", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no configuration file"), ("a = ", "cannot read the configuration")],
)
def test_a_file_that_cannot_be_read(tmp_path, content, message):
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(LensError, match=message):
        RunConfig.load(file, {})


def test_an_override_cannot_enter_a_value(tmp_path):
    with pytest.raises(LensError, match="seed is a value, not a section"):
        RunConfig.load(None, {"seed": 3, "seed.deep": 4})


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(),
        RunConfig(prompts=PromptConfig(text_name="lily")),
        RunConfig(
            seed=3,
            model=ModelConfig("some folder/model", revision="main", dtype="float16", device="cpu"),
            prompts=PromptConfig(text="a b.txt", tokens=12, windows=2, copied=0),
            capture=CaptureConfig(block_size=16, keep_qk=False, backend="torch"),
        ),
        RunConfig(prompts=PromptConfig(batch="p.jsonl", copied_length=3)),
    ],
)
def test_the_command_line_makes_the_same_configuration(config, lens_command, monkeypatch):
    seen = []

    def remember(settings):
        seen.append(settings)
        raise LensError("enough")

    monkeypatch.setattr("lens_analyses.estimate.estimate", remember)
    words = shlex.split(config.command())
    assert words[0] == "lens"
    answer = lens_command(*words[1:], "--dry-run")
    assert "enough" in answer.err, answer.err
    assert seen == [config]
