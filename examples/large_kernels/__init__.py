"""Networks of large filters on digits, a photograph and textures."""
