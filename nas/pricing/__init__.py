"""Prices of every candidate of a space, and the fastest of them (see `pricer`)."""

from nas.pricing.descent import Predictor, fastest
from nas.pricing.pricer import PricedBlock, Pricer, Prices, Progress

__all__ = ["Predictor", "PricedBlock", "Pricer", "Prices", "Progress", "fastest"]
