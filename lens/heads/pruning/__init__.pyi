from .curves import curve as curve
from .gates import gate as gate
from .groups import ablate as ablate
from .orders import orders as orders
from .outputs import metrics as metrics
