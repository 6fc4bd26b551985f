"""Triton kernels for one MoE experts layer: read gemm.py (maths), launch.py, autograd.py, scattermoe.py in
this order.

Nothing is imported here: Triton is loaded at the first call of
`accel_moe.kernels.scattermoe.scattermoe_experts_forward`, so the package imports on machines that have none.
"""
