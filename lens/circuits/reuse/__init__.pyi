from ._overlap import overlap as overlap
from ._redirection import redirect as redirect
from ._transfer import transfer as transfer
