"""Figures, tables and sentences: arrays and DataFrames in, things to look at out. Nothing here runs a model."""
