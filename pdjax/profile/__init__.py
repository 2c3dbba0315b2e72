"""What the layers of a model cost: the value and its files, measuring, estimating.

The value and its files import no JAX.
"""

from pdjax.profile.profile import LayerProfile as LayerProfile
from pdjax.profile.profile import Profile as Profile
