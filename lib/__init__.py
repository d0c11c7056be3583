"""QKV decomposition of transformer language models: the library behind the book.

The rooms, in the order data flows through them (imports point to earlier rooms only):

    site, errors   how a place in a model is named; errors that say what to do
    subjects       load a model under study                      -> Subject
    weights        one view of Q, K, V, O, norms and MLP         -> Weights
    facts          facts, templates, cases; told and known       -> FactSet, DataFrame
    static         input-free diagnostics of every head
    trace          the exact logit trace of one input            -> Capture, LogitTrace
    diagnosis      static and dynamic evidence                   -> Diagnosis
    results        report a number once: JSON and prose
    figures        arrays -> matplotlib figures
    runner         execute chapters, build the book, check its numbers
"""

__version__ = "0.1.0"
