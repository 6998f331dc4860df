"""What a run is asked to do: one pydantic model for each command, from flags and TOML, to TOML and to a hash.

The configuration names the run: two runs with the same configuration are the same run, so a command that
was killed finds its own folder again. Flags, TOML and the form of a new job are made from the same fields.
Needs no torch.
"""

from lens_analyses.config.analyses import (
    TASKS,
    CircuitSettings,
    HeadsSettings,
    RedistributeSettings,
    SinksSettings,
)
from lens_analyses.config.models import (
    CONFIGS,
    WHATS,
    CaptureConfig,
    ModelConfig,
    RunConfig,
)
from lens_analyses.config.prompts import PromptConfig
from lens_analyses.config.reading import load_config, make_config, parse_assignments
from lens_analyses.config.settings import Setting, settings_of

__all__ = [
    "CONFIGS",
    "TASKS",
    "WHATS",
    "CaptureConfig",
    "CircuitSettings",
    "HeadsSettings",
    "ModelConfig",
    "PromptConfig",
    "RedistributeSettings",
    "RunConfig",
    "Setting",
    "SinksSettings",
    "load_config",
    "make_config",
    "parse_assignments",
    "settings_of",
]
