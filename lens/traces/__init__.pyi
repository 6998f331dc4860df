from . import metrics as metrics
from .capturing import capture as capture
from .findings import findings as findings
from .profiles import profile as profile
from .recorder import capturing as capturing
from .trace import AttentionTrace as AttentionTrace
from .trace import TraceWriter as TraceWriter
