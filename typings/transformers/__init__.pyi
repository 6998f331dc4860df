"""The names of transformers that this project uses, each from where it is written: the library's own list reads 3,000 files."""

from transformers.configuration_utils import PreTrainedConfig as PreTrainedConfig
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.generation.configuration_utils import GenerationConfig as GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteria as StoppingCriteria
from transformers.generation.stopping_criteria import StoppingCriteriaList as StoppingCriteriaList
from transformers.masking_utils import AttentionMaskInterface as AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface as AttentionInterface
from transformers.modeling_utils import PreTrainedModel as PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig as AutoConfig
from transformers.models.auto.feature_extraction_auto import (
    AutoFeatureExtractor as AutoFeatureExtractor,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor as AutoImageProcessor
from transformers.models.auto.modeling_auto import AutoModelForCausalLM as AutoModelForCausalLM
from transformers.models.auto.modeling_auto import AutoModelForSeq2SeqLM as AutoModelForSeq2SeqLM
from transformers.models.auto.processing_auto import AutoProcessor as AutoProcessor
from transformers.models.auto.tokenization_auto import AutoTokenizer as AutoTokenizer
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

class WhisperFeatureExtractor(SequenceFeatureExtractor):
    """Its own file imports from the library's list."""

    def __init__(self, feature_size: int = ..., sampling_rate: int = ...) -> None: ...
