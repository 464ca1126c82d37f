"""Jobs side by side: the same results as in turn, and the threads they found."""

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from keel.errors import ConfigError, ProcessLost
from keel.world import busy_seconds, lost_process_reported, run_concurrently


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_jobs_meet_and_results_keep_their_order() -> None:
    meeting = threading.Barrier(2, timeout=10)

    def job(name: str) -> tuple[str, int]:
        meeting.wait()
        return name, torch.get_num_threads()

    assert run_concurrently(partial(job, "a"), partial(job, "b")) == [("a", 1), ("b", 1)]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_are_as_the_caller_has_them(enabled: bool) -> None:
    with torch.set_grad_enabled(enabled):
        assert run_concurrently(torch.is_grad_enabled, torch.is_grad_enabled) == [enabled, enabled]


def test_the_first_error_is_raised_when_all_have_ended() -> None:
    ended = []

    def fail(message: str) -> None:
        raise ValueError(message)

    with pytest.raises(ValueError, match="first"):
        run_concurrently(partial(fail, "first"), partial(fail, "second"), partial(ended.append, 1))
    assert ended == [1]
    assert torch.get_num_threads() == 2


def test_a_job_inside_a_job_and_jobs_on_one_thread_run_where_they_are() -> None:
    def names() -> list[str]:
        return run_concurrently(*[lambda: threading.current_thread().name] * 2)

    inner = run_concurrently(names, names)
    assert all(first == second for first, second in inner)
    torch.set_num_threads(1)
    assert names() == ["MainThread"] * 2


def test_gradients_of_two_models_are_those_of_each_alone() -> None:
    models = [torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)]
    x = torch.randn(4, 8)

    def backward(model: torch.nn.Module) -> None:
        model(x).square().sum().backward()

    run_concurrently(*(partial(backward, model) for model in models))
    for model in models:
        [expected] = torch.autograd.grad(model(x).square().sum(), [model.weight])
        torch.testing.assert_close(model.weight.grad, expected, rtol=0, atol=0)


def test_of_jobs_side_by_side_the_longest_counts_as_work() -> None:
    def work(seconds: float) -> None:
        began = time.thread_time()
        while time.thread_time() - began < seconds:
            pass

    began = busy_seconds()
    run_concurrently(partial(work, 0.1), partial(work, 0.3))
    work(0.1)
    assert 0.4 <= busy_seconds() - began < 0.5


READ_ERROR = "[third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:17832: Connection reset by peer"


def error_after(first: Exception, second: Exception) -> Exception:
    """The second error, as if raised while the first one was handled."""
    second.__context__ = first
    return second


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(READ_ERROR),
        torch.distributed.DistNetworkError("The client socket has timed out after 10000ms"),
        error_after(RuntimeError(READ_ERROR), AssertionError("expects the weights to be gathered")),
    ],
)
def test_an_error_of_a_collective_means_that_a_process_is_lost(error: Exception) -> None:
    with pytest.raises(ProcessLost, match="gone or does not respond"), lost_process_reported():
        raise error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        torch.OutOfMemoryError("gloo"),
        ConfigError("no such model"),
        error_after(ConfigError("gloo"), RuntimeError("another")),
        torch.distributed.DistNetworkError("The server socket has failed to listen on any local network address"),
    ],
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, lost_process_reported():
        raise error
    assert raised.value is error
