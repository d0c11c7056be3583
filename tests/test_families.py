"""Every family that the view reads, on small random models: the view, the trace, replay, ablation, edits, export, and
the same questions asked of TransformerLens. `print` of `test_the_table` is the table of all of them."""
