"""How close a rollout's result is to the teacher's."""
