"""Experts modules: which they are (recognise.py), their swap (swap.py), and the forward they get (layer.py)."""

from accel_moe.names import plain_name as plain_name  # scripts older than names.py import it from here
