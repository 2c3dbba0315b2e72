"""The parts of `python -m pdjax.train`."""
