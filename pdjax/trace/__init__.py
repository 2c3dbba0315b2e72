"""A loss function becomes equations, and these a line of layers."""
