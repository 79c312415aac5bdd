"""The GPU kernels against the plain closed form, on the CPU in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import copy, torch
from icce_ray.core.heads import closed_form, kernels

kernels.BLOCK_ROWS = 16  # several blocks of a small batch
generator = torch.Generator().manual_seed(0)
for heads, pairs, clusters in ((3, 21, 5), (2, 40, 33)):
    student, teacher = (
        3 * torch.randn(heads, 2 * pairs, clusters, generator=generator) for _ in range(2)
    )
    even = torch.full((heads, clusters), 1 / clusters)
    balance = torch.tensor([0.5, 0.0, 1.0])[:heads].view(-1, 1)
    for iterations, weight, weighted in ((3, 0.1, True), (0, 0.0, False), (1, 0.5, True)):
        terms = closed_form.Terms(0.6, weight, iterations)
        target = closed_form.Target(balance, None)
        weigh = (lambda agreement: agreement.mean(0)) if weighted else None
        results = []
        for step in (closed_form.loss_and_gradient, kernels.loss_and_gradient):
            running = closed_form.Running(even.clone(), even.clone())
            found = step(student.clone(), teacher.clone(), terms, target, running, weigh)
            results.append([*found, running.usage, running.marginal])
        for plain, kernel in zip(*results, strict=True):
            if plain is not None:
                torch.testing.assert_close(kernel, plain, atol=2e-6, rtol=1e-5)
        silent = kernels.loss_and_gradient(
            student.clone(), teacher.clone(), terms, target,
            closed_form.Running(even.clone(), even.clone()), weigh, want_loss=False,
        )
        assert silent[0] is None and torch.equal(silent[1], results[1][1])
"""


def test_kernels_compute_the_closed_form():
    """In a process of its own: Triton looks at TRITON_INTERPRET when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
