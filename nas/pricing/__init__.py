"""Prices of every candidate of a space, and the one with the least of something (see `pricer`)."""

from nas.pricing.descent import Measure, changed, lowest
from nas.pricing.pricer import PricedBlock, Pricer, Prices, Progress

__all__ = ["Measure", "PricedBlock", "Pricer", "Prices", "Progress", "changed", "lowest"]
