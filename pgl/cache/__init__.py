"""The volume cache: what ``pgl prepare`` writes, and training reads small blocks from."""
