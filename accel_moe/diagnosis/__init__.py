"""The checks of `python -m accel_moe.doctor`: of this machine, and of the user's own architecture on a small scale."""
