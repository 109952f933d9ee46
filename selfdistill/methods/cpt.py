"""CPT: continual pre-training on the documents, the baseline for knowledge.

    L = -mean_t log p(w_t | w_<t)

w is the text of a document, as it is; no question is asked.
"""

from __future__ import annotations

from selfdistill.config import TrainConfig
from selfdistill.loss import CrossEntropy
from selfdistill.methods.examples import DocumentRows
from selfdistill.methods.sequences import RowCompletions
from selfdistill.methods.slots import Method


def cpt(config: TrainConfig) -> tuple[Method, ...]:
    """Pieces of documents and cross-entropy."""
    return (Method(rows=DocumentRows(config), sequence=RowCompletions(), loss=CrossEntropy()),)
