"""Measure the steps of a run: time, tokens read and matrix products. Both sides of a comparison import this module."""

import time
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2)}
"""Matrix products of torch, and the places of their factors."""


class Products(TorchDispatchMode):
    """Count the matrix products inside, by the layout of their factors. Attention in one operation is not counted."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.rstrip("_")
        if name in PRODUCTS:
            self.counts[tuple(layout(args[place]) for place in PRODUCTS[name])] += 1
        return function(*args, **(kwargs or {}))


class StepMeter:
    """Call `phase` where a phase begins and `end_step` after the last one.

    The matrix products are those of the phase "update" of the first step, which is slower for it and not counted.

    Attributes:
        steps: per step, its tokens and the measurements of each phase: "seconds", "cpu", "read", "trained". The last
            two are tokens, padding included, that a model read without and with a gradient; each model counts.
    """

    def __init__(self, vocabulary):
        self.steps, self.current, self.name, self.products = [], {}, None, Products()
        embedding = torch.nn.functional.embedding

        def counted(tokens, weight, *args, **kwargs):
            if self.name and weight.shape[0] >= vocabulary:
                self.current[self.name]["trained" if torch.is_grad_enabled() else "read"] += tokens.numel()
            return embedding(tokens, weight, *args, **kwargs)

        torch.nn.functional.embedding = counted

    def phase(self, name):
        self._end_phase()
        self.name = name
        self.current.setdefault(name, dict.fromkeys(("seconds", "cpu", "read", "trained"), 0))
        if name == "update" and not self.steps:
            self.products.__enter__()
        self.started = time.perf_counter(), time.process_time()

    def end_step(self, tokens=0):
        """`tokens`: those that the step samples and learns from, without padding."""
        self._end_phase()
        self.steps.append({"phases": self.current, "tokens": tokens})
        self.current = {}

    def _end_phase(self):
        if self.name is None:
            return
        measured = self.current[self.name]
        measured["seconds"] += time.perf_counter() - self.started[0]
        measured["cpu"] += time.process_time() - self.started[1]
        if self.name == "update" and not self.steps:
            self.products.__exit__(None, None, None)
        self.name = None

    def result(self):
        """Return the steps, and the operations and the time of the products of an update alone. Call it last."""
        flops = sum(count * operations(*factors) for factors, count in self.products.counts.items())
        seconds, cpu = products_alone(self.products.counts)
        return {"steps": self.steps, "products": {"flops": flops, "seconds": seconds, "cpu": cpu}}


def layout(factor):
    """Return shape, type, and whether the last two dimensions are transposed in memory."""
    return tuple(factor.shape), str(factor.dtype), factor.stride(-2) < factor.stride(-1)


def operations(left, right):
    """Return the floating-point operations of a product of factors with these layouts."""
    size = 2 * right[0][-1]
    for length in left[0]:
        size *= length
    return size


def products_alone(counts):
    """Return wall and CPU seconds of these products alone, each measured as the fastest of three."""
    totals = [0.0, 0.0]
    for factors, count in counts.items():
        left, right = (make(*factor) for factor in factors)
        times = []
        for _ in range(3):
            start, start_cpu = time.perf_counter(), time.process_time()
            torch.matmul(left, right)
            times.append((time.perf_counter() - start, time.process_time() - start_cpu))
        totals = [total + count * min(each) for total, each in zip(totals, zip(*times))]  # noqa: B905
    return totals


def make(shape, dtype, transposed):
    """Return random numbers in this layout."""
    shape = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    made = torch.randn(shape).to(getattr(torch, dtype.removeprefix("torch.")))
    return made.transpose(-1, -2) if transposed else made
