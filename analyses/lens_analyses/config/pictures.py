"""What a run of pictures reads."""

from lens_analyses.config.listed import listed
from lens_analyses.config.settings import Section, Shown, setting


class PictureConfig(Section):
    """Which pictures, and what is asked about them."""

    image: str = setting("", "Picture files, with commas.", shown=Shown(file=True))
    question: str | None = setting(
        None,
        "A text for each picture, of a vision-language model.",
        shown=Shown(flag="--text"),
        min_length=1,
    )
    sha256: str | None = setting(
        None,
        "Of the files that were read, so that a rerun notices others.",
        shown=Shown(file=True, internal=True),
    )

    @property
    def files(self) -> tuple[str, ...]:
        """The files one by one."""
        return tuple(listed(self.image)) if self.image else ()
