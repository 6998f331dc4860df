"""A vision-language model on a picture and a question: segments, visual sinks, knock-out, and what moves their attention.

What VAR, ACT and PASTA change is measured on the predictions of the text (prefill) at several doses, and on the words that
the model goes on with (decoding); overlays show the answer's row before and after.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

import lens
from lens.common.errors import LensError
from lens.common.results import of_kind
from lens.edits.clean_runs import CleanRuns
from lens.edits.language import Edit
from lens.models.loaded import LoadedModel
from lens.models.sizes import image_token
from lens.passes.inputs import Prompt, read_prompts
from lens.runs.sections import Section
from lens.stats.verdicts import mean_told
from lens.traces.overlays import Overlay
from lens.traces.segments import Segments
from lens.vision.knocking import visual_phi
from lens_analyses.config.listed import listed
from lens_analyses.steps.columns import defined
from lens_analyses.steps.sinks import COLUMNS
from lens_analyses.steps.subject import Subject
from lens_analyses.steps.vision_headlines import of_flow, of_sinks

_CALLED = {"flow": "Flow", "knock_out": "Knock-out", "image_centric": "VAR"}
_WRITTEN = 8  # tokens that the model goes on with
_Move = Edit | Callable[[Prompt], Edit]  # of all prompts, or of each its own


def chain(subject: Subject) -> Section:
    """From what the tokens are to whether the visual sinks matter, and where their attention can go."""
    model = subject.model
    if image_token(model.model.config) is None:
        raise LensError(
            f"{model.info.class_name} reads no text, so that nothing looks at the picture from outside"
        )
    prompts, _ = read_prompts(model, subject.pictures, whole=True)
    kinds = [lens.vision.segments(model, one.inputs) for one in prompts]
    made = _Made()
    made.tables["segments"] = pd.concat(
        [one.table().assign(prompt=number) for number, one in enumerate(kinds)], ignore_index=True
    )
    made.figures["segments"] = kinds[0].plot()
    tau = float(subject.settings.phi)
    dims = _dims(model, prompts[0], tau, made)
    made.tables["sinks"] = _sinks(model, prompts, kinds, dims, tau)
    inputs = [_answered(model, *one, made) for one in zip(prompts, kinds, strict=True)]
    options: dict[str, Any] = {"seed": subject.seed, "progress": subject.progress}
    flow = made.take("flow", lambda: lens.vision.text_flow(model, inputs, **options))
    hidden = made.take(
        "knock_out", lambda: lens.vision.knock_out(model, inputs, dims=dims, tau=tau, **options)
    )
    doses = subject.settings.doses
    for name in listed(subject.settings.edits):
        edit = _edit_of(name, model, dims, tau, subject.settings.emphasise)
        made.take(
            name, lambda edit=edit: lens.effect(model, inputs, edit, amounts=doses, **options)
        )
        made.take_table(
            f"{name}_decoding",
            lambda edit=edit: _decoding(model, prompts, edit, doses, subject.seed),
        )
    made.take_table("image_centric", lambda: _centric(model, prompts, dims, tau))
    try:
        _before_and_after(model, prompts[0], kinds[0], dims, tau, made)
    except LensError as reason:
        made.left_out.append(f"No overlay before and after: {reason}.")
    return Section(
        name="chain",
        title="From the question to the picture",
        summary=(*made.said, *kinds[0].findings()),
        limits=(
            *dict.fromkeys(made.left_out),
            "Predictions of the text after the picture are measured; a small effect of hidden sinks does not prove "
            "them irrelevant where the attention went elsewhere.",
            "Overlays after VAR are what it makes of the attention that this layer has without it; what the same edit "
            "in earlier layers changes is in the doses, not in the overlay.",
        ),
        columns=defined(made.tables.values(), COLUMNS | _COLUMNS),
        configuration={
            "dims": list(dims or ()),
            "tau": tau,
            "amounts": list(doses),
            "edits": subject.settings.edits,
        },
        tables=made.tables,
        figures=made.figures,
        headlines=(*of_flow(flow), *of_sinks(hidden)),
    )


class _Made:
    """Tables, figures and sentences so far, and what could not be had."""

    def __init__(self) -> None:
        self.tables: dict[str, pd.DataFrame] = {}
        self.figures: dict[str, Any] = {}
        self.said: list[str] = []
        self.left_out: list[str] = []

    def take(self, name: str, compute: Callable[[], Any]) -> Any:
        """A result with its figure and sentences, or the reason why there is none; its limits are those of the section."""
        try:
            found = compute()
        except LensError as reason:
            self.left_out.append(f"No {name.replace('_', ' ')}: {reason}.")
            return None
        self.tables[name], self.figures[name] = found.table(), found.plot()
        limits = {"limit", *getattr(found, "missing", ())}
        for one in found.findings():
            to = self.left_out if one.kind in limits else self.said
            to.append(f"{_CALLED.get(name, name.upper())}: {one}")
        return found

    def take_table(self, name: str, compute: Callable[[], tuple[pd.DataFrame, list[str]]]) -> None:
        """A table with its sentences, or the reason why there is none."""
        try:
            self.tables[name], said = compute()
        except LensError as reason:
            self.left_out.append(f"No {name.replace('_', ' ')}: {reason}.")
            return
        called = name.removesuffix("_decoding")
        self.said += [f"{_CALLED.get(called, called.upper())}: {one}" for one in said]


def _dims(model: LoadedModel, prompt: Prompt, tau: float, made: _Made) -> tuple[int, ...] | None:
    try:
        return tuple(lens.sinks.dims(model, prompt.inputs, tau=tau).dims[:2]) or None
    except LensError as reason:
        made.left_out.append(f"No sink dimensions: {reason}.")
        return None


def _answered(
    model: LoadedModel, prompt: Prompt, kind: Segments, made: _Made
) -> dict[str, torch.Tensor]:
    """What is run to measure predictions of the text: the prompt, with the model's own answer where its question has none.

    A question that is seen both ways (PaliGemma's prefix, token type 0) has no next token to predict; what the model writes
    after it (token type 1) has.
    """
    inputs = prompt.inputs
    if "token_type_ids" not in inputs:
        return inputs
    try:
        hides = CleanRuns(model).of(prompt).hides
    except LensError:
        hides = torch.zeros(1, dtype=torch.bool)
    if hides is None or bool((hides & kind.mask("text")[0][:-1]).any()):
        return inputs
    with torch.no_grad():
        ids = model.model.generate(
            **inputs,
            max_new_tokens=_WRITTEN,
            do_sample=False,
            pad_token_id=0,
            suppress_tokens=[image_token(model.model.config)],
        )
    made.left_out.append(
        f"The question is seen both ways, so that its tokens are not predicted: what is measured are the {_WRITTEN} tokens "
        "at most that the model itself answers."
    )
    more = torch.ones_like(ids[:, inputs["input_ids"].shape[1] :])
    grown = {"input_ids": ids}
    for name in ("attention_mask", "token_type_ids"):
        if name in inputs:
            grown[name] = torch.cat([inputs[name], more.to(inputs[name])], 1)
    return inputs | grown


def _sinks(
    model: LoadedModel,
    prompts: list[Prompt],
    kinds: list[Segments],
    dims: tuple[int, ...] | None,
    tau: float,
) -> pd.DataFrame:
    """Where the visual sinks are: a row per prompt, layer and sink, and one for a layer without any."""
    rows = []
    for number, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True)):
        size = visual_phi(model, prompt, dims)
        grids = [one for one in kind.grids if one[0] == 0]
        for layer, values in enumerate(size):
            base = {"prompt": number, "layer": layer, "largest_phi": float(values.max())}
            for place in (values >= tau).nonzero()[:, 0].tolist() or [None]:
                cell = _cell(grids, place)
                own = np.nan if place is None else float(values[place])
                rows.append(
                    base | {"position": place, "row": cell[0], "column": cell[1], "phi": own}
                )
    return pd.DataFrame(rows).astype({"position": "Int64", "row": "Int64", "column": "Int64"})


def _cell(grids: list[Any], place: int | None) -> tuple[int | None, int | None]:
    """Row and column of an image token in its grid."""
    for _, first, height, width in grids:
        if place is not None and first <= place < first + height * width:
            return divmod(place - first, width)
    return None, None


def _edit_of(
    name: str, model: LoadedModel, dims: tuple[int, ...] | None, tau: float, words: str | None
) -> _Move:
    """VAR, ACT or PASTA; PASTA emphasises words of the question, or the picture."""
    if name == "var":
        return _var(model, dims, tau)
    if name == "act":
        return lens.edits.Act()
    return lambda prompt: lens.edits.Pasta([_span(model, prompt, words)])


def _var(model: LoadedModel, dims: tuple[int, ...] | None, tau: float) -> lens.edits.Var:
    return lens.edits.Var(lambda at: _image(model, at), dims=dims, tau=tau)


def _span(model: LoadedModel, prompt: Prompt, words: str | None) -> tuple[int, int]:
    """Positions of the words in a prompt, or of its picture.

    Raises:
        LensError: the prompt has no such words.
    """
    kind = lens.vision.segments(model, prompt.inputs, grid=())
    if words is None:
        places = kind.mask("image")[0].nonzero()[:, 0].tolist()
        return places[0], places[-1] + 1
    ids = prompt.ids or []
    asked = model.tokenizer(words, add_special_tokens=False)["input_ids"]
    spaced = model.tokenizer(f" {words}", add_special_tokens=False)["input_ids"]
    for wanted in (asked, spaced):
        for start in range(len(ids) - len(wanted) + 1):
            if wanted and ids[start : start + len(wanted)] == list(wanted):
                return start, start + len(wanted)
    raise LensError(
        f"the question holds no {words!r} as tokens of its own; --emphasise other words"
    )


def _decoding(
    model: LoadedModel, prompts: list[Prompt], edit: _Move, doses: tuple[float, ...], seed: int
) -> tuple[pd.DataFrame, list[str]]:
    """What the model goes on with at each dose, greedily, the edit running in every step.

    `same` is the share of tokens that are those without the edit, of the longer of the two: either may end earlier.
    """
    rows: list[dict[str, Any]] = []
    for number, prompt in enumerate(prompts):
        own = edit(prompt) if callable(edit) else edit
        plain: list[int] = []
        for amount in sorted({0.0, *doses}):
            at = [] if amount == 0 else [own.at(amount)]
            with torch.no_grad(), lens.edit(model, *at):
                written = model.model.generate(
                    **prompt.inputs, max_new_tokens=_WRITTEN, do_sample=False, pad_token_id=0
                )[0].tolist()
            ids = written[prompt.inputs["input_ids"].shape[1] :]
            plain = ids if amount == 0 else plain
            same = sum(a == b for a, b in zip(ids, plain, strict=False))
            text = "" if model.tokenizer is None else model.tokenizer.decode(ids)
            rows.append(
                {
                    "prompt": number,
                    "amount": amount,
                    "written": text or " ".join(map(str, ids)),
                    "same": same / max(1, len(ids), len(plain)),
                }
            )
    table = pd.DataFrame(rows)
    most = table[(table["amount"] == table["amount"].max()).to_numpy()]
    return table, [
        f"decoding with it at {table['amount'].max():g} keeps {mean_told(most['same'].to_numpy(), seed, '.0%')} of the tokens, "
        f"{_WRITTEN} at most, that the model writes without it (n = {len(prompts)})."
    ]


def _centric(
    model: LoadedModel, prompts: list[Prompt], dims: tuple[int, ...] | None, tau: float
) -> tuple[pd.DataFrame, list[str]]:
    """Which heads VAR calls image-centric, at prefill."""
    parts, said = [], []
    for number, prompt in enumerate(prompts):
        with torch.no_grad(), lens.edit(model, _var(model, dims, tau)) as (done,):
            model.model(**prompt.inputs)
        found = done.selection()
        parts.append(found.table().assign(prompt=number))
        which = f"prompt {number}: " if len(prompts) > 1 else ""
        said += [f"{which}{one}" for one in of_kind(found.findings(), "selected")]
    return pd.concat(parts, ignore_index=True), said


def _before_and_after(
    model: LoadedModel,
    prompt: Prompt,
    kind: Segments,
    dims: tuple[int, ...] | None,
    tau: float,
    made: _Made,
) -> None:
    """The answer's row on the picture in the layer with most visual sinks, before and after VAR."""
    sinks = made.tables["sinks"]
    own = sinks[((sinks["prompt"] == 0) & sinks["position"].notna()).to_numpy()]
    var = _var(model, dims, tau)
    layers = [
        layer for layer in var.settings.layers(model.info.layers) if (own["layer"] == layer).any()
    ]
    if not layers or not kind.grids:
        raise LensError("no layer that VAR edits has a visual sink")
    layer = int(own[own["layer"].isin(layers)]["layer"].mode().iloc[0])
    trace = lens.capture(model, prompt.inputs, keep_qk=True, progress=False)
    found = trace.overlay(f"L{layer}", query=-1)
    image, last = kind.mask("image")[0].numpy(), trace.length - 1
    sink = np.zeros(len(image), bool)
    sink[own[(own["layer"] == layer).to_numpy()]["position"].astype(int)] = True
    rows = np.stack([trace.tile(layer, head, (last, last + 1), (0, last + 1))[0] for head in range(trace.heads)])  # fmt: skip
    after = moved_rows(rows, image, sink, var)
    _, first, height, width = kind.grids[0]
    values = after[:, first : first + height * width].mean(0).reshape(1, height, width)
    both: Overlay = replace(
        found,
        values=np.concatenate([found.values, values]),
        elsewhere=np.append(found.elsewhere, 1 - values.sum()),
        names=(f"L{layer}", f"L{layer} after VAR"),
    )
    made.figures["before_and_after"] = both.plot()
    changed = int((np.abs(after - rows).max(-1) > 0).sum())
    made.said.append(
        f"In layer {layer} VAR changes the last row of {changed} of {len(rows)} heads; visual sinks go from "
        f"{rows[:, sink & image].sum(-1).mean():.1%} to {after[:, sink & image].sum(-1).mean():.1%} of it, the rest of the "
        f"image from {rows[:, image & ~sink].sum(-1).mean():.1%} to {after[:, image & ~sink].sum(-1).mean():.1%}."
    )


def moved_rows(
    rows: np.ndarray, image: np.ndarray, sink: np.ndarray, var: lens.edits.Var
) -> np.ndarray:
    """Rows [..., keys] after VAR: image-centric ones give a share of what sinks hold to the other image keys, pro rata."""
    receives = image & ~sink
    visual, held = rows[..., image].sum(-1), rows[..., receives].sum(-1)
    gives = rows[..., sink].sum(-1)
    sizes = map(torch.as_tensor, (visual, held, image.sum()))
    centric = var.settings.is_centric(*sizes).numpy() & (held > 0)
    move = np.where(centric, var.settings.moved, 0.0)
    factor = np.ones(rows.shape)
    factor[..., sink] = (1 - move)[..., None]
    factor[..., receives] = (1 + move * gives / np.where(held > 0, held, 1))[..., None]
    return rows * factor


def _image(model: Any, at: Any) -> Any:
    found = lens.vision.segments(model, {"input_ids": at.tokens}, grid=()).mask("image")
    return found.to(at.positions.device)


_COLUMNS = {
    "prompt": "Number of the picture.",
    "kind": "system, image or text.",
    "start": "First token.",
    "tokens": "How many.",
    "layer": "Layer, by the model's own number.",
    "head": "Head of the layer, from 0.",
    "name": "Layer and head.",
    "largest_phi": "Largest phi of an image token in what enters the layer.",
    "position": "Token of the sink.",
    "row": "Of the sink on the picture, in patches.",
    "column": "Of the sink on the picture, in patches.",
    "phi": "Size of the sink dimensions over the root mean square.",
    "route": "What the text's edges are cut to: the image, what comes before it (system), random tokens of the image "
    "(image_part), or as many of no image (other_part).",
    "excess": "What it changes (in the flow kl, else delta_loss) less what the control does.",
    "text_rows": "Rows of text that were looked at.",
    "visual_rows": "Those with enough attention on the image.",
    "selected_rows": "Those that were image-centric.",
    "share": "Image-centric of all rows of text.",
    "keys": "Tokens whose edges are cut, or keys or heads that are edited.",
    "mass": "Share of the attention of these rows or heads that these tokens held, or that the heads gave to the first one.",
    "condition": "The edit, or a control: the same done to others.",
    "n": "Number of prompts.",
    "written": "What the model goes on with, greedily.",
    "same": "Share of these tokens that are those without the edit, of the longer of the two.",
}
