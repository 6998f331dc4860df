from . import circuits as circuits
from . import edits as edits
from . import figures as figures
from . import heads as heads
from . import mixers as mixers
from . import policies as policies
from . import reading as reading
from . import runs as runs
from . import sinks as sinks
from . import tasks as tasks
from . import vision as vision
from .common.errors import LensError as LensError
from .common.version import __version__ as __version__
from .edits.effects import effect as effect
from .edits.running import edit as edit
from .passes.loading import load as load
from .runs.opening import open as open
from .traces.captures import capture as capture
from .traces.profiles import profile as profile

__all__ = [
    "capture",
    "circuits",
    "edit",
    "edits",
    "effect",
    "heads",
    "load",
    "policies",
    "profile",
    "reading",
    "runs",
    "sinks",
    "tasks",
    "vision",
]
