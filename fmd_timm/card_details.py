"""Model details and model comparison, as timm's cards on the Hub have them, from a run record."""
from typing import Any

from .card_template import COMPARISON, number
from .layers import METHODS

__all__ = ['ARXIV', 'TWIN', 'comparison', 'details']

# Of the record of the static network, in the `twin` of a record
TWIN = (
    'model', 'top1', 'top5', 'input_size', 'parameters', 'gmacs', 'macts', 'infer_images_per_second', 'infer_batch',
    'median_epoch_seconds',
)

ARXIV = {layer.method: layer.arxiv for layer in METHODS.values()}
PAPERS = {  # arXiv number: title, of the methods and of the networks
    '2503.17530': 'FMDConv: Fast Multi-Attention Dynamic Convolution via Speed-Accuracy Trade-off',
    '2209.07947': 'Omni-Dimensional Dynamic Convolution',
    '1912.03458': 'Dynamic Convolution: Attention over Convolution Kernels',
    '1904.04971': 'CondConv: Conditionally Parameterized Convolutions for Efficient Inference',
    '1512.03385': 'Deep Residual Learning for Image Recognition',
    '1801.04381': 'MobileNetV2: Inverted Residuals and Linear Bottlenecks',
    '1905.02244': 'Searching for MobileNetV3',
}
NETWORKS = {'resnet': '1512.03385', 'mobilenetv2': '1801.04381', 'mobilenetv3': '1905.02244'}  # by a name's beginning


def details(record: dict[str, Any]) -> dict[str, Any]:
    """Model details as timm's cards have them."""
    papers = [arxiv for method, arxiv in ARXIV.items() if method == record['method']]
    papers += [arxiv for name, arxiv in NETWORKS.items() if record['model'].startswith(name)]
    found = {
        'Model Type': 'Image classification / feature backbone',
        'Model Stats': {
            'Params (M)': f'{record["parameters"] / 1e6:.3g}',
            'GMACs': f'{record["gmacs"]:.3g}',
            'Activations (M)': f'{record["macts"]:.3g}',
            'Image size': ' x '.join(map(str, record['input_size'][1:])),
        },
        'Papers': [f'{PAPERS[arxiv]}: https://arxiv.org/abs/{arxiv}' for arxiv in papers],
        'Dataset': record['dataset'],
    }
    return {name: value for name, value in found.items() if value}


def comparison(record: dict[str, Any]) -> str:
    """With the static network of the same recipe, in columns as timm's tables have them."""
    columns = {
        'model': lambda r: r['model'],
        'top1': lambda r: f'{r["top1"]:.2f}',
        'top5': lambda r: f'{r["top5"]:.2f}',
        'img_size': lambda r: str(r['input_size'][-1]),
        'param_count': lambda r: f'{r["parameters"] / 1e6:.2f}',
        'gmacs': lambda r: f'{r["gmacs"]:.3g}',
        'macts': lambda r: f'{r["macts"]:.3g}',
        'samples_per_sec': lambda r: f'{r["infer_images_per_second"]:.1f}',
        'batch_size': lambda r: str(r['infer_batch']),
        'epoch': lambda r: number(r['median_epoch_seconds']),
    }
    rows = [columns, ['---'] * len(columns), *(
        [cell(r) for cell in columns.values()] for r in (record['twin'], record))]
    return COMPARISON.substitute(table='\n'.join(f'|{"|".join(row)}|' for row in rows)).rstrip()
