"""Put together what separately trained blocks learned, outside any federation: folders in, a folder out."""

from legolm.composition.build import Composition, compose, plan
from legolm.composition.methods import choose_method

__all__ = ["Composition", "choose_method", "compose", "plan"]
