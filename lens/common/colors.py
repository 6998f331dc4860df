"""Colours of every view: viridis for amounts, a blue-white-red scale for signed numbers."""

VIRIDIS = (
    "#440154", "#471365", "#482475", "#463480", "#414487", "#3b528b", "#355f8d", "#2f6c8e",
    "#2a788e", "#25848e", "#21918c", "#1e9c89", "#22a884", "#2fb47c", "#44bf70", "#5ec962",
    "#7ad151", "#9bd93c", "#bddf26", "#dfe318", "#fde725",
)  # fmt: skip
DIVERGING = (
    "#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7",
    "#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f",
)  # fmt: skip

LINE = "#355f8d"
BASELINE = "#8a8f98"
ACCENT = "#c2410c"
CLASSES = ("#1f5a96", ACCENT, "#17663a", "#8a5300", "#7a3e9d", "#5c6773")
INK = "#1c2430"
GRID = "#e5e8ec"


def rgb(colors: tuple[str, ...]) -> list[list[int]]:
    """Red, green and blue of each, 0 to 255."""
    return [[int(color[start : start + 2], 16) for start in (1, 3, 5)] for color in colors]


def scale(colors: tuple[str, ...]) -> list[tuple[float, str]]:
    """A plotly colour scale."""
    return [(index / (len(colors) - 1), color) for index, color in enumerate(colors)]
