"""Damages of run folders, drawn from a seed: to files of every kind, as a crash, an editor, a wrong writer or mischief makes them.

`damage(folder, other, seed)` changes one file of a run folder, and perhaps the sizes that are recorded of it, so that the
damage is met by another check. It says in words what it did.
"""

import json
import os
import random
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w
import transformers
from safetensors.numpy import load_file, save_file

from lens.models.catalogue import KNOWN
from lens.runs.manifest import MANIFEST, write_manifest

ODD: tuple[Any, ...] = (
    *(None, "", "long", "\ud800", "a\x1b[31mb\u202e", "=1+1", "x" * 100_000, "../../etc/passwd"),
    *(0, 1, -1, 2**31, 2**63, 10**400, 0.5, float("nan"), float("inf"), True),
    *(
        [],
        {},
        [None],
        {"a": {}},
        [[1, 2], 3],
        "L99H99",
        "p999",
        "\x00",
        "<script>alert(1)</script>",
    ),
)


def damage(folder: Path, other: Path, seed: int) -> str:
    """Damage one file of a run folder; `other` is another run, whose files may take its place."""
    draw = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    kinds: dict[str, list[Path]] = {}
    for path in files:
        kinds.setdefault(
            path.name if path.name in ("run.json", MANIFEST) else path.suffix, []
        ).append(path)
    kind = draw.choice(sorted(kinds))
    path = draw.choice(kinds[kind])
    own = {".parquet": TABLES, ".safetensors": ARRAYS}.get(
        path.suffix, TEXTS if path.suffix != ".json" else JSON
    )
    word, change = draw.choice([*draw.choices([*own.items()], k=3), draw.choice([*ANY.items()])])
    same = next((p for p in sorted(other.rglob(path.name)) if p.is_file()), None)
    try:
        change(path, draw, same)
    except (ValueError, KeyError, TypeError, pa.ArrowException, OverflowError) as error:
        path.write_bytes(draw.randbytes(99))  # what cannot be written so is garbage
        word += f" ({type(error).__name__})"
    then = draw.choice(["as it is", "as it is", "sizes fitted", "all fitted", "old folder"])
    _fit(folder, then)
    return f"{path.relative_to(folder)}: {word}; {then}"


def _fit(folder: Path, how: str) -> None:
    """Record the sizes as they are now; `all fitted`: the hashes too; `old folder`: without a manifest."""
    if how == "as it is":
        return
    for index in folder.glob("trace/*/trace.json"):
        _entries(
            index, lambda found, at=index.parent: found.update(files=_sizes(at, found["files"]))
        )
    _entries(folder / "run.json", lambda found: found.update(files=_sizes(folder, found["files"])))
    manifest = folder / MANIFEST
    if how == "old folder":
        manifest.unlink(missing_ok=True)
        _entries(folder / "run.json", lambda found: found.pop("manifest", None))
    if how == "all fitted" and manifest.is_file():
        try:
            names = list(json.loads(manifest.read_text())["files"])
            manifest.unlink()
            write_manifest(folder, [name for name in names if (folder / name).is_file()])
        except Exception:  # the manifest is what was damaged
            return


def _sizes(folder: Path, names: Any) -> dict[str, int]:
    return {
        name: os.lstat(folder / name).st_size for name in names if os.path.lexists(folder / name)
    }


def _entries(path: Path, change: Any) -> None:
    try:
        if not path.is_file() or path.stat().st_size > 2**28:  # 3 GB of holes
            return
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))
    except Exception:  # it is what was damaged
        return


def _flip(path, draw, other):
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 3, 64))):
        content[draw.randrange(len(content))] = draw.randrange(256)
    path.write_bytes(content)


def _special(make):
    def change(path, draw, other):
        path.unlink()
        make(path)

    return change


def _sparse(path, draw, other):
    with path.open("r+b") as file:
        file.truncate(3 * 2**30)


ANY: dict[str, Any] = {
    "truncated": lambda path, draw, other: os.truncate(path, draw.randrange(path.stat().st_size)),
    "empty": lambda path, draw, other: path.write_bytes(b""),
    "bytes flipped": _flip,
    "zeros": lambda path, draw, other: path.write_bytes(bytes(path.stat().st_size)),
    "garbage behind": lambda path, draw, other: path.write_bytes(
        path.read_bytes() + draw.randbytes(50)
    ),
    "of another run": lambda path, draw, other: (
        shutil.copy(other, path) if other else path.unlink()
    ),
    "gone": lambda path, draw, other: path.unlink(),
    "a pipe": _special(os.mkfifo),
    "a folder": _special(os.mkdir),
    "a link to a device": _special(lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": _special(lambda path: path.symlink_to(path.name)),
    "a link out of the folder": _special(lambda path: path.symlink_to("/etc/passwd")),
    "3 GB of holes": _sparse,
}


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value; of a long list the first three."""
    found = [at]
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:3])
        if isinstance(value, list)
        else ()
    )
    for name, part in items:
        found += _places(part, (*at, name))
    return found


def _edited(edit):
    def change(path, draw, other):
        found = json.loads(path.read_text())
        places = _places(found)[1:]
        shallow = [place for place in places if len(place) <= 2]
        place = draw.choice(draw.choice((places, shallow)) or [()])
        holder = found
        for name in place[:-1]:
            holder = holder[name]
        edit(holder, place[-1], draw)
        path.write_text(json.dumps(found))

    return change


def _set(holder, name, draw):
    holder[name] = draw.choice(ODD)


def _drop(holder, name, draw):
    del holder[name]


def _double(holder, name, draw):
    if isinstance(holder[name], list):
        holder[name] = holder[name] * 2
    else:
        holder[f"{name}x"] = holder[name]


JSON: dict[str, Any] = {
    "an odd value": _edited(_set),
    "another odd value": _edited(_set),
    "an entry gone": _edited(_drop),
    "an entry twice": _edited(_double),
    "brackets": lambda path, draw, other: path.write_text("[" * draw.choice((100, 900, 1_000_000))),
    "nested": lambda path, draw, other: path.write_text('{"a":' * 500 + "1" + "}" * 500),
    "a list": lambda path, draw, other: path.write_text("[1, 2]"),
    "an object": lambda path, draw, other: path.write_text("{}"),
    "a text of 300 MB": lambda path, draw, other: path.write_text(
        json.dumps({"title": "x" * 300_000_000})
    ),
}


def _other_setting(path, draw, other):
    found = tomllib.loads(path.read_text())
    place = draw.choice(_places(found)[1:])
    holder = found
    for name in place[:-1]:
        holder = holder[name]
    holder[place[-1]] = draw.choice([one for one in ODD if one is not None])
    path.write_text(tomli_w.dumps(found))


TEXTS: dict[str, Any] = {
    "another setting": _other_setting,
    "one more setting": _other_setting,
    "no UTF-8": lambda path, draw, other: path.write_bytes(b"\xff\xfe" + path.read_bytes()),
    "an odd line": lambda path, draw, other: path.write_text(path.read_text() + "\na = = 3\n"),
    "other entries": lambda path, draw, other: path.write_text("prompts = 5\nmodel = [1]\n"),
    "nested brackets": lambda path, draw, other: path.write_text("a = " + "[" * 100_000),
}


def _table(change):
    def apply(path, draw, other):
        table = pd.read_parquet(path)
        change(table, draw, draw.choice([*table.columns])).to_parquet(path, index=False)

    return apply


def _many_rows(path, draw, other):
    table = pq.read_table(path).slice(0, 1)
    column = pa.array(np.zeros(40_000_000, np.int8))
    names = table.column_names
    pq.write_table(pa.table({names[0]: column, **dict.fromkeys(names[1:2], column)}), path)


def _long_text(path, draw, other):
    name = pq.read_schema(path).names[0]
    pq.write_table(pa.table({name: ["x" * 300_000_000]}), path, compression="zstd")


def _repeated_text(path, draw, other):
    name = pq.read_schema(path).names[0]
    pq.write_table(pa.table({name: ["x" * 1_000_000] * 2000}), path, compression="zstd")


def _cells(value):
    return lambda table, draw, name: table.assign(**{name: value})


def _some_cells(table, draw, name):
    table = table.astype({name: object})
    values = [
        draw.choice(ODD[:3] + ODD[8:10] + ODD[14:16]) if draw.random() < 0.3 else one
        for one in table[name]
    ]
    kinds = draw.choice((str, float, int))

    def cast(one):
        try:
            return kinds(one)
        except (TypeError, ValueError):
            return None

    return table.assign(**{name: pd.Series([cast(one) for one in values])})


TABLES: dict[str, Any] = {
    "a column gone": _table(lambda table, draw, name: table.drop(columns=name)),
    "a column of text": _table(_cells("x")),
    "a column of -1": _table(_cells(-1)),
    "a column of NaN": _table(_cells(float("nan"))),
    "a column of nothing": _table(_cells(None)),
    "a column of large numbers": _table(_cells(2**62)),
    "a column of L99H99": _table(_cells("L99H99")),
    "a column of formulas": _table(_cells("=cmd()")),
    "a column of infinity": _table(_cells(float("inf"))),
    "a column mixed up": _table(
        lambda table, draw, name: table.assign(
            **{name: table[name].sample(frac=1, random_state=draw.randrange(99)).to_numpy()}
        )
    ),
    "odd cells": _table(_some_cells),
    "a column renamed": _table(lambda table, draw, name: table.rename(columns={name: "other"})),
    "half of the rows": _table(lambda table, draw, name: table.iloc[::2]),
    "no rows": _table(lambda table, draw, name: table.iloc[:0]),
    "rows twice": _table(lambda table, draw, name: pd.concat([table, table])),
    "one row": _table(lambda table, draw, name: table.iloc[:1]),
    "rows in another order": _table(lambda table, draw, name: table.sample(frac=1, random_state=1)),
    "40 million rows": _many_rows,
    "a text of 300 MB": _long_text,
    "a text 2,000 times": _repeated_text,
}


def _arrays(change):
    def apply(path, draw, other):
        arrays = dict(load_file(path))
        change(arrays, draw.choice(sorted(arrays)), draw)
        save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, path)

    return apply


def _of(function):
    def change(arrays, name, draw):
        arrays[name] = function(arrays[name]).astype(arrays[name].dtype)

    return _arrays(change)


def _as_integers(arrays, name, draw):
    arrays[name] = np.nan_to_num(arrays[name], posinf=0, neginf=0).astype(np.int8)


def _exchanged(path, draw, other):
    beside = draw.choice(sorted(path.parent.glob("layer-*")))
    content = path.read_bytes()
    path.write_bytes(beside.read_bytes())
    beside.write_bytes(content)


ARRAYS: dict[str, Any] = {
    "+ 1": _of(lambda x: x + 1),
    "zeros in an array": _of(lambda x: x * 0),
    "NaN": _of(lambda x: x * np.nan if x.dtype.kind == "f" else x),
    "large": _of(lambda x: x * 0 + 1e30 if x.dtype.kind == "f" else x * 0 + 2**30),
    "heads mixed up": _of(lambda x: x[::-1]),
    "places mixed up": _of(lambda x: x[..., ::-1]),
    "integers": _arrays(_as_integers),
    "cut": _arrays(lambda arrays, name, draw: arrays.update({name: arrays[name][..., :-1]})),
    "an array gone": _arrays(lambda arrays, name, draw: arrays.pop(name)),
    "one more array": _arrays(lambda arrays, name, draw: arrays.update(other=np.ones(3))),
    "layers exchanged": _exchanged,
    "a header of nonsense": lambda path, draw, other: path.write_bytes(
        b"\xff" * 16 + path.read_bytes()
    ),
}


def make_model(folder: Path, seed: int) -> None:
    """A small model with a tokenizer, or one without."""
    if seed % 2:
        shutil.copytree(KNOWN["text-lm-3l"].folder, folder)
        return
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.Qwen3Config(**sizes, head_dim=8)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)


def damage_model(folder: Path, seed: int) -> str:
    """Damage one file of a model folder; most often its configuration."""
    draw = random.Random(seed)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    config, weights = folder / "config.json", next(folder.glob("*.safetensors"))
    path = draw.choice([config, config, weights, draw.choice(files)])
    own = ARRAYS if path == weights else {**JSON, **CONFIG} if path == config else JSON
    word, change = draw.choice([*draw.choices([*own.items()], k=4), draw.choice([*ANY.items()])])
    try:
        change(path, draw, draw.choice(files))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        path.write_bytes(draw.randbytes(99))
        word += f" ({type(error).__name__})"
    return f"{path.name}: {word}"


def _setting(draw_value):
    def change(path, draw, other):
        found = json.loads(path.read_text())
        found |= draw_value(draw, found)
        path.write_text(json.dumps(found))

    return change


def _other_number(draw, found):
    name = draw.choice([name for name, value in found.items() if type(value) in (int, float)])
    return {name: draw.choice((0, -1, 1, 3, 2**16, 2**31, 2**62, 0.5, found[name] + 1))}


CONFIG: dict[str, Any] = {
    "another number": _setting(_other_number),
    "a number of another kind": _setting(_other_number),
    "another class": _setting(
        lambda draw, found: {
            "architectures": draw.choice(
                (
                    ["nn"],
                    ["BertModel"],
                    ["__doc__"],
                    [""],
                    "x",
                    [3],
                    ["AutoTokenizer"],
                    ["PreTrainedModel"],
                )
            )
        }
    ),
    "another type": _setting(
        lambda draw, found: {"model_type": draw.choice(("bert", "t5", "vit", "x", "", 3, "mamba"))}
    ),
    "code of its own": _setting(
        lambda draw, found: {
            "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"},
            "model_type": "own",
        }
    ),
    "attention of its own": _setting(
        lambda draw, found: {"_attn_implementation": draw.choice(("x/y", "flash_attention_3", 3))}
    ),
    "an activation that is none": _setting(
        lambda draw, found: {"hidden_act": draw.choice(("x", 3))}
    ),
    "rotary positions that are none": _setting(
        lambda draw, found: {
            "rope_parameters": draw.choice(({"rope_type": "x"}, 3, {}, {"rope_theta": 0}))
        }
    ),
    "layer types that do not fit": _setting(
        lambda draw, found: {
            "layer_types": draw.choice((["x"] * 3, ["full_attention"], "x", [1, 2]))
        }
    ),
}
