"""The chief sentences of pictures: each a number beside its baseline."""

from collections.abc import Iterator

import numpy as np

from lens.runs.headlines import Headline
from lens.traces.overlays import Overlay
from lens.vision.knocking import KnockOut
from lens.vision.rings import Shapes
from lens.vision.routes import TextFlow


def strongest(title: str, name: str, found: Overlay) -> Iterator[Headline]:
    """Of the map that is most on one patch: how many times what uniform attention has there."""
    values = np.nan_to_num(found.values).reshape(len(found.names), -1)
    times = values.max(-1) / values.mean(-1)
    best = int(times.argmax())
    row, column = np.unravel_index(int(values[best].argmax()), found.values.shape[1:])
    yield Headline(
        f"{title}, {found.names[best]}, {found.what}: the patch ({row}, {column}) has {times[best]:.1f} times what it has "
        "under uniform attention.",
        *(float(times[best]), np.nan, np.nan),
        baseline=1.0,
        against="uniform attention",
        figure=name,
    )


def crossing(title: str, name: str, found: Shapes) -> Iterator[Headline]:
    """The head with the largest share in its own row and column."""
    table = found.table()
    best = table.iloc[int(np.nanargmax(table["criss_cross"].to_numpy()))]
    ends = (float(best[f"criss_cross{end}"]) for end in ("", "_low", "_high"))
    fair = float(best["criss_cross_uniform"])
    yield Headline(
        f"{title}: {best['name']} keeps {best['criss_cross']:.0%} of its attention on patches in the row and column of the "
        f"patch that looks, uniform attention {fair:.0%}.",
        *ends,
        baseline=fair,
        against="uniform attention",
        figure=f"{name}_shapes",
    )


def of_flow(found: TextFlow | None) -> Iterator[Headline]:
    """Image tokens beside as many others, where the text depends on the image most."""
    if found is None:
        return
    at = int(found.kl[0].mean(-1).argmax())
    rows = found.table().set_index("route")
    part, others = rows.loc["image_part"].iloc[at], rows.loc["other_part"].iloc[at]
    if np.isfinite([part["kl"], others["kl"]]).all():
        yield Headline(
            f"In layer {found.layers[at]} the text's predictions move by {part['kl']:.3g} nats (KL) without "
            f"{part['keys']:.3g} random tokens of the image, without as many others by {others['kl']:.3g}.",
            *(float(part[f"kl{end}"]) for end in ("", "_low", "_high")),
            baseline=float(others["kl"]),
            against="as many other tokens",
            figure="flow",
        )


def of_sinks(found: KnockOut | None) -> Iterator[Headline]:
    """The visual sinks hidden, beside as many random tokens of the image."""
    if found is None:
        return
    rows = {str(row["condition"]): row for row in found.table().to_dict("records")}
    own, other = rows["edit"], float(rows["size"]["delta_loss"])
    yield Headline(
        f"Without its visual sinks ({own['mass']:.0%} of its attention) the text's loss changes by {own['delta_loss']:+.3g} "
        f"nats a token, without as many random tokens of the image by {other:+.3g}.",
        *(float(own[f"delta_loss{end}"]) for end in ("", "_low", "_high")),
        baseline=other,
        against="as many random image tokens",
        figure="knock_out",
    )
