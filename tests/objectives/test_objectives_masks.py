"""Masks: a masked row leaves no trace, whatever it holds."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from tests.helpers import (
    TRAINS,
    B,
    K,
    alternate,
    assert_equal,
    gradients,
    make_loss,
    make_rows,
    total,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


MASK = torch.ones(B, K, dtype=torch.bool)
MASK[1, 2] = MASK[3, 0] = MASK[4] = False


def spoil(rows, mask):
    """The rows with a mask, and NaN in everything that it hides."""
    rows = rows.clone()
    for key in rows.keys(True, True):
        if rows[key].is_floating_point():
            rows[key][~mask] = float("nan")
    return rows.set(("collector", "mask"), mask.unsqueeze(-1))


class TestMasks:
    def test_masked_batch_is_the_batch_without_those_rows(self):
        loss = make_loss(deterministic=True)
        slices, mask = alternate(make_rows(B, K)), MASK
        transition = alternate(make_rows(B))
        for plain in (True, False):
            if plain:
                batch, kept = spoil(slices, mask), slices[mask]
            else:
                keep = torch.arange(B) % 3 > 0
                batch = TensorDict(
                    slice=spoil(slices, mask),
                    transition=spoil(transition, keep),
                    batch_size=[B],
                )
                kept = transition[keep]
            expected = TensorDict(slice=slices[mask.all(1)], transition=kept)
            self.check(loss, batch, expected)

    @staticmethod
    def check(loss, batch, expected_batch):
        values, expected = loss(batch), loss(expected_batch)
        assert_equal(values, expected, exact=False)
        expected = gradients(total(expected), loss)
        assert_equal(gradients(total(values), loss), expected, exact=False)

    def test_no_reduction(self):
        loss = make_loss(deterministic=True, reduction="none")
        slices = alternate(make_rows(B, K))
        values, clean = loss(spoil(slices, MASK)), loss(slices)
        dropped = ~MASK.all(1)
        assert (values["loss_model"][dropped] == 0).all()
        torch.testing.assert_close(
            values["loss_model"][~dropped], clean["loss_model"][~dropped]
        )
        for term in set(TRAINS) - {"loss_model"}:
            assert values[term].shape == (B,)
            assert (values[term][~MASK.any(1)] == 0).all()
            torch.testing.assert_close(values[term][~dropped], clean[term][~dropped])
        # A row that is masked in part is the mean of what is left of it.
        left = loss.qvalue_loss(slices[1, :2])[0].mean()
        torch.testing.assert_close(values["loss_qvalue"][1], left)

    def test_everything_masked(self):
        loss = make_loss()
        values = loss(spoil(make_rows(B, K), torch.zeros(B, K, dtype=torch.bool)))
        assert all((value == 0).all() for value in values.values())
        grads = gradients(total(values), loss)
        assert all((grad == 0).all() for grad in grads.values())

    def test_mask_key(self):
        loss = make_loss(deterministic=True)
        slices = alternate(make_rows(B, K))
        clean, masked = loss(slices), loss(slices.copy().set("valid", MASK))
        assert_equal(masked, clean)
        loss.loss_mask_key = "valid"
        expected = TensorDict(slice=slices[MASK.all(1)], transition=slices[MASK])
        self.check(loss, slices.copy().set("valid", MASK), expected)
        loss.loss_mask_key = None
        assert_equal(loss(slices.copy().set(("collector", "mask"), MASK)), clean)

    def test_masks_combine(self):
        loss = make_loss(deterministic=True)
        slices = alternate(make_rows(B, K))
        both = spoil(slices, MASK)
        shifted = torch.arange(B * K).reshape(B, K, 1) % 5 > 0
        keep = MASK & shifted.squeeze(-1)
        expected = TensorDict(slice=slices[keep.all(1)], transition=slices[keep])
        self.check(loss, both.set("shifted_valid", shifted), expected)
