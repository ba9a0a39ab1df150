"""Memory on huge pages: what is handed out is zero, aligned and nobody else's."""

import mmap
import threading

import pytest
import torch

from memory3_kernels import pages

has_huge = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="huge pages are Linux's")


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (7,), (), (1 << 20, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_zeros(shape, dtype):
    made = pages.zeros(shape, dtype)
    assert made.shape == shape and made.dtype is dtype and made.is_contiguous() and not made.any()


@has_huge
def test_small_ones_share_a_region_without_touching_each_other():
    made = [pages.zeros((100 + i,), torch.int32) for i in range(50)]
    for i, tensor in enumerate(made):
        assert tensor.data_ptr() % pages.LINE == 0
        tensor.fill_(i + 1)
    assert all((tensor == i + 1).all() for i, tensor in enumerate(made))


@has_huge
def test_large_ones_begin_a_huge_page():
    made = pages.zeros((pages.REGION + 1,), torch.uint8)
    assert made.data_ptr() % pages.HUGE == 0
    made[-1] = 1


def test_made_in_inference_mode_and_filled_outside_of_it():
    with torch.inference_mode():
        made = pages.zeros((64, 64), torch.float32)
    thread = threading.Thread(target=lambda: made.fill_(3))
    thread.start()
    thread.join()
    assert made.sum() == 3 * 64 * 64


def test_a_region_outlives_its_name():
    kept = pages.zeros((1000,), torch.float32).add_(1)
    for _ in range(40):
        pages.zeros((1 << 20,), torch.uint8).fill_(9)
    assert (kept == 1).all()
