"""QKV decomposition of transformer language models: the library behind the book.

The rooms, in the order data flows through them (imports point to earlier rooms only):

    site, errors   how a place in a model is named; errors that say what to do
    weights        one view of Q, K, V, O, norms and MLP         -> Weights
    subjects       load a model under study, with its view       -> Model
    inputs         which files an output depends on, and their digests
    experiments    functions that a sweep may run on any machine
    replay         run a model from one layer up, many texts at once
    vocabulary     cross-entropy and divergence over all tokens, the unembedding read once
    facts          facts, templates, cases; told and known       -> FactSet, DataFrame
    static         input-free diagnostics of every head
    trace          the exact logit trace of one input            -> Capture, LogitTrace
    diagnosis      static and dynamic evidence                   -> Diagnosis
    closeup        what chapter 2 shows of diagnosed cases, and rival explanations
    edits          save, load, apply and restore, verify         -> Edit
    noise          what random changes of a slice do to what is told
    export         an edit as a Hugging Face folder, and back
    pathways       retrain one slice of one layer                -> Edit
    compare        six pathways head to head, with controls      -> Edits
    effects        side effects of edits, and what they leave out
    patching       run prompts again from one layer up; give one component what it did elsewhere -> Run
    blind          rules that name the component at fault, given only a subject, facts and templates -> Named
    plants         break a subject at a known place and see whether the rules find it -> a row a plant
    scores         what a table of such rows comes to              -> DataFrames
    generalise     an edit that should carry over: self-distillation, chosen on selection countries
    ceiling        how far an edit of one layer could get, and how far the chosen one gets
    controls       edits at every layer, and at parts of equal size, named or random
    rivals         other ways to make the same facts told, under one protocol
    crosscheck     the same questions put to Captum, TransformerLens and interventions
    results        report a number once: JSON and prose
    cluster        many independent calls, on this machine or on any Dask cluster
    sweep          hundreds of runs of an experiment, kept one by one    -> DataFrame
    contest        what finished sweeps say of layers, parts and rivals
    costs          what the work costs beside other tools, from a kept benchmark
    claims         the source page's statements, and what a run makes of each
    known_answers  does this GPT-2 say what others recorded of it?
    figures        arrays -> matplotlib figures
    tables         DataFrames as chapters show them
    dashboard      every head on one page, before and after each edit -> HTML
    colophon       what a page says of the run behind it
    runner         execute chapters, build the book, check its numbers
    release        repository and tag, and what must agree with them; badges and set-up cells
    snapshot       one archive to deposit, and its check
    publish        edits and dashboard as repositories of a model hub
    colab          what a chapter installs first, in Colab alone
    browser        a headless Chromium without network
    pdf            the built pages as one PDF
    mathml         Sphinx extension: formulas without network or script
    theme          Sphinx extension: tables called tables, no live code
"""

__version__ = "0.1.0"
