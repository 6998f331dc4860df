"""The configuration of a run: one model for each command, checked, written, read back, said as a command."""

import shlex
import tomllib
import typing

import pytest
import tomli_w
from lens_analyses.config import (
    CONFIGS,
    WHATS,
    CaptureConfig,
    ModelConfig,
    PromptConfig,
    RunConfig,
    analyses,
    listed,
    load_config,
    make_config,
    models,
    parse_assignments,
    settings_of,
)
from lens_analyses.console import UsageError

from lens.common.errors import LensError
from lens.runs.writer import config_hash


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
        ({"prompts": {"zzz": 3}}, "unknown setting prompts.zzz; known: prompt, text, text_name"),
        ({"prompts": 3}, "prompts is a section, got the value 3"),
        (
            {"prompts": {"tokens": "many"}},
            "prompts.tokens must be an integer of at least 1, got 'many'",
        ),
        (
            {"prompts": {"tokens": True}},
            "prompts.tokens must be an integer of at least 1, got True",
        ),
        ({"prompts": {"tokens": 3.0}}, "prompts.tokens must be an integer of at least 1, got 3.0"),
        ({"model": {"device": ""}}, "model.device must not be empty"),
        ({"model": {"name": "text-lm-3"}}, "unknown model 'text-lm-3'; did you mean 'text-lm-3l'"),
        (
            {"model": {"dtype": "int8"}},
            "model.dtype must be one of float32, float16, bfloat16, float64, got 'int8'",
        ),
        ({"seed": -1}, "seed must be at least 0 and at most 4294967295, got -1"),
        (
            {"prompts": {"tokens": 0, "copied": -1}},
            "got 0; prompts.copied must be at least 0, got -1",
        ),
        ({"capture": {"keep_qk": 1}}, "capture.keep_qk must be true or false, got 1"),
        ({"seed": "x"}, "seed must be an integer of at least 0 and at most 4294967295, got 'x'"),
        ({"prompts": {"tokens": 0}}, "prompts.tokens must be at least 1, got 0"),
        ({"prompts": {"copied": -1}}, "prompts.copied must be at least 0, got -1"),
        ({"prompts": {"copied": 0}}, "no prompt: give a text"),
        (
            {"capture": {"block_size": 0}},
            "capture.block_size must be at least 1 and at most 2147483647, got 0",
        ),
        ({"prompts": {"text": "a", "text_name": "lily"}}, "only one source at a time"),
        ({"prompts": {"text": "a", "windows": 2}}, "it needs prompts.tokens"),
        (
            {"what": "vision", "prompts": {"images": "a", "question": "b"}},
            "prompts.question is asked about pictures that are named",
        ),
        (
            {"prompts": {"batch": "a", "windows": 2, "tokens": 5}},
            "does not go with prompts.batch",
        ),
        (
            {"what": "magic"},
            "what must be one of profile, heads, sinks, redistribute, policies, mixers, explain, vision, examples, generate, patch, circuit, got 'magic'",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(values, message):
    with pytest.raises(UsageError) as refused:
        make_config(values)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("what", "analysis", "message"),
    [
        ("heads", {"n": 1}, "analysis.n must be at least 2, got 1"),
        ("heads", {"task": "iot"}, "unknown task 'iot'; known: induction, ioi"),
        ("heads", {"measures": "ablation/meen"}, "unknown measure 'ablation/meen'; give ablation"),
        ("heads", {"measures": "gradient,,direct"}, "unknown measure ''"),
        ("heads", {"rule": "mask"}, "is a setting of lens sinks and lens redistribute, and lens heads"),
        ("heads", {"rules": "mask"}, "unknown setting analysis.rules; "),
        ("sinks", {"edits": "mask,dorp"}, "unknown edit 'dorp'; known: mask, drop, mean_value"),
        ("sinks", {"amounts": "0,2"}, "analysis.amounts of transfer must be 0..1, got 2"),
        ("sinks", {"rule": "logit_bias", "amounts": "-1"}, "must be 0..1, got -1"),
        ("redistribute", {"rule": "magic"}, "analysis.rule must be one of transfer, mask, drop"),
        ("redistribute", {"rule": "pasta"}, "analysis.rule 'pasta' cannot be run from the command: it"),
        ("redistribute", {"amounts": "0,a"}, "analysis.amounts must be numbers with commas"),
        ("redistribute", {"amounts": "nan"}, "analysis.amounts must be numbers with commas"),
        ("redistribute", {"amounts": "0,0.0"}, "analysis.amounts has no amount other than 0"),
        ("redistribute", {"rule": "learned_sink", "amounts": "-1"}, "of learned_sink must be 0 or more"),
        ("circuit", {"method": "magic"}, "analysis.method must be one of exact, eap, "),
        ("circuit", {"method": "eap", "steps": 9}, "analysis.steps is of integrated gradients, which eap has none of"),
        ("vision", {"phi": "many"}, "analysis.phi must be a number from 0 on, e.g. 20; got 'many'"),
        ("vision", {"n": 9}, "analysis.n takes some of the pictures of --images"),
        ("vision", {"length": 9}, "analysis.length is of texts, and pictures have none"),
        ("circuit", {"steps": 0}, "analysis.steps must be at least 1 and at most 1000, got 0"),
        ("circuit", {"edges": -3}, "analysis.edges must be at least 0, got -3"),
        ("circuit", 3, "analysis is a section, got the value 3"),
        ("profile", {"n": 5}, "the section analysis belongs to `lens heads`"),
    ],
)  # fmt: skip
def test_wrong_settings_of_an_analysis_are_refused(what, analysis, message):
    with pytest.raises(UsageError) as refused:
        make_config({"what": what, "analysis": analysis})
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("rule", "amounts"), [("logit_bias", "-8,2"), ("learned_sink", "0,7"), ("mask", "0, 1")]
)
def test_amounts_have_the_range_of_their_rule(rule, amounts):
    config = make_config({"what": "redistribute", "analysis": {"rule": rule, "amounts": amounts}})
    assert config.analysis.doses == tuple(float(word) for word in amounts.split(","))


def test_labels_are_offered_where_they_are_taken():
    for what in WHATS:
        helps = {one.name: one.help for one in settings_of(CONFIGS[what])}
        takes = what in ("heads", "redistribute", "circuit")
        assert ("labels" in helps.get("analysis.task", "")) == takes, what


def test_words_of_measures_and_edits_are_told_apart():
    heads = make_config({"what": "heads", "analysis": {"measures": "ablation/mean, atp"}})
    assert heads.analysis.measured == (("ablation", "mean"), ("atp", ""))
    assert make_config({"what": "sinks", "analysis": {"edits": "move, drop"}}).analysis.edited == (
        "move",
        "drop",
    )


def test_the_names_of_the_configuration_are_those_of_the_library():
    from lens_analyses.steps.sink_effects import EDITS
    from lens_kernels.dispatch import MODULES

    from lens import tasks
    from lens.circuits.scores.methods import Method as Scoring
    from lens.heads.measures.methods import Baseline, Method

    assert typing.get_args(analyses.Method) == typing.get_args(Scoring)
    assert (typing.get_args(Method), typing.get_args(Baseline)) == (
        listed.MEASURES,
        listed.BASELINES,
    )
    assert tuple(EDITS) == listed.EDITS
    assert typing.get_args(models.Backend) == ("auto", *MODULES)
    assert all(callable(getattr(tasks, task)) for task in analyses.TASKS)


@pytest.mark.parametrize("what", WHATS)
def test_every_setting_says_what_it_is(what):
    found = {one.name: one for one in settings_of(CONFIGS[what])}
    length = "prompts.image" if what == "vision" else "prompts.tokens"
    assert {"what", "seed", "model.name", length, "capture.block_size"} <= set(found)
    assert any(name.startswith("analysis.") for name in found) == (what != "profile")
    assert all(one.help.endswith(".") for one in found.values())
    assert found["what"].default == what
    assert len({one.flag for one in found.values()}) == len(found)
    expected = ("text", None) if what == "vision" else ("integer", 1)
    assert (found[length].kind, found[length].least) == expected


def test_a_file_with_the_settings_of_every_analysis_stays_readable():
    """As written when all analyses shared one section: what says the default of another one is left out."""
    written = {"task": "ioi", "method": "eap-ig", "edits": "mask,drop,mean_value", "steps": 5}
    config = make_config({"what": "heads", "analysis": written})
    assert config == make_config({"what": "heads", "analysis": {"task": "ioi"}})
    assert "method" not in config.as_mapping()["analysis"]
    with pytest.raises(UsageError, match=r"analysis\.steps is a setting of lens circuit, and"):
        make_config({"what": "heads", "analysis": {**written, "steps": 6}})


def test_the_hash_of_a_profile_is_pinned():
    """Folders of earlier runs are found by it."""
    prompts = {"text_name": "lily", "tokens": 40, "windows": 2}
    assert config_hash(make_config({"prompts": prompts}).as_mapping()) == "1467a092"


def test_a_configuration_survives_toml():
    config = RunConfig(
        seed=7,
        model=ModelConfig(name="stories260k", dtype="float64"),
        prompts=PromptConfig(text_name="lily", tokens=31, windows=3, copied=2, copied_length=13),
        capture=CaptureConfig(block_size=17, keep_qk=False),
    )
    mapping = tomllib.loads(tomli_w.dumps(config.as_mapping()))
    assert make_config(mapping) == config


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
    config = load_config(file, {"prompts.tokens": 9, "capture.block_size": 8})
    assert (config.seed, config.prompts.tokens, config.capture.block_size) == (3, 9, 8)
    assert config.prompts.text == "a.txt"


def test_another_text_replaces_the_file_and_its_hash(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[prompts]\ntext = "a.txt"\nsha256 = "00"\n')
    prompts = load_config(file, {"prompts.text_name": "lily"}).prompts
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
        load_config(file, {})


def test_an_override_cannot_enter_a_value(tmp_path):
    with pytest.raises(LensError, match="seed is a value, not a section"):
        load_config(None, {"seed": 3, "seed.deep": 4})


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(),
        RunConfig(prompts=PromptConfig(text_name="lily")),
        RunConfig(
            seed=3,
            model=ModelConfig(name="owner/model", revision="main", dtype="float16", device="cpu"),
            prompts=PromptConfig(text="a b.txt", tokens=12, windows=2, copied=0),
            capture=CaptureConfig(block_size=16, keep_qk=False, backend="torch"),
        ),
        RunConfig(prompts=PromptConfig(batch="p.jsonl", copied_length=3)),
        make_config({"what": "heads", "analysis": {"measures": "gradient,direct", "n": 5}}),
        make_config({"what": "redistribute", "analysis": {"rule": "logit_bias", "amounts": "-8"}}),
        make_config({"what": "circuit", "analysis": {"compare": "a b", "method": "atp*"}}),
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run --copied 2 --tokens many", "--tokens must be an integer of at least 1, got 'many'"),
        ("run --copied 2 --tokens 0", "--tokens must be at least 1, got 0"),
        ("run --copied -2", "--copied must be at least 0, got -2"),
        ("run --copied 2 --seed 1e3", "--seed must be an integer"),
        ("run --copied 2 --dtype int8", "--dtype must be one of float32, float16, bfloat16, float64, got 'int8'"),
        ("run --copied 2 --backend cude", "--backend must be one of auto, triton, cpu, torch"),
        ("run --copied 2 --device abacus", "device 'abacus' cannot be used"),
        ("run --copied 2 --model text-lm-3", "unknown model 'text-lm-3'; did you mean 'text-lm-3l'?"),
        ("run --copied 2 --set capture.blocksize=3", "unknown setting capture.blocksize; did you mean capture.block_size?"),
        ("run --copied 2 --set capture.block_size=x", "capture.block_size must be an integer of at least 1 and at most 2147483647, got 'x'"),
        ("run --copied 2 --set nothing", "--set takes name=value, got 'nothing'"),
        ("run --copied 2 --set analysis.n=5", "the section analysis belongs to `lens heads`"),
        ("run --text-name moby-dik", "unknown text 'moby-dik'; known: moby-dick"),
        ("run --text-name lily --text x.txt", "only one source at a time, got --text and --text-name"),
        ("run --text-name lily --windows 3", "--windows cuts one text into pieces"),
        ("run --text nowhere.txt", "nowhere.txt; give a text file"),
        ("run -c nowhere.toml", "no configuration file nowhere.toml"),
        ("run --text-name moby-dick", "takes 128"),
        ("run --text-name moby-dick --tokens 200", "--tokens 200 is more than the 128"),
        ("run --copied 2 --copied-length 200", "200"),
        ("heads --copied 2 --task nonsense", "unknown task 'nonsense'"),
        ("heads --copied 2 --task nowhere.jsonl", "nowhere.jsonl"),
        ("heads --copied 2 --measures abblation", "unknown measure 'abblation'"),
        ("heads --copied 2 --n 1", "--n must be at least 2, got 1"),
        ("sinks --text-name lily --edits mask,dorp", "unknown edit 'dorp'"),
        ("sinks --text-name lily --amounts 0,3", "--amounts of transfer must be 0..1, got 3"),
        ("sinks --text-name moby-dick --tokens 4", "the text gives 1 window of 4 tokens"),
        ("sinks --text-name moby-dick --tokens 90 --length 60", "the text gives 1 window of 60 tokens"),
        ("run --copied 1000000000", "1,000,000,000 copied prompts of 51 tokens would take about "),
        ("run --copied 2 --copied-length 1000000000", "and 100,000,000 copied tokens: ask for fewer"),
        ("heads --model induction-2l --copied 2 --n 1000000", "1,000,000 prompts of the task would take about "),
        ("run --copied 2 --revision main", "--revision goes with a hub id such as owner/name"),
        ("heads --copied 2 --measures gradient/mean", "the measure 'gradient/mean' does not exist: gradient goes with zero"),
        ("heads --copied 2 --measures atp/zero", "atp goes with counterfactual or resample"),
        ("redistribute --text-name lily --rule pasta", "--rule 'pasta' cannot be run from the command"),
        ("redistribute --text-name lily --rule var", "moves attention to an image"),
        ("redistribute --text-name lily --amounts 0", "--amounts has no amount other than 0"),
        ("redistribute --text-name lily --rule magic", "--rule must be one of transfer"),
        ("redistribute --text-name lily --amounts 0,x", "--amounts must be numbers with commas"),
        ("circuit --method magic", "--method must be one of exact, eap"),
        ("circuit --steps 0 --edges -3", "--steps must be at least 1 and at most 1000, got 0; --edges must be at least 0, got -3"),
        ("circuit --model induction-2l --compare nowhere", "nowhere is no run folder"),
        ("circuit --model induction-2l --task ioi", "reads symbols"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_before_any_work(
    lens_command, tmp_path, monkeypatch, words, message
):
    """Exit code 2, one line, no folder: for a run and for its estimate."""
    monkeypatch.chdir(tmp_path)
    for last in (("--dry-run",), ("--out", "runs")):
        answer = lens_command(*words.split(), *last)
        assert answer.code == 2, answer.err
        said = [line for line in answer.err.splitlines() if not line.startswith("loading ")]
        assert len(said) == 1
        assert message in said[0]
    assert list(tmp_path.iterdir()) == []


def test_what_lens_heads_measures_follows_the_size_of_the_model_unless_it_is_named():
    asked = make_config({"what": "heads"})
    small, large = (asked.fitted(weights).analysis for weights in (1_000_000, 135_000_000))
    assert [by for by, _ in small.measured][:3] == ["ablation"] * 3
    assert [by for by, _ in large.measured] == ["gradient", "attribution", "direct"]
    assert (small.n, large.n) == (32, 8)
    assert "measures" not in asked.as_mapping().get("analysis", {})
    named = make_config({"what": "heads", "analysis": {"n": 20, "measures": "ablation/zero"}})
    assert named.fitted(135_000_000).analysis == named.analysis
    other = make_config({"what": "sinks"})
    assert other.fitted(135_000_000) is other
