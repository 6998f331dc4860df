"""Words of messages as a page shows them."""

from dash import html


def coded(text: str) -> list[str | html.Code]:
    """A message whose commands stand between backticks, with these as code.

    Example:
        >>> from lens_dashboards.pages.words import coded
        >>> coded("`lens list` shows the runs")
        [Code('lens list'), ' shows the runs']
    """
    parts = [html.Code(part) if i % 2 else part for i, part in enumerate(text.split("`"))]
    return [part for part in parts if part != ""]
