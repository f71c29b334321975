"""What keeps a client's update from the server and its rows from everyone: secure sums, and accounted noise."""

from legolm.privacy.accounting import Budget, gaussian_epsilon, noise_to_signal, sampled_epsilon, sampled_noise, within
from legolm.privacy.noise import clipped, gaussian, norm, with_share

__all__ = [
    "Budget",
    "clipped",
    "gaussian",
    "gaussian_epsilon",
    "noise_to_signal",
    "norm",
    "sampled_epsilon",
    "sampled_noise",
    "with_share",
    "within",
]
