"""Tasks made of text: the published prompts come out, and what a tokenizer breaks is left out."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.tasks import colored_objects, docstring, from_jsonl, greater_than, ioi
from lens.tasks.candidates import Candidate, Misfit, following, following_one, make_task
from lens.tasks.colored_objects import SURFACES, _Scene
from lens.tasks.greater_than import _text
from lens.tasks.ioi import TEMPLATES, _fill
from lens.tasks.words import COLORED, COLORS, GIFTS, NAMES, NOUNS, PLACES

PUBLISHED = Path(__file__).parent / "data" / "prompts"


class Pieces:
    """A tokenizer that cuts at a pattern and numbers the pieces as they come."""

    bos_token_id = 0
    all_special_ids = (0,)

    def __init__(self, pattern):
        self._pattern = re.compile(pattern, re.DOTALL)
        self._pieces = ["BOS"]

    def __call__(self, text, verbose=True):
        found = self._pattern.findall(text)
        assert "".join(found) == text
        self._pieces += [piece for piece in dict.fromkeys(found) if piece not in self._pieces]
        return {"input_ids": [0, *map(self._pieces.index, found)]}

    def text(self, ids):
        return "".join(self._pieces[index] for index in ids.tolist() if index)


def reader(pattern):
    return replace(lens.load("induction-2l"), tokenizer=Pieces(pattern), name="pieces")


@pytest.fixture(scope="module")
def by_word():
    """Words of letters are one token, the two digits of a year too."""
    return reader(r" ?[A-Za-z]+| ?\d\d|.")


@pytest.fixture(scope="module")
def by_digit():
    return reader(r" ?[A-Za-z]+|.")


@pytest.fixture(scope="module")
def short_words():
    """Words of more than six letters are several tokens."""
    return reader(r" ?[A-Za-z]{1,6}|.")


def rows(name):
    with (PUBLISHED / name).open(newline="") as file:
        return list(csv.DictReader(file))


def as_pattern(template):
    """What a filled template looks like, its people and things named."""
    pattern, seen = "", set()
    for part in re.split(r"(\[\w+\])", template.removesuffix(" [A]")):
        name = part[1:-1]
        if not part.startswith("["):
            pattern += re.escape(part)
        elif name == "B":
            pattern += r"(?P<s2>\w+)" if "B" in seen else r"(?P<first>\w+)"
        elif name == "A":
            pattern += r"(?P<second>\w+)"
        else:
            pattern += rf"(?P={name})" if name in seen else rf"(?P<{name}>\w+)"
        seen.add(name)
    return pattern


def test_the_published_ioi_prompts_are_ours():
    """Clean, another name (its column `corrupted`) and the indirect object in place of the second S."""
    used = set()
    for row in rows("ioi.csv"):
        found = [
            (template, match)
            for template in TEMPLATES
            if (match := re.fullmatch(as_pattern(template), row["clean"]))
        ]
        assert len(found) == 1
        ((template, match),) = found
        part = match.groupdict()
        s = part["s2"]
        io_first = part["second"] == s
        io = part["first"] if io_first else part["second"]
        things = {name: part[name] for name in ("PLACE", "OBJECT") if name in part}
        assert {io, s} <= set(NAMES)
        assert things.get("PLACE", PLACES[0]) in PLACES
        assert things.get("OBJECT", GIFTS[0]) in GIFTS
        assert _fill(template, things, io, s, s, io_first) == row["clean"]
        assert _fill(template, things, io, s, io, io_first) == row["corrupted_hard"]
        others = {
            name
            for name in NAMES
            if _fill(template, things, io, s, name, io_first) == row["corrupted"]
        }
        assert len(others) == 1
        assert not others & {io, s}
        used.add(template)
    assert len(used) > 3


def test_the_published_years_are_ours():
    for row in rows("greater_than.csv"):
        noun = row["clean"].split()[1]
        century = int(row["clean"][-2:])
        assert noun in NOUNS
        assert _text(noun, century, int(row["label"])) == row["clean"]
        assert _text(noun, century, 1) == row["corrupted"]


def test_the_published_colored_objects_are_ours():
    scene = r"Q: On the (\w+), (there is|you see|I see) (.*?)\. What color is the (\w+)\?\nA:"
    for prompt, answer in json.loads((PUBLISHED / "colored_objects.json").read_text()):
        text, colors_seen = "", []
        for surface, start, items, asked in re.findall(scene, prompt):
            pairs = re.findall(r"an? (\w+) (\w+)", items)
            colors, things = map(list, zip(*pairs, strict=True))
            assert surface in SURFACES
            assert set(colors) <= set(COLORS)
            assert set(things) <= set(COLORED)
            made = _Scene(f"Q: On the {surface}, {start}", colors, things)
            shown = colors[things.index(asked)].capitalize()
            text += f"{made.question(things.index(asked))} {shown}\n"
            colors_seen.append(set(colors))
        assert text.rstrip() == prompt + answer
        assert not colors_seen[0] & colors_seen[1]


def test_ioi_of_one_template(by_word):
    template = TEMPLATES[9]
    places = []
    for templates in ((template,), TEMPLATES):
        marks = ioi(by_word, n=11, seed=3, templates=templates).marks
        places.append({(int(s2 - end)) for s2, end in zip(marks["s2"], marks["end"], strict=True)})
    words = template.removesuffix(" [A]").split()
    assert places[0] == {
        -(len(words) - 1 - max(i for i, word in enumerate(words) if "[B]" in word))
    }
    assert len(places[1]) > 1


@pytest.mark.parametrize("corruption", ["abc", "s2_io", "s2_random"])
def test_ioi(by_word, corruption):
    task = ioi(by_word, n=11, seed=3, corruption=corruption)
    assert (task.n, task.metric, task.name) == (11, "logit_difference", f"ioi ({corruption})")
    assert task.corrupt is not None
    assert task.wrong is not None
    at = torch.arange(task.n)
    io, s1, s2 = (task.clean[at, task.marks[name]] for name in ("io", "s1", "s2"))
    assert torch.equal(io, task.correct[:, 0])
    assert torch.equal(s1, task.wrong[:, 0])
    assert torch.equal(s2, s1)
    assert (task.marks["s1"] < task.marks["s2"]).all()
    assert (task.marks["end"] == task.length - 1).all()
    assert (task.positions == task.length - 1).all()
    changed = (task.clean != task.corrupt).nonzero().tolist()
    names = {
        "abc": ("io", "s1", "s2"),
        "s2_io": ("s2",),
        "s2_random": ("s2",),
    }[corruption]
    assert changed == sorted(
        [row, int(task.marks[name][row])] for name in names for row in range(11)
    )
    put = task.corrupt[at, task.marks["s2"]]
    assert torch.equal(put, io) == (corruption == "s2_io")
    if corruption == "abc":
        people = torch.stack([task.corrupt[at, task.marks[name]] for name in names])
        assert all(
            len({*column.tolist()} | {int(io[row]), int(s1[row])}) == 5
            for row, column in enumerate(people.T)
        )
    io_first = task.marks["io"] < task.marks["s1"]
    assert 0 < io_first.sum() < task.n
    assert len({tuple(row) for row in task.clean.tolist()}) == task.n


def test_draws_are_repeated_by_seed(by_word):
    assert torch.equal(ioi(by_word, 5, 1).clean, ioi(by_word, 5, 1).clean)
    assert not torch.equal(ioi(by_word, 5, 1).clean[0], ioi(by_word, 5, 2).clean[0])


def test_names_of_several_tokens_are_left_out_and_named(short_words):
    task = ioi(short_words, n=7)
    assert task.dropped[0].startswith("names of several tokens: Michael, Christopher, Jessica, ")
    assert "Mary" not in task.dropped[0]
    assert any(
        re.fullmatch(r"\d+ texts of other lengths: most have \d+ tokens", why)
        for why in task.dropped
    )
    assert "dropped; logit_difference" in repr(task)
    drawn = short_words.tokenizer.text(task.clean.flatten())
    assert not {"Michael", "Christopher"} & set(drawn.split())


def test_greater_than_by_two_digits(by_word):
    task = greater_than(by_word, n=13, seed=2)
    assert task.name == "greater-than (two digits)"
    assert task.sets is not None
    text = by_word.tokenizer.text
    for row in range(task.n):
        start = int(text(task.clean[row, task.marks["start"][row]][None]))
        assert start in range(2, 99)
        assert text(task.sets.right[row, 0].clamp(min=0)) == "".join(
            f"{year:02}" for year in range(start + 1, 100)
        )
        assert text(task.sets.wrong[row, 0].clamp(min=0)) == "".join(
            f"{year:02}" for year in range(start + 1)
        )
        assert int(text(task.corrupt[row, task.marks["start"][row]][None])) == 1


def test_greater_than_by_the_tens(by_digit):
    task = greater_than(by_digit, n=13, seed=2)
    assert task.name == "greater-than (tens digit)"
    assert task.sets is not None
    text = by_digit.tokenizer.text
    for row in range(task.n):
        tens = int(text(task.clean[row, task.marks["start"][row]][None]))
        year = re.search(r"year (\d+) to", text(task.clean[row]))
        assert year is not None
        assert int(year[1][2]) == tens > 0
        assert text(task.sets.right[row, 0].clamp(min=0)) == "0123456789"[tens:]
        assert text(task.sets.wrong[row, 0].clamp(min=0)) == "0123456789"[:tens]


def test_colored_objects(by_word):
    task = colored_objects(by_word, n=9, seed=1)
    assert task.corrupt is not None
    text = by_word.tokenizer.text
    for row in range(task.n):
        prompt = text(task.clean[row])
        example, question = prompt.split("\nQ:")
        asked = re.search(r"is the (\w+)\?\nA:$", question)
        assert asked is not None
        colors = {thing: color for color, thing in re.findall(r"an? (\w+) (\w+)[,.]", question)}
        assert text(task.correct[row]).strip().lower() == colors[asked[1]]
        places = [
            task.clean[row, task.marks[name][row]][None] for name in ("right", "wrong", "other")
        ]
        found = [text(place).strip() for place in places]
        assert found[0] == colors[asked[1]]
        assert sorted(found) == sorted(colors.values())
        assert text(task.wrong[row]).strip().lower() == found[1]
        assert (task.clean[row] != task.corrupt[row]).sum() == 1
        assert not set(colors.values()) & set(re.findall(r"an? (\w+) ", example))


def test_docstring(by_word):
    task = docstring(by_word, n=9, seed=1)
    assert (task.metric, task.length) == ("max_logit_difference", task.clean.shape[1])
    assert task.sets is not None
    assert task.corrupt is not None
    text = by_word.tokenizer.text
    for row in range(task.n):
        prompt, corrupt = text(task.clean[row]), text(task.corrupt[row])
        arguments, documented = (
            [
                re.findall(r"\w+", re.findall(r"self, (.*?)\)", kind)[0])
                for kind in (prompt, corrupt)
            ],
            [re.findall(r":param (\w+):", kind) for kind in (prompt, corrupt)],
        )
        assert arguments[0][2:4] == documented[0]
        assert text(task.correct[row]) == f" {arguments[0][4]}"
        assert [arguments[0][place] for place in (0, 1, 5)] == [
            arguments[1][place] for place in (0, 1, 5)
        ]
        assert not {*arguments[0][2:5]} & {*arguments[1], *documented[1]}
        assert not {*arguments[1]} & {*documented[1]}
        assert prompt.endswith("\n    :param")
        wrong = {*arguments[0], *arguments[1], *documented[1]} - {arguments[0][4]}
        assert set(text(task.sets.wrong[row, 0].clamp(min=0)).split()) == wrong


def test_what_a_tokenizer_breaks_is_refused(by_word, short_words):
    with pytest.raises(Misfit, match="' Christopher' is 2 tokens, one was expected"):
        following_one(short_words, "given to", " Christopher")
    with pytest.raises(Misfit, match="'ly' changes how the text before it is split"):
        following(by_word, "sad", "ly")
    letters = reader(r".")
    for make, kind in ((ioi, "names"), (colored_objects, "colors"), (docstring, "names")):
        with pytest.raises(LensError, match=f"has 0 of .* {kind} as single tokens"):
            make(letters)
    with pytest.raises(LensError, match="reads years neither as two digits nor digit by digit"):
        greater_than(reader(r" ?[A-Za-z]+| ?\d{1,3}|."))
    with pytest.raises(LensError, match="n must be a positive integer, got 0"):
        ioi(by_word, n=0)
    with pytest.raises(
        LensError, match="corruption must be one of 'abc', 's2_io', 's2_random', got 'swap'"
    ):
        ioi(by_word, corruption="swap")
    for templates in ((), ("[B] gave [A] a hand",)):
        with pytest.raises(LensError, match="templates must be those of the module"):
            ioi(by_word, templates=templates)


@pytest.mark.parametrize("make", [ioi, colored_objects, docstring])
@pytest.mark.parametrize("name", ["text-lm-3l", "stories260k"])
def test_small_models_are_refused_with_the_reason(make, name):
    with pytest.raises(LensError, match=f"{name} has 0 of .* this task is not for its tokenizer"):
        make(lens.load(name))


@pytest.mark.parametrize("name", ["text-lm-3l", "stories260k"])
def test_small_models_read_years_digit_by_digit(name):
    model = lens.load(name)
    task = greater_than(model, n=6)
    assert task.name == "greater-than (tens digit)"
    assert model.token_strings([int(task.clean[0, -1])])[0].isdigit()
    assert task.evaluate(model).abs().max() < 1


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (
            Candidate("a b", "a c", (" d",), (" e",)),
            "of 36 texts for 'made' only 1 fit pieces, different and of one length, and 3 were asked",
        ),
        (
            Candidate("a b", "a", (" d",), (" e",)),
            "36 were left out because clean and corrupt prompt differ in length",
        ),
        (
            Candidate("a b", "a c", (" d",), (" d",)),
            "36 were left out because a right and a wrong answer are the same token",
        ),
        (
            Candidate("ab c", "ab d", (" e",), (" f",), {"here": "a"}),
            "36 were left out because the place of 'here' is inside a token",
        ),
    ],
)
def test_too_few_prompts_are_refused_with_the_most_frequent_reason(by_word, candidate, message):
    with pytest.raises(LensError, match=message):
        make_task(by_word, "made", 3, 0, lambda _: candidate, metric="logit_difference")


def test_an_answer_with_a_space_is_read_where_it_follows_its_prompt(by_word, tmp_path):
    """Tokenizers of the sentencepiece kind make two tokens of " the" alone and one after a text."""
    model = lens.load("stories260k")
    assert len(model.encode(" the")) == 3  # BOS, a space, the word
    path = tmp_path / "mine.jsonl"
    lines = [
        {"clean": "Lily went to", "correct": " the", "wrong": " a"},
        {"clean": "Lily went to", "correct": " the", "wrong": " the"},
        {"clean": "Lily went to", "correct": " Timothy", "wrong": " the"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    task = from_jsonl(model, path)
    assert task.wrong is not None
    assert model.token_strings(task.correct[:, 0].tolist()) == [
        " the",
        " Tim",
    ]  # " Timothy" begins so
    assert model.token_strings(task.wrong[:, 0].tolist()) == [" a", " the"]
    assert task.dropped == ("line 2: the correct and the wrong answer are the same",)
    path.write_text(json.dumps({"clean": "so sad", "correct": " d", "wrong": "x"}) + "\n")
    assert from_jsonl(by_word, path).dropped == ()
