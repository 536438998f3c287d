"""The embedded tiny teacher: a small Flux transformer that draws emoji from captions."""

from ttr_distill.tiny.data import heldout_prompts, retrieval_accuracy, retrieve, training_prompts
from ttr_distill.tiny.sampler import SamplerPath, Samples, TinySampler
from ttr_distill.tiny.schedule import initial_noise, sigma_schedule
from ttr_distill.tiny.teacher import TinyTeacher, load_teacher
from ttr_distill.tiny.text import TextEncoding

__all__ = [
    "SamplerPath",
    "Samples",
    "TextEncoding",
    "TinySampler",
    "TinyTeacher",
    "heldout_prompts",
    "initial_noise",
    "load_teacher",
    "retrieval_accuracy",
    "retrieve",
    "sigma_schedule",
    "training_prompts",
]
