"""Neighbors in memory are joined without a copy, everything else with one."""

import pytest
import torch

from mpl_fast.batch import image_buffer, joined


def test_a_loader_s_images_are_neighbors() -> None:
    labeled, weak, strong = image_buffer(2, 3, 4, torch.float32, "cpu")
    for number, view in enumerate((labeled, weak, strong)):
        assert view.shape == (len(view), 3, 4, 4)
        assert view.is_contiguous(memory_format=torch.channels_last)
        view.fill_(number)
    rows = joined([weak, labeled, strong])
    assert rows.data_ptr() == weak.data_ptr() and rows.shape == (8, 3, 4, 4)
    assert rows.is_contiguous(memory_format=torch.channels_last)
    assert rows[:, 0, 0, 0].tolist() == [1, 1, 1, 0, 0, 2, 2, 2]
    assert joined([labeled, strong]).data_ptr() == labeled.data_ptr()


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2), (2, 0), (0, 0)])
def test_others_are_copied_in_their_order(order: tuple[int, ...]) -> None:
    views = image_buffer(2, 3, 4, torch.float32, "cpu")
    for number, view in enumerate(views):
        view.fill_(number)
    chosen = [views[i] for i in order]
    rows = joined(chosen)
    assert torch.equal(rows, torch.cat(chosen))
    assert rows.data_ptr() not in {view.data_ptr() for view in views}


def test_neighbors_with_a_gradient_or_other_strides_are_copied() -> None:
    rows = torch.randn(4, 3, 2, 2, requires_grad=True)
    joined([rows[:2], rows[2:]]).sum().backward()
    assert rows.grad is not None and torch.equal(rows.grad, torch.ones_like(rows))
    plain = torch.randn(6, 3, 2, 2)
    last = plain[2:4].to(memory_format=torch.channels_last)
    assert torch.equal(joined([plain[:2], last]), torch.cat([plain[:2], last]))


def test_one_view_is_itself_and_empty_ones_are_nothing() -> None:
    labeled, weak, strong = image_buffer(2, 0, 4, torch.float32, "cpu")
    labeled.fill_(1.0)  # what is not initialized may be NaN, which equals nothing
    assert joined([labeled]) is labeled
    assert torch.equal(joined([weak, labeled, strong]), labeled)
