"""What keeps a client's update from the server and its rows from everyone: secure sums by atom, and accounted noise."""

from legolm.privacy.accounting import (
    NOISE,
    Budget,
    gaussian_epsilon,
    noise_to_signal,
    sampled_epsilon,
    sampled_noise,
    within,
)
from legolm.privacy.atoms import Atom, atoms, threshold
from legolm.privacy.client import Opening, Secrets, SecureClient
from legolm.privacy.cohort import Advert, Cohort, Grid, Session, Structure, grid_of, withheld
from legolm.privacy.masks import sent_hashes
from legolm.privacy.noise import BELOW, clipped, deviation, gaussian, norm, with_share
from legolm.privacy.numbers import Scale, bits_for, bounds, noisy, quantize, quantum_range, to_words
from legolm.privacy.primitives import derive, identity_of
from legolm.privacy.server import Opened, SecureServer

__all__ = [
    "BELOW",
    "NOISE",
    "Advert",
    "Atom",
    "Budget",
    "Cohort",
    "Grid",
    "Opened",
    "Opening",
    "Scale",
    "Secrets",
    "SecureClient",
    "SecureServer",
    "Session",
    "Structure",
    "atoms",
    "bits_for",
    "bounds",
    "clipped",
    "derive",
    "deviation",
    "gaussian",
    "gaussian_epsilon",
    "grid_of",
    "identity_of",
    "noise_to_signal",
    "noisy",
    "norm",
    "quantize",
    "quantum_range",
    "sampled_epsilon",
    "sampled_noise",
    "sent_hashes",
    "threshold",
    "to_words",
    "with_share",
    "withheld",
    "within",
]
