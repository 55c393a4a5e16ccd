"""One training step of IBM on CIFAR-sized images, beside the same algebra in PyTorch: AlexNet and ResNet-18.

Batches of 64; noise on every weight but the head's, a draw a step, batch normalisation by the batch, the penalty, and
Adam for weights, means and log variances. Ours also keeps claimed weights where they are, as it would after a task.
PyTorch runs on a GPU where JAX does. ``python -m experiments.benchmarks.mask_step``
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np

from experiments.benchmarks.harness import Case, Step, main
from experiments.card import Card

CARDS = {
    "": Card(
        "3 min",
        "AlexNet 1.3 times as fast as PyTorch, ResNet-18 0.56 times: XLA:CPU is slow at its convolutions' gradients",
    )
}
Name = Literal["AlexNet", "ResNet-18"]
BATCH, CLASSES, TASKS, PENALTY = 64, 10, 10, 1e-3


def _batch() -> tuple[np.ndarray, np.ndarray]:
    """Images [B, 32, 32, 3] and labels [B]."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((BATCH, 32, 32, 3), np.float32), rng.integers(0, CLASSES, BATCH).astype(np.int32)


def _ours(name: Name) -> Step:
    import jax
    import jax.numpy as jnp
    import optax

    from jaxcl import continual, masks, nets, trees
    from jaxcl.typing import PyTree

    images, labels = map(jnp.asarray, _batch())
    make: Callable[..., Any] = nets.AlexNet if name == "AlexNet" else partial(nets.ResNet18, normalisation="batch")
    head = "head" if name == "AlexNet" else "Dense_0"
    net = make(CLASSES, training=True)
    method = masks.ib_masks(lambda path: path.endswith("kernel") and head not in path, TASKS)
    strategy = continual.masked_network(method, net.apply, penalty_weight=PENALTY)
    tx = masks.separate_rates(optax.adam(1e-3), optax.adam(1e-3))
    batch = continual.Batch(images, labels, jnp.ones(BATCH), jnp.ones((BATCH, CLASSES), bool), jnp.int32(0))

    @jax.jit
    def start(key: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
        params, _ = method.init(key, net.init(key, images[:1]))
        return params, tx.init(params), strategy.init(key, params, batch)

    @partial(jax.jit, donate_argnums=(1, 2, 3))
    def train(key: jax.Array, params: PyTree, opt_state: PyTree, state: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        grads, _ = strategy.gradients(key, params, state, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        updates, state = strategy.after_update(key, params, state, batch, grads, updates)
        return trees.apply_updates(params, updates), opt_state, state

    carried, count = jax.block_until_ready(start(jax.random.key(0))), 0

    def step() -> None:
        nonlocal carried, count
        carried, count = jax.block_until_ready(train(jax.random.key(count), *carried)), count + 1

    return step


def _torch(name: Name) -> Step:
    import jax
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.manual_seed(0)
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"

    class Noisy(nn.Module):
        """A layer whose weight is multiplied by a draw of its noise."""

        def __init__(self, apply: Callable[..., torch.Tensor], *shape: int) -> None:
            super().__init__()
            self.apply_weight = apply
            self.weight = nn.Parameter(torch.randn(shape) / float(np.prod(shape[1:])) ** 0.5)
            self.mean = nn.Parameter(1 + 0.01 * torch.randn(shape))
            self.log_variance = nn.Parameter(-9 + 0.01 * torch.randn(shape))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            draw = self.mean + torch.exp(0.5 * self.log_variance) * torch.randn_like(self.mean)
            return self.apply_weight(x, self.weight * draw)

        def nats(self) -> torch.Tensor:
            return 0.5 * torch.log1p(self.mean**2 / (self.log_variance.exp() + 1e-8)).sum()

    def normal(channels: int, rank: int = 2) -> nn.Module:
        kind = nn.BatchNorm2d if rank == 2 else nn.BatchNorm1d
        return kind(channels, affine=False, track_running_stats=False)

    def convolution(inputs: int, channels: int, size: int, stride: int = 1, padding: int = 0) -> nn.Module:
        apply = partial(F.conv2d, stride=stride, padding=padding)
        return nn.Sequential(Noisy(apply, channels, inputs, size, size), normal(channels))

    class Block(nn.Module):
        def __init__(self, inputs: int, channels: int, stride: int) -> None:
            super().__init__()
            self.first = convolution(inputs, channels, 3, stride, 1)
            self.second = convolution(channels, channels, 3, 1, 1)
            same = stride == 1 and inputs == channels
            self.around = nn.Identity() if same else convolution(inputs, channels, 1, stride)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(self.second(F.relu(self.first(x))) + self.around(x))

    if name == "AlexNet":
        widths = [(3, 64, 4), (64, 128, 3), (128, 256, 2)]
        layers = [part for sizes in widths for part in (convolution(*sizes), nn.ReLU(), nn.MaxPool2d(2))]
        dense = [part for inputs in (1024, 2048)
                 for part in (Noisy(F.linear, 2048, inputs), normal(2048, 1), nn.ReLU())]  # fmt: skip
        net = nn.Sequential(*layers, nn.Flatten(), *dense, nn.Linear(2048, CLASSES, bias=False))
    else:
        stages = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2),
                  (512, 512, 1)]  # fmt: skip
        net = nn.Sequential(
            convolution(3, 64, 3, 1, 1), nn.ReLU(), *(Block(*sizes) for sizes in stages), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(512, CLASSES),
        )  # fmt: skip
    net = net.to(device)
    noisy = [module for module in net.modules() if isinstance(module, Noisy)]
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    images, labels = _batch()
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
    answers = torch.from_numpy(labels).long().to(device)

    def step() -> None:
        optimizer.zero_grad()
        penalty = PENALTY * sum(module.nats() for module in noisy) / BATCH
        (F.cross_entropy(net(inputs), answers) + penalty).backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


NAMES: tuple[Name, ...] = ("AlexNet", "ResNet-18")
CASES = {f"{name}, batch {BATCH}": Case(partial(_ours, name), partial(_torch, name), repeats=15) for name in NAMES}

if __name__ == "__main__":
    main("mask_step", CASES)
