"""The classes of a checkpoint: their names, as its configuration has them and as people read them."""
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn


def label_names(network: nn.Module, what: str) -> list[str] | None:
    """Names of a network's classes from its configuration, in the order of its outputs; None where it has none.

    Args:
        network: Of timm.
        what: What to call it in errors, such as "checkpoint 'runs/digits'".

    Raises:
        SystemExit: They aren't a name for each class.
    """
    names, count = network.pretrained_cfg.get('label_names'), network.num_classes
    if isinstance(names, dict):  # where some indices have no name; as JSON has it, with strings for indices
        names = [names.get(str(i), f'class {i}') for i in range(count)]
    if names in (None, '', [], ()):
        return None
    is_list = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    if not is_list or len(names) != count:
        found = f'{len(names)} names' if is_list else f'{names!r:.80}'
        raise SystemExit(f'{what}: label_names in its configuration must be {count} names, one for each class, '
                         f'got {found}')
    return list(names)


def known_names(network: nn.Module, what: str) -> list[list[str]]:
    """Names that people and datasets may know a network's classes by: one word for each, then descriptions.

    They are ImageNet's where a checkpoint of ImageNet has none of its own. There are none for other networks.
    """
    names = label_names(network, what)
    if names:
        descriptions = network.pretrained_cfg.get('label_descriptions') or {}
        if not isinstance(descriptions, dict):
            raise SystemExit(f'{what}: label_descriptions in its configuration must have a description for a name, '
                             f'got {descriptions!r:.80}')
        return [names, [str(descriptions.get(name, name)) for name in names]]
    subset = infer_imagenet_subset(network)
    if subset:
        info = ImageNetInfo(subset)
        return [info.label_names(), info.label_descriptions()]
    return []


def shown_names(network: nn.Module, what: str) -> list[str]:
    """The best names there are, and numbers where there are none."""
    known = known_names(network, what)
    return known[-1] if known else [f'class {i}' for i in range(network.num_classes)]


def printable(text: str) -> str:
    """The text with what a terminal would obey, such as colours and line breaks, written out."""
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
