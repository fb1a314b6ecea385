"""The figures of ``pgl show``, one file a picture, drawn from plain arrays."""
