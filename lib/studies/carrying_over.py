"""What finished runs of `repairs` say: the rule that chooses, and what an edit must touch to carry over.

Nothing here runs a model. The rule was written before any held-out country was asked:

    harmless  as many capability probes and working templates are told as before, and on passages, after their first
              tokens, perplexity does not rise by more than BAND (that it falls is no harm)
    chosen    of a case's runs of a pathway, among the harmless ones (among all, where none is), the one that makes most
              selection countries told that are known and untold; of equals, that with the likelier answers
"""

import numpy as np
import pandas as pd

from lib.evaluation import BAND


def harmless(runs: pd.DataFrame) -> pd.Series:
    """Which runs cost no more than they may."""
    kept = [runs[f"{kind}_told"] >= runs[f"{kind}_before"] for kind in ("capability", "working")]
    return kept[0] & kept[1] & (runs.ratio_later <= 1 + BAND)


def chosen(runs: pd.DataFrame) -> pd.DataFrame:
    """The run that the rule chooses for each case and pathway, of those that train."""
    trained = runs[runs.steps > 0]
    worst_last = (-trained.log_probability, -trained.repaired, ~harmless(trained))
    ordered = trained.iloc[np.lexsort([key.to_numpy() for key in worst_last])]
    return ordered.groupby(["case", "pathway"], sort=True).head(1).sort_values(["case", "pathway"], ignore_index=True)
