"""Hardware-aware architecture search for text-to-image diffusion networks."""

__version__ = "0.1.0"
