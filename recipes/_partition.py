"""Which images a client of a simulation has: each class shared out by a Dirichlet distribution (arXiv 1909.06335).

In numpy, because flwr-datasets, whose DirichletPartitioner does it too, needs an older `datasets` than the recipes.
"""
import numpy as np

DRAWS = 1000  # until every client has an image


def share_out(labels: np.ndarray, shares: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
    """The places of each client's images, ascending.

    Args:
        labels: (images,), from 0 on.
        shares: (classes, clients), of the images of a class; they sum up to 1 over the clients.
        generator: By which images of a class are told apart.
    """
    parts = []
    for label, of_clients in enumerate(shares):
        places = generator.permutation(np.flatnonzero(labels == label))
        ends = (of_clients.cumsum()[:-1] * len(places)).round().astype(int)
        parts.append(np.split(places, ends))
    return [np.sort(np.concatenate(of_client)) for of_client in zip(*parts)]


def dirichlet_partition(
        labels: np.ndarray, others: np.ndarray, num_classes: int, clients: int, alpha: float, seed: int,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The places of each client's images to train on and to validate on: each in one client, by the same shares.

    Args:
        labels: Of the images to train on.
        others: Of those to validate on, of which a client may get none.
        num_classes: How many there are.
        clients: How many there are; each gets an image at least.
        alpha: Of the Dirichlet distribution of each class: 0.1 gives a client few classes, 100 all of them.
        seed: The same for all clients.

    Raises:
        SystemExit: There is always a client without images.
    """
    generator = np.random.default_rng(seed)
    for _ in range(DRAWS if clients <= len(labels) else 0):
        shares = generator.dirichlet([alpha] * clients, num_classes)
        parts = share_out(labels, shares, generator)
        if min(map(len, parts)):
            return parts, share_out(others, shares, generator)
    raise SystemExit(
        f'--num-supernodes {clients} with --alpha {alpha}: a client has none of the {len(labels)} training images; '
        f'fewer clients or a larger alpha give each some')
