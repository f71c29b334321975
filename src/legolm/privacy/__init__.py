"""What keeps a client's update from the server: secure sums by atom. Public data, clients and server apart."""

from legolm.privacy.atoms import Atom, atoms, least, threshold, withheld
from legolm.privacy.client import Opening, Secrets, SecureClient
from legolm.privacy.cohort import Advert, Cohort, Grid, Session, Structure, grid_of
from legolm.privacy.primitives import derive, identity_of
from legolm.privacy.quantize import bits_for, bounds, quantize, quantum_range, to_words
from legolm.privacy.server import Opened, SecureServer

__all__ = [
    "Advert",
    "Atom",
    "Cohort",
    "Grid",
    "Opened",
    "Opening",
    "Secrets",
    "SecureClient",
    "SecureServer",
    "Session",
    "Structure",
    "atoms",
    "bits_for",
    "bounds",
    "derive",
    "grid_of",
    "identity_of",
    "least",
    "quantize",
    "quantum_range",
    "threshold",
    "to_words",
    "withheld",
]
