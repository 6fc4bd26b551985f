"""Experts modules: which they are (recognise.py), their swap (swap.py), and the forward they get (layer.py)."""
