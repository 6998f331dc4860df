"""From a folder of a diffusion model to run folders: one for each kind of attention, a prompt for each step."""

import hashlib
import importlib
import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from lens.common.errors import LensError, first_line
from lens.common.files import read_json
from lens.common.results import of_kind
from lens.figures.denoising import denoising_quadrants
from lens.models.tokens import is_special
from lens.passes.denoising import denoiser_of
from lens.runs import open_run
from lens.runs.sections import Section
from lens.runs.writer import find_by_config
from lens.traces.denoised import QUADRANTS, Denoising
from lens.traces.denoising import denoising, texts_read
from lens.traces.metrics import METRICS
from lens.traces.profiles import prompt_table
from lens.traces.store import trace_files
from lens_analyses.config.paths import local
from lens_analyses.console import Output, UsageError, log, refused_as_usage, stoppable
from lens_analyses.making import Making, check_place, check_writable, making, prompt_row
from lens_analyses.provenance import versions
from lens_analyses.report import render
from lens_analyses.runner import Finished, readable
from lens_analyses.scoring import with_pooled
from lens_analyses.steps.columns import defined

_NUMBERED = re.compile(r"text \d+")  # positions of a text that no tokenizer named
_WORDS = 4  # of a text whose maps are drawn, where none are named
_DRAWN_WORDS = 7  # positions of the text that a denoiser alone reads


def execute(
    given: Mapping[str, Any], runs: Path, output: Output, *, again: bool = False
) -> Finished:
    """Run the model and write a run folder for each part of its attention; the last one has the others beside it.

    Raises:
        UsageError: no folder of such a model, or a word that its text has not got.
        LensError: diffusers is not installed, or attention that cannot be reached.
    """
    import torch

    check_place(runs)
    with refused_as_usage():
        folder = _folder(given["name"])
    settings = {**given, "name": str(folder), "sha256": _digest(folder)}
    command = settings.pop("command")
    mapping = {
        "what": "diffusion",
        "diffusion": {k: v for k, v in settings.items() if v is not None},
    }
    run = readable(find_by_config(runs, mapping))
    if run and not again and run.status == "success" and "denoising" in run.sections:
        return Finished(run, list(run.section("denoising").summary), computed=False)
    check_writable(runs)
    log.info("loading %s", folder)
    model = load(folder)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    with (
        stoppable(),
        torch.no_grad(),
        _refused_at_once(model, given["words"]),
        denoising(model, steps=given["capture"], keep_qk=True, text=None) as found,
    ):
        run_steps(model, given)
    whole = found[0]
    words = _words(whole, given["words"])
    order = sorted(whole.parts, key=lambda part: ("cross" in part, "joint" in part))
    done: list[Making] = []
    for number, part in enumerate(order):
        own = mapping if number == len(order) - 1 else {**mapping, "part": part}
        with making(runs, own, _meta(whole, part, given, model, command), again=True) as made:
            _write(whole, part, given, words, made)
        done.append(made)
        if made.run.status != "success":
            break
    last = done[-1]
    return Finished(last.run, last.headline, beside=tuple(one.run for one in done[:-1]))


@contextmanager
def _refused_at_once(model: Any, asked: str | None) -> Iterator[None]:
    """Words that none of the texts can have are refused when the denoiser is called first, before it takes a step.

    Raises:
        UsageError: in the block, as `_words` after it.
    """
    with texts_read(model) as read:

        def check(*_: Any) -> None:
            hook.remove()
            known = {token for tokens in read.values() for token in tokens}
            _check_words([one for one in chosen if not _NUMBERED.fullmatch(one)], known)

        chosen = [] if asked is None else _listed(asked)
        hook = denoiser_of(model).register_forward_pre_hook(check)
        try:
            yield
        finally:
            hook.remove()


def load(folder: Path) -> Any:
    """The pipeline, or the denoiser alone, of a folder; weights as safetensors, no code of the folder's own.

    Raises:
        LensError: diffusers is not installed, or it cannot read the folder.
    """
    try:
        diffusers: Any = importlib.import_module("diffusers")
    except ImportError as error:
        raise LensError(
            "diffusion models need diffusers; get it with `pip install 'attention-lens[diffusers]'`"
        ) from error
    how = {"local_files_only": True, "use_safetensors": True}
    try:
        if (folder / "model_index.json").is_file():
            found: Any = diffusers.DiffusionPipeline.from_pretrained(folder, **how)
            found.set_progress_bar_config(disable=True)
            return found
        name = read_json(folder / "config.json").get("_class_name")
        kind = getattr(diffusers, str(name), None)
        if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
            raise LensError(f"{folder}/config.json names no model of diffusers, but {name!r}")
        return kind.from_pretrained(folder, **how).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise LensError(f"diffusers cannot load {folder}: {first_line(error)}") from error


def run_steps(model: Any, given: Mapping[str, Any]) -> None:
    """All denoising steps: of a pipeline by itself, of a denoiser alone on noise that it takes off evenly."""
    import torch

    draw = torch.Generator("cpu").manual_seed(given["seed"])
    if not isinstance(model, torch.nn.Module):
        takes = inspect.signature(model.__call__).parameters
        size, prompt = given["size"], given["prompt"]
        asked = {"num_inference_steps": given["steps"], "generator": draw, "output_type": "latent"}
        asked |= {"prompt": prompt} if "prompt" in takes else {"class_labels": [0]}
        asked |= {"height": size, "width": size} if size else {}
        try:
            model(**{name: value for name, value in asked.items() if name in takes})
        except LensError:
            raise
        except Exception as error:  # of a pipeline's own code: any kind
            raise LensError(
                f"{type(model).__name__} cannot run prompt={prompt!r} in {given['steps']} steps"
                f"{f' at {size} × {size} pixels' if size else ''}: {type(error).__name__}: {first_line(error)}"
            ) from error
        return
    inputs = _drawn(model, given["size"], draw)
    main = "sample" if "sample" in inputs else "hidden_states"
    for step in range(given["steps"]):
        time = torch.tensor([999.0 * (1 - step / given["steps"])])
        whole = "class_labels" in inputs or main == "sample"
        inputs["timestep"] = time.long() if whole else time
        noise = model(**inputs)[0]
        inputs[main] = inputs[main] - noise[:, : inputs[main].shape[1]] / given["steps"]


def _drawn(model: Any, size: int | None, draw: Any) -> dict[str, Any]:
    """Random inputs of a denoiser, by the names that it takes.

    Raises:
        UsageError: it takes others; then its pipeline is needed.
    """
    import torch

    config, takes = model.config, inspect.signature(type(model).forward).parameters
    channels = config.get("in_channels")
    side = size or config.get("sample_size") or 32
    width = next(
        (
            config.get(name)
            for name in (
                "joint_attention_dim",
                "caption_channels",
                "text_dim",
                "cross_attention_dim",
            )
            if isinstance(config.get(name), int)
        ),
        None,
    )
    if not isinstance(channels, int) or not isinstance(side, int) or "img_ids" in takes:
        raise UsageError(
            f"what {type(model).__name__} reads cannot be drawn at random; give the folder of its whole pipeline"
        )
    sample = torch.randn(1, channels, side, side, generator=draw)
    found: dict[str, Any] = {"sample" if "sample" in takes else "hidden_states": sample}
    if width is not None and "encoder_hidden_states" in takes:
        found["encoder_hidden_states"] = torch.randn(1, _DRAWN_WORDS, width, generator=draw)
    if "pooled_projections" in takes:
        wide = config["pooled_projection_dim"]
        found["pooled_projections"] = torch.randn(1, wide, generator=draw)
    if (
        "class_labels" in takes
        and config.get("num_embeds_ada_norm")
        and "encoder_hidden_states" not in found
    ):
        found["class_labels"] = torch.tensor([0])
    if "added_cond_kwargs" in takes and "sample" not in found:
        found["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return {name: value for name, value in found.items() if name in takes}


def _folder(name: str) -> Path:
    folder = local(name)
    if not any((folder / file).is_file() for file in ("model_index.json", "config.json")):
        raise LensError(
            f"{folder} holds no diffusion model; give the folder of a pipeline (model_index.json) or of a denoiser "
            "(config.json) as diffusers saves it"
        )
    return folder


def _digest(folder: Path) -> str:
    """Of the configuration and the sizes of the weights: another model in the same folder is another run."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json":
            found.update(path.read_bytes())
        elif path.suffix == ".safetensors":
            found.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return found.hexdigest()


def _words(found: Denoising, asked: str | None) -> list[str]:
    """Keys whose maps are drawn.

    Raises:
        UsageError: one that no text has.
    """
    texts = [found.trace(part) for part in found.parts if part.startswith(("cross", "joint"))]
    if asked is None:
        every = list(dict.fromkeys(_text(texts[0]))) if texts else []
        words = [word for word in every if not is_special(word)]
        return (words or every)[:_WORDS]  # of a text without words its tokens
    _check_words(chosen := _listed(asked), {word for trace in texts for word in _text(trace)})
    return chosen


def _listed(words: str) -> list[str]:
    return [word.strip() for word in words.split(",")]


def _check_words(chosen: list[str], known: set[str]) -> None:
    if missing := [word for word in chosen if word not in known]:
        there = (
            f"there are {', '.join(sorted(known)[:12])}"
            if known
            else "it has no words, and positions are text 0, ..."
        )
        raise UsageError(f"no position of the text is called {missing[0]!r}; {there}")


def _text(trace: Any) -> list[str]:
    first, last = trace.attrs["text"] or (0, 0)
    return trace.tokens[first:last]


def _meta(
    found: Denoising, part: str, given: Mapping[str, Any], model: Any, command: str
) -> dict[str, Any]:
    trace = found.trace(part)
    denoiser = getattr(model, "transformer", None) or getattr(model, "unet", None) or model
    weights = list(denoiser.parameters())
    return {
        "title": f"{found.model} ({part}), {len(found.steps)} of {given['steps']} denoising steps",
        "what": "diffusion",
        "command": command,
        "model": {
            "name": f"{Path(given['name']).name} ({part})",
            "class": found.model,
            "layers": max(trace.layers) + 1,
            "attending": list(trace.layers),
            "heads": trace.heads,
            "kv_heads": trace.attrs["kv_heads"],
            "head_dim": int(trace.dataset["q"].shape[-1]),
            "parameters": sum(one.numel() for one in weights),
            "dtype": str(weights[0].dtype).removeprefix("torch."),
            "licence": "unknown",
            "part": part,
        },
        "device": str(weights[0].device),
        "backend": trace.attrs["backend"],
        "block_size": trace.attrs["block_size"],
        "seed": given["seed"],
        "bos": "absent",
        "prompts": {"total": len(found.steps), "done": 0},
        "versions": versions(),
    }


def _write(
    found: Denoising, part: str, given: Mapping[str, Any], words: list[str], made: Making
) -> None:
    """The run of one part: a trace for each step, the table of heads, the section, the report."""
    rows, tables, writer = [], [], made.writer
    for number, step in enumerate(found.steps):
        trace = found.trace(part, step)
        title = f"step {step} of {given['steps']}, timestep {found.timesteps[number]:g}"
        ids = [-1] * trace.length
        row = prompt_row(number, "picture", title, given["prompt"], ids, trace.tokens)
        rows.append(row | {"status": "done", "seconds": 0.0})
        folder = writer.path / "trace" / row["prompt_id"]
        trace.save(folder)
        writer.record(*(f"trace/{folder.name}/{file}" for file in trace_files(folder)))
        tables.append(prompt_table(trace, row["prompt_id"], seed=given["seed"], metrics=METRICS))
    writer.meta["prompts"] = {"total": len(rows), "done": len(rows)}
    writer.table("prompts", pd.DataFrame(rows))
    writer.table("heads", with_pooled(rows, tables, given["seed"]))
    own = replace(found, traces={key: one for key, one in found.traces.items() if key[0] == part})
    denoised = section(own, words, given["seed"])
    writer.record(*denoised.save(writer.path))
    render(open_run(writer.path), status="success").write(writer)
    made.headline = list(denoised.summary)


def section(found: Denoising, words: list[str], seed: int) -> Section:
    """What the steps of one part are: maps of words, quadrants of joint attention, entropy."""
    part = found.parts[0]
    table = found.table().drop(columns="part")
    steps = table.groupby("step", as_index=False)[["entropy", *QUADRANTS]].mean()
    trace = found.trace(part)
    figures = {"entropy": found.plot()}
    drawn = [word for word in words if word in trace.tokens] if trace.attrs["latents"] else []
    for number, word in enumerate(drawn):
        figures[f"word_{number}"] = found.plot(word, part)
    if steps["image_to_text"].notna().any():
        figures["quadrants"] = denoising_quadrants(found)
    heads = _by_head(table)
    return Section(
        name="denoising",
        title="Attention over denoising steps",
        summary=of_kind(found.findings(), "quadrants", "entropy"),
        limits=(
            f"One run of one prompt and one draw of noise (seed {seed}): no interval.",
            "Where a word is looked at is where attention lies, and not that the word made what is there.",
            f"Captured output within {found.check:.0e} of the denoiser's own.",
            *(
                []
                if drawn or not words
                else ["This part has no key of the text, so there are no maps of words."]
            ),
        ),
        columns=defined([table, steps, heads], _COLUMNS),
        configuration={"steps": list(found.steps), "part": part, "words": drawn, "seed": seed},
        tables={"heads": heads, "steps": steps, "each": table},
        figures=figures,
    )


def _by_head(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the steps, and how far entropy goes from the first to the last."""
    of_head = table.groupby(["name", "layer", "head", "module"], sort=False, as_index=False)
    heads = of_head[["entropy", *QUADRANTS]].mean()
    each = table.pivot(index="name", columns="step", values="entropy")  # steps in their order
    change = each.iloc[:, -1] - each.iloc[:, 0]
    return heads.assign(entropy_change=change.loc[heads["name"]].to_numpy())


_COLUMNS = {
    "step": "Number of the denoising step, from 0.",
    "timestep": "What the denoiser was told at it.",
    "layer": "Number among the modules of this part.",
    "head": "Head in the layer, from 0.",
    "name": "The head.",
    "module": "Name of the module in the denoiser.",
    "entropy": "Of a row, nats, mean over rows.",
    "entropy_change": "Entropy at the last step less that at the first.",
    "text_to_text": "Of joint attention: mean mass of rows of the text on keys of the text; missing elsewhere.",
    "text_to_image": "Mean mass of rows of the text on places of the picture.",
    "image_to_text": "Mean mass of places of the picture on keys of the text.",
    "image_to_image": "Mean mass of places of the picture on places of the picture.",
    "keys": "How many keys there are.",
    "text_keys": "How many of them are of the text; 0 where they are not apart.",
}
