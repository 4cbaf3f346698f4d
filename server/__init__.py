"""Thin shells over the engine: command line, HTTP and the page."""
