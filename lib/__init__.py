"""QKV decomposition of transformer language models: the library behind the book.

The rooms, in the order data flows through them (imports point to earlier rooms only):

    site, errors   how a place in a model is named; errors that say what to do
    weights        one view of Q, K, V, O, norms and MLP         -> Weights
    subjects       load a model under study, with its view       -> Subject
    facts          facts, templates, cases; told and known       -> FactSet, DataFrame
    static         input-free diagnostics of every head
    trace          the exact logit trace of one input            -> Capture, LogitTrace
    diagnosis      static and dynamic evidence                   -> Diagnosis
    closeup        what chapter 2 shows of diagnosed cases, and rival explanations
    edits          save, load, apply and restore, verify         -> Edit
    export         an edit as a Hugging Face folder, and back
    replay         run a model from one layer up, many texts at once
    pathways       retrain one slice of one layer                -> Edit
    compare        six pathways head to head, with controls      -> Edits
    effects        side effects of edits, and what they leave out
    generalise     an edit that should carry over: self-distillation, chosen on selection countries
    crosscheck     the same questions put to Captum, TransformerLens and interventions
    results        report a number once: JSON and prose
    claims         the source page's statements, and what a run makes of each
    known_answers  does this GPT-2 say what others recorded of it?
    figures        arrays -> matplotlib figures
    tables         DataFrames as chapters show them
    runner         execute chapters, build the book, check its numbers
    mathml         Sphinx extension: formulas without network or script
"""

__version__ = "0.1.0"
