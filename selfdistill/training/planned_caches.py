"""What a planned run keeps for later steps. Call these under the run's autocast, in whose data type it is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from selfdistill.data import Demonstration, pictures_in
from selfdistill.model import KEPT_BYTES, FilledCache, LoadedModel, TeacherRule
from selfdistill.training.traced_step import PlannedPart


def contexts_bytes(
    networks: Mapping[TeacherRule, LoadedModel], stages: list[list[PlannedPart]], rows: int, limit: int
) -> int:
    """Bytes of the cached contexts: one per row, with the average length of the longest rows.

    Args:
        networks: frozen teachers, of fake tensors.
        stages: with the longest rows.
        rows: number of all rows.
        limit: of each teacher, in bytes.
    """
    total = 0
    for rule, network in networks.items():
        tasks = [parts[0] for parts in stages if parts[0].method.teacher == rule]
        lengths = [len(x.teacher_ids or []) for task in tasks for x in task.examples]
        total += min(sum(lengths) * rows * FilledCache(network).token_bytes // len(lengths), limit)
    return total


def features_bytes(
    loaded: LoadedModel, stages: list[list[PlannedPart]], rows: Sequence[Demonstration], towers: int
) -> int:
    """Bytes of the kept features of all pictures, each as large as on average in the longest rows.

    Args:
        loaded: the model, of fake tensors.
        stages: with the longest rows.
        rows: all rows.
        towers: vision towers that read the pictures.
    """
    examples = [x for parts in stages for part in parts for x in part.examples]
    some = {picture.digest: picture for x in examples for picture in pictures_in(x.student_ids)}
    if loaded.pictures is None or not some:
        return 0
    total = sum(loaded.pictures.feature_bytes(loaded.model, picture) for picture in some.values())
    count = len({picture.digest for row in rows for picture in row.images})
    return min(towers * total * count // len(some), KEPT_BYTES)
