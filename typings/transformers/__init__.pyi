"""The names of transformers that this project uses, each from where it is written: the library's own list reads 3,000 files."""

from os import PathLike
from typing import Any

from transformers.configuration_utils import PreTrainedConfig as PreTrainedConfig
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.generation.configuration_utils import GenerationConfig as GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteria as StoppingCriteria
from transformers.generation.stopping_criteria import StoppingCriteriaList as StoppingCriteriaList
from transformers.masking_utils import AttentionMaskInterface as AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface as AttentionInterface
from transformers.modeling_utils import PreTrainedModel as _PreTrainedModel
from transformers.models.bit.image_processing_pil_bit import (
    BitImageProcessorPil as BitImageProcessorPil,
)
from transformers.models.dinov2.configuration_dinov2 import Dinov2Config as Dinov2Config
from transformers.models.llama.configuration_llama import LlamaConfig as LlamaConfig
from transformers.models.whisper.configuration_whisper import WhisperConfig as WhisperConfig
from transformers.tokenization_utils_tokenizers import (
    PreTrainedTokenizerFast as PreTrainedTokenizerFast,
)

__version__: str

class _Auto:
    """What it makes is not written there, and to find nothing out takes seconds."""

    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], *inputs: Any, **options: Any) -> Any: ...

class AutoFeatureExtractor(_Auto): ...
class AutoImageProcessor(_Auto): ...
class AutoProcessor(_Auto): ...
class AutoTokenizer(_Auto): ...

class AutoModelForCausalLM(_Auto):
    _model_mapping: Any

class AutoModelForSeq2SeqLM(_Auto):
    _model_mapping: Any

class AutoConfig:
    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], **options: Any) -> PreTrainedConfig: ...
    @staticmethod
    def register(model_type: str, config: type[PreTrainedConfig], exist_ok: bool = ...) -> None: ...

class PreTrainedModel(_PreTrainedModel):
    def post_init(self) -> None:
        """What it returns is not written there, and to find it out the list is read after all."""

class WhisperFeatureExtractor(SequenceFeatureExtractor):
    """Its own file imports from the library's list."""

    def __init__(self, feature_size: int = ..., sampling_rate: int = ...) -> None: ...
