"""QKV decomposition of transformer language models: the library behind the book.

The core, in the order data flows through it (imports point upward only; a test holds it to that):

    errors, sites            errors that say what to do; names of places in a model
    files, statistics        where things are kept, what an output depends on; intervals and tests
    weights, models          one view of Q, K, V, O, norms and MLP; load and check a model     -> Weights, Model
    facts                    facts, templates, cases                                            -> Fact, Case
    forward                  run a model, or only what changes of it; losses over the vocabulary
    recall                   what is told and what is known                                     -> DataFrame
    static                   input-free diagnostics of every head
    trace                    the exact logit trace of one input                                 -> Capture, LogitTrace
    diagnosis                static and dynamic evidence, and the rule                          -> Diagnosis
    sinks                    one learned position before every text
    edits, training          an edit, checked and restored; how a pathway is trained            -> Edit
    evaluation               side effects and generalisation of edits
    interventions, peers     ablation and patching; Captum and TransformerLens
    results                  report a number once: JSON and prose

Beside it:

    inputs/                  files of facts and YAML as they come, read right or refused; below `facts`
    checkpoints/             where a model's files come from, and whether they are what they say; below `models`
    show/                    figures, tables, sentences: arrays and tables in, things to look at out
    studies/                 what chapters 2 to 9 ask beyond one trace, one edit, one measurement
    sweeps/                  a specification, its runs, where they are kept, and their record; Dask
    dashboard/               every head on one page
    press/                   execute, build, check, claims, PDF, Colab, release, archive, hub
    __main__                 the command line
"""

__version__ = "0.1.0"


def diagnose(model, facts, template, controls=()):  # type: ignore[no-untyped-def]
    """Facts of one's own on a model (a name or a loaded one): what prints as a table, with .repair(pathway) and
    .report(path). controls: other wordings, under which the facts may be known; none: forms chosen by a rule."""
    from lib.press import report

    return report.diagnose(model, facts, template, controls)
