"""Kernel search: candidates that run confined, a judge that believes none of them, an archive of the best."""
