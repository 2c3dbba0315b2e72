"""Several processes, on one host or many, that run one pipeline.

`initialize` brings them together, first among themselves and then in JAX, and watches over them: a
process that is killed, fails, is stopped or cannot be reached ends the others with a message that
names it, instead of leaving them to wait without end. So does, much later, one that runs no Python,
but not one whose main thread alone waits for something that never comes.
"""

from pdjax.distributed.peers import Peers as Peers
from pdjax.distributed.startup import current as current
from pdjax.distributed.startup import initialize as initialize
from pdjax.distributed.startup import is_needed as is_needed
from pdjax.distributed.startup import shutdown as shutdown
