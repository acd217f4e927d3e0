"""Which pairs of a batch are told to be the same, and nested embeddings of one width."""

import numpy as np
import pytest
import torch

from engine.config.errors import ConfigError
from engine.config.read import resolve
from engine.objectives.contrastive.copies import caption_ids
from engine.objectives.contrastive.matryoshka import nested_loss
from engine.objectives.contrastive.softmax import contrastive_loss
from tests.engine.loss_reference import pairs


def test_equal_captions_alone_share_an_identifier() -> None:
    generator = np.random.default_rng(0)
    tokens = torch.from_numpy(generator.integers(0, 49408, (5000, 77)))
    tokens[1::2] = tokens[::2]
    tokens[1, 40] += 1
    tokens[3] = tokens[3].flip(0)  # the same tokens in another order
    ids = caption_ids(tokens).tolist()
    assert ids[0] != ids[1] and ids[2] != ids[3]
    assert len(set(ids)) == 2502 and ids[4::2] == ids[5::2]


def test_copies_do_not_repel() -> None:
    """Two equal pairs and nothing else: there is no negative, so no loss and no gradient; unmasked it is ln 2."""
    image, text = (rows.expand(2, -1).contiguous() for rows in pairs(1))
    plain = contrastive_loss(image, text, 10.0)
    masked = contrastive_loss(image, text, 10.0, copies=torch.zeros(2, 1, dtype=torch.int64))
    assert plain.loss.item() == pytest.approx(np.log(2))
    assert masked.loss == 0 and not masked.grad_image.any() and not masked.grad_text.any()
    assert masked.i2t_top1 == masked.t2i_top1 == 1
    with pytest.raises(ValueError, match="give int64"):
        contrastive_loss(image, text, 10.0, copies=torch.zeros(2))


def test_without_widths_it_is_the_loss_itself() -> None:
    image, text = pairs(9)

    def loss(image: torch.Tensor, text: torch.Tensor):
        return contrastive_loss(image, text, 10.0)

    assert nested_loss(loss, image, text, []).grad_image.equal(loss(image, text).grad_image)


@pytest.mark.parametrize("widths", [[16], [32, 16], [0, 32], [16, 64]])
def test_widths_that_are_none_are_refused(widths: list[int]) -> None:
    options = [f"train.matryoshka={widths}", "model.preset=tiny-18b"]
    with pytest.raises(ConfigError, match=r"train\.matryoshka .* (embed_dim 32|at least 1)"):
        resolve({"data": {"shards": ["-"]}}, options)
