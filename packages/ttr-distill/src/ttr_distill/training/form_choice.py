"""Which form of a student is better: the learned one or the one that needs no training."""

from collections.abc import Sequence

from ttr_distill.student.attention import StudentAttention
from ttr_distill.training.replay import ReplaySample
from ttr_distill.training.update import measure_heldout

_WORTH_KEEPING = 0.99


def mean_distance(student: StudentAttention, samples: Sequence[ReplaySample]) -> tuple[float, float]:
    """Measure a student on the held-out queries of samples; call it inside ``training_mode``.

    Args:
        student: Measured where its parameters are.
        samples: At least one.

    Returns:
        Mean cosine distance and mean relative L2 distance.
    """
    device = next(student.parameters()).device
    pairs = [measure_heldout(student, sample.moved(device)) for sample in samples]
    return sum(pair[0] for pair in pairs) / len(pairs), sum(pair[1] for pair in pairs) / len(pairs)


def keep_better_form(student: StudentAttention, samples: Sequence[ReplaySample]) -> tuple[bool, tuple[float, float]]:
    """Leave a student in the better of its two forms; call it inside ``training_mode``.

    Samples of held-out steps judge where there are any. The trained form stays only if its mean cosine distance is at
    least one percent smaller, since less than that may turn around on other prompts.

    Args:
        student: Has a training-free form.
        samples: At least one.

    Returns:
        Whether the trained form was kept, and the distances of the training-free one.

    Raises:
        ValueError: The student has no training-free form.
    """
    initial = student.untrained()
    if initial is None:
        raise ValueError(f"{type(student).__name__} has no training-free form")
    judges = tuple(sample for sample in samples if not sample.trainable) or samples
    trained = {name: value.clone() for name, value in student.state_dict().items()}
    trained_distance, _ = mean_distance(student, judges)
    student.load_state_dict(initial)
    untrained = mean_distance(student, judges)
    kept = trained_distance < _WORTH_KEEPING * untrained[0]
    if kept:
        student.load_state_dict(trained)
    return kept, untrained
