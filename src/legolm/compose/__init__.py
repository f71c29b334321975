"""Put together what separately trained blocks learned, outside any federation: folders in, a folder out."""

from legolm.compose.build import Composition, compose, plan
from legolm.compose.methods import choose_method

__all__ = ["Composition", "choose_method", "compose", "plan"]
