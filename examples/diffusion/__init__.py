"""Neighborhood attention inside a diffusion transformer of the diffusers library."""
