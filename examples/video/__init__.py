"""Non-local means on video, as three-dimensional neighborhood attention."""
