"""Weights on disk: the official number formats, tensor names, loader and exporter."""
