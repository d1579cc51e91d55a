"""Train self-supervised and supervised vision networks and measure the geometry of every layer while they learn."""

__version__ = "0.1.0"
