"""Runs schedules on devices."""
