"""From files and embedded texts to prompts: cut on request only, and refused with a remedy."""

import json

import pytest
import transformers
from lens_analyses.config import ModelConfig, PromptConfig, RunConfig, make_config
from lens_analyses.inputs import load_model, plan, read_sources
from lens_analyses.steps.subject import window_length, windows_of

import lens
from lens.common.errors import LensError
from lens.models.vocabulary import around
from lens.runs import open_run


@pytest.fixture(scope="module")
def model():
    return lens.load("text-lm-3l")


@pytest.fixture(scope="module")
def stories():
    return lens.load("stories260k")


def prompts_of(model, **prompts):
    config, sources = read_sources(RunConfig(prompts=PromptConfig(**{"copied": 0, **prompts})))
    return plan(model, config, sources)


def test_a_whole_text_keeps_its_tokens(model, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("Call me Ishmael.")
    (prompt,) = prompts_of(model, text=str(file))
    assert prompt.ids == model.encode("Call me Ishmael.")
    assert (prompt.kind, prompt.title, prompt.text) == ("text", "short.txt", "Call me Ishmael.")


def test_a_cut_is_recorded(model):
    (prompt,) = prompts_of(model, text_name="moby-dick", tokens=37)
    whole = model.encode(lens.tasks.text("moby-dick"))
    assert prompt.ids == whole[:37]
    assert prompt.title.endswith(f"first 37 of {len(whole):,} tokens")
    assert lens.tasks.text("moby-dick").startswith(prompt.text)


def test_windows_are_consecutive_and_each_has_the_bos(model):
    whole = model.encode(lens.tasks.text("moby-dick"))
    windows = prompts_of(model, text_name="moby-dick", tokens=11, windows=3)
    assert [len(window.ids) for window in windows] == [11, 11, 11]
    assert all(window.ids[0] == model.bos_id for window in windows)
    assert [token for window in windows for token in window.ids[1:]] == whole[1:31]
    assert windows[1].title.endswith("tokens 10 to 19")


def test_an_advised_number_of_windows_is_as_much_text_and_no_more_than_there_is(model, tmp_path):
    context = model.info.context
    with pytest.raises(LensError, match=f"use --tokens {context}, and --windows 4 for as much"):
        prompts_of(model, text_name="moby-dick", tokens=2 * context, windows=2)
    short = tmp_path / "short.txt"
    short.write_text(model.tokenizer.decode(model.encode(lens.tasks.text("moby-dick"))[1:120]))
    with pytest.raises(LensError, match=f"takes; use --tokens {context}$"):
        prompts_of(model, text=str(short), tokens=9 * context)
    with pytest.raises(LensError, match=r"enough for 1 window of 100 and not for 2"):
        prompts_of(model, text=str(short), tokens=100, windows=2)


def test_pieces_of_an_encoder_keep_what_stands_round_its_text(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{at}" for at in range(40))]
    tokenizer = transformers.BertTokenizer(vocab={word: at for at, word in enumerate(words)})
    config = transformers.BertConfig(
        vocab_size=45, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=64,
    )  # fmt: skip
    model = lens.load(transformers.BertForMaskedLM(config).eval(), tokenizer=tokenizer)
    file = tmp_path / "text.txt"
    file.write_text(" ".join(words[5:]))
    body = list(range(5, 45))
    (first,) = prompts_of(model, text=str(file), tokens=12)
    assert first.ids == [2, *body[:10], 3]
    assert first.text == "w0 w1 w2 w3 w4 w5 w6 w7 w8 w9"
    pieces = prompts_of(model, text=str(file), tokens=12, windows=4)
    assert [piece.ids for piece in pieces] == [
        [2, *body[at : at + 10], 3] for at in (0, 10, 20, 30)
    ]
    assert pieces[1].title.endswith("tokens 10 to 19")
    with pytest.raises(LensError, match="enough for 4 windows of 12 and not for 5"):
        prompts_of(model, text=str(file), tokens=12, windows=5)
    settings = make_config({"what": "heads", "analysis": {"length": 8}}).analysis
    found = windows_of([piece.ids for piece in pieces], around(model), settings)
    assert found == [[2, *body[at : at + 6], 3] for at in (0, 10, 20, 30)]


def test_windows_without_bos_when_the_tokenizer_puts_none(model, tmp_path, monkeypatch):
    file = tmp_path / "text.txt"
    file.write_text("and so it goes and so it went")
    plain = model.encode(file.read_text())[1:]
    monkeypatch.setattr(type(model), "encode", lambda self, text: list(plain))
    windows = prompts_of(model, text=str(file), tokens=5, windows=2)
    assert [token for window in windows for token in window.ids] == plain[:10]


def test_copied_prompts_have_one_seed_each(model):
    config = RunConfig(seed=5, prompts=PromptConfig(copied=3, copied_length=7))
    found = plan(model, config, [])
    assert [prompt.ids for prompt in found] == [
        lens.tasks.copied(model, 7, seed) for seed in (5, 6, 7)
    ]
    assert [prompt.seed for prompt in found] == [5, 6, 7]
    assert {prompt.kind for prompt in found} == {"copied"}
    assert "(seed 6)" in found[1].title


def test_a_batch_has_a_prompt_a_line(model, tmp_path):
    file = tmp_path / "batch.txt"
    file.write_text("The first.\n\n  The second.  \n")
    found = prompts_of(model, batch=str(file))
    assert [(prompt.title, prompt.text) for prompt in found] == [
        ("batch.txt, line 1", "The first."),
        ("batch.txt, line 3", "The second."),
    ]


def test_a_jsonl_batch_has_titles(model, tmp_path):
    file = tmp_path / "batch.jsonl"
    file.write_text('{"text": "One\\ntwo.", "title": "Numbers"}\n{"text": "Three."}\n')
    found = prompts_of(model, batch=str(file))
    assert [(prompt.title, prompt.text) for prompt in found] == [
        ("Numbers", "One\ntwo."),
        ("batch.jsonl, line 2", "Three."),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON: .*each line is an object with a text"),
        ('{"txt": "a"}', 'line 2 has no text; each line must be like {"text"'),
        ('{"text": "  "}', "line 2 has no text"),
        ('["text"]', "line 2 has no text"),
    ],
)
def test_a_broken_line_of_a_batch_is_named(tmp_path, line, message):
    file = tmp_path / "batch.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(LensError, match=message):
        read_sources(RunConfig(prompts=PromptConfig(batch=str(file))))


def test_a_prompt_of_a_batch_that_is_too_long_is_named(model, tmp_path):
    file = tmp_path / "batch.txt"
    file.write_text("short\n" + "long " * 200 + "\n")
    with pytest.raises(LensError, match=r"batch.txt, line 2: the text has \d+ tokens"):
        prompts_of(model, batch=str(file))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; give one with at least one token"),
        (b" \n\t", "is empty"),
        (b"caf\xe9", r"is no UTF-8 text \(byte 3\); convert it first"),
        (None, "no file .*; give a text file, the words themselves with --prompt, or an embedded"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, content, message):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(LensError, match=message):
        read_sources(RunConfig(prompts=PromptConfig(text=str(file))))


def test_words_stand_for_themselves():
    config, sources = read_sources(RunConfig(prompts=PromptConfig(prompt="Call me")))
    assert [(one.title, one.text) for one in sources] == [("Call me", "Call me")]
    assert config.prompts.prompt == "Call me"
    with pytest.raises(LensError, match="--prompt has no words"):
        read_sources(RunConfig(prompts=PromptConfig(prompt=" ")))


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(LensError, match="is no regular file but a folder, pipe or device"):
        read_sources(RunConfig(prompts=PromptConfig(text=str(tmp_path))))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, r"the text has 22,\d+ tokens and text-lm-3l takes 128; --tokens 128 takes the first"),
        ({"tokens": 129}, "--tokens 129 is more than the 128 that text-lm-3l takes"),
        ({"tokens": 100, "windows": 999}, r"enough for \d+ windows of 100 and not for 999"),
        ({"tokens": 1, "windows": 2}, "enough for 0 windows of 1 and not for 2"),
    ],
)
def test_a_text_that_does_not_fit_is_never_cut_silently(model, prompts, message):
    with pytest.raises(LensError, match=message):
        prompts_of(model, text_name="moby-dick", **prompts)


def test_more_tokens_than_the_text_has(stories):
    with pytest.raises(
        LensError, match=r"the text has \d+ tokens of stories260k and --tokens asks"
    ):
        prompts_of(stories, text_name="lily", tokens=511)


def test_the_hash_of_a_file_holds_it_to_its_content(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one")
    config, _ = read_sources(RunConfig(prompts=PromptConfig(text=str(file))))
    assert read_sources(config)[0] == config
    file.write_text("two")
    with pytest.raises(LensError, match=r"text.txt changed since the run was configured .*remove"):
        read_sources(config)


def test_relative_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("one")
    (tmp_path / "mine").mkdir()
    given = RunConfig(model=ModelConfig(name="mine"), prompts=PromptConfig(text="text.txt"))
    config, _ = read_sources(given)
    assert config.prompts.text == str(tmp_path / "text.txt")
    assert config.model.name == str(tmp_path / "mine")


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(LensError, match=f"device '{device}' cannot be used .*see `lens doctor`"):
        load_model(RunConfig(model=ModelConfig(device=device)))


@pytest.mark.parametrize(
    ("lengths", "asked", "expected"),
    [
        ([96] * 6, None, 96),  # --tokens 96 --windows 6
        ([500], None, 128),
        ([96] * 6, 32, 32),
        ([5, 60, 58, 7], None, 58),
        ([5] * 90 + [60], None, 5),  # two windows, and half of all tokens
        ([128], None, 64),  # one text gives two windows
        ([90], None, 45),
        ([5], None, 5),  # which is then refused by its number
    ],
)
def test_windows_are_as_long_as_the_texts_allow(lengths, asked, expected):
    analysis = {} if asked is None else {"length": asked}
    settings = make_config({"what": "heads", "analysis": analysis}).analysis
    texts = [[0, *range(1, length)] for length in lengths]
    assert window_length(texts, ([0], []), settings) == expected


def test_windows_of_texts_shorter_than_the_default_need_no_setting(lens_command, tmp_path):
    words = "sinks --text-name moby-dick --tokens 96 --windows 6 --dry-run --json"
    answer = lens_command(*words.split(), "--out", tmp_path)
    assert answer.code == 0, answer.err


def test_prompts_of_a_file_that_are_left_out_are_named_in_log_warnings_and_report(
    lens_command, tmp_path
):
    """Of nine lines one is left out; three lengths, answers of two tokens and another position are used."""
    middle = ["s5 s3", "s5", "s9 s7 s6", "s12 s13"]
    rows = [
        {
            "clean": f"s{at} s2 {words} s{at}",
            "corrupt": f"s{at + 20} s2 {words} s{at}",
            "correct": "s2",
            "wrong": "s4",
        }
        for at, words in enumerate(middle * 2, 30)
    ]
    rows[1] |= {"correct": "s2 s6", "wrong": "s4 s6"}
    rows[2] |= {"position": -1}
    rows.append(rows[0] | {"corrupt": "s1"})
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    words = f"circuit --model induction-2l --copied 2 --method eap --task {path} --out {tmp_path}"
    answer = lens_command(*words.split(), "--json")
    assert answer.code == 0, answer.err
    said = "1 of 9 prompts of mine.jsonl are left out: line 9: clean has 6 tokens, corrupt 2."
    assert said in answer.err
    run = open_run(answer.json["path"])
    assert run.meta["warnings"] == [said]
    assert said in (run.path / "log.txt").read_text()
    assert said in (run.path / "report.html").read_text()
    assert any("line 9" in limit for limit in run.section("edges").limits)
    assert list(run.unsupported) == ["reading"]  # it sets prompts beside each other token by token
    assert "give prompts of one length" in run.unsupported["reading"]
