from ._flow import flow_routes as flow_routes
from ._hisp import hisp as hisp
from ._positions import positions as positions
from ._sae_codes import codes as codes
from .methods import Hybrid as Hybrid
