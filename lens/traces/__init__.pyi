from . import metrics as metrics
from .detector import detect as detect
from .findings import findings as findings
from .recorder import capturing as capturing
from .trace import AttentionTrace as AttentionTrace
from .variance import variance as variance
