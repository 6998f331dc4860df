from .bootstrap import over_rows as over_rows
from .bootstrap import over_units as over_units
