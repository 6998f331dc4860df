from .a_shape import AShape as AShape
from .base import Full as Full
from .base import Policy as Policy
from .block_sparse import BlockSparse as BlockSparse
from .block_transformer import GlobalToLocal as GlobalToLocal
from .chunks import Hierarchical as Hierarchical
from .chunks import Landmark as Landmark
from .chunks import LongHeads as LongHeads
from .duo import from_gates as from_gates
from .evaluating import evaluate as evaluate
from .files import as_json as as_json
from .files import read as read
from .files import write as write
from .flex_prefill import FlexPrefill as FlexPrefill
from .grids import Grid as Grid
from .grids import Regions as Regions
from .indexer import Indexer as Indexer
from .maps import maps as maps
from .minference import minference as minference
from .native import NativeSparse as NativeSparse
from .oracle import LargestEntry as LargestEntry
from .oracle import Oracle as Oracle
from .oracle import RandomBlocks as RandomBlocks
from .per_head import PerHead as PerHead
from .quest import Quest as Quest
from .routing import Routing as Routing
from .running import run as run
from .searching import search as search
from .seer import Seer as Seer
from .sparge import Sparge as Sparge
from .sparsifiner import Sparsifiner as Sparsifiner
from .stability import stability as stability
from .strided import Strided as Strided
from .trained import Trained as Trained
from .training import load_trained as load_trained
from .training import train as train
from .transferring import transfer as transfer
from .vertical_slash import VerticalSlash as VerticalSlash
from .xattention import XAttention as XAttention

__all__ = [
    "AShape",
    "BlockSparse",
    "FlexPrefill",
    "Oracle",
    "PerHead",
    "Quest",
    "RandomBlocks",
    "Sparge",
    "VerticalSlash",
    "XAttention",
    "evaluate",
    "run",
    "search",
    "train",
    "transfer",
]
