"""Memory and step time of a training job before it runs, from a model's config alone: `python -m accel_moe.plan`."""
