"""Try a network in the browser:  python recipes/demo.py <checkpoint> [--dataset DATASET] [--twin CHECKPOINT] [--share]

The page takes an image. It shows the most probable classes and how the image mixes the K kernels of each layer: a bar
for what kernel_attn gives each kernel. With --dataset it marks beside them what the images of a dataset get on average,
at most 1,024 of the split that evaluate.py scores, or of train. With --twin it shows the classes of a second network.

The checkpoints are folders (of a training run, or any that timm's `local-dir:` loads), Hub repositories
(`hf-hub:owner/name`) or models with a tag that are registered in timm (`resnet18_fmd.<tag>`). `recipes/publish.py
--space` publishes the page with a network as a Space on the Hub.
"""
import sys

from _arguments_checkpoint import parse_demo

if __name__ == '__main__':  # before the imports below, which take seconds
    arguments = parse_demo(sys.argv[1:], __doc__)

try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise SystemExit(f"recipes/demo.py needs {error.name}: pip install -e '.[demo]'") from error

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _compared import read_unlabelled
from _data import LabelledImages, refuse_bad_images
from _dataset import dataset_name, open_dataset
from _dynamics import check_dynamic, kernel_means, observe, watched
from _images import BadImage
from _loaders import Normalize, eval_transform
from _pictures import draw_mixes
from _recipe import VALIDATION_SPLITS
from predict import best_classes, open_network, reader
from torch import nn
from torchvision.transforms.functional import to_pil_image

from fmd_timm import DynamicConv2d

TOP = 5  # classes
BATCH = 64  # images of the dataset at a time
SAMPLES = 10  # of its images that are offered
CSS = '#image img {object-fit: contain; width: 100%; height: 100%}'  # small images, too, fill their place


@refuse_bad_images()
def main(checkpoint: str, dataset: str | None, twin: str | None, share: bool) -> None:
    page = make_page(checkpoint, dataset, twin)
    page.launch(css=CSS, share=share, max_file_size=20 * gr.FileSize.MB)


def make_page(checkpoint: str, dataset: str | None = None, twin: str | None = None) -> gr.Blocks:
    network, metadata = open_network(checkpoint, 'checkpoint')
    check_dynamic(network, f'checkpoint {checkpoint!r}')
    if all(conv.num_kernels == 1 for conv in network.modules() if isinstance(conv, DynamicConv2d)):
        raise SystemExit(f'checkpoint {checkpoint!r} has one kernel in each layer, and nothing to mix')
    networks = [(network, reader(metadata.data_config))]
    if twin:
        other, its = open_network(twin, '--twin')
        if its.label_names != metadata.label_names:
            raise SystemExit(f'--twin must be a network of the same classes as {checkpoint}, got {twin}')
        networks.append((other, reader(its.data_config)))
    images = open_images(dataset, metadata.data_config) if dataset else None
    means = mean_mixes(network, metadata.data_config, images) if images else None

    def answer(path: str | None) -> list[Any]:
        """The classes by each network, and the picture; nothing of an image that was taken away."""
        if path is None:
            return [None] * (len(networks) + 1)
        try:
            inputs = [read(Path(path)) for _, read in networks]
        except BadImage as error:
            raise gr.Error(str(error).replace(path, Path(path).name), print_exception=False) from error
        with torch.inference_mode(), watched(network) as layers:
            logits = [net(x.to(next(net.parameters()).device)) for (net, _), x in zip(networks, inputs)]
        return [
            *(dict(best_classes(each, metadata.label_names, TOP)) for each in logits),
            draw_mixes(kernel_means(layers), means, dataset and dataset_name(dataset))]

    with gr.Blocks(title=name_of(network), analytics_enabled=False) as page:
        gr.Markdown(describe(network))
        with gr.Row():
            image = gr.Image(label='Image', type='filepath', height=320, elem_id='image')
            image.preprocess = lambda upload: upload and upload.path  # the very file; gr.Image would open it first
            labels = [gr.Label(label=name_of(net), num_top_classes=TOP) for net, _ in networks]
        if images:
            with TemporaryDirectory() as folder:  # gradio keeps copies
                gr.Examples(sample_files(images, Path(folder)), image, label=f'Images of {dataset_name(dataset)}')
        gr.Markdown('## How the image mixes the kernels of each layer')
        plot = gr.Plot(show_label=False)
        image.change(answer, image, [*labels, plot])
    return page


def open_images(dataset: str, data_config: dict[str, Any]) -> LabelledImages:
    """Of a dataset, with the transform of validation; their labels mean nothing."""
    if data_config['input_size'][0] != 3:
        raise SystemExit(f'--dataset is for networks for images of 3 channels, got {data_config["input_size"][0]}')
    images = read_unlabelled(open_dataset(dataset), dataset, (*VALIDATION_SPLITS, 'train'))
    images.transform = eval_transform(data_config)
    return images


def mean_mixes(network: nn.Module, data_config: dict[str, Any], images: LabelledImages) -> dict[str, list[float]]:
    """What the images give each kernel of each layer on average."""
    normalize = Normalize(data_config['mean'], data_config['std']).to(next(network.parameters()).device)
    return kernel_means(observe(network, images, normalize, BATCH))


def sample_files(images: LabelledImages, folder: Path) -> list[str]:
    """Some of the images as files, evenly spread."""
    paths = [folder / f'{place}.png' for place in images.sample(SAMPLES)]
    for path in paths:
        to_pil_image(images.read(int(path.stem))[0]).save(path)
    return [str(path) for path in paths]


def name_of(network: nn.Module) -> str:
    return network.pretrained_cfg['architecture']


def describe(network: nn.Module) -> str:
    """The head of the page."""
    convs = [module for module in network.modules() if isinstance(module, DynamicConv2d)]
    kernels = ' or '.join(map(str, sorted({conv.num_kernels for conv in convs})))
    parameters = sum(p.numel() for p in network.parameters())
    return (
        f'# {name_of(network)}\n{convs[0].method} with {kernels} kernels in each of {len(convs)} layers, '
        f'{parameters / 1e6:,.2f} M parameters, {network.num_classes:,} classes.')


if __name__ == '__main__':
    main(**vars(arguments))
