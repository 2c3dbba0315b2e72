"""Layers become stages: their passes, their state, their part of the optimizer."""
