"""Synthetic abdominal CT with labels: for demonstrations, tests and trials without patient data.

The body is a set of level sets in millimetres, bent by smooth random warps and painted one over the other;
`rendering` holds the order, one module draws one part of the body, `scanner` adds what the machine adds.
"""

from .patient import LABELS, Patient
from .rendering import Grid, Phantom, draw_phantom
from .writing import make_phantoms

__all__ = ["LABELS", "Grid", "Patient", "Phantom", "draw_phantom", "make_phantoms"]
