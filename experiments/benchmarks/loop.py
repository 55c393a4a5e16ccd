"""The loop with naive training, beside Avalanche's Naive: the same stream, network, optimizer and batches.

One round is a run over five tasks, each followed by a test on a few examples, from the initial parameters. mnist: split
MNIST, MLP 784-256-256-10, batches of 256, an epoch, where arithmetic is the limit; digits: MLP 64-64-10, batches of 32,
20 epochs, where the loop is. Compilation happens once, before the first round.
``python -m experiments.benchmarks.loop``
"""

from functools import partial
from typing import Any, Literal

import numpy as np

from experiments.benchmarks.harness import Case, Step, main
from experiments.card import Card

CARDS = {"": Card("2 min", "at least 1.8 times Avalanche's examples a second on mnist, 10 times on digits")}
Set = Literal["mnist", "digits"]
# Hidden layers, batch size, epochs: enough of them that steps count, not the beginning and end of a run.
SETTINGS: dict[Set, tuple[tuple[int, ...], int, int]] = {"mnist": ((256, 256), 256, 1), "digits": ((64,), 32, 20)}
TASKS, TEST_EXAMPLES = 5, 100


def _examples(name: Set) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Training and test inputs [N, D] and labels [N]."""
    from jaxcl import data

    train, test = ((np.asarray(inputs), np.asarray(labels)) for inputs, labels in data.flat_features(data.load(name)))
    return train, (test[0][:TEST_EXAMPLES], test[1][:TEST_EXAMPLES])


def _ours(name: Set) -> Step:
    import jax
    import jax.numpy as jnp
    import optax

    from jaxcl import continual, nets

    hidden, batch_size, epochs = SETTINGS[name]
    parts = _examples(name)
    train, test = (continual.Examples(jnp.asarray(inputs), labels) for inputs, labels in parts)
    stream = continual.streams.class_incremental(None, train, test, classes_per_task=2)
    net = nets.MLP(hidden, classes=10)
    params = net.init(jax.random.key(0), parts[0][0][:1])
    strategy, tx = continual.naive(net.apply), optax.sgd(0.01)

    def step() -> None:
        continual.run(
            jax.random.key(1), strategy, tx, params, stream, epochs=epochs, batch_size=batch_size, steps_per_call=16
        )

    return step


def _avalanche(name: Set) -> Step:
    import logging

    import torch
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive
    from torch import nn
    from torch.utils.data import TensorDataset

    logging.disable(logging.WARNING)
    hidden, batch_size, epochs = SETTINGS[name]
    train, test = _examples(name)
    torch.manual_seed(0)

    def labelled(inputs: np.ndarray, labels: np.ndarray) -> object:
        part: Any = TensorDataset(torch.from_numpy(inputs), torch.from_numpy(labels).long())
        part.targets = part.tensors[1]  # where Avalanche looks for labels
        return as_classification_dataset(part)

    def tasks(inputs: np.ndarray, labels: np.ndarray) -> list[object]:
        parts = [np.isin(labels, (2 * task, 2 * task + 1)) for task in range(TASKS)]
        return [labelled(inputs[part], labels[part]) for part in parts]

    benchmark = benchmark_from_datasets(train=tasks(*train), test=tasks(*test))
    widths = (train[0].shape[1], *hidden)
    layers = [
        layer for wide, narrow in zip(widths, hidden, strict=False) for layer in (nn.Linear(wide, narrow), nn.ReLU())
    ]
    model = nn.Sequential(*layers, nn.Linear(widths[-1], 10))
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def step() -> None:
        model.load_state_dict(start)
        strategy = Naive(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01), criterion=nn.CrossEntropyLoss(),
            train_mb_size=batch_size, train_epochs=epochs, eval_mb_size=1024, evaluator=EvaluationPlugin(loggers=[]),
        )  # fmt: skip
        for experience in benchmark.train_stream:
            strategy.train(experience, num_workers=0)
            strategy.eval(benchmark.test_stream, num_workers=0)

    return step


CASES = {
    f"{name}, MLP {'-'.join(map(str, hidden))}, batch {batch_size}": Case(
        partial(_ours, name), partial(_avalanche, name), repeats=7, ours_per_round=3
    )
    for name, (hidden, batch_size, _) in SETTINGS.items()
}

if __name__ == "__main__":
    main("loop", CASES)
