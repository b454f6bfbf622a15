"""The light retraining of a pruned network: few iterations, with labels, zeros kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..finetune import keep_zeros
from ..status import InvalidInput
from .training import check_pairs

# of (100, 256) images and steps from 3e-4 to 2e-3, these left the least error on the training images after 510 iterations
BATCH_SIZE = 256
LEARNING_RATE = 2e-3


def retrain(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    iterations: int,
    seed: int,
    *,
    batch_size: int = BATCH_SIZE,
    learning_rate: float = LEARNING_RATE,
) -> None:
    """Adam for ``iterations`` batches of ``images`` (n, C, H, W) with ``labels`` (n,), in place; the step falls to zero along a cosine.

    The number of iterations is fixed beforehand: nothing is chosen on test images. The model is left in eval mode, without gradients; the
    same model, data, seed and number of threads give the same weights. Raises InvalidInput for bad settings or a loss that is not finite.
    """
    check_pairs(images, labels, batch_size)
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1 or not learning_rate > 0:
        raise InvalidInput(
            f"retrain: iterations must be a whole number of at least 1 and learning_rate above 0, found {iterations!r} and {learning_rate}"
        )
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=iterations)
    model.eval()  # neither dropout nor batch statistics: the network that was pruned is the one that is trained
    order = torch.empty(0, dtype=torch.int64)
    with keep_zeros(model, optimizer), torch.enable_grad():
        for _ in range(iterations):
            while len(order) < batch_size:  # a new order of all images whenever one is used up
                order = torch.cat([order, torch.randperm(len(labels), generator=generator)])
            rows, order = order[:batch_size], order[batch_size:]
            loss = functional.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    if not bool(torch.isfinite(loss)):
        raise InvalidInput(f"retrain: the loss must stay finite, found {loss.item()}; lower learning_rate (now {learning_rate})")
    model.zero_grad()
