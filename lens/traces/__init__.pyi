from . import metrics as metrics
from .findings import findings as findings
from .recorder import capturing as capturing
from .trace import AttentionTrace as AttentionTrace
