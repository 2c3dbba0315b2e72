"""The machines: the value, which imports no JAX, and measuring their links."""

from pdjax.topology.topology import Level as Level
from pdjax.topology.topology import Topology as Topology
