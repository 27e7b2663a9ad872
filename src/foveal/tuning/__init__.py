"""Tile sizes, warps and stages: shipped tables and how they are looked up."""
