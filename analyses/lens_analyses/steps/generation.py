"""What heads looked at while the model wrote: the prompt, or what it had written itself."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from lens.common.head_ids import head_columns
from lens.common.results import ends
from lens.figures.columns import column_grid
from lens.figures.generation import written_steps
from lens.runs.headlines import Headline
from lens.runs.sections import Section
from lens.traces.generated import LABEL
from lens.traces.profiles import pooled_table, prompt_table, wide
from lens.traces.trace import AttentionTrace
from lens_analyses.steps.columns import defined
from lens_analyses.steps.subject import Subject


def generation(subject: Subject) -> Section:
    """Each text that was written, token by token, and each head's attention to the prompt meanwhile."""
    names = subject.prompt_ids("text")
    traces = {name: subject.run.trace(name) for name in names}
    tables = [
        prompt_table(trace, name, seed=subject.seed if len(names) == 1 else None, metrics=[LABEL])
        for name, trace in traces.items()
    ]
    pooled = tables[0] if len(tables) == 1 else pooled_table(tables, "text", seed=subject.seed)
    heads = wide(pooled, prompts=len(names))
    heads.insert(0, "name", head_columns(zip(heads["layer"], heads["head"], strict=True))["name"])
    steps = pd.concat([_steps(name, trace) for name, trace in traces.items()], ignore_index=True)
    texts = pd.DataFrame([_text(name, trace) for name, trace in traces.items()])
    found = tuple(_headlines(heads))
    asked = subject.settings
    return Section(
        name="generation",
        title="What heads look at while the model writes",
        summary=(
            *(
                f"{row['prompt_id']}: after {row['prompt']!r} it wrote {row['written']!r}."
                for row in texts.to_dict("records")
            ),
            *(one.text for one in found),
        ),
        limits=(
            "A text that the model wrote itself is likelier to it than one of people: heads may do other things on those.",
            "The trace holds the passes in which the text was written, and one more of its last token.",
            *(("Intervals are over the tokens of one text.",) if len(names) == 1 else ()),
        ),
        columns=defined((texts, heads, steps), _COLUMNS),
        configuration={"new": asked.new, "temperature": asked.temperature, "seed": subject.seed},
        tables={"texts": texts, "heads": heads, "steps": steps},
        figures={"steps": written_steps(steps), "heads": column_grid(heads, LABEL)},
        headlines=found,
    )


def _text(name: str, trace: AttentionTrace) -> dict[str, Any]:
    start = trace.attrs["prompt_tokens"]
    return {
        "prompt_id": name,
        "prompt": _end(trace.tokens[:start]),
        "written": "".join(trace.tokens[start:]),
        "prompt_tokens": start,
        "tokens": trace.length - start,
    }


def _end(tokens: list[str], most: int = 60) -> str:
    """The last characters of a prompt."""
    said = "".join(tokens)
    return said if len(said) <= most else f"…{said[-most:]}"


def _steps(name: str, trace: AttentionTrace) -> pd.DataFrame:
    """Each token that was written, with the mean over heads of what its row has on the prompt."""
    start = trace.attrs["prompt_tokens"]
    mass = trace.match_mass.sel(match=LABEL).values[:, :, start:]
    place = np.arange(start, trace.length)
    uniform = np.mean([_uniform(place, start, trace.window(layer)) for layer in trace.layers], 0)
    return pd.DataFrame(
        {
            "prompt_id": name,
            "step": np.arange(1, len(place) + 1),
            "token": trace.tokens[start:],
            LABEL: mass.mean((0, 1)),
            f"{LABEL}_uniform": uniform,
        }
    )


def _uniform(place: np.ndarray, start: int, window: int | None) -> np.ndarray:
    """Share of the keys that rows see that are of the prompt."""
    first = np.zeros_like(place) if window is None else np.maximum(0, place - window + 1)
    return np.maximum(0, start - first) / (place - first + 1)


def _headlines(heads: pd.DataFrame) -> Iterator[Headline]:
    """The heads that look at the prompt most and least, beside uniform attention; none where masks of the
    model's own leave that unknown."""
    scored = heads.dropna(subset=[LABEL])
    if scored.empty or scored[f"{LABEL}_uniform"].isna().any():
        return
    for row, words in (
        (scored[LABEL].idxmax(), "looks back at the prompt most"),
        (scored[LABEL].idxmin(), "looks back at the prompt least"),
    ):
        one: dict[Any, Any] = scored.loc[[row]].to_dict("records")[0]
        low, high, even = (one[f"{LABEL}_{end}"] for end in ("low", "high", "uniform"))
        yield Headline(
            f"While the model writes, {one['name']} {words}: with {one[LABEL]:.2f}{ends(low, high, '.2f')} of its attention; uniform "
            f"attention would have {even:.2f} there.",
            *(float(one[LABEL]), float(low), float(high), float(even)),
            against="uniform attention",
            figure="heads",
            many=len(scored),
            units=int(one.get("n", 0)),
        )


_COLUMNS = {
    "prompt_id": "Prompt that was written on.",
    "prompt": "In the table texts the end of the prompt; else the share of attention that is on tokens of the prompt, mean over the rows of the tokens that were written.",
    "written": "What the model wrote after it.",
    "prompt_tokens": "Tokens of the prompt.",
    "tokens": "Tokens that were written.",
    "step": "Which of the tokens that were written, from 1.",
    "token": "The token, whose row this is.",
    "prompt_uniform": "The same of a head that looks at all keys that it sees alike.",
    "prompt_sink_excluded": "The same without the first token.",
    "prompt_sink_excluded_uniform": "The same without the first token, of uniform attention.",
    "prompt_sink_excluded_low": "Low end of its 95 % interval.",
    "prompt_sink_excluded_high": "High end of its 95 % interval.",
    "name": "Layer and head.",
    "layer": "Layer, by the model's own number.",
    "head": "Head of the layer, from 0.",
    "prompts": "Texts.",
}
