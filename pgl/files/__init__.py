"""Files that are written whole or not at all, loaded safely, and by one writer at a time."""
