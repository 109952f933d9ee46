"""CPT: continual pre-training on the documents, the baseline for knowledge.

    L = -mean_t log p(w_t | w_<t)

w is the raw text of a document; there are no questions.
"""

from __future__ import annotations

from selfdistill.config import TrainConfig
from selfdistill.loss import CrossEntropy
from selfdistill.methods.examples import DocumentExamples
from selfdistill.methods.sequences import DatasetCompletions
from selfdistill.methods.slots import Method


def cpt(config: TrainConfig) -> tuple[Method, ...]:
    """Chunks of documents and cross-entropy."""
    return (Method(examples=DocumentExamples(config), sequence=DatasetCompletions(), loss=CrossEntropy()),)
