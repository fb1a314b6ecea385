"""``pgl prepare``: from image files to the volume cache."""
