"""Processes of ours beside the one that was started: they crash, hang and end without harm to it."""
