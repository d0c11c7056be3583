"""Checkpoints: what a model is called, where its files come from, and whether they are what they say."""
