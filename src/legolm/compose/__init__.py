"""Put together what separately trained blocks learned, outside any federation: folders in, a folder out."""

from legolm.compose.build import Composition, compose, plan
from legolm.compose.methods import METHODS, Method, choose_method

__all__ = ["METHODS", "Composition", "Method", "choose_method", "compose", "plan"]
