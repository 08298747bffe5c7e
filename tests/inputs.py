"""What several tests use: inputs of the operator and its reference, and what training leaves."""
import hashlib
import json

import timm
import torch
import torch.nn.functional as F

from fmd_timm import set_temperature
from fmd_timm.hub import save_for_hub

# The operator

SHAPES = {  # B, K, C_in, C_out, kernel, stride, padding, dilation, groups, (H, W)
    '1x1': (3, 4, 5, 7, 1, 1, 0, 1, 1, (4, 6)),
    '3x3': (2, 4, 4, 6, 3, 1, 1, 1, 1, (7, 5)),
    'stride': (2, 2, 4, 6, 3, 2, 1, 1, 1, (8, 5)),
    'one_kernel': (2, 1, 4, 6, 3, 1, 1, 1, 1, (5, 5)),
    'dilated_groups': (2, 3, 4, 6, 3, 1, 2, 2, 2, (7, 6)),
    'depthwise': (3, 4, 6, 6, 5, 1, 2, 1, 6, (6, 6)),
    'uneven': (2, 2, 3, 4, (1, 3), (2, 1), (0, 1), 1, 1, (5, 6)),
}


def make_inputs(B, K, I, O, kernel, stride, padding, dilation, groups, size, dtype=torch.float64, tap_attn=False):
    h, w = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    torch.manual_seed(0)
    tensors = dict(
        x=torch.randn(B, I, *size), weight=torch.randn(K * O, I // groups, h, w), kernel_attn=torch.rand(B, K),
        in_attn=torch.rand(B, I), out_attn=torch.rand(B, O), bias=torch.randn(K * O),
    )
    if tap_attn:
        tensors['tap_attn'] = torch.rand(B, h * w)
    tensors = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
    return tensors, dict(stride=stride, padding=padding, dilation=dilation, groups=groups)


def one_by_one(x, weight, kernel_attn, in_attn, out_attn, bias, tap_attn=None, **conv_args):
    images = []
    for b in range(x.shape[0]):
        mixed = sum(share * kernel for share, kernel in zip(kernel_attn[b], weight.chunk(kernel_attn.shape[1])))
        mixed_bias = sum(share * part for share, part in zip(kernel_attn[b], bias.chunk(kernel_attn.shape[1])))
        if tap_attn is not None:
            mixed = tap_attn[b].reshape(weight.shape[2:]) * mixed
        y = F.conv2d(in_attn[b, :, None, None] * x[b], mixed, mixed_bias, **conv_args)
        images.append(out_attn[b, :, None, None] * y)
    return torch.stack(images)


# A run of training, and what it leaves

def make_record(**changes):
    """What training leaves, with made-up numbers."""
    hardware = {
        'device': 'NVIDIA H200', 'device_count': 2, 'device_type': 'cuda', 'precision': 'bf16', 'cudnn_benchmark': True}
    versions = {'torch': '2.15.0', 'timm': '1.0.31'}
    seconds, accuracy = [9.1, 1.2, 1.3], 350 / 360
    return {
        'model': 'resnet18_fmd_cifar', 'model_args': {}, 'init': None, 'teacher': None, 'method': 'FMDConv',
        'temperature': 30.0, 'preset': 'digits',
        'recipe': {'epochs': 3, 'dataset': 'digits', 'batch_size': 128, 'seed': 7},
        'command': 'python recipes/train.py --preset digits --seed 7', 'dataset': 'digits', 'dataset_type': None,
        'train_split': 'train', 'train_images': 1437, 'validation_split': 'test', 'validation_images': 360,
        'unread_images': {'train': 0, 'validation': 0},
        'num_classes': 10, 'label_names': [f'digit {i}' for i in range(10)],
        'top1': 100 * accuracy, 'top5': 100 * 359 / 360, 'loss': 0.12345, 'best_top1': 100 * accuracy, 'best_epoch': 3,
        'epochs': 3, 'epoch_seconds': seconds, 'steps_per_epoch': 11, 'median_epoch_seconds': 1.25,
        'legs': [{**hardware, 'versions': versions, 'git_commit': '0123456789abcdef', 'epoch_seconds': seconds,
                  'data_wait_seconds': [0.5, 0.12, 0.0]}], 'data_wait_share': 0.05,
        'ies': 1.25 / accuracy, 'rcs': accuracy / 1.25, 'ies_infer': 0.012 / accuracy, 'rcs_infer': 81155.7 * accuracy,
        'train_images_per_second': 11 * 128 / 1.25, 'infer_images_per_second': 81155.7, 'infer_ms_per_image': 0.012,
        'infer_batch': 256, 'peak_memory_mib': 1234.7, 'parameters': 44712345, 'gmacs': 0.567891, 'macts': 1.23456,
        **hardware,
        'kernel_entropy': 0.8764, 'gate_std': 0.0432, 'kernel_distance': 0.5,
        'input_size': [3, 32, 32], 'global_batch': 128, 'seed': 7, 'versions': versions, 'weights_sha256': '0' * 64,
        'git_commit': '0123456789abcdef', 'finished': '2026-11-20T12:00:00', **changes,
    }


def make_run(folder, **kwargs):
    """A folder as training leaves it, of a network that nobody trained, and what that network says of some images."""
    model = timm.create_model('resnet18_fmd_cifar', **kwargs).eval()
    set_temperature(model, kernel=3.0, gate=2.0)
    save_for_hub(model, folder, model_config=dict(label_names=make_record()['label_names']))
    record = make_record(
        model_args=kwargs, parameters=sum(p.numel() for p in model.parameters()),
        weights_sha256=hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest())
    (folder / 'result.json').write_text(json.dumps(record))
    save_logits(model, folder)


def save_logits(model, folder):
    images = torch.randn(2, *model.pretrained_cfg['input_size'])
    with torch.no_grad():
        torch.save((images, model(images)), folder / 'logits.pt')
