"""The inference service: what runs on the GPU hosts, installable on its own."""

__version__ = "0.1.0"
