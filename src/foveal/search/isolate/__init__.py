"""Processes that run code nobody trusts, and the one that they are forked from."""
