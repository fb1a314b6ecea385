"""The folder that a run leaves, read back: what it holds, what it says, how the run is doing."""
