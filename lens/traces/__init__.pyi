from . import metrics as metrics
from .attentions import from_attentions as from_attentions
from .attentions import from_transformer_lens as from_transformer_lens
from .detector import detect as detect
from .findings import findings as findings
from .recorder import capturing as capturing
from .trace import AttentionTrace as AttentionTrace
from .variance import variance as variance
