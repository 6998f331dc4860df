"""A vision-language model on a picture and a question: segments, visual sinks, knock-out, VAR with its side effects."""

from typing import Any

import pandas as pd

import lens
from lens.common.errors import LensError
from lens.models.sizes import image_token
from lens.passes.inputs import read_prompts
from lens.runs.sections import Section
from lens_analyses.steps.columns import defined
from lens_analyses.steps.subject import Subject

_AMOUNTS = (0.0, 0.3, 0.6)


def chain(subject: Subject) -> Section:
    """From what the tokens are to whether the visual sinks matter, and where their attention can go."""
    model = subject.model
    if image_token(model.model.config) is None:
        raise LensError(
            f"{model.info.class_name} reads no text, so that nothing looks at the picture from outside"
        )
    prompts, _ = read_prompts(model, subject.pictures, whole=True)
    inputs = [prompt.inputs for prompt in prompts]
    tables: dict[str, Any] = {}
    figures, said, left_out = {}, [], []
    kinds = [lens.vision.segments(model, one) for one in inputs]
    tables["segments"] = pd.concat(
        [one.table().assign(prompt=number) for number, one in enumerate(kinds)], ignore_index=True
    )
    said += [one for found in kinds[:1] for one in found.findings()]
    figures["segments"] = kinds[0].plot()
    dims, tau = None, float(subject.settings.phi)
    try:
        dims = lens.sinks.dims(model, inputs[0], tau=tau).dims[:2] or None
    except LensError as reason:
        left_out.append(f"No sink dimensions: {reason}.")
    try:
        knocked = lens.vision.knock_out(
            model, inputs, dims=dims, tau=tau, seed=subject.seed, progress=subject.progress
        )
        tables["knock_out"], figures["knock_out"] = knocked.table(), knocked.plot()
        said += knocked.findings()
        var = lens.edits.Var(lambda at: _image(model, at), dims=dims, tau=tau)
        moved = lens.effect(
            model, inputs, var, amounts=_AMOUNTS, seed=subject.seed, progress=subject.progress
        )
        tables["var"], figures["var"] = moved.table(), moved.plot()
        said += moved.findings()
    except LensError as reason:
        left_out.append(
            f"No {'VAR' if 'knock_out' in tables else 'knock-out and no VAR'}: {reason}."
        )
    columns = defined(tables.values(), _COLUMNS)
    columns |= {
        name: name.replace("_", " ").capitalize() + ", as lens.effect names it."
        for table in tables.values()
        for name in map(str, table.columns)
        if name not in columns
    }
    return Section(
        name="chain",
        title="From the question to the picture",
        summary=tuple(said),
        limits=(
            *left_out,
            "Predictions of the text after the picture are measured; a small effect of hidden sinks does not prove "
            "them irrelevant where the attention went elsewhere.",
        ),
        columns=columns,
        configuration={"dims": list(dims or ()), "tau": tau, "amounts": list(_AMOUNTS)},
        tables=tables,
        figures=figures,
    )


def _image(model: Any, at: Any) -> Any:
    found = lens.vision.segments(model, {"input_ids": at.tokens}, grid=()).mask("image")
    return found.to(at.positions.device)


_COLUMNS = {
    "prompt": "Number of the picture.",
    "kind": "system, image or text.",
    "start": "First token.",
    "tokens": "How many.",
}
