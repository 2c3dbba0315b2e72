"""The object that a training loop holds: arguments, decisions, and what is compiled."""
