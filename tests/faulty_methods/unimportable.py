"""Fails while it is imported, unlike a module that is not there."""

net = 1 / 0
