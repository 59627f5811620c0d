"""What a forward multiplies, and how fast a device can: both sides of `share of the peak`."""
import time

import torch

def work(c, B, n, m, T):
    """Multiplications of a forward that runs n positions, needs the logits of m and attends to T.
    In the last layer all n give keys and values, but only the m pass through the rest. A training
    step takes 3 times as many, and each has its addition: 6 * work(c, B, T, T, T) operations."""
    qkv = c.n_embd**2 + 2 * c.n_embd * c.n_kv_head * c.head_dim
    rest = c.n_embd**2 + 3 * c.n_embd * c.n_ff + 2 * c.n_embd * T
    through = (c.n_layer - 1) * n + m
    return B * (c.n_layer * n * qkv + through * rest + m * c.n_embd * c.vocab_size)

def matmul_peak(device, dtype, n):
    """Multiplications and additions a second in a product of n x n matrices."""
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times)
