"""Phase 2: learn in which layers and diffusion steps a student may answer; and the ``ttr`` command.

``policy`` decides and ``guard`` puts it before a router; ``methods`` ranks by every rule and learner (``pairs``,
``relaxed``, ``probe``, ``reinforce``, ``budget``), ``trainer`` learns from whole images; ``quality`` and ``costs`` say
what is good and what it takes; ``pipeline`` and ``report`` are the quickstart. The package itself imports none of them.
"""
