"""Label maps beside CT: found by layout or by name, checked, resampled, kept in the cache."""
