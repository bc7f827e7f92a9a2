"""Protocols: scale, data, backbones and default variants of a comparison, and the data that they bring."""
